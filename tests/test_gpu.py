"""The slice on a GPU against the CPU: the same algorithm, the same numbers to rounding. Runs where there is a GPU."""

from __future__ import annotations

import numpy as np
import pytest

from ntkdask import arrays
from ntkdask.datasets.rows import MemoryRows
from ntkdask.features import ArcCosineFeatures, NTKRandomFeatures
from ntkdask.kernels import NNGP, NTK, ArcCosine
from ntkdask.networks import fully_connected
from ntkdask.planning.tiles import Tile
from ntkdask.preprocessing import FittedPreprocessor
from ntkdask.solvers.gram import GramSums
from ntkdask.workflows.ridge.gram import accumulate
from ntkdask.workflows.stream import FeatureStream

pytestmark = pytest.mark.gpu
TOLERANCE = {"float32": 2e-5, "float64": 1e-12}


@pytest.fixture(params=["float32", "float64"])
def x(request):
    return np.random.default_rng(0).standard_normal((300, 20)).astype(request.param)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("sampling", ["gaussian", "spherical", "structured"])
def test_ntk_features(x, depth, sampling):
    features = NTKRandomFeatures(fully_connected(depth, bias_variance=0.1), 700, sampling=sampling)
    there = arrays.to_host(features(arrays.to_device(x)))
    here = features(x)
    assert there.dtype == here.dtype
    # a step of a product that is zero to rounding may fall either way: compare inner products, not features
    scale = np.abs(here @ here.T).max()
    assert np.abs(there @ there.T - here @ here.T).max() <= 50 * TOLERANCE[x.dtype.name] * scale


@pytest.mark.parametrize("sampling", ["gaussian", "structured"])
@pytest.mark.parametrize("order", [0, 1])
def test_arc_cosine_features(x, order, sampling):
    features = ArcCosineFeatures(256, order, sampling=sampling)
    difference = arrays.to_host(features(arrays.to_device(x))) - features(x)
    assert (np.abs(difference) > TOLERANCE[x.dtype.name] * 10).mean() < 1e-3


@pytest.mark.parametrize("kernel", [NTK(fully_connected(2)), NNGP(fully_connected(2)), ArcCosine(0), ArcCosine(1)])
def test_kernels(x, kernel):
    here, there = kernel(x), arrays.to_host(kernel(arrays.to_device(x)))
    assert np.abs(here - there).max() <= TOLERANCE[x.dtype.name] * np.abs(here).max()


def test_gram_sums(x):
    y = np.random.default_rng(1).standard_normal((300, 3))
    weights = np.random.default_rng(2).random(300)
    here, there = GramSums.zeros(20, 3), GramSums.zeros(20, 3, arrays.to_device(x))
    here.add(x.copy(), y, weights)
    there.add(arrays.to_device(x), arrays.to_device(y), arrays.to_device(weights))
    assert np.allclose(here.pack(), there.pack(), rtol=TOLERANCE[x.dtype.name], atol=TOLERANCE[x.dtype.name] * 300)


def test_a_slab_on_the_device(x):
    labels = np.random.default_rng(1).integers(0, 4, 300)
    rows = MemoryRows(x, labels)
    fitted = FittedPreprocessor.for_rows((20,), x.dtype, x.dtype.name)
    here, there = (
        accumulate(FeatureStream(rows, fitted, ArcCosineFeatures(64, 1), 4, 128, device), Tile((0,), 0, 300), 4).pack()
        for device in (False, True)
    )
    assert np.allclose(here, there, rtol=10 * TOLERANCE[x.dtype.name], atol=1e-3 if x.dtype == np.float32 else 1e-10)
