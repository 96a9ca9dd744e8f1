"""The pseudo-NTK beside the full empirical NTK of the same rows: the paper's measures, from arrays or from stored tiles.

    for every block of rows (i, j), j <= i (a task):  sums of Θ_ij and Θ̂_ij       (`solvers/kernel_measures.py`), added in a fixed tree
    the ends of both spectra                                                       (`matrices/spectrum.py`)

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
from ntkdask.errors import InputError, MemoryBudgetError
from ntkdask.execution.progress import Listener, Silent
from ntkdask.execution.site import Site
from ntkdask.matrices.spectrum import spectrum
from ntkdask.matrices.stored import StoredMatrix
from ntkdask.planning.resources import BASE_BYTES
from ntkdask.planning.tiles import Plan, Tile, TileGrid
from ntkdask.solvers.kernel_measures import (
    STRIP_BYTES,
    KernelSums,
    block_view,
    kernel_sums,
    pseudo_of,
    relative_difference,
    stacked,
)
from ntkdask.wording import format_bytes

LABEL = "kernel-sums"


@dataclass(frozen=True)
class Ends:
    """The ends of a spectrum.

    condition: lambda_max/lambda_min, infinite for a lambda_min that is not above float64 rounding. noise: about what rounding of the
    entries' own dtype does to eigenvalues, ε·lambda_max; a lambda_min below it means nothing.
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
    """Measures of a pseudo-NTK Θ̂ against the full eNTK Θ.

    Parameters
    ----------
    pairs : int
        Pairs of rows.
    outputs : int
        O, outputs of the network.
    off_diagonal_ratio : float
        Mean over pairs of ‖off-diagonal part of the block‖_F / ‖its diagonal‖_F (Figure 2 of the paper).
    pooled_off_diagonal_ratio : float
        The same quotient of the norms over all pairs.
    frobenius : float
        ‖Θ − Θ̂⊗I‖_F / ‖Θ‖_F (Theorem 1, Figure 3).
    norm_difference : float
        |‖Θ̂⊗I‖_F − ‖Θ‖_F| / ‖Θ‖_F, the other reading of Figure 3.
    pseudo : Ends or None
        Ends of the spectrum of Θ̂ (n, n).
    full : Ends or None
        Ends of the spectrum of Θ (n·O, n·O).

    Notes
    -----
    The relative differences |Θ̂'s − Θ's| / |Θ's| of the ends and of the condition numbers are None without spectra, and NaN where they
    mean nothing.
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
        return _finite(asdict(self) | {f"{name}_difference": self._difference(name) for name in names})

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

    Parameters
    ----------
    full : array (n, m, O, O) or (n·O, m·O), or the url of a stored matrix (n·O, m·O)
        Θ, float32 or float64; matrices in the order i·O + o.
    pseudo : array (n, m), url of a stored matrix, or None
        Θ̂. None takes Θ's own, the sum of each block over O; not for a stored Θ with spectra.
    outputs : int or None
        O, needed for a Θ of shape (n·O, m·O) without a pseudo.
    spectra : bool
        Whether the ends of both spectra are computed, too, of symmetric matrices.
    client : distributed.Client or None
        Whose workers run the tasks over stored tiles. None: this process.
    plan : Plan or None
        memory_bytes of a task, and as of `spectrum`. None takes the smallest worker's where there is a client.
    listener : Listener or None
        Hears of stages and tasks.
    threads : int or None
        Of each task. None: what its process has.

    Returns
    -------
    KernelComparison
        The measures, and the ends of the spectra or None.

    Raises
    ------
    InputError
        For shapes that do not belong together, NaN, and spectra of what is not symmetric.
    MemoryBudgetError
        Before anything runs, when a block of stored tiles does not fit a task.

    References
    ----------
    Mohamadi & Sutherland 2023, Figures 2 to 6.
    """
    # threads: without a number what the process has, as `spectrum` takes it; they decide the bits of a decomposition
    site, plan = Site(client=client, listener=listener or Silent(), threads=threads), plan or Plan()
    if isinstance(full, (str, os.PathLike)):
        theta: Any = StoredMatrix.open(full)
        pseudo_matrix = None if pseudo is None else _opened(pseudo)
        count = _outputs(theta.shape, None if pseudo_matrix is None else pseudo_matrix.shape, outputs)
        if spectra and pseudo_matrix is None:
            raise InputError(
                "compare_kernels: the spectrum of a pseudo-NTK takes its matrix. Give pseudo, or spectra=False."
            )
        sums = _stored_sums(theta, pseudo_matrix, count, site, plan)
        matrices = (pseudo, full)
    else:
        theta = require_float(as_array(full), "full")
        pseudo_matrix = None if pseudo is None else _in_memory(pseudo)
        if theta.ndim != 4:
            theta = block_view(
                theta, _outputs(theta.shape, None if pseudo_matrix is None else pseudo_matrix.shape, outputs)
            )
        sums = kernel_sums(theta, pseudo_matrix)
        matrices = (pseudo_of(theta) if pseudo_matrix is None else pseudo_matrix, theta)
    ends: list[Ends | None] = [None, None]
    if spectra:
        ends = [ends_of(m, site, plan) for m in matrices]
    return KernelComparison(
        sums.pairs,
        sums.outputs,
        sums.off_diagonal_ratio,
        sums.pooled_off_diagonal_ratio,
        sums.frobenius,
        sums.norm_difference,
        *ends,
    )


def ends_of(matrix: Any, site: Site, plan: Plan) -> Ends:
    """The ends of the spectrum of a symmetric array, of blocks (n, n, O, O), or of a stored matrix (its url)."""
    is_stored = isinstance(matrix, (str, os.PathLike))
    operand = matrix if is_stored or matrix.ndim == 2 else stacked(matrix)
    values = spectrum(operand, 1, client=site.client, plan=plan, listener=site.listener, threads=site.threads)
    eps = float(np.finfo((StoredMatrix.open(matrix) if is_stored else matrix).dtype).eps)
    return Ends(values.lambda_max, values.lambda_min, values.condition, eps * values.lambda_max)


def _opened(pseudo: Any) -> Any:
    """A pseudo-NTK that blocks can be cut from."""
    return StoredMatrix.open(pseudo) if isinstance(pseudo, (str, os.PathLike)) else as_array(pseudo)


def _in_memory(pseudo: Any) -> Array:
    """A pseudo-NTK as an array."""
    opened = _opened(pseudo)
    return opened.read(opened.dtype) if isinstance(opened, StoredMatrix) else opened


def _outputs(full: tuple[int, ...], pseudo: tuple[int, ...] | None, outputs: int | None) -> int:
    """O of a full eNTK, from its shape and the pseudo-NTK's, or as it was given; InputError where they disagree."""
    if pseudo is not None and len(pseudo) == len(full) == 2 and pseudo[0] and full[0] % pseudo[0] == 0:
        quotient = full[0] // pseudo[0]
        if quotient and full[1] == quotient * pseudo[1] and outputs in (None, quotient):
            return quotient
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
        pseudo = None if self.pseudo is None else self.pseudo[tile.start : tile.stop, tile.col_start : tile.col_stop]
        count = 2 if self.mirrored and tile.start != tile.col_start else 1
        return kernel_sums(block_view(theta, o), pseudo).times(count)


def _add(node: tuple[int, int], left: KernelSums, right: KernelSums) -> KernelSums:
    return left + right


def _stored_sums(full: StoredMatrix, pseudo: Any, outputs: int, site: Site, plan: Plan) -> KernelSums:
    """The sums over all blocks, one task for each; MemoryBudgetError when a block does not fit a task."""
    if pseudo is not None and not isinstance(pseudo, StoredMatrix):
        raise InputError("compare_kernels: beside a stored empirical NTK the pseudo-NTK is stored, too: give its url.")
    n, m = (size // outputs for size in full.shape)
    # a block is a tile where O divides it, else it reads up to four
    rows, columns = (max(1, size // outputs) for size in full.tile_shape)
    limit, needed = site.bounded(plan).memory_bytes, _block_bytes(full, pseudo, rows, columns, outputs)
    if limit is not None and needed > limit:
        raise MemoryBudgetError(
            f"{LABEL} of tiles of {full.tile_shape[0]} x {full.tile_shape[1]} needs {format_bytes(needed)} but a task has "
            f"{format_bytes(limit)}. Store the kernels in smaller tiles (Plan.tile_rows), or give each worker more memory."
        )
    mirrored = full.is_symmetric and rows == columns
    tiles = list(TileGrid(n, m, rows, columns, symmetric=mirrored))
    return site.reduce(_SumsTask(full, pseudo, outputs, mirrored), _add, tiles, LABEL)


def _block_bytes(full: StoredMatrix, pseudo: StoredMatrix | None, rows: int, columns: int, outputs: int) -> int:
    """Peak bytes of the task of a block: of either matrix the block, a tile and its checksummed file; float64 strips."""
    blocks = [(full, rows * columns * outputs**2)] + ([] if pseudo is None else [(pseudo, rows * columns)])
    matrix_bytes = sum(
        matrix.dtype.itemsize * (entries + 3 * matrix.tile_shape[0] * matrix.tile_shape[1])
        for matrix, entries in blocks
    )
    return BASE_BYTES + matrix_bytes + 4 * STRIP_BYTES


def _finite(value: Any) -> Any:
    """A table with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
