"""Kernels of images cut into batches, threads and passes: one result; the memory that is declared."""

import itertools

import numpy as np
import pytest
from contracts import normwise, peak_bytes
from image_examples import GAP, HARD, LAYERED, RELU, hard_images, images, twin

from ntkdask import threads
from ntkdask.kernels import NTK, both
from ntkdask.kernels.planes import reference as planes
from ntkdask.networks import AvgPool, Conv, Flatten, Network, convolutional, myrtle


@pytest.mark.parametrize("name", ["pool", "projection", "tail"])
def test_batches_and_threads_change_no_bit(name, monkeypatch):
    network, x = Network(LAYERED[name]), images(7, (6, 6, 2))
    whole, own, pairs = NTK(network)(x), NTK(network).diagonal(x), by_planes(network, x)
    with threads.limited(1):
        np.testing.assert_array_equal(NTK(network)(x), whole)
        np.testing.assert_array_equal(by_planes(network, x), pairs)
    np.testing.assert_array_equal(NTK(network).diagonal(x[3:5]), own[3:5])
    np.testing.assert_allclose(NTK(network)(x[3:5], x[:3]), whole[3:5, :3], rtol=1e-12)
    np.testing.assert_array_equal(by_planes(network, x[3:5], x[:3]), pairs[:, 3:5, :3])
    monkeypatch.setattr(planes, "BATCH_ENTRIES", 36)
    np.testing.assert_array_equal(by_planes(network, x), pairs)
    np.testing.assert_array_equal(NTK(network).diagonal(x), own)


def by_planes(network, x, y=None):
    """(2, n, m): S and T at the readout by the general path."""
    maps = [planes.variance_maps(network, side) for side in (x, x if y is None else y)]
    return np.stack(planes.readout_pairs(network, x, y, *maps, True))


GENERAL = {**{name: Network(layers) for name, layers in LAYERED.items()}, **HARD, "myrtle": myrtle(5)}


@pytest.mark.parametrize("name", GENERAL)
def test_planes_without_a_fused_pass(name):
    """What the readout gives to the layers after it, by the general path, for pairs that are equal, constant and zero too."""
    network, x = GENERAL[name], hard_images()[..., :2]
    upto = Network(network.layers[: network.readout_position + 1])
    if name == "myrtle":
        x = x[:, :4, :4]
    exact = twin(upto, x)
    for found in (by_planes(upto, x), by_planes(upto, x, x.copy())):
        for k, matrix in zip(found, exact, strict=True):
            assert normwise(k, matrix, np.diag(matrix), np.diag(matrix)) <= 1e-10


@pytest.mark.parametrize("readout", ["gap", "flatten"])
def test_no_planes_are_computed_that_are_not_read(readout, monkeypatch):
    """Flatten reads plane 0 alone, and through a pooling by 2 the planes −1, 0, 1."""
    read, get = [], planes.Inputs.get
    monkeypatch.setattr(planes.Inputs, "get", lambda self, delta: read.append(delta) or get(self, delta))
    x = images(1, (4, 4, 3))
    layers = (Conv(), RELU, AvgPool(2), Conv(), RELU, Flatten() if readout == "flatten" else GAP)
    s, _ = planes.readout_pairs(Network(layers), x, x, *[planes.variance_maps(Network(layers), x)] * 2, False)
    assert s.shape == (1, 1)
    reach = (-1, 0, 1)
    assert set(read) == set(
        itertools.product(reach, reach) if readout == "flatten" else itertools.product(range(-3, 4), repeat=2)
    )
    # the variance maps: plane 0, and what the pooling mixes of it
    count = 49 if readout == "gap" else 9
    assert len(read) == count + 9


@pytest.mark.parametrize(
    "network", [convolutional(2), Network(LAYERED["tail"]), Network(LAYERED["pool in a residual"])]
)
def test_no_images_give_an_empty_matrix(network):
    none = images(0)
    assert NTK(network)(none).shape == (0, 0)
    assert NTK(network)(none, images(2)).shape == (0, 2)
    assert NTK(network).diagonal(none).shape == (0,)


MEMORY = {
    "gap": (convolutional(2), (6, 5, 3)),
    "flatten": (convolutional(6, readout="flatten"), (16, 16, 3)),
    "circular": (convolutional(1, padding="circular"), (5, 5, 3)),
    "gelu": (convolutional(1, activation="gelu"), (5, 5, 1)),
    "pooled": (Network(LAYERED["pool twice"]), (6, 6, 2)),
    "residual": (Network(LAYERED["projection"]), (6, 6, 3)),
    "tail": (Network(LAYERED["tail"]), (5, 5, 2)),
}


@pytest.mark.parametrize("name", MEMORY)
@pytest.mark.parametrize("m", [pytest.param(None, marks=pytest.mark.slow), 20])
def test_workspace_is_declared(name, m):
    network, shape = MEMORY[name]
    x = images(40, shape)
    y = None if m is None else images(m, shape, seed=1)
    for kernel in (NTK(network), both(network)):
        planned = kernel.workspace_bytes(40, m or 40, 8, shape)
        peak = peak_bytes(lambda kernel=kernel: kernel(x, y), planned)
        assert peak <= planned + 2**14
        assert planned <= 5 * peak
