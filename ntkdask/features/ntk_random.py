"""Random features of the ReLU neural tangent kernel: Zandieh et al. 2021, Algorithm 2, for every fully connected ReLU
network of MATH.md §1 (biases, weight variances, frozen layers, raw or normalised ReLU, scaled inputs).

Each hidden layer multiplies the tangent features ψ by step features φ̇ of the covariance, compressed by a TensorSRHT,
and puts the layer's ReLU features φ beside them. Everything is homogeneous, so rows need no normalisation: norms (and
biases, as a constant feature) travel through φ. Works on row blocks that stay in cache; called by workflows on tiles.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from ntkdask.activations import ReLU
from ntkdask.arrays import Array, flatten_rows, namespace, require_float
from ntkdask.cache import shared
from ntkdask.errors import InputError
from ntkdask.features.arccosine import drawing_bytes, relu_into, relu_weights, require_sampling, step_into, step_weights
from ntkdask.features.base import FeatureMapBase, require_components, row_blocks
from ntkdask.features.sketches import TensorSRHT
from ntkdask.kernels.neural import NTK
from ntkdask.networks import Activation, Dense, Network
from ntkdask.registry import register

BLOCK_BYTES = 2**23
"""Bytes of one block's step features: they are written, transformed and dropped while they are in cache."""


@dataclass(frozen=True)
class Widths:
    """How many features of each kind: m₀ step, m₁ ReLU, m_s sketched; `output` of them leave the map."""

    step: int
    relu: int
    sketch: int


@register("feature map")
@dataclass(frozen=True)
class NTKRandomFeatures(FeatureMapBase):
    """Features ψ with E⟨ψ(x), ψ(z)⟩ = Θ(x, z) at depth 1; above, random features of earlier layers leave a bias O(1/m).

    ψ ← φ ⊕ Q²(φ̇ ⊗ ψ), φ̇ = √(2/m₀)·step(W₀φ), φ = √(2/m₁)·relu(W₁φ); m₁ + m_s = n_components at every depth (a bias in
    the last layer takes one more, constant, component).

    network: fully connected, ReLU, ending in Dense. n_relu = m₁ and n_step = m₀ (None: the split measured best per second,
    see `default_widths`). sampling: "gaussian", or "spherical", the leverage-score sampling of Theorem 3 in exact form.
    Raises InputError for other networks or too few components. Source: Zandieh et al. 2021, Algorithm 2, eq. 11, 15.
    """

    network: Network
    n_components: int
    seed: int = 0
    n_step: int | None = None
    n_relu: int | None = None
    sampling: str = "gaussian"

    def __post_init__(self) -> None:
        require_components(self.n_components)
        require_sampling(self.sampling)
        _require_relu_network(self.network)
        _ = self.widths

    @property
    def target(self) -> NTK:
        """The NTK of the network."""
        return NTK(self.network)

    @functools.cached_property
    def widths(self) -> Widths:
        """The numbers of step, ReLU and sketched features; InputError where n_components does not leave room."""
        last = self._denses[-1]
        bias = int(last.bias_variance > 0)
        if not any(layer.trainable for layer in self._denses):
            raise InputError("NTKRandomFeatures: no layer of the network is trainable, so its NTK is zero.")
        sketched = any(layer.trainable for layer in self._denses[:-1])
        if not sketched:
            return Widths(0, self.n_components - bias, 0)
        step, relu = default_widths(self.n_components)
        step = step if self.n_step is None else require_components(self.n_step, "n_step")
        relu = relu if self.n_relu is None else require_components(self.n_relu, "n_relu")
        sketch = self.n_components - relu - bias if last.trainable else self.n_components
        if sketch < 1 or relu < 1:
            raise InputError(
                f"NTKRandomFeatures: n_components={self.n_components} leaves {sketch} sketched components beside "
                f"n_relu={relu} (and {bias} for the bias). Use n_components >= {relu + bias + 1} or a smaller n_relu."
            )
        return Widths(step, relu, sketch)

    @property
    def _denses(self) -> tuple[Dense, ...]:
        return tuple(layer for layer in self.network.layers if isinstance(layer, Dense))

    def __call__(self, x: Array) -> Array:
        """(n, *s) → (n, n_components) of x's kind and dtype."""
        x = flatten_rows(require_float(x))
        out = namespace(x).empty((x.shape[0], self.n_components), x.dtype)
        weights = self._weights(x)
        for rows in row_blocks(x.shape[0], self._block_rows(x.dtype.itemsize)):
            self._block_into(x[rows], weights, out[rows])
        return out

    def _weights(self, x: Array) -> list[tuple[Array | None, Array | None]]:
        """(ReLU, step) weights of every hidden layer, held for a whole call: drawing them again for each block could take
        longer than using them. The process's cache keeps them between calls where it may."""
        shared.reserve(2 * self._weights_bytes(x.dtype.itemsize, x.shape[1]))
        w, d, pairs = self.widths, x.shape[1], []
        for h, dense in enumerate(self._denses[:-1]):
            inputs = (w.relu if h else d) + int(dense.bias_variance > 0)
            last_frozen = h + 1 == self.network.depth and not self._denses[-1].trainable
            relu = (
                None if last_frozen else relu_weights(self.seed, ("ntk", h, "relu"), inputs, w.relu, self.sampling, x)
            )
            pairs.append((relu, step_weights(self.seed, ("ntk", h, "step"), inputs, w.step, x) if w.step else None))
        return pairs

    def workspace_bytes(self, n: int, itemsize: int, row_shape: tuple[int, ...] | None = None) -> int:
        """Result, one block's temporaries and, given the shape of a row, every layer's weights."""
        w, rows = self.widths, min(n, self._block_rows(itemsize))
        d = math.prod(row_shape or (0,))
        hidden = w.relu + w.sketch + 1
        sketch = (
            TensorSRHT(w.sketch, self.seed).workspace_bytes(rows, w.step, max(d, hidden) + 1, itemsize)
            if w.sketch
            else 0
        )
        block = rows * itemsize * (w.step + (d + 1) + 2 * hidden) + sketch
        weights = 0 if row_shape is None else self._weights_bytes(itemsize, d)
        return n * self.n_components * itemsize + block + weights

    def _weights_bytes(self, itemsize: int, d: int) -> int:
        """All layers' weights, which are kept, and the drawing of one, which is not."""
        w, inputs = self.widths, [d + 1] + [self.widths.relu + 1] * (self.network.depth - 1)
        return sum(i * (w.relu + w.step) * itemsize for i in inputs) + max(
            drawing_bytes(i, max(w.relu, w.step)) for i in inputs
        )

    def _block_rows(self, itemsize: int) -> int:
        return max(32, min(1024, BLOCK_BYTES // (itemsize * max(self.widths.step, self.widths.relu))))

    def _block_into(self, x: Array, weights: list[tuple[Array | None, Array | None]], out: Array) -> None:
        """One block of rows through all the layers; `out` (b, n_components) receives the features."""
        xp, w, first = namespace(x), self.widths, self._denses[0]
        weight = first.weight_variance / (x.shape[1] if self.network.scale_inputs else 1)
        covariance = _with_bias(x, math.sqrt(weight), first.bias_variance)
        tangent = covariance if first.trainable else None
        for h in range(self.network.depth):
            following = self._denses[h + 1]
            width = w.relu + int(following.bias_variance > 0)
            is_last = h + 1 == self.network.depth
            if is_last and not following.trainable:
                self._sketch_into(h, covariance, tangent, weights[h][1], following, out)
                return
            features = out if is_last else xp.empty((x.shape[0], width + w.sketch), x.dtype)
            self._relu_into(h, covariance, weights[h][0], following, features[:, :width])
            if tangent is not None:
                self._sketch_into(h, covariance, tangent, weights[h][1], following, features[:, width:])
            elif not is_last:
                features = features[:, :width]
            covariance = features[:, :width]
            tangent = features if following.trainable else (features[:, width:] if tangent is not None else None)

    def _relu_into(self, h: int, covariance: Array, weights: Array, following: Dense, out: Array) -> None:
        """out ← [σ_w·φ, σ_b]: ReLU features of layer h as the next Dense layer weighs them."""
        m = self.widths.relu
        relu_into(covariance, weights, out[:, :m])
        factor = math.sqrt(self._gain(h) / 2 * following.weight_variance)
        if factor != 1.0:
            out[:, :m] *= out.dtype.type(factor)
        if out.shape[1] > m:
            out[:, m] = math.sqrt(following.bias_variance)

    def _sketch_into(
        self, h: int, covariance: Array, tangent: Array, weights: Array, following: Dense, out: Array
    ) -> None:
        """out ← σ_w·Q²(φ̇ ⊗ ψ): step features of layer h times the tangent features, compressed."""
        xp, m = namespace(covariance), self.widths.step
        steps = step_into(covariance, weights, xp.empty((covariance.shape[0], m), covariance.dtype))
        scale = math.sqrt(2.0 / m * self._gain(h) / 2 * following.weight_variance)
        TensorSRHT(out.shape[1], self.seed, ("ntk", h, "sketch"))(steps, tangent, out=out, scale=scale)

    def _gain(self, h: int) -> float:
        layer = self.network.layers[2 * h + 1]
        return layer.gain if isinstance(layer, Activation) else 1.0


def default_widths(n_components: int) -> tuple[int, int]:
    """(m₀, m₁) for `n_components` outputs: half ReLU features, the other half sketched from as many step features."""
    half = max(1, n_components // 2)
    return half, half


def _with_bias(x: Array, factor: float, bias_variance: float) -> Array:
    """[factor·x, σ_b]: features of Λ of a first Dense layer; x itself where that is the same."""
    xp = namespace(x)
    if factor == 1.0 and bias_variance == 0.0:
        return x
    bias = int(bias_variance > 0)
    out = xp.empty((x.shape[0], x.shape[1] + bias), x.dtype)
    xp.multiply(x, x.dtype.type(factor), out=out[:, : x.shape[1]])
    if bias:
        out[:, -1] = math.sqrt(bias_variance)
    return out


def _require_relu_network(network: Network) -> None:
    """InputError, naming the layer, unless the network is [Dense, ReLU]×L + Dense with L >= 1."""
    if not isinstance(network, Network):
        raise InputError(f"NTKRandomFeatures: network is {network!r}; give a Network, for example fully_connected(1).")
    for position, layer in enumerate(network.layers):
        expected = Activation if position % 2 else Dense
        if not isinstance(layer, expected):
            raise InputError(f"NTKRandomFeatures: layer {position} is {layer}; expected Dense and Activation in turn.")
        if isinstance(layer, Activation) and not isinstance(layer.sigma, ReLU):
            raise InputError(
                f"NTKRandomFeatures: layer {position} is {layer.sigma}; these random features are for relu."
            )
    if len(network.layers) % 2 == 0 or network.depth == 0:
        raise InputError(
            f"NTKRandomFeatures: the network has {network.depth} activations and {len(network.layers)} layers; expected at least one "
            "activation and a last Dense. For a linear kernel use features=None."
        )
