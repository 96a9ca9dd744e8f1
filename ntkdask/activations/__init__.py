"""Activations σ with their dual activations; `get` finds one by its name, `from_function` makes one of any σ."""

from ntkdask.activations.analytic import GELU, Cos, Erf, Exp, Gabor, Gaussian, NormalizedGaussian, RBFActivation, Sin
from ntkdask.activations.base import ActivationFunction, get
from ntkdask.activations.elu import ELU
from ntkdask.activations.function import FromFunction, from_function
from ntkdask.activations.logistic import Logistic, Sigmoid, SiLU, Softplus, Tanh
from ntkdask.activations.polynomial import Hermite, Monomial, Polynomial
from ntkdask.activations.quadrature import derivative_from_dual, quadrature_dual
from ntkdask.activations.rectified import (
    ABReLU,
    Abs,
    Identity,
    LeakyReLU,
    RectifiedMonomial,
    ReLU,
    Sign,
    Step,
    kappa0,
    kappa1,
)

__all__ = [
    "ELU",
    "GELU",
    "ABReLU",
    "Abs",
    "ActivationFunction",
    "Cos",
    "Erf",
    "Exp",
    "FromFunction",
    "Gabor",
    "Gaussian",
    "Hermite",
    "Identity",
    "LeakyReLU",
    "Logistic",
    "Monomial",
    "NormalizedGaussian",
    "Polynomial",
    "RBFActivation",
    "ReLU",
    "RectifiedMonomial",
    "SiLU",
    "Sigmoid",
    "Sign",
    "Sin",
    "Softplus",
    "Step",
    "Tanh",
    "derivative_from_dual",
    "from_function",
    "get",
    "kappa0",
    "kappa1",
    "quadrature_dual",
]


def __dir__() -> list[str]:
    return sorted(__all__)
