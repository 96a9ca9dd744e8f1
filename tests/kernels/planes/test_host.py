"""The compiled passes over folded slabs against the general ones over planes, of every kind of layer and geometry.

The general ones are compared with a twin in `test_convolutional`.
"""

import numpy as np
import pytest
from numba import types

from ntkdask import activations
from ntkdask.kernels.planes import host as plane_pass
from ntkdask.kernels.planes import reference as planes
from ntkdask.kernels.planes import stage as plane_stage
from ntkdask.kernels.planes.program import program
from ntkdask.networks import Activation as A
from ntkdask.networks import AvgPool, Dense, Flatten, GlobalAvgPool, LayerNorm, Network, Residual, convolutional, myrtle
from ntkdask.networks import Conv as C

ab = activations.get("abrelu", A=0.3, B=1.2)
NETWORKS = {
    "conv2": convolutional(2),
    "flatten": convolutional(3, readout="flatten"),
    "q5": convolutional(2, filter_size=5),
    "q2": convolutional(2, filter_size=2),
    "q(3,1)": convolutional(2, filter_size=(3, 1)),
    "circ": convolutional(2, padding="circular"),
    "circ5": convolutional(2, padding="circular", filter_size=5),
    "bias": convolutional(2, bias_variance=0.2),
    "arora": convolutional(3, trainable_ends=False),
    "abrelu": convolutional(2, activation=ab),
    "leaky": convolutional(2, activation=activations.get("leaky_relu", slope=0.2), weight_variance=1.7),
    "identity": convolutional(1, activation="identity"),
    "myrtle5": myrtle(5),
    "myrtle7b": myrtle(7, bias_variance=0.1),
    "myrtleflat": Network((C(), A(), AvgPool(2), C(), A(), AvgPool(2), C(), A(), Flatten(), Dense())),
    "pool(2,1)": Network((C(), A(), AvgPool((2, 1)), C(5), A(ab), Flatten(), Dense())),
    "pool4": Network((C(), A(), AvgPool(4), C(), A(), GlobalAvgPool(), Dense())),
    "poolfirst": Network((AvgPool(2), C(), A(), GlobalAvgPool(), Dense())),
    "just flatten": Network((Flatten(), Dense())),
    "gap": Network((GlobalAvgPool(), Dense())),
    "res": Network((C(), A(), Residual((C(), A(), C())), Flatten(), Dense())),
    "res2": Network((C(), Residual((A(), C(), A(ab), C(bias_variance=0.1)), (C(1),)), A(), GlobalAvgPool(), Dense())),
    "ln": Network((C(), LayerNorm(), A(), C(bias_variance=0.3), LayerNorm(), A(), GlobalAvgPool(), Dense())),
    "nested": Network(
        (
            C(),
            Residual((A(), C(), Residual((A(), C()), ()))),
            A(),
            AvgPool(2),
            Residual((C(), A(), C()), (C(1, trainable=False),)),
            GlobalAvgPool(),
            Dense(),
        )
    ),
    "resfirst": Network((Residual((C(), A(), C()), (C(1),)), A(), GlobalAvgPool(), Dense())),
    "noreluconv": Network((C(), C(), A(), C(trainable=False), A(normalize=False), C(), GlobalAvgPool(), Dense())),
    "stride": Network((C(), A(), C(stride=2), A(), C(), A(), GlobalAvgPool(), Dense())),
    "stride3": Network((C(stride=3), A(ab), C(3, bias_variance=0.1), A(), Flatten(), Dense())),
    "valid": Network((C(padding="valid"), A(), C((2, 3), "valid"), A(), GlobalAvgPool(), Dense())),
    "validsame": Network((C(padding="valid"), A(), C(bias_variance=0.2), A(), C(5), GlobalAvgPool(), Dense())),
    "validpool": Network(
        (C((3, 3), "valid"), A(), AvgPool(2), C(2, "valid"), A(), AvgPool((1, 2)), C(), A(), GlobalAvgPool(), Dense())
    ),
    "stridepool": Network((C(stride=2), A(), AvgPool(2), C(stride=2), A(), GlobalAvgPool(), Dense())),
    "lenet": Network((C((3, 5), "valid"), A(), AvgPool(2), C((2, 3), "valid", stride=(1, 2)), A(), Flatten(), Dense())),
    "circstride": Network((C(padding="circular", stride=2), A(), C(5, "circular"), A(), GlobalAvgPool(), Dense())),
    "resnet": Network(
        (
            C(),
            Residual((A(), C(stride=2), A(), C()), (C(1, stride=2),)),
            Residual((A(), C(), A(), C())),
            A(),
            Residual((C(stride=2), A(), C()), (C(1, stride=2),)),
            A(),
            GlobalAvgPool(),
            Dense(),
        )
    ),
    "resvalid": Network(
        (
            C(),
            Residual((A(), C(3, "valid", stride=2, bias_variance=0.1)), (C(3, "valid", stride=2),)),
            A(),
            Flatten(),
            Dense(),
        )
    ),
    "stride(1,3)": Network((C((2, 5), stride=(1, 3)), A(), C(1, stride=(3, 1)), A(), GlobalAvgPool(), Dense())),
}


def both_sides():
    """Images of 8×12 with equal ones, equal and zero patches."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((3, 8, 12, 2)), rng.standard_normal((2, 8, 12, 2))
    y[0], y[1, :4], x[2, :4, :4] = x[1], x[0, :4], 0
    return x, y


TOLERANCE = {"float64": 1e-14, "float32": 5e-7}
IN_FLOAT32 = ("pool4", "circ5", "myrtle5", "stride(1,3)")
"""Every day: tables do not know the dtype, and the loops are the same code for all networks. The others are slow tests."""
VARIANTS = (
    *(
        "conv2",
        "q2",
        "q5",
        "circ",
        "bias",
        "leaky",
        "identity",
        "myrtle7b",
        "myrtleflat",
        "poolfirst",
        "just flatten",
        "gap",
        "res",
    ),
    *("resfirst", "stride", "stride3", "validsame", "validpool", "stridepool", "circstride", "resvalid"),
)
"""Networks whose parts others have, too: slow tests in both dtypes."""

every_network = pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            name,
            dtype,
            marks=() if (dtype == "float64" and name not in VARIANTS) or name in IN_FLOAT32 else pytest.mark.slow,
        )
        for name in NETWORKS
        for dtype in TOLERANCE
    ],
)


@every_network
def test_the_passes_agree(name, dtype):
    network, tolerance = NETWORKS[name], TOLERANCE[dtype]
    x, y = (images.astype(dtype) for images in both_sides())
    stages = program(network, x.shape[1:3])
    assert plane_pass.takes(stages)
    maps = [planes.variance_maps(network, images) for images in (x, y)]
    exact = planes.readout_pairs(network, x, y, *maps, True)
    owns = [planes.image_diagonals(network, images, own, True) for images, own in zip((x, y), maps, strict=True)]
    found = plane_pass.readout(stages, x, y, *maps, 1.0)
    s_only, _ = plane_pass.readout(stages, x, y, *maps, 1.0, tangent=False)
    np.testing.assert_array_equal(s_only, found[0])
    sizes = [np.sqrt(a[:, None] * b) for a, b in zip(*owns, strict=True)]
    for values, expected, size in zip(found, exact, (sizes[0], np.maximum(*sizes)), strict=True):
        assert np.all(np.abs(values - expected) <= tolerance * size)
    symmetric = plane_pass.readout(stages, x, None, maps[0], maps[0], 1.0)
    full = plane_pass.readout(stages, x, x, maps[0], maps[0], 1.0)
    off = ~np.eye(len(x), dtype=bool)
    for a, b, own in zip(symmetric, full, owns[0], strict=True):
        assert np.all(np.abs(a - b)[off] <= tolerance * np.maximum(own, owns[0][0]).max())


@every_network
def test_images_meet_themselves(name, dtype):
    network, x = NETWORKS[name], both_sides()[0].astype(dtype)
    x[0], x[1, :, 1:] = 0.5, x[1, :, :1]  # equal patches at every offset, and along the rows
    maps = planes.variance_maps(network, x)
    exact = planes.image_diagonals(network, x, maps, True)
    found = plane_pass.diagonal(program(network, x.shape[1:3]), x, maps, 1.0)
    for values, expected in zip(found, exact, strict=True):
        assert values.dtype == np.float64
        np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-14 * exact[0].max())


def test_what_wraps_at_a_border_that_no_stride_divides_is_not_taken():
    network = Network((C(padding="circular"), A(), C(stride=2), GlobalAvgPool()))
    assert plane_pass.takes(program(network, (8, 8)))
    assert not plane_pass.takes(program(network, (8, 7)))


def test_ragged_blocks_run_in_the_code_of_whole_ones():
    """Arrays with gaps are another type, for which a stage would be compiled again, for a quarter of a minute."""
    network = NETWORKS["flatten"]
    x = np.random.default_rng(0).standard_normal((plane_pass.FLAT_COLUMNS + 3, 3, 2, 3))
    maps = planes.variance_maps(network, x)
    plane_pass.readout(program(network, (3, 2)), x, None, maps, maps, 1.0)
    arguments = [kind for signature in plane_stage.run_stage.signatures for kind in signature]
    fields = [kind for group in arguments if isinstance(group, types.BaseNamedTuple) for kind in group]
    arrays = [kind for kind in (*arguments, *fields) if isinstance(kind, types.Array)]
    assert len(arrays) > 10
    assert {kind.layout for kind in arrays} == {"C"}
