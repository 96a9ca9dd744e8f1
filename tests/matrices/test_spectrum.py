"""spectrum against dense LAPACK: exact, by Lanczos, on arrays and stores; what did not converge says so."""

import json
import math
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
from job_examples import Counter

from ntkdask.errors import InputError, MemoryBudgetError, StoreError
from ntkdask.kernels import NTK, ArcCosine
from ntkdask.matrices import spectrum as module
from ntkdask.matrices.spectrum import spectrum
from ntkdask.networks import fully_connected
from ntkdask.planning.resources import Resources
from ntkdask.planning.tiles import Plan
from ntkdask.store import TileStore
from ntkdask.workflows.kernel_matrix.build import kernel_matrix

ALPHAS = (1e-3, 1.0, 100.0)


def matrix_of(n: int = 200, d: int = 12, depth: int = 3) -> np.ndarray:
    return NTK(fully_connected(depth))(np.random.default_rng(0).normal(size=(n, d)))


def stored(folder: Path, n: int = 200, d: int = 12, depth: int = 3, tile: int = 48, dtype: str = "float64") -> str:
    x = np.random.default_rng(0).normal(size=(n, d))
    kernel_matrix(NTK(fully_connected(depth)), x, url=folder / "k", plan=Plan(tile, dtype=dtype))
    return str(folder / "k")


def dimension(values: np.ndarray, alpha: float) -> float:
    return float((values / (values + alpha)).sum())


@pytest.mark.parametrize("source", ["array", "dask", "url", "cluster"])
def test_dense(tmp_path, client, source):
    dense = matrix_of()
    given = (
        {"array": dense, "dask": da.from_array(dense, chunks=50)}.get(source) if source in ("array", "dask") else None
    )
    found = spectrum(
        stored(tmp_path) if given is None else given,
        5,
        statistical_dimension=ALPHAS,
        client=client if source == "cluster" else None,
    )
    values = np.linalg.eigvalsh(dense)
    assert (found.method, found.n, found.products) == ("dense", 200, 0)
    assert np.allclose(found.eigenvalues, values[::-1][:5], rtol=1e-12)
    assert found.lambda_max == found.eigenvalues[0]
    assert found.lambda_min == pytest.approx(values[0], rel=1e-9)
    assert found.condition == pytest.approx(values[-1] / values[0], rel=1e-9)
    assert found.trace == pytest.approx(np.trace(dense), rel=1e-12)
    assert found.residuals == (0.0,) * 5
    assert found.lambda_min_converged
    for s, alpha in zip(found.statistical_dimension, ALPHAS, strict=True):
        assert (s.alpha, s.standard_error) == (alpha, 0.0)
        assert s.value == pytest.approx(dimension(values, alpha), rel=1e-9)


@pytest.mark.parametrize(("dtype", "on_cluster"), [("float32", False), ("float64", False), ("float64", True)])
def test_lanczos(tmp_path, client, dtype, on_cluster):
    url = stored(tmp_path, 100, dtype=dtype)
    found = spectrum(
        url,
        5,
        method="lanczos",
        statistical_dimension=ALPHAS,
        client=client if on_cluster else None,
        tolerance=1e-8,
        n_probes=30,
        n_steps=40,
        cache_bytes=2**28,
    )
    # of the matrix as it is stored: float32 tiles are a slightly other matrix
    values = np.linalg.eigvalsh(kernel_values(url))
    assert found.method == "lanczos"
    assert np.allclose(found.eigenvalues, values[::-1][:5], rtol=1e-10)
    assert max(found.residuals) <= 1e-6 * values[-1]
    assert found.lambda_min_converged
    assert found.lambda_min_residual <= 1e-8 * values[-1]
    assert abs(found.lambda_min - values[0]) <= 1e-8 * values[-1]
    assert found.trace == pytest.approx(values.sum(), rel=1e-10)
    assert found.products > 30 * 40
    for s, alpha in zip(found.statistical_dimension, ALPHAS, strict=True):
        assert abs(s.value - dimension(values, alpha)) <= 4 * s.standard_error + 1e-6 * s.value


def kernel_values(url: str) -> np.ndarray:
    from ntkdask.matrices.stored import StoredMatrix

    return StoredMatrix.open(url).read("float64")


def test_equal_seeds_give_equal_numbers_anywhere(tmp_path, client):
    url = stored(tmp_path, 60)
    options = {
        "k": 3,
        "method": "lanczos",
        "statistical_dimension": (1.0,),
        "n_probes": 4,
        "n_steps": 8,
        "threads": 1,
        "max_products": 20,
        "cache_bytes": 2**28,
    }
    rows = [
        {**spectrum(url, client=c, seed=seed, **options).to_json(), "seconds": 0.0}
        for c, seed in ((None, 0), (client, 0), (None, 1))
    ]
    assert rows[0] == rows[1]
    assert rows[0]["statistical_dimension"] != rows[2]["statistical_dimension"]


def test_what_did_not_converge_says_so(tmp_path):
    """Few products on an ill-conditioned matrix: an upper bound of the smallest eigenvalue, and by how much it may err."""
    url = stored(tmp_path, 200, d=2, depth=1)
    found = spectrum(url, 3, method="lanczos", max_products=10)
    values = np.linalg.eigvalsh(kernel_values(url))
    assert not found.lambda_min_converged
    assert found.lambda_min > values[0] > 0
    assert found.lambda_min_residual > 1e-6 * found.lambda_max
    assert np.abs(values - found.lambda_min).min() <= found.lambda_min_residual
    assert found.condition < values[-1] / values[0]


def test_a_singular_matrix_has_no_condition_number():
    x = np.random.default_rng(0).normal(size=(30, 5))
    twice = ArcCosine(1)(np.concatenate([x, x]))
    found = spectrum(twice)
    assert abs(found.lambda_min) < 1e-12 * found.lambda_max
    assert found.condition == math.inf
    assert json.loads(json.dumps(found.to_json()))["condition"] is None


@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_rows(tmp_path, n):
    found = spectrum(stored(tmp_path, n))
    assert len(found.eigenvalues) == n
    assert np.allclose(found.eigenvalues, np.linalg.eigvalsh(matrix_of(n))[::-1])
    with pytest.raises(InputError, match=f"has {n} rows.*at least 8"):
        spectrum(tmp_path / "k", method="lanczos")


def test_more_eigenvalues_than_iterations_can_find(tmp_path):
    found = spectrum(stored(tmp_path, 30), 100, method="lanczos")
    assert len(found.eigenvalues) == 28
    assert np.allclose(found.eigenvalues, np.linalg.eigvalsh(matrix_of(30))[::-1][:28])


def test_the_plan_chooses(tmp_path, monkeypatch):
    url = stored(tmp_path)
    assert spectrum(url).method == "dense"
    monkeypatch.setattr(module, "DENSE_ROWS", 199)
    products = {"max_products": 5}
    assert spectrum(url, 3, **products).method == "lanczos"
    assert spectrum(url, 3, method="dense").method == "dense"
    assert spectrum(url, 3, plan=Plan(memory_bytes=2**30)).method == "dense"
    assert spectrum(url, 3, plan=Plan(memory_bytes=2**20), **products).method == "lanczos"
    for arguments in ((url, {"method": "dense"}), (matrix_of(), {})):
        with pytest.raises(MemoryBudgetError, match=r"of a 200 x 200 matrix needs .* but a task has 1 MiB"):
            spectrum(arguments[0], plan=Plan(memory_bytes=2**20), **arguments[1])


def test_listeners_hear(tmp_path, client):
    listener = Counter()
    spectrum(stored(tmp_path), client=client, listener=listener)
    assert (listener.stages, listener.labels) == ([("spectrum", 1, 0)], ["spectrum"])


@pytest.mark.parametrize(
    ("matrix", "options", "words"),
    [
        (np.ones((3, 4)), {}, r"the matrix has shape \(3, 4\)"),
        (np.ones((0, 0)), {}, "n >= 1"),
        (np.ones(4), {}, r"shape \(4,\)"),
        (np.ones((4, 4), int), {}, "dtype int64"),
        (np.full((4, 4), np.nan), {}, "the matrix has NaN or infinite values in rows 0, 1"),
        (np.array([[1.0, 2.0], [3.0, 1.0]]), {}, "is not symmetric"),
        (np.eye(4), {"method": "lanczos"}, "is for stored matrices"),
        (np.eye(4), {"method": "power"}, "method is 'power'; use one of auto, dense, lanczos"),
        (np.eye(4), {"k": 0}, "k=0"),
        (np.eye(4), {"tolerance": 0.0}, "tolerance=0"),
        (np.eye(4), {"max_products": 0}, "max_products=0"),
        (np.eye(4), {"statistical_dimension": (1.0, 0.0)}, "alpha=0; it needs 0 < alpha"),
        (np.eye(4), {"statistical_dimension": (math.nan,)}, "alpha=nan"),
    ],
)
def test_bad_input(matrix, options, words):
    with pytest.raises(InputError, match=words):
        spectrum(matrix, **options)


def test_stores_that_have_no_spectrum(tmp_path):
    x = np.random.default_rng(0).normal(size=(20, 3))
    kernel_matrix(ArcCosine(1), x, x[:7], url=tmp_path / "block")
    with pytest.raises(InputError, match="not stored as symmetric"):
        spectrum(tmp_path / "block")
    url = stored(tmp_path)
    TileStore.open(url).chunk_path((1, 0)).unlink()
    with pytest.raises(StoreError, match="has 14 of its 15 tiles"):
        spectrum(url)


def offering(monkeypatch, memory: int | None) -> list:
    """Workers whose smallest share is `memory`; who asked."""
    asked = []
    monkeypatch.setattr(
        "ntkdask.execution.workers.resources", lambda client: asked.append(client) or Resources(memory, threads=1)
    )
    return asked


def test_workers_are_asked_what_fits(tmp_path, client, monkeypatch):
    url = stored(tmp_path)
    asked = offering(monkeypatch, 2**30)
    assert spectrum(url, 3, client=client).method == "dense"
    assert asked == [client]
    # 320 MiB of the process, 256 MiB of LAPACK: the decomposition is too large, products are not
    offering(monkeypatch, 500 * 2**20)
    assert spectrum(url, 3, client=client, max_products=5).method == "lanczos"
    with pytest.raises(
        MemoryBudgetError, match=r"of a 200 x 200 matrix needs 576 MiB .* but a task has 500 MiB.*lanczos"
    ):
        spectrum(url, client=client, method="dense")
    # without a limit of theirs, rows decide
    offering(monkeypatch, None)
    assert spectrum(url, client=client).method == "dense"


def test_products_that_do_not_fit_are_refused_before_they_start(tmp_path, client, monkeypatch):
    url, listener = stored(tmp_path), Counter()
    offering(monkeypatch, 330 * 2**20)
    with pytest.raises(
        MemoryBudgetError, match=r"kernel-product needs .* tiles of 48 x 48, 3 vectors\) but a worker has 330 MiB"
    ):
        spectrum(url, 3, client=client, cache_bytes=2**28, listener=listener)
    assert not listener.stages


@pytest.mark.parametrize("arguments", [{"plan": Plan(memory_bytes=2**30)}, {"method": "dense"}])
def test_what_a_plan_says_is_not_asked(tmp_path, client, monkeypatch, arguments):
    asked = offering(monkeypatch, 2**30)
    assert spectrum(stored(tmp_path), client=client, **arguments).method == "dense"
    assert len(asked) == ("plan" not in arguments)
