"""The arithmetic of a known pace: work of all tiles, sizes of tiles, time that passes."""

import math

import pytest

from ntkdask.planning.pace import LEAST_TILE_SECONDS, MOST_TASKS, TILE_SECONDS, TILES_PER_SLOT, Pace, elapsed_seconds
from ntkdask.planning.tiles import TileGrid

MILLISECOND, MICROSECOND = 1e-3, 1e-6


def pace(entry_seconds=MILLISECOND, share=1.0, row_seconds=0.0) -> Pace:
    return Pace(entry_seconds, share, row_seconds, 8, 1)


@pytest.mark.parametrize(
    ("n", "m", "tile"), [(100, None, 16), (96, None, 32), (5, None, 8), (1, None, 1), (70, 40, 16)]
)
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_work_is_that_of_all_tiles(n, m, tile, share):
    """Against the tiles themselves."""
    grid = TileGrid(n, m or n, tile, tile, symmetric=m is None)
    one, work = pace(share=share, row_seconds=0.3), 0.0
    for t in grid:
        on_diagonal = m is None and t.start == t.col_start
        work += one.tile_seconds(t.rows, t.col_stop - t.col_start) * (share if on_diagonal else 1.0)
        work += 0.3 * t.rows if on_diagonal else 0.0
    assert one.work_seconds(n, m, tile) == pytest.approx(work)


@pytest.mark.parametrize("entry_seconds", [1e-9, 7 * MICROSECOND, 1.5 * MILLISECOND, 0.2, 30.0, 1000.0])
@pytest.mark.parametrize("slots", [1, 2, 8, 64])
@pytest.mark.parametrize(
    ("n", "m"), [(1, None), (300, None), (4000, None), (60_000, None), (1000, 5), (10_000, 50_000)]
)
def test_tiles_take_minutes_and_go_round(entry_seconds, slots, n, m):
    one = pace(entry_seconds)
    rows = one.tile_rows(n, m, slots)
    assert rows >= 1
    most = n if m is None else m
    took = one.tile_seconds(min(rows, n), min(rows, most))
    # where there would be more tiles than there may be, they take what they take: 200·201/2 is about MOST_TASKS
    least = math.ceil(n / 200 if m is None else math.sqrt(n * m / MOST_TASKS))
    assert rows <= max(1, least) or took <= TILE_SECONDS * (1 + 1e-9)
    # cut further for the sake of the slots: so that there are enough, and not below the least
    blocks = -(-n // rows)
    tiles = blocks * (blocks + 1) // 2 if m is None else blocks * -(-m // rows)
    assert rows == 1 or tiles >= TILES_PER_SLOT * slots or took <= LEAST_TILE_SECONDS * (1 + 1e-9)
    assert tiles <= 1.8 * MOST_TASKS  # rows are rounded down to whole steps
    # not smaller than it needs to be: a size up breaks a bound
    larger = 2 * rows + 64
    blocks = -(-n // larger)
    tiles = blocks * (blocks + 1) // 2 if m is None else blocks * -(-m // larger)
    assert tiles < TILES_PER_SLOT * slots or one.tile_seconds(larger, min(larger, most)) > TILE_SECONDS


@pytest.mark.parametrize(
    ("entry_seconds", "n_train", "n_total", "slots", "rows"),
    [
        (MILLISECOND, 4000, 10_000, 2, 22),  # 4 s a row, 90 s a task
        (MILLISECOND, 100_000, 10_000, 2, 1),  # 100 s a row
        (MILLISECOND, 4000, 160, 2, 10),  # 16 tasks
        (MILLISECOND, 4000, 10, 2, 1),
        (MICROSECOND, 1000, 1000, 1, 2000),  # more rows than there are
    ],
)
def test_rows_of_a_task_of_predictions(entry_seconds, n_train, n_total, slots, rows):
    assert pace(entry_seconds).predict_rows(n_train, n_total, slots) == rows


def test_elapsed_seconds():
    assert elapsed_seconds(100.0, 10, 1) == pytest.approx(100.0)
    assert elapsed_seconds(100.0, 10, 4) == pytest.approx(30.0)
    assert elapsed_seconds(100.0, 10, 50) == pytest.approx(10.0)
    assert elapsed_seconds(0.0, 0, 3) == 0.0
