"""Per-example gradients of any parameter through torch.func, for parameters that are not captured layer by layer.

The gradient of the outputs of one row, vectorised over rows by vmap. Where vmap cannot follow a module (recurrent layers of some
backends, control flow that depends on values), there is one backward pass for each row instead. Several times slower than `capture`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn
from torch.func import functional_call, vjp, vmap

from ntkdask.errors import InputError

Tensor = torch.Tensor


def jacobians(twin: nn.Module, names: list[str], x: Tensor, cotangents: Tensor) -> dict[str, Tensor]:
    """The gradients of Σ_o c_qo·y_o of each row in some parameters.

    Parameters
    ----------
    twin : torch.nn.Module
        A private copy, see `twins.make_twin`.
    names : list of str
        Dotted names of the parameters.
    x : tensor (rows, ...)
        Rows as the module takes them.
    cotangents : tensor (Q, O)
        The coefficients c.

    Returns
    -------
    dict of str to tensor (rows, Q, columns)
        Columns in the order of `parameter.reshape(-1)`.

    Raises
    ------
    InputError
        Where autograd cannot differentiate the module.
    """
    parameters = {name: twin.get_parameter(name).detach() for name in names}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of operators without a batching rule, which are slower
            gradients = _vectorised(twin, parameters, x.detach(), cotangents)
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        if isinstance(error, getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)):
            raise
        gradients = _row_by_row(twin, parameters, x.detach(), cotangents)
    return {name: g.reshape(len(x), len(cotangents), -1) for name, g in gradients.items()}


def _vectorised(twin: nn.Module, parameters: Mapping[str, Tensor], x: Tensor, cotangents: Tensor) -> dict[str, Tensor]:
    """All rows at once, by vmap over rows of vmap over cotangents."""

    def of_row(row: Tensor) -> dict[str, Tensor]:
        def outputs(p: dict[str, Tensor]) -> Tensor:
            return functional_call(twin, p, (row.unsqueeze(0),), tie_weights=True).squeeze(0)

        pull = vjp(outputs, dict(parameters))[1]
        return vmap(pull)(cotangents)[0]

    return vmap(of_row)(x)


def _row_by_row(twin: nn.Module, parameters: Mapping[str, Tensor], x: Tensor, cotangents: Tensor) -> dict[str, Tensor]:
    """One backward pass for each row and cotangent."""
    out = {name: x.new_zeros(len(x), len(cotangents), p.numel(), dtype=p.dtype) for name, p in parameters.items()}
    for i in range(len(x)):
        leaves = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
        try:
            y = functional_call(twin, leaves, (x[i : i + 1].clone(),), tie_weights=True).squeeze(0)
            for q, row in enumerate(cotangents):
                grads = torch.autograd.grad(
                    y, list(leaves.values()), row, retain_graph=q + 1 < len(cotangents), allow_unused=True
                )
                for name, g in zip(leaves, grads, strict=True):
                    if g is not None:
                        out[name][i, q] = (g.to_dense() if g.is_sparse else g).reshape(-1)
        except RuntimeError as error:
            raise InputError(
                f"autograd cannot differentiate {type(twin).__name__} in {', '.join(parameters)}: {error}"
            ) from error
    return out
