"""Per-example gradients of any parameter through torch.func: for what is not captured layer by layer.

vmap over rows of the gradient of one row's outputs; where vmap cannot follow a module (recurrent layers of some backends,
control flow that looks at values), one backward pass for each row instead. Several times slower than capture.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn
from torch.func import functional_call, vjp, vmap

from ntkdask.errors import InputError

Tensor = torch.Tensor


def jacobians(copy: nn.Module, names: list[str], x: Tensor, cotangents: Tensor) -> dict[str, Tensor]:
    """{name: (rows, Q, columns)}: gradients of Σ_o c_qo·y_o of each row in the named parameters, in the order of reshape(-1).

    copy: a private copy (`twins.twin`); x: (rows, ...); cotangents: (Q, O). InputError where autograd cannot differentiate it.
    """
    parameters = {name: copy.get_parameter(name).detach() for name in names}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # batching rules that are missing, and slower for it
            found = _vectorised(copy, parameters, x.detach(), cotangents)
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        if isinstance(error, getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)):
            raise
        found = _row_by_row(copy, parameters, x.detach(), cotangents)
    return {name: g.reshape(len(x), len(cotangents), -1) for name, g in found.items()}


def _vectorised(copy: nn.Module, parameters: Mapping[str, Tensor], x: Tensor, cotangents: Tensor) -> dict[str, Tensor]:
    def of_row(row: Tensor) -> dict[str, Tensor]:
        def outputs(p: dict[str, Tensor]) -> Tensor:
            return functional_call(copy, p, (row.unsqueeze(0),), tie_weights=True).squeeze(0)

        pull = vjp(outputs, dict(parameters))[1]
        return vmap(pull)(cotangents)[0]

    return vmap(of_row)(x)


def _row_by_row(copy: nn.Module, parameters: Mapping[str, Tensor], x: Tensor, cotangents: Tensor) -> dict[str, Tensor]:
    out = {name: x.new_zeros(len(x), len(cotangents), p.numel(), dtype=p.dtype) for name, p in parameters.items()}
    for i in range(len(x)):
        leaves = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
        try:
            y = functional_call(copy, leaves, (x[i : i + 1].clone(),), tie_weights=True).squeeze(0)
            for q, row in enumerate(cotangents):
                grads = torch.autograd.grad(
                    y, list(leaves.values()), row, retain_graph=q + 1 < len(cotangents), allow_unused=True
                )
                for name, g in zip(leaves, grads, strict=True):
                    if g is not None:
                        out[name][i, q] = (g.to_dense() if g.is_sparse else g).reshape(-1)
        except RuntimeError as error:
            raise InputError(
                f"autograd cannot differentiate {type(copy).__name__} in {', '.join(parameters)}: {error}"
            ) from error
    return out
