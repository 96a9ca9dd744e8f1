"""approximation_error against matrices written out, on maps whose errors are known, on samples of datasets; bad input."""

from dataclasses import dataclass

import dask.array as da
import numpy as np
import pytest
import scipy.linalg
from contracts import rows

import ntkdask as nd
from ntkdask import arrays, seeds
from ntkdask.errors import DtypeError, InputError
from ntkdask.features import ArcCosineFeatures, FourierFeatures, NTKRandomFeatures, Nystrom
from ntkdask.features.base import FeatureMapBase
from ntkdask.features.quality import gram_error
from ntkdask.kernels import NTK, RBF, ArcCosine
from ntkdask.networks import fully_connected


@dataclass(frozen=True)
class Scaled(FeatureMapBase):
    """√factor times the exact features of the linear kernel."""

    n_components: int
    factor: float = 1.0
    target = NTK(fully_connected(0))

    def __call__(self, x):
        return np.sqrt(self.factor).astype(x.dtype) * x


def by_definition(approximate, exact, lam):
    """Every error, from NumPy's norms and scipy.linalg.eig of (K + λI)⁻¹(K̂ + λI)."""
    n = len(exact)
    values = np.sort(scipy.linalg.eig(np.linalg.solve(exact + lam * np.eye(n), approximate + lam * np.eye(n)))[0].real)
    return {
        "frobenius": np.linalg.norm(approximate - exact) / np.linalg.norm(exact),
        "spectral": np.linalg.norm(approximate - exact, 2) / np.linalg.norm(exact, 2),
        "diagonal": np.abs(np.diag(approximate - exact)).max() / np.diag(exact).mean(),
        "smallest": values[0],
        "largest": values[-1],
    }


MAPS = [
    ArcCosineFeatures(200),
    NTKRandomFeatures(fully_connected(2), 300),
    FourierFeatures(101, 0.2),
    Nystrom(RBF(0.2), 20),
]


@pytest.mark.parametrize("feature_map", MAPS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("lam", [0.1, 3.0, None])
def test_errors_are_those_of_the_definition(feature_map, lam):
    x = rows(60)
    feature_map = feature_map.fit(x)
    found = nd.approximation_error(feature_map, x, lam=lam)
    phi, exact = feature_map(x), feature_map.target(x)
    used = np.diag(exact).mean() if lam is None else lam
    assert (found.n, found.n_components) == (60, feature_map.n_components)
    assert found.lam == pytest.approx(used, rel=1e-14)
    for name, value in by_definition(phi @ phi.T, exact, used).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-8, abs=1e-9), name


def test_the_constants_bound_the_matrices_tightly():
    """Eq. 13: K̂ + λI − smallest·(K + λI) and largest·(K + λI) − (K̂ + λI) are positive semi-definite and singular."""
    x, feature_map = rows(40), ArcCosineFeatures(100, seed=1)
    found = nd.approximation_error(feature_map, x, lam=0.5)
    phi = feature_map(x)
    approximate, exact = phi @ phi.T + 0.5 * np.eye(40), ArcCosine(1)(x) + 0.5 * np.eye(40)
    size = np.linalg.norm(exact, 2)
    for rest in (approximate - found.smallest * exact, found.largest * exact - approximate):
        assert abs(np.linalg.eigvalsh(rest)[0]) < 1e-12 * size
    assert found.epsilon == max(1 - found.smallest, found.largest - 1) > 0


@pytest.mark.parametrize("factor", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_scaled_kernel(factor, dtype):
    """K̂ = cK: errors |c − 1|; (cμ + λ)/(μ + λ) at the ends of K's spectrum, and 1 where K has a null space."""
    x = np.random.default_rng(0).standard_normal((30, 5)).astype(dtype)
    found = nd.approximation_error(Scaled(5, factor), x, lam=2.0)
    top = np.linalg.eigvalsh(x.astype("float64") @ x.T.astype("float64"))[-1]
    end = (factor * top + 2) / (top + 2)
    tolerance = {"float32": 1e-5, "float64": 1e-12}[dtype]
    assert found.frobenius == pytest.approx(abs(factor - 1), abs=tolerance)
    assert found.spectral == pytest.approx(abs(factor - 1), abs=tolerance)
    assert found.smallest == pytest.approx(min(1, end), abs=tolerance)
    assert found.largest == pytest.approx(max(1, end), abs=tolerance)


def test_errors_fall_with_components():
    x = rows(100)
    found = [nd.approximation_error(FourierFeatures(m, 0.2), x) for m in (64, 1024, 16384)]
    for name in ("frobenius", "spectral", "epsilon"):
        first, second, third = (getattr(f, name) for f in found)
        assert 2 < first / second < 8, name  # √16 = 4
        assert 2 < second / third < 8, name


def test_leverage_scores_lower_the_spectral_error():
    """Theorem 3 of Zandieh et al. 2021: directions on the sphere have the law of leverage-score sampling. d = 6, unit rows."""
    x = np.random.default_rng(0).standard_normal((60, 6))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    mean, error = {}, {}
    for sampling in ("gaussian", "spherical"):
        maps = [ArcCosineFeatures(512, seed=seed, sampling=sampling) for seed in range(60)]
        found = np.array([nd.approximation_error(feature_map, x, lam=0.1).epsilon for feature_map in maps])
        mean[sampling], error[sampling] = found.mean(), found.std(ddof=1) / np.sqrt(60)
    assert mean["gaussian"] - mean["spherical"] > 3 * np.hypot(error["gaussian"], error["spherical"])


# --- samples ------------------------------------------------------------------------------------------------------


def test_a_sample_is_seeded_and_without_replacement():
    x = np.random.default_rng(0).standard_normal((200, 4))
    feature_map = ArcCosineFeatures(50)
    found = nd.approximation_error(feature_map, x, n_rows=30, seed=3)
    chosen = np.sort(seeds.permutation(3, ("quality",), 200)[:30])
    assert found == nd.approximation_error(feature_map, x[chosen])
    assert found.n == 30
    assert found != nd.approximation_error(feature_map, x, n_rows=30, seed=4)
    assert nd.approximation_error(feature_map, x).n == 200


def test_dask_arrays_and_datasets(tmp_path):
    x = np.random.default_rng(0).standard_normal((120, 4)).astype("float32")
    feature_map = FourierFeatures(64, 0.1)
    expected = nd.approximation_error(feature_map, x, n_rows=50)
    assert nd.approximation_error(feature_map, da.from_array(x, chunks=(17, 2)), n_rows=50) == expected
    dataset = nd.write_dataset(tmp_path / "rows.zarr", x, np.zeros(120))
    assert nd.approximation_error(feature_map, dataset, n_rows=50) == expected
    assert nd.approximation_error(feature_map, dataset.url, n_rows=50) == expected


def test_images_of_bytes_are_scaled():
    x = np.random.default_rng(0).integers(0, 256, (20, 3, 3, 1)).astype("uint8")
    feature_map = FourierFeatures(64, 0.1)
    assert nd.approximation_error(feature_map, x) == nd.approximation_error(feature_map, (x / 255).astype("float32"))


@pytest.mark.gpu
def test_device_agrees_with_host():
    x = rows(60)
    host = nd.approximation_error(FourierFeatures(128, 0.2), x)
    device = nd.approximation_error(FourierFeatures(128, 0.2), arrays.to_device(x))
    assert device.frobenius == pytest.approx(host.frobenius, rel=1e-9)
    assert device.epsilon == pytest.approx(host.epsilon, rel=1e-9)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0, -1.0, float("nan"), float("inf"), "small", True])
def test_bad_ridges(lam):
    with pytest.raises(InputError, match=r"lam is .*, expected a positive number"):
        nd.approximation_error(ArcCosineFeatures(8), rows(6), lam=lam)


@pytest.mark.parametrize("n_rows", [0, -1, 2.5, None, True])
def test_bad_samples(n_rows):
    with pytest.raises(InputError, match="n_rows is"):
        nd.approximation_error(ArcCosineFeatures(8), rows(6), n_rows=n_rows)


def test_bad_rows_and_maps():
    with pytest.raises(InputError, match=r"\(0, 6\)"):
        nd.approximation_error(ArcCosineFeatures(8), rows(6)[:0])
    with pytest.raises(InputError, match=r"shape \(6,\)"):
        nd.approximation_error(ArcCosineFeatures(8), np.ones(6))
    with pytest.raises(DtypeError, match="complex128"):
        nd.approximation_error(ArcCosineFeatures(8), np.ones((3, 2), complex))
    with pytest.raises(InputError, match="the exact kernel is zero on these rows"):
        nd.approximation_error(ArcCosineFeatures(8), np.zeros((3, 2)))
    with pytest.raises(InputError, match="is not fitted"):
        nd.approximation_error(Nystrom(RBF(1.0), 8), rows(6))


def test_a_ridge_below_the_rounding_of_the_kernel():
    exact = np.diag([1.0, -1e-3])
    with pytest.raises(InputError, match=r"not positive definite: .* an eigenvalue of -0\.001\. Use lam > 0\.001"):
        gram_error(np.eye(2), exact, 1e-4)
    assert gram_error(exact, exact, 0.1).epsilon == pytest.approx(0, abs=1e-12)


def test_matrices_of_other_shapes():
    for shapes in (((2, 2), (3, 3)), ((2, 3), (2, 3)), ((0, 0), (0, 0))):
        with pytest.raises(InputError, match="expected two"):
            gram_error(*map(np.zeros, shapes))
