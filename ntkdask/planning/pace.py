"""How fast a kernel or a map is, and what follows: seconds of a tile, of a matrix, of Gram sums; tiles of minutes and not hours.

Pure arithmetic on what `calibrate` and `calibrate_features` measured. A tile is what a killed worker loses and what is dealt to
workers: for a kernel of a microsecond an entry memory bounds it, for one of a millisecond time does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

TILE_SECONDS = 90.0
"""A tile takes no longer, if it can."""
LEAST_TILE_SECONDS = 2.0
"""Nor is it cut to take less: scheduling, reading and writing a tile take some hundredths of a second."""
TILES_PER_SLOT = 8
"""So many tiles for every slot leave the last ones to finish within an eighth of the whole."""
MOST_TASKS = 20_000
"""Tiles of a matrix, and tasks of predictions, are no more than about these, however slow the kernel: each is a file and a receipt."""


@dataclass(frozen=True)
class Pace:
    """A kernel's measured speed. entry_seconds: of an entry k(x_i, y_j) in one task, while every slot runs one.

    A tile of r rows with themselves takes symmetric_share of a tile of different rows, at least the half of one triangle, and r times
    row_seconds for its exact diagonal. rows: of the square tile that was measured; threads: of the task. side_seconds: of a row
    or a column of a tile, whatever the other side (a network's passes over it); 0 for kernels that are entries alone.
    """

    entry_seconds: float
    symmetric_share: float
    row_seconds: float
    rows: int
    threads: int
    side_seconds: float = 0.0

    def tile_seconds(self, rows: int, columns: int) -> float:
        """Seconds of a tile of different rows."""
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
        """Rows of a tile, and columns where there are so many.

        At most TILE_SECONDS, and TILES_PER_SLOT tiles for every slot where that leaves each LEAST_TILE_SECONDS; about MOST_TASKS tiles
        in all, even if they take longer.
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
        """Rows of a square tile of different rows that takes so long."""
        e, f = self.entry_seconds, self.side_seconds
        return (math.sqrt(f * f + e * seconds) - f) / e

    def _bounded(self, shared: float, least: float, rows_in: Callable[[float], float]) -> int:
        wanted = max(rows_in(LEAST_TILE_SECONDS), min(rows_in(TILE_SECONDS), shared))
        return max(1, int(max(wanted, math.ceil(least))))


@dataclass(frozen=True)
class RowPace:
    """A feature map's measured speed in one task, while every slot runs one: seconds of a row, on batches of `rows` with `threads`
    threads; product_rate: flops a second of Gram sums, counted as m² a row of m features.
    """

    row_seconds: float
    product_rate: float
    rows: int
    threads: int

    def product_seconds(self, rows: int, m: int) -> float:
        """Seconds of the Gram sums of rows of m features, the features not counted."""
        return rows * float(m) ** 2 / self.product_rate


def _blocks(tiles: int) -> int:
    """The least b with b(b + 1)/2 >= tiles: blocks of rows with so many tiles in a triangle."""
    return math.ceil((math.sqrt(1 + 8 * tiles) - 1) / 2)


def elapsed_seconds(work_seconds: float, tasks: int, slots: int) -> float:
    """Seconds until equal tasks of `work_seconds` in all are done: ⌈tasks/slots⌉ rounds of one each."""
    return work_seconds * -(-tasks // slots) / max(1, tasks)
