"""Random projection of a torch network's per-example gradients: features whose inner products approximate its pseudo-NTK.

    φ(x) = Σ_b S_b ∇_b φ̄(x),   φ̄ = O^{−1/2}·Σ_o f_o,   b: blocks of the parameters' columns

Each S_b is a CountSketch: every parameter adds its derivative, with a random sign, to one random component. Signs and components are a
function of (seed, parameter's name, column) alone. Gradients are formed slice by slice from what one forward and one backward pass
leave, so nothing of size rows × parameters exists. For data sets whose n × n pseudo-NTK is too much.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ntkdask import seeds
from ntkdask.arrays import Array, namespace, require_float, require_rows
from ntkdask.cache import shared
from ntkdask.features.base import FeatureMapBase, require_components
from ntkdask.features.sketching.count_sketch import Buckets, CountSketch
from ntkdask.kernels.empirical import PseudoNTK
from ntkdask.modules.optional import require_torch
from ntkdask.registry import register

if TYPE_CHECKING:
    from ntkdask.modules.jacobian.slices import GradientSlices

DRAW_COLUMNS = 2**14
"""Columns of a parameter that one stream of random bits serves; a constant of the format: changing it changes every result."""
MEMORY_BYTES = 2**29


@register("feature map")
@dataclass(frozen=True)
class ProjectedGradients(FeatureMapBase):
    """Seeded CountSketch of the gradient of φ̄ = O^{−1/2}·Σ_o f_o in all parameters: (n, *s) → (n, n_components), float32 or float64.

    E⟨φ(x), φ(y)⟩ = ∇φ̄(x)·∇φ̄(y), the pseudo-NTK, exactly. The variance is at most (k(x,x)·k(y,y) + k(x,y)²)/n_components, as
    for dense random signs, at the cost of one addition for each parameter and row.

    Parameters
    ----------
    module : torch.nn.Module
        A module in eval mode, or a description of one (`ntkdask.modules`); it is never changed.
    n_components : int
        Number of features >= 1.
    seed : int
        Seed of signs and components.
    input_layout : {"nchw", None}
        "nchw" gives images (n, H, W, C) to the module as (n, C, H, W); None passes rows as they are.
    parameters : str or tuple of str, optional
        Patterns (fnmatch) of the names of the parameters, such as "layer4.*"; None: all that require gradients.
    memory_bytes : int
        About how many bytes a call may hold beside its input, its result and the module.

    Raises
    ------
    InputError
        As `PseudoNTK` does.

    References
    ----------
    MATH.md §5; Charikar, Chen & Farach-Colton 2002; Weinberger et al. 2009, Lemma 2.
    """

    module: Any
    n_components: int
    seed: int = 0
    input_layout: str | None = "nchw"
    parameters: str | tuple[str, ...] | None = None
    memory_bytes: int = MEMORY_BYTES

    def __post_init__(self) -> None:
        require_components(self.n_components)
        if isinstance(self.parameters, list):
            object.__setattr__(self, "parameters", tuple(self.parameters))
        _ = self.target  # checks the arguments that both take

    @property
    def target(self) -> PseudoNTK:
        """The pseudo-NTK of the module's parameters."""
        return PseudoNTK(self.module, self.input_layout, self.parameters)

    def __call__(self, x: Array) -> Array:
        """Features of rows: (n, *s) → (n, n_components), of x's kind and dtype."""
        x = require_rows(require_float(x))
        out = namespace(x).zeros((x.shape[0], self.n_components), x.dtype)
        if x.shape[0]:
            slices = self._slices()
            shared.reserve(2 * slices.widths(x.dtype.itemsize, x.shape[1:])[0] * (4 + x.dtype.itemsize))
            for rows, pieces, columns in slices.over(x):
                out[rows] += _ColumnSketch(self.n_components, self.seed, ("projected-gradients",), pieces)(columns)
        return out

    def workspace_bytes(self, n: int, itemsize: int, row_shape: tuple[int, ...] | None = None) -> int:
        """Peak bytes of a call: the result and, given the shape of a row, signs, components, a copy of the module, a batch."""
        result = n * self.n_components * itemsize
        if row_shape is None:
            return result
        slices = self._slices()
        columns, widest = slices.widths(itemsize, row_shape)
        # signs and components are kept; raw bits, their shifts and remainders of a chunk are not
        drawn = columns * (4 + itemsize) + 6 * 8 * widest
        return 2 * result + drawn + slices.workspace_bytes(n, itemsize, row_shape)

    def _slices(self) -> GradientSlices:
        require_torch("ProjectedGradients")
        from ntkdask.modules.jacobian.slices import GradientSlices

        names = (self.parameters,) if isinstance(self.parameters, str) else self.parameters
        return GradientSlices(self.module, self.input_layout, names, self.memory_bytes, "ProjectedGradients")


@dataclass(frozen=True)
class _ColumnSketch(CountSketch):
    """The CountSketch of pieces (parameter, first column, last column) side by side; each parameter has streams of its own."""

    pieces: tuple[tuple[str, int, int], ...] = ()

    def buckets(self, d: int, dtype: np.dtype) -> Buckets:
        """Components and signs of the pieces' columns, drawn once per process."""

        def draw() -> Buckets:
            bits = np.concatenate([self._bits(*piece) for piece in self.pieces])
            sign = 1 - 2 * (bits & np.uint64(1)).astype(np.int8)
            return Buckets(((bits >> np.uint64(1)) % np.uint64(self.n_components)).astype(np.int32), sign.astype(dtype))

        return shared.get(("column-sketch", self, dtype.name), draw)

    def _bits(self, name: str, start: int, stop: int) -> np.ndarray:
        """Raw bits of the columns from start to stop of a parameter."""
        drawn = []
        for block in range(start // DRAW_COLUMNS, -(-stop // DRAW_COLUMNS)):
            base = block * DRAW_COLUMNS
            bits = seeds.raw_bits(self.seed, (*self.path, name), min(stop - base, DRAW_COLUMNS), block)
            drawn.append(bits[max(0, start - base) :])
        return np.concatenate(drawn)
