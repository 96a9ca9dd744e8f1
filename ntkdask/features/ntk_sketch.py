"""NTKSketch: sketches of the neural tangent kernel of homogeneous activations without random weights. Zandieh et al. 2021.

Two methods: one polynomial in the cosine for the whole kernel (Remark 1, `homogeneous_sketch`), or Algorithm 1, layer by layer,
which is here: a polynomial for κ₁ and one for κ₀ of the layer's cosine, sketched by `dot_product_sketch`, with φ̇ ⊗ ψ
compressed by a TensorSRHT. Called by workflows on tiles.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkdask.activations.rectified import PiecewiseLinear
from ntkdask.arrays import Array, namespace
from ntkdask.errors import InputError, nearest
from ntkdask.features.arccosine import drawing_bytes, step_into, step_weights
from ntkdask.features.base import FeatureMapBase, require_components, row_blocks
from ntkdask.features.dot_product_sketch import DotProductSketch, scaled_rows
from ntkdask.features.homogeneous_sketch import HomogeneousSketch
from ntkdask.features.sketching.poly_sketch import rows_for_leaves
from ntkdask.features.sketching.polynomial_fits import (
    EXPANSIONS,
    GRID,
    activation_coefficients,
    kernel_of_cosine,
    require_degree,
    require_homogeneous,
)
from ntkdask.features.sketching.sketches import TensorSRHT
from ntkdask.kernels.correlations import row_squares
from ntkdask.kernels.neural import NTK
from ntkdask.networks import Activation, Dense, Network
from ntkdask.registry import register

METHODS = ("polynomial", "algorithm1")
DERIVATIVES = ("sketch", "random")
BLOCK_BYTES = 2**22
"""Bytes of one block's features of one kind."""


@dataclass(frozen=True)
class Slope:
    """Features φ̇ of κ' of one layer.

    Parameters
    ----------
    polynomial : DotProductSketch, optional
        Sketch of the polynomial of κ'; None for σ'(Wφ) with random directions W.
    factors : array, float64
        Roots of the polynomial's positive coefficients.
    n_components : int
        Number of features.
    """

    polynomial: DotProductSketch | None
    factors: np.ndarray
    n_components: int


@dataclass(frozen=True)
class Stage:
    """One activation and the Dense after it, for unit rows.

    Parameters
    ----------
    layer : Activation
        The activation.
    covariance : DotProductSketch, optional
        Sketch of κ/κ(1); None where no features of it are needed.
    factors : array, float64
        Roots of the coefficients of κ/κ(1).
    slope : Slope, optional
        Features of κ'; None where T is zero before the stage.
    tensor : TensorSRHT, optional
        Compression of φ̇ ⊗ ψ; None where T is zero before the stage.
    variance : float
        S(x, x) after the Dense.
    weight : float
        σ_w² of the Dense.
    trainable : bool
        Whether the Dense is trainable, so that S enters T there.
    """

    layer: Activation
    covariance: DotProductSketch | None
    factors: np.ndarray
    slope: Slope | None
    tensor: TensorSRHT | None
    variance: float
    weight: float
    trainable: bool


@register("feature map")
@dataclass(frozen=True)
class NTKSketch(FeatureMapBase):
    """Features ψ with ⟨ψ(x), ψ(z)⟩ ≈ Θ(x, z) of a fully connected network of homogeneous activations without biases.

    Zero rows have zero features.

    Parameters
    ----------
    network : Network
        Fully connected, of homogeneous activations, without biases.
    n_components : int
        Number of features.
    seed : int
        Seed of all random numbers.
    degree : int
        Degree >= 1 of the polynomials.
    method : {"polynomial", "algorithm1"}
        "polynomial" (Remark 1): ψ = ‖x‖·⊕_j √c_j·Q_j x̂ for one polynomial Σ_j c_j α^j ≈ Θ of unit rows. "algorithm1": ψ ← φ ⊕
        Q²(φ̇ ⊗ ψ) with φ and φ̇ sketches of polynomials for κ and κ' of the features φ of the layer before. Both give each
        power components in proportion to its coefficient instead of compressing a direct sum.
    derivative : {"sketch", "random"}
        Of algorithm1 alone: φ̇ by a sketch, or by random features, which have no truncation error, where σ has one kink at 0.
    expansion : {"fit", "taylor"}
        Of algorithm1 alone: non-negative least squares, or the truncated series of the paper, whose errors are larger (κ₀:
        0.091 at degree 8, against 0.034).
    leaves : {"srht", "count"}
        Of polynomial alone: "count" takes SciPy sparse rows in time proportional to their non-zeros, at a larger variance.

    Raises
    ------
    InputError
        For biases, other activations or layers, degree 0, too few components and unknown options.

    Notes
    -----
    The bias of the polynomials is `truncation_error`; "algorithm1" has a further one of O(1/n_components) from
    depth 2 on. The variance is O(1/n_components).

    References
    ----------
    Zandieh et al. 2021, Algorithm 1, Remark 1; MATH.md §4.
    """

    network: Network
    n_components: int
    seed: int = 0
    degree: int = 8
    method: str = "polynomial"
    derivative: str = "sketch"
    expansion: str = "fit"
    leaves: str = "srht"

    def __post_init__(self) -> None:
        require_components(self.n_components)
        require_degree(self.degree)
        require_homogeneous(self.network, "NTKSketch")
        for name, allowed in (("method", METHODS), ("derivative", DERIVATIVES), ("expansion", EXPANSIONS)):
            value = getattr(self, name)
            if value not in allowed:
                raise InputError(f"NTKSketch: unknown {name} {value!r}{nearest(str(value), allowed)}")
        if self.method == "polynomial":
            if (self.derivative, self.expansion) != ("sketch", "fit"):
                raise InputError(
                    "NTKSketch: derivative and expansion are options of method='algorithm1'; method='polynomial' fits the "
                    "whole kernel."
                )
            _ = self._polynomial
        elif self.leaves != "srht":
            raise InputError(
                f"NTKSketch: leaves is {self.leaves!r}, an option of method='polynomial'; method='algorithm1' takes dense rows."
            )
        else:
            _ = self._stages

    @property
    def target(self) -> NTK:
        """The NTK of the network."""
        return NTK(self.network)

    @functools.cached_property
    def truncation_error(self) -> float:
        """The bias that no n_components removes, in parts of √(Θ_ii·Θ_jj).

        It is the maximum over cosines of the polynomials' error in Θ/Θ(1).
        """
        if self.method == "polynomial":
            return self._polynomial.truncation_error
        points = np.linspace(-1.0, 1.0, GRID)
        exact = kernel_of_cosine(self.network, points)
        return float(np.abs(self._truncated(points) - exact).max() / exact[-1])

    @property
    def takes_sparse(self) -> bool:
        """Whether rows may be a SciPy sparse matrix: with leaves="count"."""
        return self.leaves == "count"

    def __call__(self, x: Any) -> Array:
        """Features of rows: (n, *s) → (n, n_components), of x's kind and dtype.

        With leaves="count" x may be a SciPy sparse matrix.
        """
        if self.method == "polynomial":
            return self._polynomial(x)
        x = rows_for_leaves(x, self.leaves)
        out = namespace(x).empty((x.shape[0], self.n_components), x.dtype)
        for rows in row_blocks(x.shape[0], self._block_rows(x.dtype.itemsize)):
            self._block_into(x[rows], out[rows])
        return out

    def workspace_bytes(self, n: int, itemsize: int, row_shape: tuple[int, ...] | None = None) -> int:
        """Peak bytes of a call: result, one block's temporaries and, given the shape of a row, the sketches' random numbers."""
        if self.method == "polynomial":
            return self._polynomial.workspace_bytes(n, itemsize, row_shape)
        m, rows, width = self.n_components, min(n, self._block_rows(itemsize)), math.prod(row_shape or (1,))
        peak = tangent = 0
        for stage in self._stages:
            sketching = 0 if stage.covariance is None else stage.covariance.workspace_bytes(rows, width, itemsize)
            if stage.slope is not None and stage.tensor is not None:
                s = stage.slope.n_components
                kind = stage.slope.polynomial
                slope = width * s * itemsize + drawing_bytes(width, s) if kind is None else 0
                slope += kind.workspace_bytes(rows, width, itemsize) if kind is not None else 0
                tensor = stage.tensor.workspace_bytes(rows, s, max(tangent, width), itemsize)
                sketching += rows * s * itemsize + slope + tensor
            peak = max(peak, sketching)
            width, tangent = m, 2 * m
        features = rows * (math.prod(row_shape or (1,)) + 4 * m * (len(self._stages) > 1)) * itemsize
        return n * m * itemsize + features + peak + 32 * rows + 2**14

    # --- method="polynomial" ------------------------------------------------------------------------------------------

    @functools.cached_property
    def _polynomial(self) -> HomogeneousSketch:
        return HomogeneousSketch(self.network, self.n_components, self.seed, self.degree, leaves=self.leaves)

    # --- method="algorithm1" -------------------------------------------------------------------------------------------

    @functools.cached_property
    def _stages(self) -> tuple[Stage, ...]:
        """Every activation with its sketches."""
        layers = self.network.layers
        _require_alternating(layers)
        first: Any = layers[0]
        variance, has_tangent, stages = first.weight_variance, first.trainable, []
        for h in range(self.network.depth):
            after: Any = layers[2 * h + 2]
            stage = self._stage(h, layers[2 * h + 1], after, variance, has_tangent)
            stages.append(stage)
            variance, has_tangent = stage.variance, has_tangent or after.trainable
        if not has_tangent:
            raise InputError("NTKSketch: no layer of the network is trainable, so its NTK is zero.")
        return tuple(stages)

    def _stage(self, h: int, layer: Any, after: Any, variance: float, has_tangent: bool) -> Stage:
        m, is_last, path = self.n_components, h + 1 == self.network.depth, ("ntk-sketch", h)
        value, slope = activation_coefficients(layer, self.degree, self.expansion)
        gain = layer.gain * layer.sigma.second_moment()
        # hidden features are brought to unit length, so that κ enters as κ/κ(1) whatever the expansion lacks there
        value /= gain if is_last else value.sum()
        n_tensor = 0
        if has_tangent:
            n_tensor = m if is_last and not after.trainable else m - (m // 2 if is_last else 0)
        n_covariance = 0 if is_last and not after.trainable else m - (n_tensor if is_last else 0)
        covariance = self._sketch(value, n_covariance, (*path, "covariance")) if n_covariance else None
        slopes = None
        if has_tangent:
            by_sketch = self.derivative == "sketch"
            if not by_sketch and not isinstance(layer.sigma, PiecewiseLinear):
                raise InputError(
                    f"NTKSketch: derivative='random' needs an activation with one kink at 0; {layer.sigma} has no σ' to draw features "
                    "of. Use derivative='sketch'."
                )
            polynomial = self._sketch(slope, m, (*path, "slope")) if by_sketch else None
            slopes = Slope(polynomial, np.sqrt(slope[slope > 0]), m)
        return Stage(
            layer,
            covariance,
            np.sqrt(value[value > 0]),
            slopes,
            TensorSRHT(n_tensor, self.seed, (*path, "tensor")) if n_tensor else None,
            variance * gain * after.weight_variance,
            after.weight_variance,
            after.trainable,
        )

    def _sketch(self, coefficients: np.ndarray, n_components: int, path: tuple) -> DotProductSketch:
        degrees = tuple(np.flatnonzero(coefficients).tolist())
        return DotProductSketch(degrees, tuple(coefficients[list(degrees)].tolist()), n_components, self.seed, path)

    def _block_rows(self, itemsize: int) -> int:
        return max(32, min(1024, BLOCK_BYTES // (itemsize * self.n_components)))

    def _block_into(self, x: Array, out: Array) -> None:
        """Take one block of rows through all layers; `out` (b, n_components) receives the features."""
        xp = namespace(x)
        first: Any = self.network.layers[0]
        lengths = xp.sqrt(row_squares(x))
        unit = scaled_rows(x, _inverse(lengths))
        tangent = unit * unit.dtype.type(math.sqrt(first.weight_variance)) if first.trainable else None
        for h, stage in enumerate(self._stages):
            is_last = h + 1 == len(self._stages)
            n_tensor = 0 if stage.tensor is None else stage.tensor.n_components
            n_own = stage.covariance.n_components if stage.covariance is not None and stage.trainable else 0
            features = out if is_last else xp.empty((x.shape[0], n_tensor + n_own), x.dtype)
            if tangent is not None:
                self._tensor_into(h, stage, unit, tangent, features[:, :n_tensor])
            if stage.covariance is not None:
                phi = stage.covariance.powers(unit, features[:, n_tensor:] if is_last else None)
                phi = stage.covariance.weigh(phi, xp.asarray(stage.factors)[:, None], unit.shape[1], phi)
                if not is_last:
                    unit = scaled_rows(phi, _inverse(xp.sqrt(row_squares(phi))))
                    phi = unit
                if n_own:
                    xp.multiply(phi, phi.dtype.type(math.sqrt(stage.variance)), out=features[:, n_tensor:])
            tangent = features if features.shape[1] else None
        divisor = x.shape[1] if self.network.scale_inputs else 1
        out *= (lengths / math.sqrt(divisor)).astype(out.dtype)[:, None]

    def _tensor_into(self, h: int, stage: Stage, unit: Array, tangent: Array, out: Array) -> None:
        """Write σ_w·Q²(φ̇ ⊗ ψ) of layer h to `out`."""
        xp, slope, scale = namespace(unit), stage.slope, math.sqrt(stage.weight)
        if slope is None or stage.tensor is None:
            return
        if slope.polynomial is not None:
            powers = slope.polynomial.powers(unit)
            features = slope.polynomial.weigh(powers, xp.asarray(slope.factors)[:, None], unit.shape[1], powers)
        else:
            sigma: Any = stage.layer.sigma
            (low, high), m = sigma.slopes, slope.n_components
            weights = step_weights(self.seed, ("ntk-sketch", h, "step"), unit.shape[1], m, unit)
            features = step_into(unit, weights, xp.empty((unit.shape[0], m), unit.dtype))
            features *= features.dtype.type(low + high)
            features -= features.dtype.type(low)
            scale *= math.sqrt(stage.layer.gain / m)
        stage.tensor(features, tangent, out=out, scale=scale)

    def _truncated(self, cosine: np.ndarray) -> np.ndarray:
        """Θ of unit rows with the polynomials in place of κ and κ': what the features estimate."""
        evaluate = np.polynomial.polynomial.polyval
        first: Any = self.network.layers[0]
        variance, c = first.weight_variance, cosine
        theta = variance * c * first.trainable
        one = np.ones_like(cosine)
        for h, stage in enumerate(self._stages):
            value, slope = activation_coefficients(stage.layer, self.degree, self.expansion)
            if self.derivative == "random":
                derivative = stage.layer.gain * stage.layer.sigma.dual_derivative(one, one, c)
            else:
                derivative = evaluate(c, slope)
            last = h + 1 == len(self._stages)
            c = evaluate(c, value) / (stage.layer.gain * stage.layer.sigma.second_moment() if last else value.sum())
            theta = stage.weight * theta * derivative + stage.variance * c * stage.trainable
        return theta


def _require_alternating(layers: tuple) -> None:
    """InputError, naming the layer, unless the layers are [Dense, Activation]×L + Dense with L >= 1."""
    for position, layer in enumerate(layers):
        if not isinstance(layer, Activation if position % 2 else Dense):
            raise InputError(
                f"NTKSketch: layer {position} is {layer}; method='algorithm1' expects Dense and Activation in turn. Use "
                "method='polynomial'."
            )
    if len(layers) < 3 or len(layers) % 2 == 0:
        raise InputError(
            f"NTKSketch: the network has {len(layers)} layers; method='algorithm1' expects at least one activation and a last Dense."
        )


def _inverse(lengths: Array) -> Array:
    """1/lengths, 0 where they are 0."""
    xp = namespace(lengths)
    return xp.where(lengths > 0, 1.0 / xp.where(lengths > 0, lengths, 1.0), 0.0)
