"""StoredKernel against dense twins: products, columns, diagonal; equal bits anywhere; what is cached and what travels."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from job_examples import damage
from scipy.sparse.linalg import eigsh

from ntkdask.cache import ByteCache
from ntkdask.errors import DamagedTileError, InputError, StoreError
from ntkdask.matrices import operator as operators
from ntkdask.matrices import stored as matrices
from ntkdask.matrices.operator import StoredKernel
from ntkdask.matrices.stored import StoredMatrix
from ntkdask.solvers.products import tile_product, tile_products
from ntkdask.store import TileStore


def stored(folder: Path, matrix: np.ndarray, tile: tuple[int, int], triangle: str | None, name: str = "k") -> Path:
    """`matrix` in a tile store, every tile committed."""
    store = TileStore.create(
        folder / name,
        shape=matrix.shape,
        tile_shape=tile,
        dtype=matrix.dtype,
        fingerprint={"name": name},
        triangle=triangle,
    )
    for index in store.indices():
        store.record(store.commit(index, np.ascontiguousarray(matrix[store.slices(index)])))
    return folder / name


def symmetric(n: int = 70, dtype: str = "float64", seed: int = 0) -> np.ndarray:
    a = np.random.default_rng(seed).normal(size=(n, n)).astype(dtype)
    return a @ a.T + np.eye(n, dtype=dtype)


def vectors(n: int, k: int | None = None, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=n if k is None else (n, k))


def agree(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.shape == expected.shape and np.abs(found - expected).max(initial=0) <= 1e-14 * np.abs(expected).sum()


@pytest.fixture
def small_panels(monkeypatch):
    """Two tiles of 16 x 16 float64 a panel."""
    monkeypatch.setattr(matrices, "PANEL_BYTES", 2 * 16 * 16 * 8)
    monkeypatch.setattr(operators, "PANEL_BYTES", 2 * 16 * 16 * 8)


# products of one tile


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(1, 1), (31, 70), (32, 5), (100, 33)])
@pytest.mark.parametrize("k", [1, 3])
def test_tile_products(dtype, shape, k):
    tile = vectors(*shape).astype(dtype)
    right, left = vectors(shape[1], k, 2), vectors(shape[0], k, 3)
    wide = tile.astype(np.float64)
    down, across = tile_products(tile, right, left)
    assert agree(down, wide @ right)
    assert agree(across, wide.T @ left)
    assert agree(tile_product(tile, right), wide @ right)
    assert {a.dtype.name for a in (down, across)} == {"float64"}


def test_float32_tiles_lose_nothing_in_products():
    """Against float32 arithmetic, which errs by about 1e-7 of the sum of magnitudes."""
    tile, v = np.abs(vectors(512, 512)).astype("float32"), np.abs(vectors(512, 1))
    exact = tile.astype(np.longdouble) @ v
    assert np.abs(tile_product(tile, v) / exact - 1).max() < 1e-14
    assert np.abs(tile @ v.astype("float32") / exact - 1).max() > 1e-8


# the operator


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("n", "tile"), [(1, 1), (1, 8), (70, 16), (70, 70), (70, 100), (64, 16), (9, 1)])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_symmetric_matrix(tmp_path, small_panels, dtype, n, tile, weighted):
    matrix = symmetric(n, dtype)
    scale = np.sqrt(np.arange(n) % 4) if weighted else None
    a = StoredKernel(stored(tmp_path, matrix, (tile, tile), "symmetric"), scale=scale)
    s = np.ones(n) if scale is None else scale
    dense = s[:, None] * matrix.astype(np.float64) * s
    assert a.shape == (n, n)
    for k in (None, 0, 1, 5):
        assert agree(a @ vectors(n, k), dense @ vectors(n, k))
    wanted = [n - 1, 0, n // 2, n - 1]
    assert agree(a.columns(wanted), dense[:, wanted])
    assert a.columns([]).shape == (n, 0)
    assert agree(a.diagonal(), np.diag(dense))
    assert a.trace() == pytest.approx(np.trace(dense), rel=1e-14)
    whole = a.read_dense()
    assert whole.flags.f_contiguous
    assert agree(whole, dense)
    assert a.read_dense("float32").dtype == "float32"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("tile", [(16, 9), (23, 60), (1, 60), (100, 100)])
def test_a_rectangular_matrix(tmp_path, small_panels, dtype, tile):
    matrix = vectors(23, 60).astype(dtype)
    tile = tuple(min(t, s) for t, s in zip(tile, matrix.shape, strict=True))
    a = StoredKernel(stored(tmp_path, matrix, tile, None))
    dense = matrix.astype(np.float64)
    assert agree(a @ vectors(60), dense @ vectors(60))
    assert agree(a @ vectors(60, 4), dense @ vectors(60, 4))
    assert agree(a.columns([59, 3, 3]), dense[:, [59, 3, 3]])
    assert agree(a.read_dense(), dense)
    for call in (a.diagonal, a.trace, a.to_scipy):
        with pytest.raises(InputError, match="is for square matrices"):
            call()
    with pytest.raises(InputError, match="scale is for square matrices"):
        StoredKernel(a.matrix.url, scale=np.ones(23))


def test_a_lower_matrix(tmp_path):
    """A stored factor: what is above its diagonal is zero."""
    matrix = np.tril(symmetric())
    a = StoredKernel(stored(tmp_path, matrix, (16, 16), "lower"))
    assert agree(a @ vectors(70, 2), matrix @ vectors(70, 2))
    assert agree(a.columns([0, 69, 30]), matrix[:, [0, 69, 30]])
    assert agree(a.read_dense(), matrix)
    with pytest.raises(InputError, match="is not stored as symmetric"):
        a.to_scipy()


def test_panels_cover_every_tile_once(tmp_path, small_panels):
    matrix = StoredMatrix.open(stored(tmp_path, symmetric(), (16, 16), "symmetric"))
    panels = matrix.panels()
    assert [index for panel in panels for index in panel] == TileStore.open(matrix.url).indices()
    sizes = [sum(TileStore.open(matrix.url).read(index).nbytes for index in panel) for panel in panels]
    assert max(sizes) <= matrices.PANEL_BYTES
    assert all(a + b > matrices.PANEL_BYTES for a, b in itertools.pairwise(sizes))


@pytest.mark.parametrize("k", [1, 3])
def test_loop_and_clusters_give_equal_bits(tmp_path, small_panels, two_workers, k):
    url, v = stored(tmp_path, symmetric(dtype="float32"), (16, 16), "symmetric"), vectors(70, k)
    scale = np.linspace(0, 2, 70)
    bits = {
        (StoredKernel(url, client, scale, threads, cache) @ v).tobytes()
        for client in (None, two_workers)
        for threads in (1, 2)
        for cache in (0, 2**20)
    }
    assert len(bits) == 1
    a, here = StoredKernel(url, two_workers, scale), StoredKernel(url, None, scale)
    assert (a.columns([3, 69]) == here.columns([3, 69])).all()
    assert (a.diagonal() == here.diagonal()).all()


def test_large_vectors_travel_as_a_state(tmp_path, monkeypatch, two_workers):
    url, saved = stored(tmp_path, symmetric(), (16, 16), "symmetric"), []
    save = operators.save_state
    monkeypatch.setattr(operators, "save_state", lambda *a: saved.append(save(*a)) or saved[-1])
    a = StoredKernel(url, two_workers)
    small = a @ vectors(70, 3)
    assert saved == []
    monkeypatch.setattr(operators, "TASK_BYTES", 1000)
    assert (a @ vectors(70, 3) == small).all()
    assert len(saved) == 1
    # and nothing of it stays
    assert [p.name for p in tmp_path.iterdir()] == ["k"]


def test_a_cache_keeps_the_same_panels(tmp_path, monkeypatch, small_panels):
    """What fits is read once; the rest for every product, and does not push out what is kept."""
    url = stored(tmp_path, symmetric(80), (16, 16), "symmetric")
    reads = []
    read = TileStore.read
    monkeypatch.setattr(TileStore, "read", lambda self, index: reads.append(index) or read(self, index))
    monkeypatch.setattr(operators, "shared", ByteCache(0))
    monkeypatch.setattr(operators, "DEFAULT_BYTES", 0)
    panels = StoredMatrix.open(url).panels()
    for kept in (0, 3, len(panels)):
        a = StoredKernel(url, cache_bytes=kept * operators.PANEL_BYTES)
        operators.shared.clear()
        for product in range(3):
            reads.clear()
            a @ vectors(80)
            expected = panels if product == 0 else panels[kept:]
            assert sorted(reads) == sorted(index for panel in expected for index in panel)


def test_the_cache_holds_one_matrix(tmp_path, monkeypatch):
    """The next fold's tiles take the place of the last one's: a plan counts one matrix."""
    monkeypatch.setattr(operators, "shared", ByteCache(0))
    for seed in (0, 1):
        url = stored(tmp_path / str(seed), symmetric(seed=seed), (16, 16), "symmetric")
        a = StoredKernel(url, cache_bytes=2**30)
        a @ vectors(70)
        held = []
        operators.shared.discard(lambda key: held.append(key[1]))  # noqa: B023
        assert set(held) == {a.matrix.token}


def test_a_matrix_written_anew_is_not_taken_for_the_old_one(tmp_path):
    for seed in (0, 1):
        matrix = symmetric(seed=seed)
        path = stored(tmp_path / "other", matrix, (16, 16), "symmetric", "k")
        a = StoredKernel(path, cache_bytes=2**30)
        assert agree(a @ vectors(70), matrix @ vectors(70))
        assert agree(a @ vectors(70), matrix @ vectors(70))
        TileStore.open(path).forget(TileStore.open(path).indices())


def test_scipy_takes_it(tmp_path):
    matrix = symmetric()
    a = StoredKernel(stored(tmp_path, matrix, (16, 16), "symmetric")).to_scipy()
    assert agree(a @ vectors(70), matrix @ vectors(70))
    assert agree(a.matmat(vectors(70, 2)), matrix @ vectors(70, 2))
    assert agree(a.T @ vectors(70), matrix @ vectors(70))
    top = eigsh(a, k=2, which="LA", v0=np.ones(70), return_eigenvectors=False)
    assert np.allclose(np.sort(top), np.linalg.eigvalsh(matrix)[-2:])


def test_a_task_holds_what_is_declared(tmp_path):
    a = StoredKernel(stored(tmp_path, symmetric(), (16, 16), "symmetric"), threads=2)
    assert a.task_bytes(1) >= 2 * 16 * 16 * 8 + 2 * 70 * 8
    assert a.task_bytes(10) > a.task_bytes(1)


# refusals


@pytest.mark.parametrize("v", [np.ones(69), np.ones((69, 2)), np.ones((70, 2, 2)), 3.0])
def test_vectors_that_do_not_fit(tmp_path, v):
    a = StoredKernel(stored(tmp_path, symmetric(), (16, 16), "symmetric"))
    with pytest.raises(InputError, match=r"is \(70, 70\) and was multiplied with .*; give \(70,\) or \(70, k\)"):
        a @ v


@pytest.mark.parametrize(
    "scale", [np.ones(69), -np.ones(70), np.full(70, np.nan), np.full(70, np.inf), np.ones((70, 1))]
)
def test_scales_that_do_not_fit(tmp_path, scale):
    with pytest.raises(InputError, match=r"scale has shape .*expected \(70,\) finite numbers >= 0"):
        StoredKernel(stored(tmp_path, symmetric(), (16, 16), "symmetric"), scale=scale)


@pytest.mark.parametrize("indices", [[70], [-1], [3, 100]])
def test_columns_outside(tmp_path, indices):
    a = StoredKernel(stored(tmp_path, symmetric(), (16, 16), "symmetric"))
    with pytest.raises(InputError, match="has columns 0 to 69"):
        a.columns(indices)


def test_an_incomplete_matrix_is_refused(tmp_path):
    path = stored(tmp_path, symmetric(), (16, 16), "symmetric")
    TileStore.open(path).chunk_path((3, 1)).unlink()
    with pytest.raises(StoreError, match="has 14 of its 15 tiles"):
        StoredKernel(path)
    with pytest.raises(StoreError, match="holds no Zarr array"):
        StoredKernel(tmp_path)
    sides = {"shape": (2, 2, 2), "tile_shape": (2, 2, 2), "dimensions": ("a", "b", "c")}
    cube = TileStore.create(tmp_path / "cube", **sides, dtype="f4", fingerprint={})
    with pytest.raises(StoreError, match="a matrix has two axes"):
        StoredKernel(cube.path)


@pytest.mark.parametrize("on_cluster", [False, True])
def test_a_damaged_tile_is_named(tmp_path, two_workers, on_cluster):
    path = stored(tmp_path, symmetric(), (16, 16), "symmetric")
    a = StoredKernel(path, two_workers if on_cluster else None)
    damage(path, (3, 1))
    with pytest.raises(DamagedTileError, match=r"tile \(3, 1\)"):
        a @ vectors(70)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_on_the_gpu(tmp_path, dtype):
    matrix = symmetric(3000, dtype)
    a = StoredKernel(stored(tmp_path, matrix, (1100, 1100), "symmetric"), cache_bytes=2**30, device=True)
    for _ in range(2):
        assert agree(a @ vectors(3000, 3), matrix.astype(np.float64) @ vectors(3000, 3))
    assert agree(a.columns([5, 2999]), matrix[:, [5, 2999]].astype(np.float64))
    assert agree(a.diagonal(), np.diag(matrix).astype(np.float64))
