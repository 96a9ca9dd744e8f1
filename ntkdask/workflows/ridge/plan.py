"""Plan a ridge run: sizes whose tasks fit the memory of a worker; flops, tasks and bytes on disk.

Pure arithmetic over declared workspaces. A plan that does not fit is refused, with the numbers, before anything runs. A test compares
measured peaks with these numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from ntkdask.errors import MemoryBudgetError
from ntkdask.features.base import FeatureMap
from ntkdask.features.fitting import DataDependentMap, learns, uses_targets
from ntkdask.planning.resources import BASE_BYTES, Costs, Resources, RidgePlan
from ntkdask.planning.tiles import Plan, largest_rows
from ntkdask.preprocessing import FittedPreprocessor, Step
from ntkdask.solvers.gram import packed_length
from ntkdask.wording import format_bytes


@dataclass(frozen=True, kw_only=True)
class RidgeShape:
    """The facts on which the sizes of a ridge run depend.

    Parameters
    ----------
    n_total, n_train : int
        Rows of the dataset, and of one fit.
    row_shape : tuple of int
        Shape of a row.
    row_bytes : int
        Stored bytes of a row.
    m, k : int
        Features, and columns of the targets.
    n_groups : int
        Groups of rows with separate Gram sums, for choosing alpha.
    selection : str
        How alpha is chosen.
    n_runs : int
        Number of fits: how often every Gram matrix is summed.
    """

    n_total: int
    n_train: int
    row_shape: tuple[int, ...]
    row_bytes: int
    m: int
    k: int
    n_groups: int
    selection: str
    n_runs: int = 1


def plan_ridge(
    shape: RidgeShape, feature_map: FeatureMap | None, steps: tuple[Step, ...], *, plan: Plan, resources: Resources
) -> RidgePlan:
    """Choose slab, batch and tile rows so that every task fits.

    Parameters
    ----------
    shape : RidgeShape
        Rows, features, targets, groups, fits.
    feature_map : FeatureMap or None
        Declares its workspace. None: the rows themselves.
    steps : tuple of Step
        Preprocessing.
    plan : Plan
        Requested sizes, memory and dtype (None: float32).
    resources : Resources
        Memory, threads and GPU of a task.

    Raises
    ------
    MemoryBudgetError
        When not even batches of one row fit a worker, or the batches do not fit the GPU; with the numbers.
    """
    dtype = plan.dtype or "float32"
    sizes = RidgePlan.unbounded(shape.n_total, dtype, resources, plan.tile_rows)
    limit = plan.memory_bytes or resources.memory_bytes
    if limit is None:
        return sizes

    def bytes_of(rows: int) -> int:
        return max(costs_of(shape, feature_map, steps, _with_batch(sizes, rows)).memory.values())

    least = costs_of(shape, feature_map, steps, _with_batch(sizes, 1)).memory
    worst = max(least, key=lambda name: least[name])
    if least[worst] > limit:
        cheaper = "" if shape.selection == "gcv" else 'selection="gcv", '
        if worst.startswith("features"):
            cheaper += "fewer candidates or landmarks, "
        raise MemoryBudgetError(
            f"{worst} needs {format_bytes(least[worst])} (rows=1, n_components={shape.m}, targets={shape.k}, {dtype}; the process "
            f"itself {format_bytes(BASE_BYTES)}) but a worker has {format_bytes(limit)}. Use n_components <= "
            f"{_largest_components(shape, limit, dtype)}, {cheaper}or give each worker more memory."
        )
    rows = largest_rows(limit, bytes_of, sizes.batch_rows, "a batch of features")
    fitting = _with_batch(sizes, rows)
    on_device = costs_of(shape, feature_map, steps, fitting).device_memory
    if sizes.device and on_device > 0.9 * resources.device_bytes:
        raise MemoryBudgetError(
            f"gram-slab needs {format_bytes(on_device)} on the device (rows={rows}, n_components={shape.m}, {dtype}) but a GPU has "
            f"{format_bytes(resources.device_bytes)}. Use fewer n_components or a smaller Plan.memory_bytes."
        )
    return fitting


def costs_of(shape: RidgeShape, feature_map: FeatureMap | None, steps: tuple[Step, ...], plan: RidgePlan) -> Costs:
    """Memory, flops, tasks and disk of a run under `plan`."""
    itemsize = np.dtype(plan.dtype).itemsize
    m, k = shape.m, shape.k
    gram, packed = 8 * m * m, 8 * packed_length(m, k)
    batch = batch_bytes(shape, feature_map, steps, plan)
    scratch = itemsize * m * m if itemsize == 4 else 0
    # writing a tile: Zarr's buffer, the checksummed copy and the bytes that go to the file
    commit = 3 * packed
    folds = 1 if shape.n_groups == 1 else 2
    memory = {
        "gram-slab": gram + max(batch + scratch, packed + commit),
        "gram-sum": 2 * packed + max(packed, commit),
        # LAPACK's evd: 2 m² of workspace beside the matrix; the packed sums are still there while they are unpacked
        "solve": folds * gram + max(3 * gram, packed),
        "predict": predict_bytes(shape, feature_map, steps, plan),
    }
    if shape.selection == "loo":
        memory["loo-slab"] = gram + itemsize * m * m + batch + 3 * 8 * plan.batch_rows * m
    covariances = 0
    if any(step.needs == "covariance" for step in steps):
        d = math.prod(shape.row_shape)
        # at the end the covariance, its vector, and the buffers that write it
        memory["preprocess-slab"] = 8 * d * d * 2 + max(batch, 3 * 8 * d * d)
        covariances = 2 * -(-shape.n_total // plan.slab_rows) * 8 * d * d
        memory["preprocess-sum"] = 5 * 8 * d * d
        # the covariance, ZCA's 48 d² bytes, and the buffers that write the fitted matrix
        memory["preprocess-fit"] = 9 * 8 * d * d
    sums, passes = 0, 0
    if learns(feature_map):
        learner = cast(DataDependentMap, feature_map)
        sums, passes = learner.sums_bytes(shape.row_shape, k), learner.n_passes
        fitting = learner.fit_bytes(plan.batch_rows, itemsize, shape.row_shape, k)
        memory["features-slab"] = rows_bytes(shape, steps, plan) + fitting + 4 * sums
        memory["features-sum"] = 6 * sums
        memory["features-fit"] = 2 * sums + learner.finish_bytes(itemsize, shape.row_shape, k)
    memory = {name: BASE_BYTES + value for name, value in memory.items()}
    # features that learn from targets are fitted anew for every held-out fold, which takes two sums each
    refits = 1 + (shape.n_groups if shape.n_groups > 1 and uses_targets(feature_map) else 0)
    rounds = shape.n_groups if refits == 1 else 2 * refits - 1
    per_pass = -(-shape.n_total // plan.slab_rows)
    slabs = per_pass * rounds
    tiles = -(-shape.n_total // plan.tile_rows)
    # a centre for every map that was fitted, and the solve
    tasks = shape.n_runs * (2 * slabs - rounds + (len(steps) + 2 * passes * refits) * per_pass + refits + 1 + tiles)
    flops = shape.n_runs * (float(shape.n_train) * m * m + 9.0 * m**3 * shape.n_groups)
    kept = packed * (slabs + rounds) + 2 * per_pass * sums + covariances
    disk = shape.n_runs * (kept + 8 * shape.n_total * k + 8 * m * k)
    return Costs(memory, (gram + batch + scratch) if plan.device else 0, flops, tasks, disk)


def plan_predictions(shape: RidgeShape, feature_map: FeatureMap | None, dtype: str, resources: Resources) -> RidgePlan:
    """Sizes for predicting rows with a fitted model of this shape; MemoryBudgetError, with the numbers, when no batch fits."""
    sizes = RidgePlan.unbounded(shape.n_total, dtype, resources)
    if resources.memory_bytes is None:
        return sizes

    def bytes_of(rows: int) -> int:
        return BASE_BYTES + predict_bytes(shape, feature_map, (), _with_batch(sizes, rows))

    what = f"predicting with {shape.m} features ({dtype})"
    return _with_batch(sizes, largest_rows(resources.memory_bytes, bytes_of, sizes.batch_rows, what))


def predict_bytes(shape: RidgeShape, feature_map: FeatureMap | None, steps: tuple[Step, ...], plan: RidgePlan) -> int:
    """Peak bytes of a task of predictions: a batch and its difference from the centre, the weights, the scores."""
    centred, scores = np.dtype(plan.dtype).itemsize * plan.batch_rows * shape.m, 8 * plan.batch_rows * shape.k
    return batch_bytes(shape, feature_map, steps, plan) + centred + 8 * shape.m * shape.k + scores


def batch_bytes(shape: RidgeShape, feature_map: FeatureMap | None, steps: tuple[Step, ...], plan: RidgePlan) -> int:
    """Peak bytes of computing the features of one batch from stored rows, preprocessing and weights of the map included."""
    itemsize, rows = np.dtype(plan.dtype).itemsize, plan.batch_rows
    d = math.prod(shape.row_shape)
    mapped = (
        rows * d * itemsize if feature_map is None else feature_map.workspace_bytes(rows, itemsize, shape.row_shape)
    )
    return rows_bytes(shape, steps, plan) + mapped


def rows_bytes(shape: RidgeShape, steps: tuple[Step, ...], plan: RidgePlan) -> int:
    """Peak bytes of reading and preprocessing one batch, the states of preprocessing and the targets included."""
    itemsize, rows = np.dtype(plan.dtype).itemsize, plan.batch_rows
    d = math.prod(shape.row_shape)
    # in memory twice: the stored chunks that a range overlaps, and the range
    raw = 2 * rows * shape.row_bytes
    fitted = FittedPreprocessor(shape.row_shape, plan.dtype)
    work = fitted.workspace_bytes(rows, shape.row_shape, itemsize)
    work += max((step.workspace_bytes(rows, shape.row_shape, itemsize) for step in steps), default=0)
    states = sum(8 * d * (d if step.needs == "covariance" else 2) for step in steps)
    return raw + work + 2 * states + 8 * rows * (shape.k + 1) * 2


def _with_batch(plan: RidgePlan, rows: int) -> RidgePlan:
    return replace(plan, batch_rows=rows)


def _largest_components(shape: RidgeShape, limit: int, dtype: str) -> int:
    """About how many components would fit: the solve holds four float64 matrices of their square."""
    folds = 1 if shape.n_groups == 1 else 2
    return max(1, int(math.sqrt(max(0, limit - BASE_BYTES) / (8 * (folds + 3)))) // 64 * 64)
