"""σ′(t), elementwise, of every activation: the factor in the backward pass of a finite network.

The duals in `activations` never need it: k_σ′ comes from integrals. At a kink, which a Gaussian hits with probability 0, it is the
limit from the left (ReLU: 0). Step and sign have the almost everywhere derivative 0, as in their duals.
"""

from __future__ import annotations

import functools
import math

from ntkdask.activations.analytic import GELU, Cos, Erf, Exp, Gabor, Gaussian, NormalizedGaussian, RBFActivation, Sin
from ntkdask.activations.base import ActivationFunction
from ntkdask.activations.elu import ELU
from ntkdask.activations.function import FromFunction
from ntkdask.activations.logistic import Logistic
from ntkdask.activations.polynomial import Hermite, Monomial, Polynomial
from ntkdask.activations.rectified import PiecewiseLinear, RectifiedMonomial, Sign, Step
from ntkdask.arrays import Array, namespace, special
from ntkdask.errors import InputError

DIFFERENCE_STEP = 6e-6
"""Relative step of central differences in float64: the cube root of the rounding error."""


@functools.singledispatch
def derivative(sigma: ActivationFunction, t: Array) -> Array:
    """σ′(t), almost everywhere.

    Parameters
    ----------
    sigma : ActivationFunction
        The activation.
    t : array of any shape, float32 or float64

    Returns
    -------
    array of t's shape, dtype and namespace

    Raises
    ------
    InputError
        For an activation of which no function is known (normalised Gaussian) or whose derivative is not written here.

    Notes
    -----
    A `from_function` without `derivative` is differenced in float64, h = 6e-6·max(1, |t|), with an absolute error of about 1e-10.

    Examples
    --------
    >>> import numpy as np
    >>> from ntkdask.activations import get
    >>> derivative(get("relu"), np.array([-1.0, 2.0]))
    array([0., 1.])
    """
    raise InputError(
        f"the derivative of {sigma} is not known as a function; add it to ntkdask.activations.derivatives."
    )


@derivative.register
def _(sigma: NormalizedGaussian, t: Array) -> Array:
    raise InputError(f"{sigma} is known by its dual alone: no finite network has it. Use a map of its kernel instead.")


@derivative.register
def _(sigma: PiecewiseLinear, t: Array) -> Array:
    low, high = sigma.slopes
    return namespace(t).where(t > 0, t.dtype.type(high), t.dtype.type(0 - low))


@derivative.register(Step)
@derivative.register(Sign)
def _(sigma: ActivationFunction, t: Array) -> Array:
    return namespace(t).zeros_like(t)


@derivative.register
def _(sigma: RectifiedMonomial, t: Array) -> Array:
    if sigma.q == 0:
        return namespace(t).zeros_like(t)
    return sigma.q * namespace(t).maximum(t, 0) ** (sigma.q - 1) * (t > 0)


@derivative.register
def _(sigma: Logistic, t: Array) -> Array:
    return sigma.derivative(t)


@derivative.register
def _(sigma: ELU, t: Array) -> Array:
    xp = namespace(t)
    return xp.exp(xp.minimum(t, 0))


@derivative.register
def _(sigma: GELU, t: Array) -> Array:
    """Φ(t) + t·φ(t)."""
    return special(t).ndtr(t) + t * namespace(t).exp(-t * t / 2) * t.dtype.type(1 / math.sqrt(2 * math.pi))


@derivative.register
def _(sigma: Erf, t: Array) -> Array:
    return namespace(t).exp(-t * t) * t.dtype.type(2 / math.sqrt(math.pi))


@derivative.register
def _(sigma: Exp, t: Array) -> Array:
    return sigma.A * sigma(t)


@derivative.register
def _(sigma: Sin, t: Array) -> Array:
    return sigma.A * namespace(t).cos(sigma.A * t + sigma.B)


@derivative.register
def _(sigma: Cos, t: Array) -> Array:
    return -sigma.A * namespace(t).sin(sigma.A * t + sigma.B)


@derivative.register
def _(sigma: RBFActivation, t: Array) -> Array:
    return 2 * sigma.A * namespace(t).cos(math.sqrt(2) * sigma.A * t + math.pi / 4)


@derivative.register
def _(sigma: Gaussian, t: Array) -> Array:
    return -2 * sigma.A * t * sigma(t)


@derivative.register
def _(sigma: Gabor, t: Array) -> Array:
    xp = namespace(t)
    return xp.exp(-t * t) * (xp.cos(t) - 2 * t * xp.sin(t))


@derivative.register
def _(sigma: Hermite, t: Array) -> Array:
    return sigma.q * Hermite(sigma.q - 1)(t) if sigma.q else namespace(t).zeros_like(t)


@derivative.register
def _(sigma: Monomial, t: Array) -> Array:
    return sigma.q * t ** (sigma.q - 1) if sigma.q else namespace(t).zeros_like(t)


@derivative.register
def _(sigma: Polynomial, t: Array) -> Array:
    slopes = [j * value for j, value in enumerate(sigma.coefficients)][1:]
    return Polynomial(tuple(slopes))(t) if slopes else namespace(t).zeros_like(t)


@derivative.register
def _(sigma: FromFunction, t: Array) -> Array:
    xp = namespace(t)
    if sigma.derivative is not None:
        return xp.asarray(sigma.derivative(t)).astype(t.dtype, copy=False)
    wide = t.astype(xp.float64)
    step = DIFFERENCE_STEP * xp.maximum(xp.abs(wide), 1.0)
    above, below = wide + step, wide - step
    return ((sigma(above) - sigma(below)) / (above - below)).astype(t.dtype, copy=False)
