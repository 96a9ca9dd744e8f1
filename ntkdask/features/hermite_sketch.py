"""Sketch of the NTK and NNGP of fully connected networks of any activation, on all of R^d, by truncated Hermite expansions.

Han et al. 2022, Theorem 1: k_σ(a, b, c) ≈ Σ_{ℓ<=degree} r_ℓ(a)r_ℓ(b)c^ℓ is the inner product of ⊕_ℓ r_ℓ(a)·Q_ℓ x̂, Q_ℓ a sketch of
x̂^{⊗ℓ} (`dot_product_sketch`), r_ℓ the radial functions of σ (`radial_functions`). Biases are a constant component of the row, weight
variances and frozen layers as in MATH.md §1. Works on row blocks; called by workflows on tiles.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from ntkdask.activations import RectifiedMonomial, Sign, Step
from ntkdask.arrays import Array, flatten_rows, namespace, require_float
from ntkdask.errors import InputError, nearest
from ntkdask.features.base import FeatureMapBase, require_components, row_blocks
from ntkdask.features.dot_product_sketch import DotProductSketch, scaled_rows
from ntkdask.features.sketching.polynomial_fits import KERNELS, require_degree
from ntkdask.features.sketching.radial_functions import BLOCK_ENTRIES, active_degrees, radial_functions, slope_functions
from ntkdask.features.sketching.sketches import TensorSRHT
from ntkdask.kernels.correlations import row_squares
from ntkdask.kernels.general import node_variances
from ntkdask.kernels.neural import NNGP, NTK
from ntkdask.networks import Activation, Dense, Network
from ntkdask.registry import register

MAX_DEGREE = 64
"""A power of degree ℓ takes ℓ transforms of a row; radial functions are tested up to here."""
LENGTHS = (0.25, 1.0, 2.0, 4.0)
BLOCK_BYTES = 2**23
"""Bytes of one block's rows of a layer's sketch."""


@dataclass(frozen=True)
class SlopeProduct:
    """Features of (rest of T)·k_σ', k_σ' = Σ_ℓ s_ℓ(a)s_ℓ(b)c^ℓ: the sketched tensor product of the features of both."""

    slope: DotProductSketch
    tensor: TensorSRHT

    def __call__(self, rest: Array, unit: Array, slopes: Array, scale: float, out: Array) -> None:
        """Write scale·Q²(φ̇ ⊗ rest) to `out` (n, tensor.n_components); slopes (degree, n) are the s_ℓ(a_i)."""
        powers = self.slope.powers(unit)
        weighed = self.slope.weigh(powers, slopes[list(self.slope.degrees)], unit.shape[1], powers)
        self.tensor(rest, weighed, out=out, scale=scale)

    def workspace_bytes(self, rows: int, d: int, n_rest: int, itemsize: int) -> int:
        """Peak bytes of a call beyond its arguments."""
        width = self.slope.n_components
        sketching = self.slope.workspace_bytes(rows, d, itemsize)
        return rows * width * itemsize + max(sketching, self.tensor.workspace_bytes(rows, n_rest, width, itemsize))


@dataclass(frozen=True)
class Stage:
    """One activation with the Dense layers around it.

    Parameters
    ----------
    before, after : Dense
        The layers before and after the activation.
    layer : Activation
        The activation.
    covariance : DotProductSketch
        Sketch of Σ_ℓ f_ℓ·r_ℓ(a)r_ℓ(b)c^ℓ.
    factors : array (degree + 1,), float64
        The f_ℓ, which are 1 in hidden layers.
    product : SlopeProduct, optional
        None where T has no rest, that is no part before this layer other than Λ.
    """

    before: Dense
    layer: Activation
    after: Dense
    covariance: DotProductSketch
    factors: np.ndarray
    product: SlopeProduct | None


@register("feature map")
@dataclass(frozen=True)
class HermiteSketch(FeatureMapBase):
    """Features of the NTK or NNGP of a fully connected network of any activations, truncated at `degree`.

    Depth 1: φ(x) = ⊕_ℓ √(1 + ℓ)·r_ℓ(a)·Q_ℓ û with u = [σ_w·x, σ_b], a = ‖u‖, and 1 in place of √(1 + ℓ) for an NNGP: since
    Λ·k_σ' = Σ_ℓ ℓ·r_ℓ(a)r_ℓ(b)c^ℓ, one sketch serves both terms of the NTK. Above, each layer's features, rescaled to their
    exact length, enter the next layer, and the rest of T beside Λ is tensored with features of k_σ'.

    Parameters
    ----------
    network : Network
        [Dense, Activation]×L + Dense with L >= 1.
    n_components : int
        Number of features. They are shared out for rows with ‖x‖ from ¼ to 4 (‖x‖/√d with `scale_inputs`); for other rows the
        features are as unbiased, with more variance, wherever σ has a usable expansion at their length. Bounded and linearly
        growing activations have one at every length; exp, sin, cos and the like have none for long rows, which a call refuses.
    seed : int
        Seed of all random numbers.
    degree : int
        Degree of truncation, from 1 to 64.
    kernel : {"ntk", "nngp"}
        The kernel that is sketched.

    Raises
    ------
    InputError
        For other networks, for too few components, for activations without a usable expansion (`sketching.radial_functions`), in a
        call also for rows so long that σ grows or oscillates too fast there, and for the NTK of a σ that jumps, whose k_σ' is not
        the derivative of its k_σ.

    Notes
    -----
    At depth 1 the bias is that of truncation, see `truncation_errors`; features of earlier layers leave a further
    bias of O(1/n_components). The variance is O(1/n_components).

    References
    ----------
    Han et al. 2022, Theorems 1-3, Algorithm 1.
    """

    network: Network
    n_components: int
    seed: int = 0
    degree: int = 8
    kernel: str = "ntk"

    def __post_init__(self) -> None:
        require_components(self.n_components)
        if require_degree(self.degree) > MAX_DEGREE:
            raise InputError(f"HermiteSketch: degree is {self.degree}, expected at most {MAX_DEGREE}.")
        if self.kernel not in KERNELS:
            raise InputError(f"HermiteSketch: unknown kernel {self.kernel!r}{nearest(str(self.kernel), KERNELS)}")
        _require_network(self.network, self.kernel)
        _ = self._stages

    @property
    def target(self) -> NTK | NNGP:
        """The NTK or NNGP of the network."""
        return NTK(self.network) if self.kernel == "ntk" else NNGP(self.network)

    def truncation_errors(self, x: Array) -> Array:
        """The share of k_σ(a, a, 1) that truncation leaves out for each row: (n, *s) → (n,) float64, the largest of all layers.

        It is the share in degrees above `degree`; for an NTK that of k_σ'(a, a, 1) counts, too. At depth 1, by Cauchy-Schwarz,
        |E⟨φ(x), φ(y)⟩ − K(x, y)| <= √(error(x)·error(y)·K(x, x)·K(y, y)).
        """
        x = flatten_rows(require_float(x))
        xp, errors = namespace(x), namespace(x).zeros(x.shape[0])
        for stage, squares in zip(self._stages, self._variances(x), strict=True):
            sigma, a = stage.layer.sigma, xp.sqrt(squares)
            one = xp.where(a > 0, 1.0, 0.0)
            parts = [(radial_functions(sigma, a, self.degree), sigma.dual(a, a, one))]
            if self.kernel == "ntk":
                parts.append((slope_functions(sigma, a, self.degree), sigma.dual_derivative(a, a, one)))
            for values, exact in parts:
                # a row of length 0 has no direction: of its expansion the constant is all
                kept = xp.where(a > 0, (values * values).sum(axis=0), values[0] ** 2)
                errors = xp.maximum(errors, xp.where(exact > 0, 1.0 - kept / xp.where(exact > 0, exact, 1.0), 0.0))
        return errors

    def __call__(self, x: Array) -> Array:
        """Features of rows: (n, *s) → (n, n_components), of x's kind and dtype."""
        x = flatten_rows(require_float(x))
        out = namespace(x).empty((x.shape[0], self.n_components), x.dtype)
        for rows in row_blocks(x.shape[0], self._block_rows(x.dtype.itemsize)):
            self._block_into(x[rows], out[rows])
        return out

    def workspace_bytes(self, n: int, itemsize: int, row_shape: tuple[int, ...] | None = None) -> int:
        """Peak bytes of a call: result, one block's temporaries and, given the shape of a row, the sketches' random numbers."""
        rows, m = min(n, self._block_rows(itemsize)), self.n_components
        peak, width, n_rest = 0, math.prod(row_shape or (0,)) + 1, 0
        for h, stage in enumerate(self._stages):
            inputs = width + n_rest
            sketching = stage.covariance.workspace_bytes(rows, width, itemsize)
            if stage.product is not None:
                sketching += stage.product.workspace_bytes(rows, width, n_rest, itemsize)
            hidden = h + 1 < len(self._stages)
            n_rest = (m if stage.product is not None else 0) + m * stage.before.trainable
            results = (m + n_rest) * hidden
            peak = max(peak, rows * (inputs + results) * itemsize + sketching)
            width = m + 1
        return n * m * itemsize + peak + 8 * (6 * BLOCK_ENTRIES + rows * (4 * (self.degree + 1) + 8))

    # --- the layers -----------------------------------------------------------------------------------------------

    @functools.cached_property
    def _stages(self) -> tuple[Stage, ...]:
        """Every activation with its sketches; their components are shared out for rows of the lengths `LENGTHS`."""
        try:
            return self._planned(np.array(LENGTHS) ** 2)
        except InputError:
            # growing activations have no expansion for long rows; any other fault is raised again here
            return self._planned(np.ones(1))

    def _planned(self, squares: np.ndarray) -> tuple[Stage, ...]:
        layers, rest, stages = self.network.layers, np.zeros_like(squares), []
        for h, variances in enumerate(node_variances(layers, squares)):
            stage, rest = self._stage(h, layers[2 * h : 2 * h + 3], np.sqrt(variances), rest)
            stages.append(stage)
        return tuple(stages)

    def _stage(self, h: int, layers: tuple, a: np.ndarray, rest: np.ndarray) -> tuple[Stage, np.ndarray]:
        """One stage, and the rest of T after it, (k,), for rows of lengths a (k,).

        rest: (k,), the rest of T before the stage, 0 where there is none.
        """
        before, layer, after = layers
        is_last, tangent, path = h + 1 == self.network.depth, self.kernel == "ntk", ("hermite", h)
        squares = radial_functions(layer.sigma, a, self.degree) ** 2
        slopes = slope_functions(layer.sigma, a, self.degree) ** 2
        # lengths of which the truncation leaves little need no components
        kept = squares.sum(axis=0) / np.maximum(layer.sigma.dual(a, a, np.ones_like(a)), np.finfo(np.float64).tiny)
        low = np.arange(self.degree + 1.0)[:, None]
        factors = low * before.trainable + after.trainable if is_last and tangent else np.ones_like(low)
        active = active_degrees(layer.sigma, self.degree)
        degrees = tuple(degree for degree in active if factors[degree] > 0)
        product_values = rest * slopes.sum(axis=0)
        m, product = self.n_components - (self._has_constant if is_last else 0), None
        if product_values.any():
            # each part's standard deviation is about its size over the root of its components
            totals = product_values + (factors * squares).sum(axis=0)
            part = float((product_values / np.where(totals > 0, totals, 1.0)).mean())
            room = m - len(degrees) if is_last else m
            m_tensor = max(1, min(round(m * part) if degrees else m, room)) if is_last else m
            slope = self._sketch(tuple(k - 1 for k in active if k), slopes, kept, self.n_components, (*path, "slope"))
            product = SlopeProduct(slope, TensorSRHT(m_tensor, self.seed, (*path, "tensor")))
            m -= m_tensor if is_last else 0
        covariance = self._sketch(degrees, factors * squares, kept, m, (*path, "covariance"))
        if tangent:
            own = (low * squares).sum(axis=0) * before.trainable
            rest = after.weight_variance * layer.gain * (product_values + own)
        return Stage(before, layer, after, covariance, factors[:, 0], product), rest

    def _sketch(
        self, degrees: tuple[int, ...], values: np.ndarray, kept: np.ndarray, n_components: int, path: tuple
    ) -> DotProductSketch:
        """A sketch whose components follow the degrees' shares of `values`.

        values: (degree + 1, k), at k lengths; kept: (k,), the weight of each length.
        """
        chosen = values[list(degrees)]
        sums = chosen.sum(axis=0)
        shares = tuple((kept * chosen / np.where(sums > 0, sums, 1.0)).sum(axis=1).tolist())
        return DotProductSketch(degrees, shares, n_components, self.seed, path)

    @property
    def _has_constant(self) -> bool:
        """Whether the last Dense adds its bias variance to the kernel."""
        last = self.network.layers[-1]
        return isinstance(last, Dense) and last.bias_variance > 0 and (last.trainable or self.kernel == "nngp")

    def _variances(self, x: Array) -> list[Array]:
        """Λ(x_i, x_i) before every activation, each (n,) float64, exact."""
        return node_variances(self.network.layers, row_squares(x) / self._divisor(x))

    def _divisor(self, x: Array) -> float:
        return float(x.shape[1]) if self.network.scale_inputs else 1.0

    def _block_rows(self, itemsize: int) -> int:
        return max(32, min(1024, BLOCK_BYTES // (itemsize * self.n_components)))

    def _block_into(self, x: Array, out: Array) -> None:
        """Take one block of rows through all layers; `out` (b, n_components) receives the features."""
        xp, variances, rest = namespace(x), self._variances(x), None
        first = self._stages[0].before
        unit = _first_rows(x, first.weight_variance / self._divisor(x), first.bias_variance, variances[0])
        for h, (stage, squares) in enumerate(zip(self._stages, variances, strict=True)):
            a, width = xp.sqrt(squares), unit.shape[1]
            radial = radial_functions(stage.layer.sigma, a, self.degree)
            slopes = None
            if stage.product is not None:
                slopes = slope_functions(stage.layer.sigma, a, self.degree, radial)
            if h + 1 == len(self._stages):
                self._last_into(stage, unit, radial, slopes, rest, out)
                return
            powers = stage.covariance.powers(unit)
            if self.kernel == "ntk":
                rest = self._rest(stage, unit, powers, radial, slopes, rest)
            features = stage.covariance.weigh(powers, radial[list(stage.covariance.degrees)], width, powers)
            unit = _next_rows(features, stage.after.bias_variance, variances[h + 1])

    def _rest(
        self, stage: Stage, unit: Array, powers: Array, radial: Array, slopes: Array | None, rest: Array | None
    ) -> Array | None:
        """Features of the rest of T beside Λ after the stage's second Dense; None where it is zero."""
        xp, own = namespace(unit), stage.before.trainable
        n_tensor = stage.product.tensor.n_components if stage.product is not None else 0
        if not (n_tensor or own):
            return None
        gain = stage.after.weight_variance * stage.layer.gain
        out = xp.empty((unit.shape[0], n_tensor + own * powers.shape[1]), unit.dtype)
        if stage.product is not None:
            stage.product(rest, unit, slopes, math.sqrt(gain), out[:, :n_tensor])
        if own:
            weights = radial * xp.sqrt(gain * xp.arange(self.degree + 1.0))[:, None]
            sketch = stage.covariance
            sketch.weigh(powers, weights[list(sketch.degrees)], unit.shape[1], out[:, n_tensor:])
        return out

    def _last_into(
        self, stage: Stage, unit: Array, radial: Array, slopes: Array | None, rest: Array | None, out: Array
    ) -> None:
        """Write [σ_w·(rest ⊗ φ̇), σ_w·√f_ℓ·r_ℓ·Q_ℓ û, σ_b] of the last layer to `out`."""
        gain = stage.after.weight_variance * stage.layer.gain
        xp, start = namespace(unit), 0
        if stage.product is not None:
            start = stage.product.tensor.n_components
            stage.product(rest, unit, slopes, math.sqrt(gain), out[:, :start])
        sketch, end = stage.covariance, start + stage.covariance.n_components
        powers = sketch.powers(unit, out[:, start:end])
        weights = radial * xp.asarray(np.sqrt(gain * stage.factors))[:, None]
        sketch.weigh(powers, weights[list(sketch.degrees)], unit.shape[1], powers)
        out[:, end:] = math.sqrt(stage.after.bias_variance)


def _first_rows(x: Array, weight_variance: float, bias_variance: float, squares: Array) -> Array:
    """Unit rows [σ_w·x, σ_b]/√Λ with Λ = squares (n,); 0 where Λ = 0."""
    inverse = _inverse(squares)
    constants = math.sqrt(bias_variance) * inverse if bias_variance > 0 else None
    return scaled_rows(x, math.sqrt(weight_variance) * inverse, constants)


def _next_rows(features: Array, bias_variance: float, squares: Array) -> Array:
    """Unit rows [√(Λ − σ_b²)·φ/‖φ‖, σ_b]/√Λ with Λ = squares (n,).

    The features φ of a layer are given the length of their exact variance.
    """
    xp = namespace(features)
    inverse = _inverse(squares)
    constants = xp.minimum(math.sqrt(bias_variance) * inverse, 1.0)
    scales = xp.sqrt(1.0 - constants**2) * _inverse(row_squares(features))
    return scaled_rows(features, scales, constants if bias_variance > 0 else None)


def _inverse(squares: Array) -> Array:
    """1/√squares, 0 where they are 0."""
    xp = namespace(squares)
    return xp.where(squares > 0, 1.0 / xp.sqrt(xp.where(squares > 0, squares, 1.0)), 0.0)


def _require_network(network: Network, kernel: str) -> None:
    """InputError, naming the layer, unless the network is [Dense, Activation]×L + Dense, L >= 1, and its kernel can be sketched."""
    name = "HermiteSketch"
    if not isinstance(network, Network):
        raise InputError(f"{name}: network is {network!r}; give a Network, for example fully_connected(1).")
    for position, layer in enumerate(network.layers):
        if not isinstance(layer, Activation if position % 2 else Dense):
            raise InputError(f"{name}: layer {position} is {layer}; expected Dense and Activation in turn.")
        if kernel == "ntk" and isinstance(layer, Activation) and _jumps(layer):
            raise InputError(
                f"{name}: layer {position} is {layer.sigma}, which jumps: the derivative of its dual activation is not the dual of "
                "its derivative, 0. Use kernel='nngp' or a continuous activation."
            )
    if len(network.layers) % 2 == 0 or network.depth == 0:
        raise InputError(
            f"{name}: the network has {network.depth} activations and {len(network.layers)} layers; expected at least one "
            "activation and a last Dense. For a linear kernel use features=None."
        )
    if kernel == "ntk" and not any(isinstance(layer, Dense) and layer.trainable for layer in network.layers):
        raise InputError(f"{name}: no layer of the network is trainable, so its NTK is zero.")


def _jumps(layer: Activation) -> bool:
    sigma = layer.sigma
    return isinstance(sigma, (Step, Sign)) or (isinstance(sigma, RectifiedMonomial) and sigma.q == 0)
