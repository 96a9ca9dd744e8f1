"""The passes over planes on a GPU against the CPU: every readout, both sources, float32 and float64. Runs where there is a GPU."""

from __future__ import annotations

import numpy as np
import pytest
from kernels.planes.test_device import NETWORKS, TOLERANCE, images, normwise

from ntkdask import arrays
from ntkdask.kernels import NNGP, NTK, both
from ntkdask.kernels.planes import device as plane_device
from ntkdask.kernels.planes import program as stages
from ntkdask.kernels.planes import reference as planes
from ntkdask.networks import convolutional, myrtle

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", NETWORKS)
def test_readout_is_the_general_paths(name, dtype):
    network, shape, _ = NETWORKS[name]
    x, y = images(shape, dtype, 5), images(shape, dtype, 4, 1)
    y[0] = x[1]
    maps = [planes.variance_maps(network, side) for side in (x, y)]
    expected = planes.readout_pairs(network, x.astype(float), y.astype(float), *maps, True)
    own = [planes.image_diagonals(network, side, m, True) for side, m in zip((x, y), maps, strict=True)]
    there = [[arrays.to_device(v) for v in side] for side in maps]
    program = stages.program(network, shape)
    found = plane_device.readout(program, arrays.to_device(x), arrays.to_device(y), *there, 1.0, True)
    for part in (0, 1):
        error = normwise(arrays.to_host(found[part]), expected[part], [side[part] for side in own])
        assert error <= TOLERANCE[dtype] * max(1, network.depth)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("network", [convolutional(3), convolutional(3, readout="flatten"), myrtle(5)], ids=str)
def test_kernels_of_whole_images(network, dtype):
    x = np.random.default_rng(0).standard_normal((9, 32, 32, 3)).astype(dtype)
    x[3:, :8] = 1.5
    x[4] = x[5]
    for kernel in (NTK(network), NNGP(network)):
        diagonal = kernel.diagonal(x.astype(float))
        there = arrays.to_host(kernel(arrays.to_device(x)))
        assert normwise(there, kernel(x.astype(float)), (diagonal, diagonal)) <= TOLERANCE[dtype]
        np.testing.assert_array_equal(there, there.T)


def test_equal_calls_give_equal_bits():
    x = arrays.to_device(np.random.default_rng(0).standard_normal((30, 32, 32, 3)).astype("float32"))
    for network in (convolutional(3), myrtle(5)):
        first, second = both(network)(x), both(network)(x)
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(arrays.to_host(a), arrays.to_host(b))
