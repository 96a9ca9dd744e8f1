"""The sections of a job file as validated, frozen dataclasses: what keys there are, of which types, with which defaults."""

from __future__ import annotations

import dataclasses
from typing import Any

from pydantic.dataclasses import dataclass

from ntkdask.jobs.tables import STRICT, Bool, Int, Number, Tables
from ntkdask.modules import descriptions  # noqa: F401 (networks of PyTorch by name; imports no torch)


@dataclass(frozen=True, config=STRICT)
class SplitSpec:
    """The table data.split: either `folds` or a `test` fraction; left out when the data have train and test parts.

    Parameters
    ----------
    folds : int or None
        Outer folds of a cross-validation, 2 to 100.
    test : float or None
        Share of the rows that are test rows, between 0 and 1.
    shuffle : bool
        At random by the seed; false: in contiguous stretches of rows.
    """

    folds: Int | None = None
    test: Number | None = None
    shuffle: Bool = True


@dataclass(frozen=True, config=STRICT)
class DataSpec:
    """The table [data] of a job: either `url`, or `train` and `test`.

    Parameters
    ----------
    url : str or None
        A dataset with parts train and test, or one that `split` splits.
    train : str or None
        A dataset of training rows.
    test : str or None
        A dataset of test rows.
    split : SplitSpec or None
        How the rows of `url` are split.
    preprocess : tuple
        Preprocessing steps in their order, names or tables; they are fitted to training rows alone.
    train_rows : int or None
        How many training rows are taken, at random by the seed. None: all.
    test_rows : int or None
        The same for test rows.
    """

    url: str | None = None
    train: str | None = None
    test: str | None = None
    split: SplitSpec | None = None
    preprocess: tuple[Any, ...] = ()
    train_rows: Int | None = None
    test_rows: Int | None = None


@dataclass(frozen=True, config=STRICT)
class SolverSpec:
    """The table [solver] of a job; see `RidgeOptions`, with a [kernel] `KernelRidgeOptions`.

    Parameters
    ----------
    alphas : float, tuple of float or dict
        A number, a list, or { logspace = [from exponent, to exponent, count] }.
    selection : str or None
        How one of several alphas is chosen. None: "gcv" for features, "auto" for a kernel.
    solver : str
        The factorisation, or "cg" with a kernel; "auto" chooses.
    fit_intercept : bool
        Whether to fit an intercept, which is not penalised.
    folds : int
        Groups of training rows for selection "kfold", 2 to 100.
    holdout : float
        Share of training rows that selection "holdout" holds out, between 0 and 1.
    tolerance : float or None
        Relative residual at which "cg" stops; only with a kernel.
    max_iterations : int or None
        Iterations of "cg", at most; only with a kernel.
    """

    alphas: Number | tuple[Number, ...] | dict[str, Any] = (1.0,)
    selection: str | None = None
    solver: str = "auto"
    fit_intercept: Bool = True
    folds: Int = 5
    holdout: Number = 0.2
    tolerance: Number | None = None
    max_iterations: Int | None = None


@dataclass(frozen=True, config=STRICT)
class RunSpec:
    """The table [run] of a job: seed, dtype, sizes, and the local cluster.

    Parameters
    ----------
    seed : int
        Of the split, the folds, and of features and kernels that have none of their own.
    dtype : str
        "float32" or "float64", of the numerics.
    worker_memory : str or None
        Memory of a worker of a local cluster, such as "2 GiB".
    n_workers : int or None
        Workers of a local cluster.
    slab_rows : int or None
        Rows that one task of a reduction over features sums.
    tile_rows : int or None
        Rows and columns of a kernel matrix's tiles.
    folder : str or None
        Folder of the results. None: runs/<name>.
    """

    seed: Int = 0
    dtype: str = "float32"
    worker_memory: str | None = None
    n_workers: Int | None = None
    slab_rows: Int | None = None
    tile_rows: Int | None = None
    folder: str | None = None


SHARED_TABLES: Tables = {("data",): DataSpec, ("data", "split"): SplitSpec, ("run",): RunSpec}
"""The tables that job files and sweep files share."""


@dataclass(frozen=True, config=STRICT)
class JobSpec:
    """A whole job file: ridge on [features], on a [kernel], or without both on the rows themselves.

    Parameters
    ----------
    name : str
        Name of the run and of its folder.
    data : DataSpec
        Datasets, split, preprocessing.
    network : dict or None
        The network of the features or the kernel; a table here, as the next two are, of which `build_job` makes objects.
    features : dict or None
        The feature map.
    kernel : dict or None
        The kernel.
    solver : SolverSpec
        Alphas, how to choose among them, how to solve.
    run : RunSpec
        Seed, dtype, sizes, workers.
    """

    name: str
    data: DataSpec
    network: dict[str, Any] | None = None
    features: dict[str, Any] | None = None
    kernel: dict[str, Any] | None = None
    solver: SolverSpec = dataclasses.field(default_factory=SolverSpec)
    run: RunSpec = dataclasses.field(default_factory=RunSpec)
