"""How long tiles, matrices and Gram sums take at a measured pace, and tiles that take minutes instead of hours.

Pure arithmetic on the measurements of `workflows.kernel_matrix.calibrate` and `workflows.calibrate_features`. A killed worker loses
a tile, and workers are dealt tiles: for a kernel of a microsecond an entry memory bounds the tile, for one of a millisecond time does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

TILE_SECONDS = 90.0
"""Most seconds of a tile, and of a slab's features, where `MOST_TASKS` allows it."""
LEAST_TILE_SECONDS = 2.0
"""Least seconds of a tile: scheduling, reading and writing it take some hundredths of a second."""
TILES_PER_SLOT = 8
"""Tiles for every slot: with so many, the slots that finish early wait for at most an eighth of the whole time."""
MOST_TASKS = 20_000
"""About the most tiles of a matrix or tasks of predictions, however slow the kernel: each is a file and a receipt."""


@dataclass(frozen=True)
class Pace:
    """A kernel's measured speed in one task, while every slot runs one.

    Parameters
    ----------
    entry_seconds : float
        Seconds of an entry k(x_i, y_j).
    symmetric_share : float
        A tile of rows with themselves takes this part of a tile of different rows: at least the half of one triangle.
    row_seconds : float
        Seconds a row of the exact diagonal of a tile of rows with themselves.
    rows : int
        Rows of the square tile that was measured.
    threads : int
        Threads of the task that was measured.
    side_seconds : float
        Seconds of each row and each column of a tile, whatever the other side (a network's passes over them); 0 for kernels without.
    """

    entry_seconds: float
    symmetric_share: float
    row_seconds: float
    rows: int
    threads: int
    side_seconds: float = 0.0

    def tile_seconds(self, rows: int, columns: int) -> float:
        """Seconds of a tile of different rows and columns."""
        return self.entry_seconds * rows * columns + self.side_seconds * (rows + columns)

    def work_seconds(self, n: int, m: int | None, tile_rows: int) -> float:
        """Seconds of all tiles one after the other; m=None: one triangle of (n, n) in square tiles of tile_rows."""
        if m is not None:
            sides = n * -(-m // tile_rows) + m * -(-n // tile_rows)
            return self.entry_seconds * n * m + self.side_seconds * sides
        # a diagonal tile passes over its rows once
        sides = n * -(-n // tile_rows)
        whole, last = divmod(n, tile_rows)
        diagonal = whole * tile_rows**2 + last**2
        return (
            self.entry_seconds * (self.symmetric_share * diagonal + (n * n - diagonal) / 2)
            + self.row_seconds * n
            + (self.side_seconds * sides)
        )

    def tile_rows(self, n: int, m: int | None, slots: int) -> int:
        """Rows of a tile, and its columns where there are so many; m=None: of one triangle of (n, n).

        A tile takes at most TILE_SECONDS, and every slot gets TILES_PER_SLOT tiles where each then takes LEAST_TILE_SECONDS. There
        are about MOST_TASKS tiles at most, even if they take longer.
        """
        if m is None:
            shared, least = (n / _blocks(count) for count in (TILES_PER_SLOT * slots, MOST_TASKS))
        else:
            shared, least = (math.sqrt(n * m / count) for count in (TILES_PER_SLOT * slots, MOST_TASKS))
        rows = self._bounded(shared, least, self._square_rows)
        if m is not None and min(n, m) <= rows:
            rows = self.predict_rows(min(n, m), max(n, m), slots)
        step = 64 if rows >= 64 else 16 if rows >= 16 else 1
        return rows // step * step

    def predict_rows(self, n_train: int, n_total: int, slots: int) -> int:
        """Rows that one task predicts from n_train training rows, bounded as `tile_rows` is."""
        shared, least = n_total / (TILES_PER_SLOT * slots), n_total / MOST_TASKS
        return self._bounded(shared, least, lambda seconds: seconds / (self.entry_seconds * n_train))

    def _square_rows(self, seconds: float) -> float:
        """Rows of a square tile of different rows that takes `seconds`."""
        e, f = self.entry_seconds, self.side_seconds
        return (math.sqrt(f * f + e * seconds) - f) / e

    def _bounded(self, shared: float, least: float, rows_in: Callable[[float], float]) -> int:
        """Rows within the bounds on a tile's time and on the number of tiles.

        shared: rows that give every slot its tiles. least: rows that give MOST_TASKS tiles. rows_in: rows of a tile of so many
        seconds.
        """
        wanted = max(rows_in(LEAST_TILE_SECONDS), min(rows_in(TILE_SECONDS), shared))
        return max(1, int(max(wanted, math.ceil(least))))


@dataclass(frozen=True)
class RowPace:
    """A feature map's measured speed in one task, while every slot runs one.

    Parameters
    ----------
    row_seconds : float
        Seconds of the features of a row.
    product_rate : float
        Flops a second of Gram sums, counted as m² a row of m features.
    rows : int
        Rows of a batch that was measured.
    threads : int
        Threads of the task that was measured.
    """

    row_seconds: float
    product_rate: float
    rows: int
    threads: int

    def tile_rows(self, n: int, most: int) -> int:
        """Rows of a tile of n rows' features that takes TILE_SECONDS, at most `most`; there are about MOST_TASKS tiles at most."""
        rows = max(1, math.ceil(n / MOST_TASKS), int(min(n, TILE_SECONDS / max(self.row_seconds, 1e-12))))
        return min(most, rows if rows < 64 else rows // 64 * 64)

    def product_seconds(self, rows: int, m: int) -> float:
        """Seconds of the Gram sums of rows of m features, without the features."""
        return rows * float(m) ** 2 / self.product_rate


def _blocks(tiles: int) -> int:
    """The least b with b(b + 1)/2 >= tiles: a triangle of b rows of blocks has at least so many tiles."""
    return math.ceil((math.sqrt(1 + 8 * tiles) - 1) / 2)


def elapsed_seconds(work_seconds: float, tasks: int, slots: int) -> float:
    """Seconds until `tasks` equal tasks of `work_seconds` in all are done: ⌈tasks/slots⌉ rounds of one a slot."""
    return work_seconds * -(-tasks // slots) / max(1, tasks)
