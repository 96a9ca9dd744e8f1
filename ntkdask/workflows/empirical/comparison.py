"""The pseudo-NTK beside the full empirical NTK of the same rows: the paper's measures, from arrays or from stored tiles.

    for every block of rows (i, j), j <= i (a task):  sums of Θ_ij and Θ̂_ij       (`solvers/kernel_measures.py`), added in a fixed tree
    the ends of both spectra                                                       (`workflows/spectrum.py`)

A task reads the tiles that its block lies in, so that nothing of size (n·O)² is in one memory. Called by the sweep, and as
`nd.compare_kernels`.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ntkdask.arrays import Array, as_array, require_float
from ntkdask.errors import InputError
from ntkdask.execution.map_reduce import reduce_tiles
from ntkdask.execution.progress import Listener, Silent
from ntkdask.execution.window import Done
from ntkdask.matrices.spectrum import spectrum
from ntkdask.matrices.stored import StoredMatrix
from ntkdask.planning.tiles import Plan, Tile, TileGrid
from ntkdask.solvers.kernel_measures import KernelSums, block_view, kernel_sums, pseudo_of, relative_difference, stacked

LABEL = "kernel-sums"


@dataclass(frozen=True)
class Ends:
    """The ends of a spectrum: condition = lambda_max/lambda_min, infinite for a lambda_min that is not above float64 rounding.

    noise: about what rounding of the entries' own dtype does to eigenvalues, ε·lambda_max; a lambda_min below it means nothing.
    """

    lambda_max: float
    lambda_min: float
    condition: float
    noise: float

    @property
    def resolved(self) -> bool:
        """Whether lambda_min stands above the noise."""
        return self.lambda_min > self.noise


@dataclass(frozen=True)
class KernelComparison:
    """Measures of Θ̂ against Θ; names as in `KernelSums`. pseudo, full: ends of the spectra of Θ̂ (n, n) and Θ (n·O, n·O), or None.

    Relative differences |Θ̂'s − Θ's| / |Θ's| of the ends and condition numbers are None without spectra, NaN where they mean nothing.
    """

    pairs: int
    outputs: int
    off_diagonal_ratio: float
    pooled_off_diagonal_ratio: float
    frobenius: float
    norm_difference: float
    pseudo: Ends | None = None
    full: Ends | None = None

    @property
    def lambda_max_difference(self) -> float | None:
        """Figure 4 of the paper."""
        return self._difference("lambda_max")

    @property
    def lambda_min_difference(self) -> float | None:
        """Figure 5."""
        return self._difference("lambda_min")

    @property
    def condition_difference(self) -> float | None:
        """Figure 6."""
        return self._difference("condition")

    def to_json(self) -> dict[str, Any]:
        """As a table of numbers; None where one is missing, infinite or NaN."""
        names = ("lambda_max", "lambda_min", "condition")
        found = asdict(self) | {f"{name}_difference": self._difference(name) for name in names}
        return _finite(found)

    def _difference(self, name: str) -> float | None:
        if self.pseudo is None or self.full is None:
            return None
        return relative_difference(getattr(self.pseudo, name), getattr(self.full, name))


def compare_kernels(
    full: Any,
    pseudo: Any = None,
    *,
    outputs: int | None = None,
    spectra: bool = True,
    client: Any = None,
    plan: Plan | None = None,
    listener: Listener | None = None,
    threads: int | None = None,
) -> KernelComparison:
    """Measures of a full eNTK and a pseudo-NTK of the same rows.

    full: Θ as an array (n, m, O, O), or in order i·O + o as an array (n·O, m·O) or the url of a stored matrix. pseudo: Θ̂ as an array
    (n, m) or a url; None takes Θ's own, the sum of each block over O (not for a stored Θ with spectra). outputs: O, needed for
    (n·O, m·O) without a pseudo. spectra: also the ends of both spectra, of symmetric matrices; plan, client and threads as of
    `spectrum`. client: tasks over stored tiles run there.
    Raises InputError for shapes that do not belong together, NaN, and spectra of what is not symmetric.
    Source: Mohamadi & Sutherland 2023, Figures 2 to 6.
    """
    listener = listener or Silent()
    if isinstance(full, (str, os.PathLike)):
        theta: Any = StoredMatrix.open(full)
        other = None if pseudo is None else _opened(pseudo)
        count = _outputs(theta.shape, None if other is None else other.shape, outputs)
        if spectra and other is None:
            raise InputError(
                "compare_kernels: the spectrum of a pseudo-NTK takes its matrix. Give pseudo, or spectra=False."
            )
        sums = _stored_sums(theta, other, count, client, listener, threads)
        matrices = (pseudo, full)
    else:
        theta = require_float(as_array(full), "full")
        other = None if pseudo is None else _in_memory(pseudo)
        if theta.ndim != 4:
            theta = block_view(theta, _outputs(theta.shape, None if other is None else other.shape, outputs))
        sums = kernel_sums(theta, other)
        matrices = (pseudo_of(theta) if other is None else other, theta)
    ends: list[Ends | None] = [None, None]
    if spectra:
        ends = [_ends(m, client, plan, listener, threads) for m in matrices]
    return KernelComparison(
        sums.pairs,
        sums.outputs,
        sums.off_diagonal_ratio,
        sums.pooled_off_diagonal_ratio,
        sums.frobenius,
        sums.norm_difference,
        *ends,
    )


def _opened(pseudo: Any) -> Any:
    """A pseudo-NTK that blocks can be cut from."""
    return StoredMatrix.open(pseudo) if isinstance(pseudo, (str, os.PathLike)) else as_array(pseudo)


def _in_memory(pseudo: Any) -> Array:
    opened = _opened(pseudo)
    return opened.read(opened.dtype) if isinstance(opened, StoredMatrix) else opened


def _outputs(full: tuple[int, ...], pseudo: tuple[int, ...] | None, outputs: int | None) -> int:
    """O, from the shapes or as it was given."""
    if pseudo is not None and len(pseudo) == len(full) == 2 and pseudo[0] and full[0] % pseudo[0] == 0:
        found = full[0] // pseudo[0]
        if found and full[1] == found * pseudo[1] and outputs in (None, found):
            return found
    elif (
        pseudo is None
        and outputs is not None
        and outputs >= 1
        and len(full) == 2
        and not any(s % outputs for s in full)
    ):
        return outputs
    beside = "" if pseudo is None else f" beside a pseudo-NTK of shape {pseudo}"
    raise InputError(
        f"compare_kernels: a full empirical NTK of shape {full}{beside} with outputs={outputs}; it has O rows and columns for each of "
        "the pseudo-NTK's. Give outputs where there is no pseudo-NTK."
    )


@dataclass(frozen=True, eq=False)
class _SumsTask:
    """The sums of one block of rows and columns, counted for its mirror image, too."""

    full: StoredMatrix
    pseudo: StoredMatrix | None
    outputs: int
    mirrored: bool

    def __call__(self, tile: Tile) -> KernelSums:
        o = self.outputs
        theta = self.full[tile.start * o : tile.stop * o, tile.col_start * o : tile.col_stop * o]
        own = None if self.pseudo is None else self.pseudo[tile.start : tile.stop, tile.col_start : tile.col_stop]
        return kernel_sums(block_view(theta, o), own).times(2 if self.mirrored and tile.start != tile.col_start else 1)


def _add(node: tuple[int, int], left: KernelSums, right: KernelSums) -> KernelSums:
    return left + right


def _stored_sums(
    full: StoredMatrix, pseudo: Any, outputs: int, client: Any, listener: Listener, threads: int | None
) -> KernelSums:
    if pseudo is not None and not isinstance(pseudo, StoredMatrix):
        raise InputError("compare_kernels: beside a stored empirical NTK the pseudo-NTK is stored, too: give its url.")
    n, m = (size // outputs for size in full.shape)
    # a block is a tile where O divides it, else it reads up to four
    rows, columns = (max(1, size // outputs) for size in full.tile_shape)
    mirrored = full.is_symmetric and rows == columns
    tiles = list(TileGrid(n, m, rows, columns, symmetric=mirrored))
    listener.stage(LABEL, len(tiles))

    def receive(node: tuple[int, int], done: Done[KernelSums]) -> None:
        if node[0] == 0:
            listener.task(LABEL, done)

    task = _SumsTask(full, pseudo, outputs, mirrored)
    return reduce_tiles(task, _add, tiles, client, label=LABEL, receive=receive, threads=threads)


def _ends(matrix: Any, client: Any, plan: Plan | None, listener: Listener, threads: int | None) -> Ends:
    stored = isinstance(matrix, (str, os.PathLike))
    eps = float(np.finfo((StoredMatrix.open(matrix) if stored else matrix).dtype).eps)
    operand = matrix if stored or matrix.ndim == 2 else stacked(matrix)
    found = spectrum(operand, 1, client=client, plan=plan, listener=listener, threads=threads)
    return Ends(found.lambda_max, found.lambda_min, found.condition, eps * found.lambda_max)


def _finite(value: Any) -> Any:
    """Tables whose numbers JSON has."""
    if isinstance(value, dict):
        return {key: _finite(held) for key, held in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
