"""Stored factors: not positive definite, of something else, damaged; right-hand sides, alphas and scales that make no sense."""

import sys

import cloudpickle
import numpy as np
import pytest
from factor_examples import SIDE, N, kernel, lower, store_matrix
from job_examples import Counter, Killed, damage

from ntkdask.errors import DamagedTileError, FingerprintError, InputError, StoreError
from ntkdask.matrices.factor import Factor, open_factor
from ntkdask.matrices.factorize import factorize
from ntkdask.store import TileStore

# workers cannot import this module
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def matrix(tmp_path):
    return store_matrix(tmp_path, kernel())


# --- not positive definite ----------------------------------------------------------------------------------------


def advised(error):
    return float(str(error.value).split("Use alpha >= ")[1].split()[0].rstrip(".,"))


@pytest.mark.parametrize(("first", "second"), [(0, 1), (3, 40), (60, 89)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_repeated_rows_without_a_ridge(tmp_path, first, second, dtype):
    """Reported at the tile of the repetition, with an alpha that works; what was committed stays."""
    matrix = store_matrix(tmp_path, kernel(d=60, repeat=[(first, second)]), dtype=dtype)
    tile = second // 16
    rows = rf"rows {tile * 16}:{min(tile * 16 + 16, N)} \(first at row {second}\)"
    with pytest.raises(
        InputError, match=rf"alpha=0 is not positive definite to rounding in {rows}.*Repeated rows"
    ) as error:
        factorize(matrix, 0.0, url=tmp_path / "factor")
    store = TileStore.open(tmp_path / "factor")
    assert [i for i in range(SIDE) if not store.pending([(i, i)])] == list(range(tile))
    alpha = advised(error)
    assert 0 < alpha < (1e-3 if dtype == "float32" else 1e-10)
    factorize(matrix, alpha, url=tmp_path / "factor", overwrite=True)


def test_the_error_names_the_eigenvalue_and_the_tile_on_a_cluster(tmp_path, client):
    matrix = kernel(d=60)
    matrix[50, 50] -= 2.0
    schur = matrix[50, 50] - matrix[50, :50] @ np.linalg.solve(matrix[:50, :50], matrix[:50, 50])
    with pytest.raises(InputError, match=r"rows 48:64 \(first at row 50\).*smallest eigenvalue -") as error:
        factorize(store_matrix(tmp_path, matrix), 0.0, url=tmp_path / "factor", client=client)
    assert any("cholesky-tile: block (3, 3)" in note for note in error.value.__notes__)
    assert advised(error) >= -schur
    factorize(tmp_path / "matrix", advised(error), url=tmp_path / "larger")


def test_a_float32_matrix_with_slightly_negative_eigenvalues(tmp_path):
    """Smooth kernels in float32 do this: eigenvalues fall below rounding, -1e-7·λ_max; the advice is of that size."""
    matrix = kernel(d=2).astype("float32")
    values = np.linalg.eigvalsh(matrix.astype(float))
    assert -1e-6 * values[-1] < values[0] < 0
    with pytest.raises(
        InputError, match=r"float32 entries and a float64 factor.*or a matrix and a factor in float64"
    ) as error:
        factorize(store_matrix(tmp_path, matrix, dtype="float32"), 0.0, url=tmp_path / "factor")
    assert -values[0] < advised(error) < 1e-5 * values[-1]
    factorize(tmp_path / "matrix", advised(error), url=tmp_path / "larger")


def test_values_that_are_no_numbers_are_named(tmp_path):
    matrix = kernel()
    matrix[40, 20] = matrix[20, 40] = np.nan
    with pytest.raises(InputError, match=r"NaN or infinite values in rows 32:48"):
        factorize(store_matrix(tmp_path, matrix), 0.1, url=tmp_path / "factor")


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"alpha": 0.2}, "alpha: stored 0.1, asked 0.2"),
        ({"scale": np.full(N, 2.0)}, "scale: stored None"),
        ({"dtype": "float32"}, "dtype: stored 'float64', asked 'float32'"),
        ({"fingerprint": {"run": 2}}, "run: stored None, asked 2"),
    ],
)
def test_a_factor_of_something_else_is_refused(tmp_path, matrix, changes, line):
    url = tmp_path / "factor"
    before = lower(factorize(matrix, 0.1, url=url).url)
    with pytest.raises(FingerprintError, match=line):
        factorize(matrix, **{"alpha": 0.1, "url": url, **changes})
    assert (lower(url) == before).all()
    factor = factorize(matrix, **{"alpha": 0.1, "url": url, **changes}, overwrite=True)
    assert (lower(factor.url) != before).any() or "fingerprint" in changes


def test_a_factor_of_another_matrix_is_refused(tmp_path, matrix):
    factorize(matrix, 0.1, url=tmp_path / "factor")
    other = store_matrix(tmp_path, kernel(), tile=32, name="other")
    with pytest.raises(FingerprintError, match="tile_shape"):
        factorize(other, 0.1, url=tmp_path / "factor")


def test_a_damaged_tile_is_named(tmp_path, matrix):
    factor = factorize(matrix, 0.1, url=tmp_path / "factor")
    calls = {
        tmp_path / "factor": lambda: factor.solve(np.ones(N)),
        matrix: lambda: factorize(matrix, 1.0, url=tmp_path / "b"),
    }
    for url, call in calls.items():
        damage(url, (4, 2))
        with pytest.raises(DamagedTileError, match=r"tile \(4, 2\) of .* is damaged"):
            call()


@pytest.mark.parametrize("alpha", [-1.0, np.nan, np.inf, "1", None, True, [1.0]])
def test_alphas_that_make_no_sense(tmp_path, matrix, alpha):
    with pytest.raises(InputError, match="alpha is"):
        factorize(matrix, alpha, url=tmp_path / "factor")


@pytest.mark.parametrize("scale", [np.ones(N - 1), np.ones((N, 1)), np.full(N, -1.0), np.full(N, np.nan)])
def test_scales_that_make_no_sense(tmp_path, matrix, scale):
    with pytest.raises(InputError, match=rf"scale has shape .* expected \({N},\)"):
        factorize(matrix, 0.1, url=tmp_path / "factor", scale=scale)


def test_a_left_out_row_without_a_ridge(tmp_path, matrix):
    with pytest.raises(InputError, match=r"scale is 0 in 2 rows \(first 5\) and alpha is 0"):
        factorize(matrix, 0.0, url=tmp_path / "factor", scale=np.where(np.isin(np.arange(N), (5, 9)), 0.0, 1.0))


def test_matrices_that_cannot_be_factorised(tmp_path, matrix):
    full = TileStore.create(tmp_path / "full", shape=(4, 4), tile_shape=(2, 2), dtype="float64", fingerprint={})
    with pytest.raises(InputError, match="not stored as a symmetric matrix"):
        factorize(full.path, 0.1, url=tmp_path / "factor")
    with pytest.raises(StoreError, match="holds no Zarr array"):
        factorize(tmp_path / "nowhere", 0.1, url=tmp_path / "factor")
    with pytest.raises(InputError, match="a factor in 'float16'"):
        factorize(matrix, 0.1, url=tmp_path / "factor", dtype="float16")
    TileStore.open(matrix).forget([(2, 1)])
    with pytest.raises(StoreError, match=r"1 tiles of .* not computed yet"):
        factorize(matrix, 0.1, url=tmp_path / "factor")
    assert not (tmp_path / "factor").exists()


def test_factors_that_are_none(tmp_path, matrix):
    with pytest.raises(InputError, match="not a Cholesky factor"):
        Factor(str(matrix))
    with pytest.raises(Killed):
        factorize(matrix, 0.1, url=tmp_path / "factor", listener=Counter(2))
    with pytest.raises(StoreError, match=r"not computed yet. Run `factorize` again"):
        open_factor(tmp_path / "factor")


@pytest.mark.parametrize(
    ("rhs", "message"),
    [
        (np.ones(N + 1), rf"expected \({N},\)"),
        (np.ones((N, 2, 2)), "shape"),
        (3.0, "shape"),
        (np.where(np.arange(N) == 7, np.nan, 1.0), "row 7"),
    ],
)
def test_right_hand_sides_that_make_no_sense(tmp_path, matrix, rhs, message):
    factor = factorize(matrix, 0.1, url=tmp_path / "factor")
    with pytest.raises(InputError, match=message):
        factor.solve(rhs)
