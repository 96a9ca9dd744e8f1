"""Peak bytes of the tasks of kernel ridge that walk rows, and of the rows that workers keep."""

from __future__ import annotations

import math

import numpy as np

from ntkdask.cache import DEFAULT_BYTES
from ntkdask.kernels import Kernel
from ntkdask.planning.resources import BASE_BYTES
from ntkdask.preprocessing import FittedPreprocessor, Step
from ntkdask.workflows.kernel_ridge.sizes import KernelRidgePlan, KernelShape
from ntkdask.workflows.model import POINTS_BYTES


def row_tasks(shape: KernelShape, kernel: Kernel, steps: tuple[Step, ...], plan: KernelRidgePlan) -> dict[str, int]:
    """Peak bytes of preprocessing, gathering and predicting, the process and its caches included, by label."""
    itemsize, rows, d = np.dtype(plan.dtype).itemsize, plan.batch_rows, math.prod(shape.row_shape)
    fitted = FittedPreprocessor(shape.row_shape, plan.dtype)
    work = fitted.workspace_bytes(rows, shape.row_shape, itemsize)
    work += max((step.workspace_bytes(rows, shape.row_shape, itemsize) for step in steps), default=0)
    states = 2 * sum(8 * d * (d if step.needs == "covariance" else 2) for step in steps)
    batch = 2 * rows * shape.row_bytes + work + states + rows * d * itemsize
    labels = 8 * shape.n_train * (shape.k + 1)
    block = plan.block_rows
    predict = kernel.workspace_bytes(rows, block, itemsize, shape.row_shape) + 8 * rows * block
    # a block of points is held twice while it is read, and small sets of points stay in the cache
    predict += 3 * block * d * itemsize + min(POINTS_BYTES, shape.n_train * d * itemsize)
    memory = {"gather-rows": batch + 3 * labels + 8 * 2**20, "predict": batch + 2 * labels + predict}
    if any(step.needs == "covariance" for step in steps):
        memory["preprocess-fit"] = 9 * 8 * d * d
    held = BASE_BYTES + plan.held_bytes + plan.cache_bytes
    return {name: held + size for name, size in memory.items()}


def kept_rows_bytes(shape: KernelShape, dtype: str) -> int:
    """Preprocessed training rows that building the matrices leaves in a worker's cache, fold by fold."""
    return min(DEFAULT_BYTES, shape.n_runs * shape.n_train * math.prod(shape.row_shape) * np.dtype(dtype).itemsize)
