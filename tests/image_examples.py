"""Networks of images with layers of every kind, images for them, and their naive kernels."""

import numpy as np
from reference import image_kernels, slopes_dual

from ntkdask.networks import (
    Activation,
    AvgPool,
    Conv,
    Dense,
    Flatten,
    GlobalAvgPool,
    LayerNorm,
    Network,
    Residual,
    convolutional,
)

RELU = Activation("relu")
GAP = GlobalAvgPool()


def plain(layers):
    """Layers as `reference.image_kernels` takes them; duals of activations with slopes are the twin's own."""
    found = []
    for layer in layers:
        if isinstance(layer, Conv):
            found.append(
                (
                    "conv",
                    layer.filter,
                    layer.padding,
                    layer.strides,
                    layer.weight_variance,
                    layer.bias_variance,
                    layer.trainable,
                )
            )
        elif isinstance(layer, Dense):
            found.append(("dense", layer.weight_variance, layer.bias_variance, layer.trainable))
        elif isinstance(layer, Activation):
            found.append(("activation", *duals(layer)))
        elif isinstance(layer, Residual):
            found.append(("residual", plain(layer.branch), plain(layer.shortcut)))
        elif isinstance(layer, AvgPool):
            found.append(("pool", layer.window))
        else:
            found.append(({LayerNorm: "norm", GlobalAvgPool: "gap", Flatten: "flatten"}[type(layer)],))
    return found


def duals(layer):
    """k and k' of an Activation, as functions of (a, b, c)."""
    sigma, gain = layer.sigma, layer.gain
    if sigma.slopes:
        return slopes_dual(*sigma.slopes, gain)
    return lambda a, b, c: gain * sigma.dual(a, b, c), lambda a, b, c: gain * sigma.dual_derivative(a, b, c)


def twin(network, x, y=None):
    return image_kernels(plain(network.layers), x, y, x.shape[3] if network.scale_inputs else 1.0)


def images(n, shape=(6, 6, 3), seed=0, dtype="float64"):
    return np.random.default_rng(seed).standard_normal((n, *shape)).astype(dtype)


LAYERED = {
    "pool": (Conv(), RELU, AvgPool(2), Conv(), RELU, GAP, Dense()),
    "pool columns": (Conv(), RELU, AvgPool((2, 1)), Conv(), RELU, Flatten(), Dense()),
    "pool 3": (Conv(2), RELU, AvgPool((3, 2)), Conv(), RELU, GAP, Dense()),
    "pool twice": (Conv(), RELU, AvgPool((3, 1)), Conv(), RELU, AvgPool(2), Conv(), RELU, Flatten(), Dense()),
    "pool of a convolution": (Conv(), AvgPool(2), RELU, Conv(), RELU, GAP, Dense()),
    "pool of circular": (Conv(3, "circular"), RELU, AvgPool(2), Conv(2, "circular"), RELU, GAP, Dense()),
    "pool first": (AvgPool(2), Conv(), RELU, GAP, Dense()),
    "biases": (Conv(3, "same", 1, 1.5, 0.2), RELU, Conv(3, "valid", 1, 0.7, 0.1), RELU, GAP, Dense(2.0, 0.3)),
    "frozen": (
        Conv(trainable=False),
        RELU,
        Conv(3, "same", 1, 1.2, 0.1, trainable=False),
        RELU,
        Conv(),
        RELU,
        GAP,
        Dense(),
    ),
    "all frozen": (Conv(trainable=False), RELU, GAP, Dense(trainable=False)),
    "two convolutions": (Conv(), Conv(2, "same", 2), RELU, Flatten()),
    "norm": (Conv(), LayerNorm(), RELU, Conv(3, "same", 1, 1.0, 0.3), LayerNorm(), RELU, GAP, Dense()),
    "norm of biases": (Conv(3, "same", 1, 1.0, 0.3), LayerNorm(), RELU, Conv(), LayerNorm(), Flatten(), Dense()),
    "residual": (Conv(), Residual((RELU, Conv(), RELU, Conv())), RELU, GAP, Dense()),
    "projection": (
        Conv(),
        Residual((RELU, Conv(3, "same", 2), RELU, Conv(3, "same", 1, 0.5)), (Conv(1, "same", 2),)),
        RELU,
        Residual((Conv(), LayerNorm(), RELU, Conv())),
        GAP,
        Dense(),
    ),
    "circular residual": (
        Conv(3, "circular"),
        Residual((RELU, Conv(3, "circular"))),
        RELU,
        Conv(2, "circular", 2),
        RELU,
        GAP,
    ),
    "nested": (
        Conv(),
        Residual((Residual((RELU, Conv(2)), (Conv(1), LayerNorm())), RELU, Conv()), (Residual((RELU, Conv())),)),
        RELU,
        Flatten(),
        Dense(),
    ),
    "pool in a residual": (
        Conv(),
        Residual((RELU, Conv(), AvgPool(2)), (RELU, AvgPool(2), Conv())),
        RELU,
        GAP,
        Dense(),
    ),
    "pools around a residual": (
        Conv(),
        RELU,
        AvgPool(2),
        Conv(),
        Residual((RELU, Conv(), RELU, Conv())),
        AvgPool(3),
        RELU,
        GAP,
        Dense(),
    ),
    "tail": (Conv(), RELU, GAP, Dense(1.2, 0.1), RELU, Dense(0.8, trainable=False), Activation("erf"), Dense()),
    "tail of residuals": (
        Conv(),
        RELU,
        Flatten(),
        Dense(),
        LayerNorm(),
        Residual((RELU, Dense())),
        RELU,
        Residual((Dense(),), (Dense(), RELU)),
        Dense(),
    ),
}


def hard_images(dtype="float64"):
    """Two that are equal, one opposite, one saturated in part, two constant, one of zeros in part, one of zeros."""
    x = images(8, (6, 6, 3), dtype=dtype)
    x[1] = x[0]
    x[2] = -x[0]
    x[3, :4] = 1.0
    x[4], x[5] = 0.7, 0.3
    x[6, :, 3:] = 0
    x[7] = 0
    return x


HARD = {
    "gap": convolutional(3),
    "flatten": convolutional(2, readout="flatten"),
    "pooled": Network(LAYERED["pool"]),
    "circular": convolutional(2, padding="circular"),
    "biases": convolutional(2, bias_variance=0.3),
    "residual": Network(LAYERED["projection"]),
    "norm": Network(LAYERED["norm"]),
    "tail": Network((Conv(), RELU, GAP, Dense(), RELU, Dense())),
}
