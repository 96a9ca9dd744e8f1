"""A fully connected ReLU network as random features: one block of rows through all its layers, given the layers' weights.

    φ ← √(gain/2)·σ_w·[relu(φ W), σ_b],   ψ ← φ ⊕ Q²(φ̇ ⊗ ψ),   φ̇ = step(φ W')

Who draws or learns the weights is not decided here, see `ntk_random`. Arrays in, arrays out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ntkdask.activations import ReLU
from ntkdask.arrays import Array, is_device_array, namespace
from ntkdask.compiled import compiled, inlined
from ntkdask.errors import InputError
from ntkdask.features.arccosine import Weights, relu_into, step_into
from ntkdask.features.sketching.operands import over_rows, row_memory, unit_stride
from ntkdask.features.sketching.sketches import TensorSRHT
from ntkdask.networks import Activation, Dense, Network

BLOCK_BYTES = 2**23
"""Bytes of one block's step features: they are written, transformed and dropped while they are in cache."""


@dataclass(frozen=True)
class Widths:
    """How many features of each kind a layer has: m₀ step, m₁ ReLU and m_s sketched ones."""

    step: int
    relu: int
    sketch: int


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """The weights of one hidden layer.

    Parameters
    ----------
    relu : array (inputs, m₁), optional
        Directions of the ReLU features, with their factors; None where the layer needs none.
    step : array (inputs, m₀), optional
        Directions of the step features; None where the layer needs none.
    share : float
        A step feature is 0 or √share, times its own factor where there are `factors`.
    sketch : int
        m_s, the number of sketched features.
    factors : array (m₀,), optional
        A factor for each step feature.
    """

    relu: Weights | None
    step: Weights | None
    share: float
    sketch: int
    factors: Array | None = None


@dataclass(frozen=True)
class ReluLayers:
    """The layers of [Dense, ReLU]×L + Dense as a map of row blocks.

    Parameters
    ----------
    network : Network
        The network.
    seed : int
        Seed of the sketches.
    exact_norms : bool
        Whether ReLU and sketched features of every row are scaled to the lengths that they have in the mean, which are those of
        what enters the layer.
    """

    network: Network
    seed: int
    exact_norms: bool = False

    @property
    def denses(self) -> tuple[Dense, ...]:
        """The L + 1 dense layers."""
        return tuple(layer for layer in self.network.layers if isinstance(layer, Dense))

    @property
    def depth(self) -> int:
        """L, the number of hidden layers."""
        return self.network.depth

    def has_tangent(self, h: int) -> bool:
        """Whether tangent features enter hidden layer h, for which it needs step features: a dense layer up to it is trainable."""
        return any(layer.trainable for layer in self.denses[: h + 1])

    def needs_relu(self, h: int) -> bool:
        """Whether the ReLU features of hidden layer h are read; those before a frozen readout are not."""
        return h + 1 < self.depth or self.denses[-1].trainable

    def n_inputs(self, h: int, d: int, relu_before: int) -> int:
        """How many features enter hidden layer h: those of the rows (d) or of the layer before, and one for a bias."""
        return (relu_before if h else d) + int(self.denses[h].bias_variance > 0)

    def block_into(self, x: Array, weights: Sequence[LayerWeights], out: Array) -> None:
        """Take one block of rows x (b, d) through all layers; `out` (b, n_components) receives the features."""
        xp = namespace(x)
        covariance = self._inputs(x)
        tangent = covariance if self.denses[0].trainable else None
        for h in range(self.depth):
            following, layer = self.denses[h + 1], weights[h]
            is_last = h + 1 == self.depth
            if is_last and not following.trainable:
                self._sketch_into(h, covariance, tangent, layer, out)
                return
            width = layer.relu.shape[1] + int(following.bias_variance > 0)  # type: ignore[union-attr]
            features = out if is_last else xp.empty((x.shape[0], width + layer.sketch), x.dtype)
            self._relu_into(h, covariance, layer.relu, features[:, :width])
            if tangent is not None:
                self._sketch_into(h, covariance, tangent, layer, features[:, width:])
            elif not is_last:
                features = features[:, :width]
            covariance = features[:, :width]
            tangent = features if following.trainable else (features[:, width:] if tangent is not None else None)

    def covariance(self, h: int, x: Array, weights: Sequence[LayerWeights]) -> Array:
        """Features of the covariance that enters hidden layer h, (b, n_inputs); only weights of the layers before h are read."""
        covariance = self._inputs(x)
        for before in range(h):
            relu = weights[before].relu
            width = relu.shape[1] + int(self.denses[before + 1].bias_variance > 0)  # type: ignore[union-attr]
            features = namespace(x).empty((x.shape[0], width), x.dtype)
            self._relu_into(before, covariance, relu, features)
            covariance = features
        return covariance

    def block_bytes(self, widths: Sequence[Widths], d: int, n: int, itemsize: int) -> int:
        """Bytes of the temporaries of one block of at most n rows."""
        rows = min(n, block_rows(widths, itemsize))
        step, sketch = max(w.step for w in widths), max(w.sketch for w in widths)
        hidden = max(w.relu + w.sketch for w in widths) + 1
        srht = TensorSRHT(sketch, self.seed).workspace_bytes(rows, step, max(d, hidden) + 1, itemsize) if sketch else 0
        return rows * itemsize * (step + (d + 1) + 2 * hidden) + srht

    def _inputs(self, x: Array) -> Array:
        """[factor·x, σ_b], features of Λ of the first Dense layer; x itself where they are equal."""
        xp, first = namespace(x), self.denses[0]
        factor = math.sqrt(first.weight_variance / (x.shape[1] if self.network.scale_inputs else 1))
        if factor == 1.0 and first.bias_variance == 0.0:
            return x
        bias = int(first.bias_variance > 0)
        out = xp.empty((x.shape[0], x.shape[1] + bias), x.dtype)
        xp.multiply(x, x.dtype.type(factor), out=out[:, : x.shape[1]])
        if bias:
            out[:, -1] = math.sqrt(first.bias_variance)
        return out

    def _relu_into(self, h: int, covariance: Array, weights: Weights, out: Array) -> None:
        """Write [σ_w·φ, σ_b] to `out`: the ReLU features of layer h as the next Dense layer weighs them."""
        following, m = self.denses[h + 1], weights.shape[1]
        relu_into(covariance, weights, out[:, :m])
        factor = math.sqrt(self._gain(h) / 2 * following.weight_variance)
        if self.exact_norms:
            _scale_to(out[:, :m], covariance, factor)
        elif factor != 1.0:
            out[:, :m] *= out.dtype.type(factor)
        if out.shape[1] > m:
            out[:, m] = math.sqrt(following.bias_variance)

    def _sketch_into(self, h: int, covariance: Array, tangent: Array, layer: LayerWeights, out: Array) -> None:
        """Write σ_w·Q²(φ̇ ⊗ ψ) to `out`: step features of layer h times the tangent features, compressed."""
        xp, m = namespace(covariance), layer.step.shape[1]  # type: ignore[union-attr]
        steps = step_into(covariance, layer.step, xp.empty((covariance.shape[0], m), covariance.dtype))
        if layer.factors is not None:
            steps *= layer.factors
        scale = math.sqrt(self._gain(h) / 2 * self.denses[h + 1].weight_variance)
        sketch = TensorSRHT(out.shape[1], self.seed, ("ntk", h, "sketch"))
        sketch(steps, tangent, out=out, scale=math.sqrt(layer.share) * scale)
        if self.exact_norms:
            _scale_to(out, tangent, scale)

    def _gain(self, h: int) -> float:
        layer = self.network.layers[2 * h + 1]
        return layer.gain if isinstance(layer, Activation) else 1.0


def _scale_to(out: Array, like: Array, factor: float) -> None:
    """Scale the rows of `out` to `factor` times the lengths of the rows of `like`; rows of zeros stay zero."""
    if is_device_array(out):
        xp = namespace(out)
        squares, wanted = (xp.einsum("ij,ij->i", a, a) for a in (out, like))
        out *= (xp.sqrt(wanted / xp.where(squares > 0, squares, 1)) * factor).astype(out.dtype)[:, None]
        return
    (n, m), (flat, stride), (flat_like, stride_like) = out.shape, row_memory(out), row_memory(unit_stride(like))
    kind = out.dtype.type

    def work(start: int, stop: int) -> None:
        _scale_rows(flat, stride, m, flat_like, stride_like, like.shape[1], kind(factor), kind(0), start, stop)

    over_rows(work, n, n * (m + like.shape[1]))


LEAST, MOST = 1e-30, 1e30
"""Squared lengths between which sums in float32 are right."""


@compiled
def _scale_rows(out, stride, columns, like, stride_like, width, factor, zero, first, last):
    for r in range(first, last):
        row, other = out[r * stride : r * stride + columns], like[r * stride_like : r * stride_like + width]
        squares, wanted = zero, zero
        for i in range(columns):
            squares += row[i] * row[i]
        for i in range(width):
            wanted += other[i] * other[i]
        if LEAST < squares < MOST and LEAST < wanted < MOST:
            scale = factor * math.sqrt(wanted / squares)
            for i in range(columns):
                row[i] *= scale
            continue
        own, other_own = _wide_length(row), _wide_length(other)
        if own > 0:
            scale = factor * row.dtype.type(other_own / own)
            for i in range(columns):
                row[i] *= scale


@inlined
def _wide_length(row):
    """‖row‖, summed in float64: squares of its entries may leave float32."""
    total = 0.0
    for i in range(row.size):
        total += np.float64(row[i]) * np.float64(row[i])
    return math.sqrt(total)


def block_rows(widths: Sequence[Widths], itemsize: int) -> int:
    """How many rows a block has."""
    return max(32, min(1024, BLOCK_BYTES // (itemsize * max(max(w.step, w.relu) for w in widths))))


def readout_network(network: Network) -> Network:
    """The network whose NTK is the NNGP of `network`: the same layers, of which only the last is trainable."""
    *hidden, last = network.layers
    frozen = [replace(layer, trainable=False) if isinstance(layer, Dense) else layer for layer in hidden]
    readout = replace(last, trainable=True) if isinstance(last, Dense) else last
    return replace(network, layers=(*frozen, readout))


def require_relu_network(network: Network, name: str) -> None:
    """InputError, naming the map and the layer, unless the network is [Dense, ReLU]×L + Dense with L >= 1."""
    if not isinstance(network, Network):
        raise InputError(f"{name}: network is {network!r}; give a Network, for example fully_connected(1).")
    for position, layer in enumerate(network.layers):
        expected = Activation if position % 2 else Dense
        if not isinstance(layer, expected):
            raise InputError(f"{name}: layer {position} is {layer}; expected Dense and Activation in turn.")
        if isinstance(layer, Activation) and not isinstance(layer.sigma, ReLU):
            raise InputError(f"{name}: layer {position} is {layer.sigma}; these random features are for relu.")
    if len(network.layers) % 2 == 0 or network.depth == 0:
        raise InputError(
            f"{name}: the network has {network.depth} activations and {len(network.layers)} layers; expected at least one "
            "activation and a last Dense. For a linear kernel use features=None."
        )
