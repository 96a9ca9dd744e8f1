"""One forward and one backward pass of a batch: each layer's input, and the gradient of the outputs at each layer's output.

No gradient of a parameter is computed: the weights of the private copy (`twins`) are frozen, and autograd is asked for the
gradients at the outputs of layers alone. They are taken at the graph's nodes that made these outputs, so that later in-place
operations (ReLU(inplace=True)) do no harm. Called by `gradients` and by `survey`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from ntkdask.errors import InputError

Tensor = torch.Tensor


@dataclass
class Use:
    """One call of a layer in a forward pass.

    Parameters
    ----------
    layer : str
        Dotted name of the layer.
    call : int
        Number of the call among those of this layer, from 0.
    a : tensor (rows, *)
        The input, detached.
    version : int
        Autograd's version of the input at the call; an in-place operation increases it.
    edge : torch.autograd.graph.GradientEdge
        The node of the graph that made the output.
    shape : tuple of int
        Shape of the output.
    """

    layer: str
    call: int
    a: Tensor
    version: int
    edge: Any
    shape: tuple[int, ...]

    @property
    def intact(self) -> bool:
        """Whether the input still is what the layer saw: no operation has written to it since."""
        return self.a._version == self.version

    def takes(self, rows: int) -> bool:
        """Whether the layer took so many rows and gave as many, and its input is intact."""
        return self.intact and self.a.ndim > 0 and len(self.a) == rows and self.shape[:1] == (rows,)


def require_output(y: Any, rows: int, caller: str) -> Tensor:
    """`y` itself where it is a real tensor (rows, O), O ≥ 1; InputError, which names the `caller`, otherwise."""
    if not isinstance(y, Tensor):
        raise InputError(
            f"{caller}: the module gives {type(y).__name__}, expected one tensor (n, O). Wrap it to return that one."
        )
    if y.ndim != 2 or y.shape[0] != rows or not y.shape[1]:
        advice = "Return y[:, None]" if tuple(y.shape) == (rows,) else "Flatten all but the first axis, rows first"
        raise InputError(
            f"{caller}: the module gives {tuple(y.shape)} for {rows} rows, expected (n, O), O logits a row. {advice}."
        )
    if not y.is_floating_point():
        raise InputError(f"{caller}: the module's output has dtype {y.dtype}; expected real floating-point logits.")
    return y


@contextmanager
def differentiable(device: torch.device) -> Iterator[None]:
    """A context with gradients on and autocast off, whatever surrounds it."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        yield


class Recorder:
    """Records the calls of layers of a private copy by forward hooks.

    Weights are frozen, so a layer whose input depends on no differentiable tensor would give an output outside autograd's graph:
    the hook makes the graph begin there.
    """

    def __init__(self, twin: nn.Module) -> None:
        self.twin = twin
        self.uses: list[Use] = []
        self._layers: dict[str, Any] = {}
        self._recording = False

    def watch(self, layers: Collection[str]) -> None:
        """Record the layers of these dotted names, and no others."""
        for name in set(self._layers) - set(layers):
            self._layers.pop(name).remove()
        for name in set(layers) - set(self._layers):
            self._layers[name] = self.twin.get_submodule(name).register_forward_hook(
                self._hook(name), prepend=True, with_kwargs=True
            )

    def _hook(self, name: str) -> Callable[..., Tensor | None]:
        """The forward hook of the layer `name`; it returns a new output where the graph begins there."""

        def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Tensor | None:
            if not self._recording or not torch.is_grad_enabled():
                return None
            layer_input = args[0] if args else kwargs.get("input", kwargs.get("x"))
            if not isinstance(layer_input, Tensor) or not isinstance(out, Tensor):
                return None
            starts_graph = not out.requires_grad
            if starts_graph:
                try:
                    out = out.detach().requires_grad_().clone()  # no leaf, for the same reason as in `forward`
                except RuntimeError:  # torch.vmap lets no tensor within it ask for gradients: not captured
                    return None
            call = sum(use.layer == name for use in self.uses)
            a = layer_input.detach()
            self.uses.append(Use(name, call, a, a._version, get_gradient_edge(out), tuple(out.shape)))
            return out if starts_graph else None

        return record

    def forward(self, x: Tensor) -> tuple[Tensor, list[Use]]:
        """(outputs, uses of the watched layers) of a forward pass of rows x, a tensor that the module may write to."""
        self.uses, self._recording = [], True
        try:
            # a leaf would refuse in-place operations
            y = self.twin(x.requires_grad_().clone() if x.is_floating_point() else x)
        finally:
            self._recording = False
        uses, self.uses = self.uses, []
        return y, uses


def output_gradients(y: Tensor, uses: list[Use], cotangents: Tensor) -> list[Tensor | None]:
    """For each use the gradients of Σ_o c_qo·y_o at the layer's output, (rows, Q, *shape); None where y does not depend on it.

    There is a backward pass for each row q of `cotangents` (Q, O).
    """
    if not y.requires_grad or not uses:
        return [None] * len(uses)
    edges = [use.edge for use in uses]
    by_cotangent: list[tuple[Tensor | None, ...]] = []
    for q, row in enumerate(cotangents):
        keep = q + 1 < len(cotangents)
        grads = torch.autograd.grad(y, edges, row.expand_as(y), retain_graph=keep, allow_unused=True)
        by_cotangent.append(grads)
    if len(by_cotangent) == 1:
        return [None if g is None else g.unsqueeze(1) for g in by_cotangent[0]]
    return [
        None if all(g is None for g in of_use) else torch.stack([_or_zeros(g, of_use) for g in of_use], dim=1)
        for of_use in zip(*by_cotangent, strict=True)
    ]


def _or_zeros(g: Tensor | None, others: tuple[Tensor | None, ...]) -> Tensor:
    """A gradient, or zeros in the shape of the others where it is None."""
    if g is not None:
        return g
    return torch.zeros_like(next(other for other in others if other is not None))
