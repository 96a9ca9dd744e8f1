"""Finite networks: a `Network` of a given width in NTK parameterisation, forward, and the gradient of its output for each row.

z = σ_w·W h/√(fan-in) + σ_b·b with W, b standard normal (MATH.md §1, §5). The first layer divides by √d only with
`scale_inputs`, and a q×q convolution by q. Every hidden Dense and Conv has `width` units, the last Dense one. A network that
does not end in a Dense is read out by a frozen one, with the same expected tangent kernel. Called by `gradient`; no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ntkdask import seeds
from ntkdask.arrays import Array, is_device_array, namespace, to_device
from ntkdask.cache import shared
from ntkdask.features.arccosine import drawing_bytes
from ntkdask.features.finite import layers as finite_layers
from ntkdask.networks import (
    Activation,
    AvgPool,
    Conv,
    Dense,
    Flatten,
    GlobalAvgPool,
    Layer,
    LayerNorm,
    Network,
    Residual,
)
from ntkdask.networks.finite import FinitePlan, Weights, Where, parameter_stream

Parameters = Mapping[Where, tuple[Array, Array | None]]
"""(inputs, units) weights and (units,) biases, or None without, by the place of their layer."""

Backward = Callable[[Array, Array], Array]
"""(gradient of a layer's output, (n, n_parameters) to write parameters' gradients into) → gradient of its input."""


@dataclass(frozen=True, eq=False)
class FiniteNetwork:
    """`network` of `width` units a layer, for rows of one shape.

    Parameters
    ----------
    network : Network
        The description.
    width : int
        Units of every hidden layer.
    row_shape : tuple of int
        (d,), or (H, W, C) where the network takes images.

    Notes
    -----
    Derived fields: `weights`, every Dense and Conv by its place; `joins`, how the paths of each Residual meet, see
    `FinitePlan`; `n_parameters`, the trainable weights and biases, which are the columns of a gradient; `row_elements`, about
    how many numbers a row holds at the peak of a gradient.
    """

    network: Network
    width: int
    row_shape: tuple[int, ...]
    layers: tuple[Layer, ...] = field(init=False)
    weights: dict[Where, Weights] = field(init=False)
    joins: dict[Where, tuple[float, float] | None] = field(init=False)
    n_parameters: int = field(init=False)
    row_elements: int = field(init=False)

    def __post_init__(self) -> None:
        plan = FinitePlan(self.network, self.width, self.row_shape)
        for name in ("layers", "weights", "joins", "n_parameters", "row_elements"):
            object.__setattr__(self, name, getattr(plan, name))

    def draw(self, seed: int, like: Array) -> Parameters:
        """Standard normal parameters in like's dtype and on its device, from `seed` and the place of each layer; cached."""
        return {where: self._draw(where, weights, seed, like) for where, weights in self.weights.items()}

    def _draw(self, where: Where, weights: Weights, seed: int, like: Array) -> tuple[Array, Array | None]:
        device, dtype = is_device_array(like), like.dtype.name

        def normals(name: str, rows: int) -> Array:
            path = parameter_stream(where, name)
            key = (*path, seed, rows, weights.units, dtype, device and like.device.id)
            return shared.get(key, lambda: to_device(seeds.normals(seed, path, rows, weights.units, dtype), device))

        return normals("weights", weights.inputs), normals("biases", 1)[0] if weights.has_bias else None

    def parameters_bytes(self, itemsize: int) -> int:
        """Bytes of all parameters, which are kept, and of the drawing of one layer's, which is not."""
        drawing = max(drawing_bytes(w.inputs, w.units) for w in self.weights.values())
        return drawing + itemsize * sum(w.size for w in self.weights.values())

    def __call__(self, x: Array, parameters: Parameters) -> Array:
        """The output f(x), (n,), for rows x (n, *row_shape)."""
        return self._follow(self.layers, x, parameters, ())[0][:, 0]

    def gradients(self, x: Array, parameters: Parameters, out: Array) -> None:
        """Write the gradient of f at every row to `out` (n, n_parameters).

        Its columns are W's (inputs × units) and then b's of each trainable layer, in order.
        """
        value, backward = self._follow(self.layers, x, parameters, ())
        backward(namespace(x).ones_like(value), out)

    def _follow(
        self, layers: tuple[Layer, ...], h: Array, parameters: Parameters, where: Where
    ) -> tuple[Array, Backward]:
        backwards = []
        for position, layer in enumerate(layers):
            h, backward = self._layer(layer, h, parameters, (*where, position))
            backwards.append(backward)

        def all_backward(g: Array, out: Array) -> Array:
            while backwards:
                # released as soon as the layer is done
                g = backwards.pop()(g, out)
            return g

        return h, all_backward

    def _layer(self, layer: Layer, h: Array, parameters: Parameters, where: Where) -> tuple[Array, Backward]:
        if isinstance(layer, (Dense, Conv)):
            return self._linear(self.weights[where], h, *parameters[where], is_first=where == (0,))
        if isinstance(layer, Activation):
            h, back = finite_layers.activate(layer, h)
        elif isinstance(layer, LayerNorm):
            h, back = finite_layers.layer_norm(h)
        elif isinstance(layer, AvgPool):
            h, back = finite_layers.average_pool(layer, h)
        elif isinstance(layer, GlobalAvgPool):
            h, back = finite_layers.global_average_pool(h)
        elif isinstance(layer, Flatten):
            h, back = finite_layers.flatten(h)
        else:
            return self._residual(layer, h, parameters, where)
        return h, lambda g, out: back(g)

    def _linear(
        self, w: Weights, h: Array, weights: Array, biases: Array | None, is_first: bool
    ) -> tuple[Array, Backward]:
        """z = factor·h·W + σ_b·b on vectors, or on the patches of images."""
        xp, factor = namespace(h), h.dtype.type(w.factor)
        seen, gather = finite_layers.patches(w.layer, h) if isinstance(w.layer, Conv) else (h, None)
        z = seen.reshape(-1, w.inputs) @ weights
        z *= factor
        deviation = h.dtype.type(math.sqrt(w.layer.bias_variance))
        if biases is not None:
            z += deviation * biases

        def backward(g: Array, out: Array) -> Array:
            n = g.shape[0]
            scaled = g * factor
            if w.start is not None:
                stop = w.start + w.inputs * w.units
                view = out[:, w.start : stop].reshape(n, w.inputs, w.units)
                if gather is None:
                    xp.multiply(seen[:, :, None], scaled[:, None], out=view)
                else:
                    pixels = seen.reshape(n, -1, w.inputs).transpose(0, 2, 1)
                    xp.matmul(pixels, scaled.reshape(n, -1, w.units), out=view)
                if biases is not None:
                    total = g.reshape(n, -1, w.units).sum(axis=1)
                    xp.multiply(total, deviation, out=out[:, stop : stop + w.units])
            if is_first:
                return g  # the gradient with respect to the rows is not needed
            back = scaled.reshape(-1, w.units) @ weights.T
            return back.reshape(seen.shape) if gather is None else gather(back)

        return z.reshape(*seen.shape[:-1], w.units), backward

    def _residual(self, layer: Residual, h: Array, parameters: Parameters, where: Where) -> tuple[Array, Backward]:
        xp, joined = namespace(h), self.joins[where]
        left, left_back = self._follow(layer.branch, h, parameters, (*where, "branch"))
        right, right_back = self._follow(layer.shortcut, h, parameters, (*where, "shortcut"))
        if joined is None:
            return left + right, lambda g, out: left_back(g, out) + right_back(g, out)
        a, b = (h.dtype.type(factor) for factor in joined)
        channels = left.shape[-1]

        def backward(g: Array, out: Array) -> Array:
            return left_back(g[..., :channels] * a, out) + right_back(g[..., channels:] * b, out)

        return xp.concatenate([left * a, right * b], axis=-1), backward
