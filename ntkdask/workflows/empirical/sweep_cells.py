"""What the experiments of Mohamadi & Sutherland sweep over: networks, widths, training epochs and seeds, and the data they share.

A cell is one network at one width, seed and epoch. `sweep.py` computes cells, `sweep_table.py` keeps them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkdask.errors import InputError
from ntkdask.modules.protocol import TrainingProtocol
from ntkdask.solvers.linearized import one_hot
from ntkdask.states import content_digest

KERNELS = ("pntk", "entk")


@dataclass(frozen=True, eq=False)
class SweepData:
    """Standardised rows and their labels, the same for every network.

    Parameters
    ----------
    x : array (n, *s), floating
        Training rows; images are NHWC.
    labels : array (n,), integers
        Their classes, 0..C−1.
    x_test : array (m, *s), floating
        Test rows.
    labels_test : array (m,), integers
        Their classes.
    n_classes : int
        C.

    Raises
    ------
    InputError
        For rows that are not floating, rows without labels, and labels out of range.
    """

    x: np.ndarray
    labels: np.ndarray
    x_test: np.ndarray
    labels_test: np.ndarray
    n_classes: int

    def __post_init__(self) -> None:
        for name, rows, labels in (("x", self.x, self.labels), ("x_test", self.x_test, self.labels_test)):
            if not len(rows) or len(rows) != len(labels) or rows.dtype.kind != "f":
                raise InputError(
                    f"the sweep's {name} has shape {rows.shape} and dtype {rows.dtype} for {len(labels)} labels; give floating rows, "
                    "one for each label."
                )
            one_hot(labels, self.n_classes)

    @property
    def digest(self) -> str:
        """Digest of all rows and labels."""
        return content_digest(self.x, self.labels, self.x_test, self.labels_test)


@dataclass(frozen=True)
class PntkSweep:
    """The networks, epochs and seeds of a sweep, and what is computed of each.

    Parameters
    ----------
    networks : mapping
        {name: {width: description}}: descriptions of modules whose outputs are the classes. Their seed is replaced by each of `seeds`.
    seeds : sequence of int
        Of the initial weights, and of the order of rows in training.
    protocol : TrainingProtocol or None
        Training on the rows of the kernels; its checkpoints are the epochs of the cells. None: initial weights alone.
    kernels : sequence of str
        ("pntk", "entk"), or ("pntk",) where the (n·O)² numbers of the full eNTK are too many: then there are no differences.
    alpha : float
        The ridge of f_lin, 0 in the paper. Where a kernel is singular to rounding, the least safe one is used, and its cell says so.
    dtype : str
        Of rows and kernels, "float32" or "float64"; float64 tells smaller eigenvalues from rounding.

    Raises
    ------
    InputError
        For a sweep without networks, widths or seeds, names that are no file names, and values that cannot be.
    """

    networks: Mapping[str, Mapping[int, Any]]
    seeds: Sequence[int] = (0, 1, 2)
    protocol: TrainingProtocol | None = None
    kernels: Sequence[str] = KERNELS
    alpha: float = 0.0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not self.networks or not all(self.networks.values()) or not self.seeds:
            raise InputError("a sweep takes at least one network with one width, and one seed.")
        for name, by_width in self.networks.items():
            bad = [w for w, d in by_width.items() if not (isinstance(w, int) and w > 0 and hasattr(d, "build"))]
            if bad or not name or set(name) & set("/\\"):
                raise InputError(
                    f"network {name!r} of the sweep: give {{width: description}} under a plain name, such as "
                    f'{{"FCN": {{64: FiniteNetwork(...)}}}}; found {bad or name!r}.'
                )
        if not set(self.kernels) <= set(KERNELS) or "pntk" not in self.kernels:
            raise InputError(f'a sweep\'s kernels are {tuple(self.kernels)}; use ("pntk", "entk") or ("pntk",).')
        if self.dtype not in ("float32", "float64") or not 0 <= self.alpha < math.inf:
            raise InputError(
                f"a sweep's dtype is {self.dtype!r} and alpha {self.alpha}; use 'float32' or 'float64', alpha >= 0."
            )

    @property
    def epochs(self) -> tuple[int, ...]:
        """Epochs at which there is a cell."""
        return (0,) if self.protocol is None else self.protocol.checkpoints


@dataclass(frozen=True)
class Cell:
    """One network at one width, seed and epoch; its description has the seed."""

    network: str
    width: int
    seed: int
    epoch: int
    description: Any

    @property
    def name(self) -> str:
        """The name of its file, without the suffix."""
        return f"{self.network}-w{self.width:05d}-s{self.seed}-e{self.epoch:04d}"


def cells_of(sweep: PntkSweep) -> Iterator[list[Cell]]:
    """The cells of a sweep, those of one training at a time, by epoch."""
    for network, by_width in sweep.networks.items():
        for width, description in by_width.items():
            for seed in sweep.seeds:
                seeded = dataclasses.replace(description, seed=seed)
                yield [Cell(network, width, seed, epoch, seeded) for epoch in sweep.epochs]
