"""A pseudo-NTK beside a full eNTK: arrays and stored tiles give what is written out; spectra against LAPACK."""

import json
import math

import numpy as np
import pytest
from cluster_examples import PaperCluster

from ntkdask.errors import InputError, MemoryBudgetError
from ntkdask.execution import site
from ntkdask.execution.map_reduce import reduce_tiles
from ntkdask.networks import fully_connected
from ntkdask.planning.tiles import Plan, TileGrid
from ntkdask.solvers.kernel_measures import kernel_sums, pseudo_of, stacked
from ntkdask.store import TileStore
from ntkdask.workflows.empirical import comparison as module
from ntkdask.workflows.empirical.comparison import Ends, KernelComparison, compare_kernels
from ntkdask.workflows.kernel_matrix.build import kernel_matrix

MEASURES = ("off_diagonal_ratio", "pooled_off_diagonal_ratio", "frobenius", "norm_difference")


def kernels(n=11, outputs=3, seed=0, parameters=70):
    """(Θ (n, n, O, O), Θ̂ (n, n)), symmetric."""
    left = np.random.default_rng(seed).standard_normal((n, outputs, parameters))
    theta = np.tensordot(left, left, (2, 2)).transpose(0, 2, 1, 3)
    return theta, pseudo_of(theta)


def put(path, matrix, tile, symmetric=True):
    """The matrix as a complete store of tiles."""
    tile_cols = tile if isinstance(tile, int) else tile[1]
    tile = tile if isinstance(tile, int) else tile[0]
    store = TileStore.create(
        path,
        shape=matrix.shape,
        tile_shape=(tile, tile_cols),
        dtype=matrix.dtype.name,
        fingerprint={"of": path.name},
        triangle="symmetric" if symmetric else None,
    )
    for t in TileGrid(*matrix.shape, tile, tile_cols, symmetric=symmetric):
        block = matrix[t.start : t.stop, t.col_start : t.col_stop]
        store.record(store.commit(t.index, np.ascontiguousarray(block), 0.0))
    return path


def assert_same(found, theta, pseudo, tolerance=1e-12):
    __tracebackhide__ = True
    expected = kernel_sums(theta, pseudo)
    assert (found.pairs, found.outputs) == (expected.pairs, expected.outputs)
    for name in MEASURES:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=tolerance), name


def test_arrays_in_either_layout():
    theta, pseudo = kernels()
    for full, own, outputs in (
        (theta, pseudo, None),
        (theta, None, None),
        (stacked(theta), pseudo, None),
        (stacked(theta), None, 3),
    ):
        found = compare_kernels(full, own, outputs=outputs)
        assert_same(found, theta, pseudo)
        for ends, matrix in ((found.pseudo, pseudo), (found.full, stacked(theta))):
            values = np.linalg.eigvalsh(matrix)
            assert ends.lambda_max == pytest.approx(values[-1], rel=1e-12)
            assert ends.lambda_min == pytest.approx(values[0], rel=1e-9)
            assert ends.condition == pytest.approx(values[-1] / values[0], rel=1e-9)
            assert ends.resolved
        ratio = found.pseudo.lambda_max / found.full.lambda_max
        assert found.lambda_max_difference == pytest.approx(abs(ratio - 1), rel=1e-9)
        kappa = found.pseudo.condition / found.full.condition
        assert found.condition_difference == pytest.approx(abs(kappa - 1), rel=1e-9)


@pytest.mark.parametrize("tile", [9, 6, 4, 2, 33])
def test_stored_tiles_of_any_size(tmp_path, tile):
    """Tiles that cut through the blocks of a pair, too."""
    theta, pseudo = kernels()
    full = put(tmp_path / "full", stacked(theta), tile)
    own = put(tmp_path / "pseudo", pseudo, 4)
    found = compare_kernels(full, own)
    assert_same(found, theta, pseudo)
    direct = compare_kernels(theta, pseudo)
    assert found.full.lambda_min == pytest.approx(direct.full.lambda_min, rel=1e-9)
    assert_same(compare_kernels(full, outputs=3, spectra=False), theta, pseudo)
    assert_same(compare_kernels(theta, own), theta, pseudo)


def test_a_rectangle_has_measures_but_no_spectrum(tmp_path):
    theta, pseudo = kernels()
    theta, pseudo = theta[:, :5], pseudo[:, :5]
    full = put(tmp_path / "full", stacked(theta), (6, 9), symmetric=False)
    own = put(tmp_path / "pseudo", pseudo, (4, 2), symmetric=False)
    for f, p in ((theta, pseudo), (full, own)):
        assert_same(compare_kernels(f, p, spectra=False), theta, pseudo)
        with pytest.raises(InputError, match="symmetric"):
            compare_kernels(f, p)


def test_a_cluster_gives_the_same_bits(tmp_path, two_workers):
    theta, pseudo = kernels(20)
    full, own = put(tmp_path / "full", stacked(theta), 9), put(tmp_path / "pseudo", pseudo, 4)
    here, there = (compare_kernels(full, own, spectra=False, client=c) for c in (None, two_workers))
    assert here == there


@pytest.mark.parametrize("tile", [12, 5])
def test_kernels_of_a_module_in_tiles(tmp_path, tile):
    """As `kernel_matrix` stores them; beside the same kernels in memory."""
    pytest.importorskip("torch")
    from ntkdask.kernels.empirical import EmpiricalNTK, PseudoNTK
    from ntkdask.modules.descriptions import FiniteNetwork

    net = FiniteNetwork(fully_connected(1), 40, 3, (5,))
    x = np.random.default_rng(0).standard_normal((14, 5))
    full, pseudo, plan = EmpiricalNTK(net, output="full"), PseudoNTK(net), Plan(tile_rows=tile, tile_cols=tile)
    kernel_matrix(full, x, url=tmp_path / "full", plan=plan)
    kernel_matrix(pseudo, x, url=tmp_path / "pseudo", plan=plan)
    found, direct = compare_kernels(tmp_path / "full", tmp_path / "pseudo"), compare_kernels(full(x), pseudo(x))
    assert_same(found, full(x), pseudo(x), 1e-10)
    for side in ("full", "pseudo"):
        assert getattr(found, side).lambda_max == pytest.approx(getattr(direct, side).lambda_max, rel=1e-10)


def test_blocks_that_no_task_can_hold_are_refused_before_anything_runs(tmp_path):
    theta, pseudo = kernels()
    full, own = put(tmp_path / "full", stacked(theta), 9), put(tmp_path / "pseudo", pseudo, 4)
    workers = PaperCluster(memory_limit=2**28)
    for spectra in (False, True):
        with pytest.raises(MemoryBudgetError, match=r"tiles of 9 x 9 needs .* but a task has 230 MiB"):
            compare_kernels(full, own, spectra=spectra, client=workers)
    assert workers.asked == 2
    with pytest.raises(MemoryBudgetError, match="a task has 1 MiB"):
        compare_kernels(full, own, plan=Plan(memory_bytes=2**20))
    # arrays are measured here, whatever the workers have
    assert compare_kernels(theta, pseudo, client=workers).full is not None
    assert workers.asked == 2


def test_one_triangle_is_read_once(tmp_path, monkeypatch):
    theta, _ = kernels(12)
    full = put(tmp_path / "full", stacked(theta), 9)
    seen = []

    def counted(task, combine, tiles, *arguments, **keywords):
        seen.extend(tiles)
        return reduce_tiles(task, combine, tiles, *arguments, **keywords)

    monkeypatch.setattr(site, "reduce_tiles", counted)
    compare_kernels(full, outputs=3, spectra=False)
    assert len(seen) == 4 * 5 // 2


def test_eigenvalues_below_rounding_are_named():
    """A kernel of low rank, in float32: its smallest eigenvalue is noise."""
    theta, pseudo = kernels(parameters=6)
    found = compare_kernels(theta.astype("float32"), pseudo.astype("float32"))
    assert not found.full.resolved
    assert not found.pseudo.resolved
    table = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert table["frobenius"] == found.frobenius
    assert table["full"]["lambda_max"] == found.full.lambda_max


def test_tables_have_no_infinities():
    singular = Ends(2.0, 0.0, math.inf, 1e-7)
    found = KernelComparison(1, 2, math.inf, 0.1, 0.2, 0.3, Ends(2.0, 1.0, 2.0, 1e-7), singular)
    table = found.to_json()
    assert table["off_diagonal_ratio"] is table["condition_difference"] is table["lambda_min_difference"] is None
    assert table["full"]["condition"] is None
    assert table["lambda_max_difference"] == 0.0
    assert KernelComparison(1, 2, 0.1, 0.1, 0.2, 0.3).to_json()["lambda_max_difference"] is None


def test_a_missing_pseudo_kernel_is_said_before_anything_runs(tmp_path, monkeypatch):
    theta, _ = kernels()
    full = put(tmp_path / "full", stacked(theta), 9)
    monkeypatch.setattr(module, "_stored_sums", None)
    with pytest.raises(InputError, match=r"spectra=False"):
        compare_kernels(full, outputs=3)


def test_what_does_not_belong_together(tmp_path):
    theta, pseudo = kernels()
    full = put(tmp_path / "full", stacked(theta), 9)
    for f in (stacked(theta), full):
        with pytest.raises(InputError, match="Give outputs where there is no pseudo-NTK"):
            compare_kernels(f)
        with pytest.raises(InputError, match="Give outputs"):
            compare_kernels(f, outputs=4)
    with pytest.raises(InputError, match=r"beside a pseudo-NTK of shape \(10, 11\)"):
        compare_kernels(stacked(theta), pseudo[:10])
    with pytest.raises(InputError, match="the pseudo-NTK is stored, too"):
        compare_kernels(full, pseudo)
    skew = theta.copy()
    skew[0, 1] += 1
    with pytest.raises(InputError, match="not symmetric"):
        compare_kernels(skew, pseudo)
