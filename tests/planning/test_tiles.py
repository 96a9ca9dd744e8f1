"""Tiles: every index once, largest rows, budget errors with their numbers."""

import re
from itertools import pairwise

import numpy as np
import pytest

from ntkdask.errors import InputError, MemoryBudgetError
from ntkdask.planning.tiles import Plan, Tile, TileGrid, largest_rows, row_tiles, slab_rows

SIZES = [(1, 1, 1, 1), (7, 5, 2, 3), (8, 8, 8, 8), (9, 4, 100, 3), (12, 12, 5, 4)]


@pytest.mark.parametrize(("n", "m", "tile_rows", "tile_cols"), SIZES)
def test_a_grid_covers_every_entry_once(n, m, tile_rows, tile_cols):
    count = np.zeros((n, m), int)
    tiles = list(TileGrid(n, m, tile_rows, tile_cols))
    for tile in tiles:
        assert 1 <= tile.rows == tile.stop - tile.start <= tile_rows
        assert 1 <= tile.col_stop - tile.col_start <= tile_cols
        assert (tile.start, tile.col_start) == (tile.index[0] * tile_rows, tile.index[1] * tile_cols)
        count[tile.start : tile.stop, tile.col_start : tile.col_stop] += 1
    assert (count == 1).all()
    assert len({tile.index for tile in tiles}) == len(tiles) == -(-n // tile_rows) * -(-m // tile_cols)


@pytest.mark.parametrize(("n", "size"), [(1, 1), (10, 3), (9, 3), (5, 100)])
def test_a_symmetric_grid_keeps_one_triangle(n, size):
    tiles = list(TileGrid(n, n, size, size, symmetric=True))
    blocks = -(-n // size)
    assert len(tiles) == blocks * (blocks + 1) // 2
    count = np.zeros((n, n), int)
    for tile in tiles:
        rows, columns = slice(tile.start, tile.stop), slice(tile.col_start, tile.col_stop)
        count[rows, columns] += 1
        if tile.index[0] != tile.index[1]:
            count.T[rows, columns] += 1
    assert (count == 1).all()


@pytest.mark.parametrize("sizes", [(0, 1, 1, 1), (1, 1, 0, 1), (1, 1, 1, -2)])
def test_empty_grids_are_refused(sizes):
    with pytest.raises(InputError, match="at least 1"):
        TileGrid(*sizes)


@pytest.mark.parametrize("sizes", [(4, 5, 2, 2), (4, 4, 2, 3)])
def test_symmetric_grids_are_square(sizes):
    with pytest.raises(InputError, match="square"):
        TileGrid(*sizes, symmetric=True)


@pytest.mark.parametrize(("n", "size"), [(1, 1), (10, 3), (9, 3), (5, 100), (0, 4)])
def test_row_tiles_cover_every_row_once(n, size):
    tiles = row_tiles(n, size)
    assert [i for t in tiles for i in range(t.start, t.stop)] == list(range(n))
    assert [t.index for t in tiles] == [(i,) for i in range(len(tiles))]


def test_tiles_say_where_they_are():
    assert str(Tile((2,), 8, 12)) == "tile (2,) (rows 8:12)"
    assert str(Tile((2, 1), 8, 12, 4, 8)) == "tile (2, 1) (rows 8:12, columns 4:8)"


@pytest.mark.parametrize("n", [1, 511, 512, 1024, 5000, 20_001, 32_767, 32_768, 50_000, 581_012, 16_000_000])
def test_slabs_are_a_power_of_two_of_stated_sizes(n):
    size = slab_rows(n)
    count = len(range(0, n, size))
    assert count & (count - 1) == 0
    if n >= 32_768:
        assert 4096 <= size <= 8192
    else:
        assert count <= 8
        assert count == 1 or size >= 512


def test_four_times_the_rows_never_make_fewer_slabs():
    counts = [-(-n // slab_rows(n)) for n in (512 * 4**k for k in range(10))]
    assert all(b >= a for a, b in pairwise(counts))


@pytest.mark.parametrize("per_row", [1, 7, 1000])
@pytest.mark.parametrize("budget", [1000, 64_000, 10**6])
def test_largest_rows_fits_and_the_next_step_does_not(budget, per_row):
    rows = largest_rows(budget, lambda r: per_row * r, limit=10_000, subject="task")
    assert per_row * rows <= budget
    assert rows <= 10_000
    if rows < 10_000:
        assert per_row * (rows + (1 if rows < 64 else 64)) > budget
        assert rows <= 64 or rows % 64 == 0


def test_largest_rows_may_be_the_limit():
    assert largest_rows(10**9, lambda r: r, limit=1001, subject="task") == 1001
    assert largest_rows(10**9, lambda r: r, limit=1, subject="task") == 1
    assert largest_rows(10**9, lambda r: 10**9, limit=77, subject="task") == 77


def test_budget_errors_name_the_numbers():
    expected = re.escape("ntk_random needs 2 GiB for one row, but a task has 1.5 GiB. Use n_components <= 9.")
    with pytest.raises(MemoryBudgetError, match=expected):
        largest_rows(3 * 2**29, lambda r: r * 2**31, 10, "ntk_random", "Use n_components <= 9.")
    with pytest.raises(MemoryBudgetError, match="Give the workers more memory"):
        largest_rows(1, lambda r: 2 * r, 10, "task")


@pytest.mark.parametrize("arguments", [{}, {"tile_rows": 1, "tile_cols": 2, "memory_bytes": 3, "dtype": "float32"}])
def test_plans(arguments):
    plan = Plan(**arguments)
    assert (plan.tile_rows, plan.dtype) == (arguments.get("tile_rows"), arguments.get("dtype"))


@pytest.mark.parametrize(
    "arguments", [{"tile_rows": 0}, {"tile_cols": 2.0}, {"memory_bytes": True}, {"dtype": "float16"}, {"tile_rows": -1}]
)
def test_bad_plans_are_refused(arguments):
    with pytest.raises(InputError, match=f"Plan: {next(iter(arguments))} is"):
        Plan(**arguments)
