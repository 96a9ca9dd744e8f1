"""Kernel ridge regression with exact CNTKs on a subset of CIFAR-10, beside fully connected NTKs and RBF on the same split.

    python -m benchmarks.cifar_cntk --import cifar10-images.tar.xz          # once: the archive becomes data/cifar10.zarr
    python -m benchmarks.cifar_cntk [--train 200] [--test 1000] [--kernels NAME ...] [--folder runs/cifar-cntk] [--threads 2]

Training images: the first --train of a seeded, class-balanced order, so that a larger subset holds the smaller ones; test images: the
first --test of the test part's. Pixels are standardised per channel, mean and deviation of the training images. Matrices lie in
--folder, tile by tile: stopped (Ctrl-C) and started again, a run goes on where it was. Ridge on one-hot targets with an intercept;
alpha, and the γ of RBF, by exact leave-one-out on the training images. Prints accuracy on the test images, seconds of kernel
tiles in all sessions together, and pairs a second; at t seconds a pair --train n takes about t·(n²/2 + n·test).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial.distance import pdist

import ntkdask as nd
from ntkdask import threads
from ntkdask.datasets import Dataset, import_dataset, open_parts
from ntkdask.errors import DataError, UserError
from ntkdask.kernels import NTK, RBF, Kernel
from ntkdask.solvers.dual import DualEigh
from ntkdask.store import TileStore

KERNELS: dict[str, Callable[[], Kernel]] = {
    "cntk-3": lambda: NTK(nd.convolutional(3)),
    "cntk-10": lambda: NTK(nd.convolutional(10)),
    "myrtle-5": lambda: NTK(nd.myrtle(5)),
    "myrtle-7": lambda: NTK(nd.myrtle(7)),
    "myrtle-10": lambda: NTK(nd.myrtle(10)),
    "ntk-1": lambda: NTK(nd.fully_connected(1)),
    "ntk-3": lambda: NTK(nd.fully_connected(3)),
}
GAMMAS = tuple(2.0**k for k in range(-4, 3))
"""Of RBF, over the median squared distance of training images."""

ALPHAS = np.logspace(-8, 1, 28)
"""Over the mean of the kernel's diagonal."""

SEED = 0
SLOW_TILE, FAST_TILE = 64, 512
"""Rows of a tile: a few seconds of a convolutional kernel, so that little is lost when a run stops."""


@dataclass(frozen=True)
class Split:
    """Standardised images (n, 32, 32, 3) float32 and labels (n,) of the training and the test rows."""

    x: np.ndarray
    labels: np.ndarray
    x_test: np.ndarray
    labels_test: np.ndarray
    classes: int

    @property
    def targets(self) -> np.ndarray:
        """(n, classes) one-hot."""
        return np.eye(self.classes)[self.labels]


@dataclass(frozen=True)
class Fit:
    """What one kernel gave. error: of leave-one-out; seconds and pairs: of all kernel tiles."""

    alpha: float
    error: float
    accuracy: float
    seconds: float
    pairs: int


def balanced(labels: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """(n,) rows in an order in which every class comes once in each round, so that prefixes are balanced; DataError with too few."""
    classes = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    rounds = min(map(len, classes))
    if n > rounds * len(classes):
        raise DataError(
            f"{n} balanced images were asked for, there are {rounds * len(classes)}. Use --train or --test {rounds * len(classes)}."
        )
    return np.stack([rows[:rounds] for rows in classes], axis=1).reshape(-1)[:n]


def read_split(url: str, n: int, n_test: int) -> Split:
    """The subset of the dataset at `url` with the parts train and test; DataError where there is none."""
    parts = open_parts(url)
    if not {"train", "test"} <= set(parts):
        raise DataError(f"{url} has parts {', '.join(parts)}; expected train and test. Import CIFAR-10 again.")
    x, labels = _rows(parts["train"], n)
    x_test, labels_test = _rows(parts["test"], n_test)
    mean, deviation = x.mean((0, 1, 2), dtype=np.float64), x.std((0, 1, 2), dtype=np.float64)
    x, x_test = (((side - mean) / deviation).astype(np.float32) for side in (x, x_test))
    return Split(x, labels, x_test, labels_test, len(parts["train"].class_names or ()))


def _rows(data: Dataset, n: int) -> tuple[np.ndarray, np.ndarray]:
    labels = data.targets(0, data.n)
    chosen = balanced(labels, n, np.random.default_rng(SEED))
    return data.x[np.sort(chosen)].compute()[np.argsort(np.argsort(chosen))], labels[chosen]


def stored(kernel: Kernel, folder: Path, tile: int, x: np.ndarray, y: np.ndarray | None = None) -> np.ndarray:
    """kernel(x, y), float32, computed tile by tile into `folder` where it is not there yet."""
    plan = nd.Plan(tile_rows=tile, tile_cols=tile, dtype="float32")
    return nd.kernel_matrix(kernel, x, y, url=folder, plan=plan).compute()


def fit(kernel: Kernel, split: Split, folder: Path, tile: int) -> Fit:
    """Matrices, leave-one-out over ALPHAS, accuracy."""
    n, m = len(split.x), len(split.x_test)
    matrix = stored(kernel, folder / "train", tile, split.x)
    scale = float(np.mean(np.diag(matrix)))
    ridge = DualEigh.factorise(matrix, split.targets)
    errors = ridge.leave_one_out_path(list(scale * ALPHAS))
    best = int(np.argmin(errors))
    cross = stored(kernel, folder / "test", tile, split.x_test, split.x)
    predicted = ridge.solve(scale * ALPHAS[best]).predict(cross).argmax(axis=1)
    receipts = [r for part in ("train", "test") for r in TileStore.open(folder / part).receipts.values()]
    accuracy = float(np.mean(predicted == split.labels_test))
    return Fit(
        scale * ALPHAS[best], float(errors[best]), accuracy, sum(r.seconds for r in receipts), n * (n + 1) // 2 + n * m
    )


def fit_rbf(split: Split, folder: Path) -> tuple[float, Fit]:
    """(γ, fit): the γ of GAMMAS with the smallest leave-one-out error."""
    distance = float(np.median(pdist(split.x[:1000].reshape(min(1000, len(split.x)), -1), "sqeuclidean")))
    fits = {g / distance: fit(RBF(g / distance), split, folder / f"gamma-{g:g}", FAST_TILE) for g in GAMMAS}
    gamma = min(fits, key=lambda g: fits[g].error)
    return gamma, fits[gamma]


def report(name: str, found: Fit, note: str = "") -> None:
    """Print one line of results."""
    print(
        f"{name:12s} accuracy {found.accuracy:.2%}, leave-one-out error {found.error:.4f}, alpha {found.alpha:.3g}{note}; "
        f"{found.seconds:.1f} s of tiles for {found.pairs:,} pairs, {found.pairs / found.seconds:.4g} a second",
        flush=True,
    )


def run(a: argparse.Namespace) -> None:
    """Every kernel on the one split."""
    split = read_split(a.data, a.train, a.test)
    print(
        f"{len(split.x)} training and {len(split.x_test)} test images, {split.classes} classes, {a.threads} threads, "
        f"load {os.getloadavg()}"
    )
    folder = a.folder / f"{a.train}-{a.test}"
    for name in a.kernels:
        if name == "rbf":
            gamma, found = fit_rbf(split, folder / name)
            report(name, found, f", γ {gamma:.3g}")
        else:
            kernel = KERNELS[name]()
            tile = SLOW_TILE if kernel.network.takes_images else FAST_TILE
            report(name, fit(kernel, split, folder / name, tile))


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--import", dest="source", metavar="ARCHIVE", help="the images in class folders, imported first"
    )
    parser.add_argument("--data", default="data/cifar10.zarr")
    parser.add_argument("--train", type=int, default=200)
    parser.add_argument("--test", type=int, default=1000)
    known = (*KERNELS, "rbf")
    parser.add_argument(
        "--kernels", nargs="+", choices=known, default=["ntk-1", "ntk-3", "rbf", "cntk-3"], metavar="NAME"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/cifar-cntk"))
    parser.add_argument("--threads", type=int, default=threads.current())
    return parser.parse_args(arguments)


def main() -> None:
    """Import where asked, run, print."""
    a = parsed()
    if a.source:
        import_dataset(a.source, a.data)
    try:
        open_parts(a.data)
    except UserError as error:
        print(f"skipped: {error}\nImport the images first: python -m benchmarks.cifar_cntk --import ARCHIVE")
        return
    with threads.limited(a.threads):
        run(a)


if __name__ == "__main__":
    main()
