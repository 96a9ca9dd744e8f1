"""σ(t) of every activation as a function of torch tensors, with gradients: the torch side of `activations`.

At a kink the derivative is the limit from the left, and step and sign have the derivative 0, as in `activations.derivatives`; a
constant σ stays part of the graph, so that gradients through it are 0 and not missing. Called by `finite`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ntkdask.activations import (
    ELU,
    GELU,
    ActivationFunction,
    Cos,
    Erf,
    Exp,
    FromFunction,
    Gabor,
    Gaussian,
    Hermite,
    Monomial,
    NormalizedGaussian,
    Polynomial,
    RBFActivation,
    RectifiedMonomial,
    Sigmoid,
    Sign,
    SiLU,
    Sin,
    Softplus,
    Step,
    Tanh,
)
from ntkdask.activations.derivatives import derivative
from ntkdask.activations.rectified import PiecewiseLinear
from ntkdask.arrays import Array, as_array, namespace
from ntkdask.errors import InputError


@functools.singledispatch
def elementwise(sigma: ActivationFunction, t: Tensor) -> Tensor:
    """σ(t) in t's shape, dtype and device.

    Raises InputError for an activation of which no function is known (normalised Gaussian), or that is not written here.

    >>> from ntkdask.activations import get
    >>> elementwise(get("relu"), torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """
    raise InputError(f"{sigma} has no torch function yet; add it to ntkdask.modules.elementwise.")


_FORMULAS: dict[type[ActivationFunction], Callable[[Any, Tensor], Tensor]] = {
    Sign: lambda sigma, t: torch.sign(t),
    Tanh: lambda sigma, t: torch.tanh(t),
    Sigmoid: lambda sigma, t: torch.sigmoid(t),
    SiLU: lambda sigma, t: functional.silu(t),
    # functional.softplus is linear from t = 20 on
    Softplus: lambda sigma, t: torch.logaddexp(t, torch.zeros_like(t)),
    ELU: lambda sigma, t: functional.elu(t),
    GELU: lambda sigma, t: functional.gelu(t),
    Erf: lambda sigma, t: torch.erf(t),
    Exp: lambda sigma, t: torch.exp(sigma.A * t),
    Sin: lambda sigma, t: torch.sin(sigma.A * t + sigma.B),
    Cos: lambda sigma, t: torch.cos(sigma.A * t + sigma.B),
    RBFActivation: lambda sigma, t: math.sqrt(2) * torch.sin(math.sqrt(2) * sigma.A * t + math.pi / 4),
    Gaussian: lambda sigma, t: torch.exp(-sigma.A * t * t),
    Gabor: lambda sigma, t: torch.exp(-t * t) * torch.sin(t),
    Monomial: lambda sigma, t: t**sigma.q,
}
"""Activations that are one formula; the others are written out below."""
for _kind, _formula in _FORMULAS.items():
    elementwise.register(_kind, _formula)


@elementwise.register
def _(sigma: NormalizedGaussian, t: Tensor) -> Tensor:
    raise InputError(f"{sigma} is known by its dual alone: no finite network has it. Use its exact kernel instead.")


@elementwise.register
def _(sigma: PiecewiseLinear, t: Tensor) -> Tensor:
    low, high = sigma.slopes
    if (low, high) == (0, 1):
        return torch.relu(t)
    return t if (low, high) == (-1, 1) else torch.where(t > 0, high * t, -low * t)


@elementwise.register
def _(sigma: Step, t: Tensor) -> Tensor:
    # 1 at 0; every step of it is differentiable, with slope 0
    return torch.ceil((torch.sign(t) + 1) / 2)


@elementwise.register
def _(sigma: RectifiedMonomial, t: Tensor) -> Tensor:
    return torch.relu(t) ** sigma.q if sigma.q else elementwise(Step(), t)


@elementwise.register
def _(sigma: Hermite, t: Tensor) -> Tensor:
    before, now = torch.zeros_like(t), t**0
    for n in range(sigma.q):
        before, now = now, t * now - n * before
    return now


@elementwise.register
def _(sigma: Polynomial, t: Tensor) -> Tensor:
    total = sigma.coefficients[-1] * t**0
    for coefficient in sigma.coefficients[-2::-1]:
        total = total * t + coefficient
    return total


@elementwise.register
def _(sigma: FromFunction, t: Tensor) -> Tensor:
    return _OfArrays.apply(t, sigma)


class _OfArrays(torch.autograd.Function):
    """A user's function of arrays, on the tensor's memory; differentiable once, forwards and backwards, and under vmap."""

    @staticmethod
    def forward(t: Tensor, sigma: FromFunction) -> Tensor:
        return _on_arrays(sigma, t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, FromFunction], output: Tensor) -> None:
        t, ctx.sigma = inputs
        ctx.save_for_backward(t)
        ctx.save_for_forward(t)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * _SlopeOfArrays.apply(ctx.saved_tensors[0], ctx.sigma), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent * _SlopeOfArrays.apply(ctx.saved_tensors[0], ctx.sigma)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], t: Tensor, sigma: FromFunction) -> tuple[Tensor, int]:
        return _OfArrays.apply(t, sigma), in_dims[0]


class _SlopeOfArrays(torch.autograd.Function):
    """σ′ of a user's function, to be taken as it is: there is no second derivative."""

    @staticmethod
    def forward(t: Tensor, sigma: FromFunction) -> Tensor:
        return _on_arrays(functools.partial(derivative, sigma), t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, FromFunction], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], t: Tensor, sigma: FromFunction) -> tuple[Tensor, int]:
        return _SlopeOfArrays.apply(t, sigma), in_dims[0]


def _on_arrays(function: Any, t: Tensor) -> Tensor:
    """function(t) through NumPy or CuPy, in memory of its own."""
    array: Array = as_array(t.detach())
    return torch.from_dlpack(namespace(array).array(function(array), dtype=array.dtype, order="C"))
