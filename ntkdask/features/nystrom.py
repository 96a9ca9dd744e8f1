"""Nyström features of any exact kernel: the kernel of rows with landmark rows, whitened.

Landmarks are chosen from the training rows by streams of priorities, so that the choice does not depend on batches, slabs or
workers. Fitted in memory by `fit` or over a stored dataset, see `fitting`. There are no out-of-sample weights and no refinement
of landmarks: the means of k-means are no training rows, and kernels of images need rows that are images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ntkdask import seeds
from ntkdask.arrays import Array, is_device_array, namespace, require_float, require_rows, to_device, to_host
from ntkdask.errors import InputError, nearest
from ntkdask.features.base import require_components
from ntkdask.features.fitting import COMPONENT_INDICES, DataDependentMap, Learned, Sums, Training, TrainingBatch
from ntkdask.kernels.base import Kernel, require_kernel
from ntkdask.registry import register

LANDMARKS = ("uniform", "leverage", "kmeans++")

CANDIDATES = 4
"""For each landmark, rows of the uniform sample of training rows that k-means++ chooses from."""

PROPOSALS = 256
"""Rows that k-means++ proposes at a time, at most."""

PRIORITY_BLOCK = 4096
"""Row numbers of a stream of priorities; a constant of the format."""

CUT = {"float32": 1e-6, "float64": 1e-12}
"""Directions of K_SS with eigenvalues below this part of its mean diagonal are dropped. A relative error ε of the kernel
becomes ε/√CUT in a feature: 1e-4 in float32, 1e-10 in float64."""

LEAST_SCORE = 1e-300
"""Score of rows of zeros, which become landmarks only where nothing else is left."""


@register("feature map")
@dataclass(frozen=True)
class Nystrom(DataDependentMap):
    """φ(x) = K_{xS}·U·Λ^{−1/2} with K_SS = UΛUᵀ, so that ⟨φ(x), φ(y)⟩ = K_{xS}K_SS⁻¹K_{Sy}; S are n_components training rows.

    Exact on S, and K − K̂ is positive semi-definite: the bias depends on the landmarks, not on the seed.

    Parameters
    ----------
    kernel : Kernel
        Any exact kernel, of images too.
    n_components : int
        The largest number of landmarks and of features, >= 1.
    seed : int
        Seed of the choice of landmarks.
    landmarks : {"uniform", "leverage", "kmeans++"}
        How they are chosen. "uniform": at random. "leverage": without replacement in proportion to approximate ridge leverage
        scores k(x, x) − K_{xJ}(K_JJ + ρI)⁻¹K_{Jx} from as many uniform rows J, with ρ the mean tail of K_JJ's spectrum beyond a
        quarter of it; this takes one more pass over the rows. "kmeans++": D² sampling in the kernel's feature space from a
        uniform sample of 4·n_components rows. Rows of weight 0 are never landmarks.

    Raises
    ------
    InputError
        For an argument that is no kernel, unknown landmarks, n_components < 1 and a call before `fit`.

    Notes
    -----
    The fitted map has the row numbers of its landmarks in `component_indices_`. Where K_SS has less than full rank (equal
    rows, zero rows, rank below n_components), its null directions are dropped and the fitted map has fewer components, as
    it has when there are fewer training rows than n_components.

    References
    ----------
    Williams & Seeger 2001; Alaoui & Mahoney 2015 and Musco & Musco 2017 (ridge leverage scores, here in
    two steps); Arthur & Vassilvitskii 2007 (k-means++).

    >>> from ntkdask.kernels import RBF
    >>> x = np.arange(12.0).reshape(6, 2) / 10
    >>> phi = Nystrom(RBF(1.0), 6).fit(x)(x)
    >>> bool(np.allclose(phi @ phi.T, RBF(1.0)(x)))
    True
    """

    kernel: Kernel
    n_components: int
    seed: int = 0
    landmarks: str = "uniform"

    def __post_init__(self) -> None:
        require_components(self.n_components)
        require_kernel(self.kernel, "Nystrom")
        if self.landmarks not in LANDMARKS:
            raise InputError(f"unknown landmarks {self.landmarks!r}{nearest(str(self.landmarks), LANDMARKS)}")

    @property
    def target(self) -> Kernel:
        """The kernel."""
        return self.kernel

    @property
    def n_passes(self) -> int:
        """2 for leverage scores, else 1."""
        return 2 if self.landmarks == "leverage" else 1

    # --- choosing landmarks -----------------------------------------------------------------------------------------

    @property
    def _capacity(self) -> int:
        """How many rows a pass keeps."""
        return self.n_components * (CANDIDATES if self.landmarks == "kmeans++" else 1)

    def begin(self, index: int, learned: Learned, training: Training, like: Array | None = None) -> Sums:
        """No rows yet: every place is free and has the worst priority."""
        xp, kept = np if like is None else namespace(like), self._capacity
        return {
            "rows": xp.zeros((kept, math.prod(training.row_shape)), xp.float64),
            "priorities": np.full(kept, np.inf),
            "numbers": np.full(kept, np.inf),
        }

    def accumulate(self, index: int, learned: Learned, batch: TrainingBatch, sums: Sums) -> None:
        """Keep the rows of the batch that have better priorities than those kept so far."""
        priorities = _exponentials(self.seed, index, batch.numbers)
        if index:
            priorities /= np.maximum(self._leverage(batch.x, learned), LEAST_SCORE)
        numbers = np.asarray(batch.numbers, np.float64)
        if batch.weights is not None:
            numbers = np.where(to_host(batch.weights) > 0, numbers, np.inf)
        _keep(sums, batch.x.reshape(batch.x.shape[0], -1), priorities, numbers)

    def merge(self, index: int, left: Sums, right: Sums) -> Sums:
        """The rows with the best priorities of both sums."""
        _keep(left, right["rows"], right["priorities"], right["numbers"])
        return left

    def finish(self, index: int, learned: Learned, sums: Sums, training: Training) -> Mapping[str, np.ndarray]:
        """The landmarks (s, *row_shape) in the rows' dtype, and the whitening matrix (s, components) in float64.

        After the first pass of leverage scores they are those of the preliminary rows J, with the ridge ρ.
        """
        order = np.lexsort((sums["numbers"], sums["priorities"]))
        order = order[np.isfinite(sums["numbers"][order])]
        if not len(order):
            raise InputError("Nystrom: no training row has a positive weight, so there are no landmarks.")
        # float64 whatever the dtype of the rows: the rounding of K_SS hides its small eigenvalues
        rows = to_device(sums["rows"][order], training.device).reshape(len(order), *training.row_shape)
        if self.landmarks == "kmeans++":
            chosen = _spread(self.kernel, rows, self.n_components, self.seed)
            rows, order = rows[namespace(rows).asarray(chosen)], order[chosen]
        values, vectors = (to_host(a) for a in namespace(rows).linalg.eigh(self.kernel(rows)))
        if index + 1 < self.n_passes:
            whitening = vectors / np.sqrt(np.maximum(values, 0) + _ridge(values))
        else:
            least = max(CUT[training.dtype] * values.mean(), len(rows) * np.finfo(np.float64).eps * values[-1])
            large = np.flatnonzero(values > least)[::-1]
            if not len(large):
                raise InputError(f"Nystrom: {self.kernel} of the landmarks is zero. Rows of zeros have no features.")
            whitening = vectors[:, large] / np.sqrt(values[large])
        return {
            "landmarks": to_host(rows).astype(training.dtype),
            "whitening": np.ascontiguousarray(whitening),
            COMPONENT_INDICES: sums["numbers"][order].astype(np.int64),
        }

    def finish_bytes(self, itemsize: int, row_shape: tuple[int, ...], n_targets: int) -> int:
        """Peak bytes of `finish`: the rows twice, and the larger of two steps.

        The steps are K_SS with its eigendecomposition (a copy, and 2 s² of workspace), and the kernel of k-means++ proposals
        with all rows kept.
        """
        s, kept, d = self.n_components, self._capacity, math.prod(row_shape)
        k_ss = self.kernel.workspace_bytes(s, s, 8, row_shape) + 8 * 4 * s * s
        together = min(PROPOSALS, s)
        proposals = self.kernel.workspace_bytes(kept, together, 8, row_shape) + 8 * 4 * kept * together
        return 2 * 8 * kept * d + max(k_ss, proposals if self.landmarks == "kmeans++" else 0)

    def _leverage(self, x: Array, learned: Learned) -> np.ndarray:
        """Leverage scores up to a common factor, (n,) float64 on the host; at least rounding times k(x, x)."""
        own = self.kernel.diagonal(x).astype("float64")
        phi = self.kernel(x, learned.on("landmarks", x)) @ learned.on("whitening", x)
        explained = (phi * phi).sum(axis=1, dtype="float64")
        return np.maximum(to_host(own - explained), 16 * np.finfo(x.dtype).eps * to_host(own))

    def fit_bytes(self, n: int, itemsize: int, row_shape: tuple[int, ...], n_targets: int) -> int:
        """Peak bytes of `accumulate`: sums, the incoming rows and, for leverage scores, a call of the preliminary map."""
        d, kept = math.prod(row_shape), self._capacity
        choosing = 64 * (n + kept) + min(n, kept) * d * (itemsize + 8)
        scores = self.workspace_bytes(n, itemsize, row_shape) + 2 * n * self.n_components * itemsize
        return self.sums_bytes(row_shape, n_targets) + choosing + (scores if self.n_passes > 1 else 0)

    def sums_bytes(self, row_shape: tuple[int, ...], n_targets: int) -> int:
        """Bytes of the sums: the rows kept, their priorities and numbers."""
        return 8 * self._capacity * (math.prod(row_shape) + 2)

    # --- features ---------------------------------------------------------------------------------------------------

    def apply(self, x: Array, learned: Learned) -> Array:
        """Features of rows: (n, *s) → (n, components)."""
        x = require_rows(require_float(x))
        landmarks = learned.on("landmarks", x)
        flat = x.shape[1:] != landmarks.shape[1:] and math.prod(x.shape[1:]) == math.prod(landmarks.shape[1:])
        return self.kernel(x, landmarks.reshape(-1, *x.shape[1:]) if flat else landmarks) @ learned.on("whitening", x)

    def learned_components(self, learned: Learned) -> int:
        """The rank of K_SS."""
        return learned["whitening"].shape[1]

    def workspace_bytes(self, n: int, itemsize: int, row_shape: tuple[int, ...] | None = None) -> int:
        """Peak bytes of a call: result, the kernel with n_components landmarks, and landmarks and whitening in x's dtype."""
        return self._bytes(n, self.n_components, self.n_components, itemsize, row_shape)

    def learned_workspace_bytes(
        self, learned: Learned, n: int, itemsize: int, row_shape: tuple[int, ...] | None = None
    ) -> int:
        """The same for the landmarks and components that there are."""
        s, rank = learned["whitening"].shape
        return self._bytes(n, s, rank, itemsize, row_shape)

    def _bytes(self, n: int, s: int, rank: int, itemsize: int, row_shape: tuple[int, ...] | None) -> int:
        held = s * (math.prod(row_shape or (0,)) + rank) * itemsize
        return n * rank * itemsize + self.kernel.workspace_bytes(n, s, itemsize, row_shape) + held


def _exponentials(seed: int, index: int, numbers: np.ndarray) -> np.ndarray:
    """Independent draws of the exponential law, (b,), one for each row number.

    The least of E_i/p_i belongs to row i with probability p_i/Σp, and the s least are a sample without replacement (Efraimidis &
    Spirakis 2006).
    """
    numbers = np.asarray(numbers, np.int64)
    out = np.empty(len(numbers))
    blocks = numbers // PRIORITY_BLOCK
    for block in np.unique(blocks):
        inside = blocks == block
        draws = seeds.uniforms(seed, ("nystrom", "priorities", index), PRIORITY_BLOCK, int(block))
        out[inside] = -np.log(draws[numbers[inside] % PRIORITY_BLOCK])
    return out


def _keep(sums: Sums, rows: Array, priorities: np.ndarray, numbers: np.ndarray) -> None:
    """Let rows with a finite number take the places of kept rows with a worse priority, in place."""
    kept, valid = len(sums["numbers"]), np.flatnonzero(np.isfinite(numbers))
    every = np.concatenate([sums["numbers"], numbers[valid]])
    # free places have number inf, and come last
    best = np.lexsort((every, np.concatenate([sums["priorities"], priorities[valid]])))
    best = best[np.argsort(~np.isfinite(every[best]), kind="stable")][:kept]
    incoming = valid[best[best >= kept] - kept]
    free = np.setdiff1d(np.arange(kept), best[best < kept])
    sums["priorities"][free], sums["numbers"][free] = priorities[incoming], numbers[incoming]
    xp = namespace(sums["rows"])
    incoming = xp.asarray(incoming) if is_device_array(rows) else incoming
    sums["rows"][xp.asarray(free)] = rows[incoming]


def _ridge(values: np.ndarray) -> float:
    """(1/k)·Σ of all but the k largest of ascending eigenvalues, k a quarter of them; at least rounding of the largest, and > 0."""
    k = max(1, len(values) // 4)
    tail = float(np.maximum(values[:-k], 0).sum()) / k
    return max(tail, len(values) * float(np.finfo(np.float64).eps * values[-1]), 1e-30)


def _spread(kernel: Kernel, rows: Array, count: int, seed: int) -> np.ndarray:
    """Indices of at most `count` of the rows, chosen by k-means++.

    The first row comes first; then each is drawn in proportion to its squared distance k(i, i) + k(j, j) − 2k(i, j) from the
    nearest chosen row. There are fewer where every row equals a chosen one. Rows are proposed in batches, by the distances
    before the batch, and accepted with probability (distance now)/(distance then): the law is that of one draw at a time, but
    the kernel is called on many columns at once.
    """
    own, rounding = to_host(kernel.diagonal(rows)), 16 * np.finfo(rows.dtype).eps

    def squares(columns: np.ndarray) -> np.ndarray:
        sizes = own[:, None] + own[columns]
        distances = sizes - 2 * to_host(kernel(rows, rows[namespace(rows).asarray(columns)]))
        # a distance that is only rounding, as between equal rows, counts as 0
        return np.where(distances > rounding * sizes, distances, 0)

    chosen, batch = [0], 0
    distance = squares(np.array(chosen))[:, 0]
    while len(chosen) < min(count, len(rows)) and (total := np.cumsum(distance))[-1] > 0:
        size = min(PROPOSALS, len(chosen))
        where, accept = seeds.uniforms(seed, ("nystrom", "kmeans++"), 2 * size, batch).reshape(2, size)
        proposed = np.minimum(np.searchsorted(total, where * total[-1], side="right"), len(rows) - 1)
        before, from_proposed = distance[proposed], squares(proposed)
        for column, row in enumerate(proposed):
            if len(chosen) < count and accept[column] * before[column] < distance[row]:
                chosen.append(int(row))
                distance = np.minimum(distance, from_proposed[:, column])
                distance[row] = 0
        batch += 1
    return np.array(chosen)
