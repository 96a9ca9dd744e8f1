"""Rows that kernels of images refuse, and what they say of them."""

import numpy as np
import pytest
from image_examples import GAP, images

from ntkdask import registry
from ntkdask.errors import DtypeError, InputError
from ntkdask.features import CNTKSketch, GradientFeatures
from ntkdask.kernels import NNGP, NTK
from ntkdask.networks import AvgPool, Conv, Dense, Network, Residual, convolutional, myrtle


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 768), r"rows of shape \(768,\), but the network takes images, \(n, H, W, C\).*reshape"),
        ((3, 16, 16), r"rows of shape \(16, 16\).*Add the axis of channels to grey images"),
        ((3, 2, 16, 16, 3), r"rows of shape \(2, 16, 16, 3\).*reshape"),
        ((5,), r"x has shape \(5,\), but the network takes images"),
        ((3, 0, 16, 3), "at least one row, one column and one channel"),
        ((3, 16, 16, 0), "at least one row, one column and one channel"),
        ((3, 3, 32, 32), r"looks like \(C, H, W\), channels first \(NCHW\): give x.transpose\(0, 2, 3, 1\)"),
        ((3, 1, 28, 28), "NCHW"),
        ((3, 4, 24, 32), "NCHW"),
    ],
)
def test_rows_that_are_no_images_are_refused(shape, message):
    x, kernel = np.ones(shape), NTK(convolutional(1))
    for call in (lambda: kernel(x), lambda: kernel(images(2), x), lambda: kernel.diagonal(x)):
        with pytest.raises(InputError, match=message.replace("x has", ". has")):
            call()
    if len(shape) > 1:
        with pytest.raises(InputError, match=message):
            kernel.workspace_bytes(3, 3, 8, shape[1:])


def test_narrow_images_are_no_channels():
    for shape in ((3, 5, 32), (1, 64, 3), (4, 4, 32), (1, 100, 12)):
        assert NNGP(convolutional(0))(np.ones((1, *shape))).shape == (1, 1)


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_layout_nhwc_takes_images_of_few_rows(rows):
    """A strip of 3×12 pixels with 10 channels is computed as its transpose, which nobody takes for channels first."""
    x = np.random.default_rng(0).standard_normal((4, rows, 12, 10))
    network = convolutional(1, layout="nhwc")
    turned = x.transpose(0, 2, 1, 3).copy()
    with pytest.raises(InputError, match=r"layout='nhwc', an argument of Network, convolutional and myrtle"):
        NTK(convolutional(1))(x)
    for kernel in (NTK(network), NNGP(network)):
        np.testing.assert_allclose(kernel(x), type(kernel)(convolutional(1))(turned), rtol=1e-12)
        np.testing.assert_allclose(kernel.diagonal(x), np.diag(kernel(x)), rtol=1e-12)
        assert kernel.workspace_bytes(4, 4, 8, x.shape[1:]) > 0
    for feature_map in (CNTKSketch(network, 64), GradientFeatures(network, 4096)):
        assert feature_map(x).shape[0] == 4
        assert feature_map.workspace_bytes(4, 8, x.shape[1:]) > 0


def test_other_layouts_are_refused_and_the_default_is_no_part_of_a_fingerprint():
    with pytest.raises(InputError, match=r"layout is 'nchw', expected 'nhwc' or None.*transpose\(0, 2, 3, 1\)"):
        Network((Conv(), GAP, Dense()), layout="nchw")
    plain, said = convolutional(1), convolutional(1, layout="nhwc")
    assert "layout" not in registry.to_config(plain)
    assert registry.to_config(said)["layout"] == "nhwc"
    for network in (plain, said, myrtle(5, layout="nhwc")):
        assert registry.from_config(registry.to_config(network)) == network


@pytest.mark.parametrize("shape", [(6, 6, 1), (6, 5, 3), (5, 6, 3)])
def test_images_of_other_shapes_are_refused(shape):
    with pytest.raises(InputError, match=r"x has images of 6×6 pixels with 3 channels and y of"):
        NTK(convolutional(1))(images(2), images(2, shape))


@pytest.mark.parametrize("dtype", ["uint8", "float16", "int64"])
def test_other_dtypes_are_refused(dtype):
    x = np.ones((2, 6, 6, 3), dtype)
    for call in (lambda: NTK(convolutional(1))(x), lambda: NTK(convolutional(1)).diagonal(x)):
        with pytest.raises(DtypeError, match=f"{dtype}.*float32 or float64"):
            call()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((Conv(7, "valid"), GAP), "layer 0: Conv: a filter of 7×7 with padding 'valid' does not fit an image of 6×6"),
        ((Conv(), AvgPool(4), GAP), "layer 1: AvgPool: windows of 4×4 do not divide images of 6×6"),
        (
            (Conv(), Residual((Conv(3, "same", 2),)), GAP),
            "layer 1: the branch of the Residual gives images of 3×3, its shortcut 6×6",
        ),
        (
            (Conv(), AvgPool(2), Residual((Conv(4, "valid"),), (Conv(),)), GAP),
            r"layer 2.branch.0: Conv: a filter of 4×4",
        ),
    ],
)
def test_images_that_do_not_fit_the_layers_are_refused(layers, message):
    kernel = NTK(Network((*layers, Dense())))
    for call in (
        lambda: kernel(images(2)),
        lambda: kernel.diagonal(images(2)),
        lambda: kernel(images(0)),
        lambda: kernel.workspace_bytes(2, 2, 8, (6, 6, 3)),
    ):
        with pytest.raises(InputError, match=message):
            call()
