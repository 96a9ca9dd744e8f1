"""One forward and one backward pass of a batch: what went into each layer, and the gradient of the outputs at what came out.

No gradient of a parameter is computed: the copy's weights are frozen, and autograd is asked for the gradients at the layers' outputs
alone, at the nodes that made them, so that later in-place operations (ReLU(inplace=True)) do no harm. Called by `gradients` and by
`survey`; works on the private copies of `twins`.
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
    """One call of a layer: its name, which of its calls it was, its input (rows first) and the node that made its output."""

    layer: str
    call: int
    a: Tensor
    version: int
    edge: Any
    shape: tuple[int, ...]

    @property
    def intact(self) -> bool:
        """Whether the input is what the layer saw: nothing has written to it since."""
        return self.a._version == self.version

    def takes(self, rows: int) -> bool:
        """Whether the layer took so many rows, and gave as many, and its input is intact."""
        return self.intact and self.a.ndim > 0 and len(self.a) == rows and self.shape[:1] == (rows,)


def require_output(y: Any, rows: int, what: str) -> Tensor:
    """The module's output when it is a real (rows, O) tensor, O ≥ 1; InputError otherwise."""
    if not isinstance(y, Tensor):
        raise InputError(
            f"{what}: the module gives {type(y).__name__}, expected one tensor (n, O). Wrap it to return that one."
        )
    if y.ndim != 2 or y.shape[0] != rows or not y.shape[1]:
        advice = "Return y[:, None]" if tuple(y.shape) == (rows,) else "Flatten all but the first axis, rows first"
        raise InputError(
            f"{what}: the module gives {tuple(y.shape)} for {rows} rows, expected (n, O), O logits a row. {advice}."
        )
    if not y.is_floating_point():
        raise InputError(f"{what}: the module's output has dtype {y.dtype}; expected real floating-point logits.")
    return y


@contextmanager
def differentiable(device: torch.device) -> Iterator[None]:
    """Gradients on and autocast off, whatever surrounds the call."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        yield


class Recorder:
    """Hooks on the layers of a private copy; `forward` runs it and lists the layers' uses.

    The output of a layer that nothing differentiable reached starts the graph there.
    """

    def __init__(self, copy: nn.Module) -> None:
        self.copy = copy
        self.uses: list[Use] = []
        self._layers: dict[str, Any] = {}
        self._recording = False

    def watch(self, layers: Collection[str]) -> None:
        """Record these layers, by their names, and no others."""
        for name in set(self._layers) - set(layers):
            self._layers.pop(name).remove()
        for name in set(layers) - set(self._layers):
            self._layers[name] = self.copy.get_submodule(name).register_forward_hook(
                self._hook(name), prepend=True, with_kwargs=True
            )

    def _hook(self, name: str) -> Callable[..., Tensor | None]:
        def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Tensor | None:
            if not self._recording or not torch.is_grad_enabled():
                return None
            seen = args[0] if args else kwargs.get("input", kwargs.get("x"))
            if not isinstance(seen, Tensor) or not isinstance(out, Tensor):
                return None
            started = not out.requires_grad
            if started:
                try:
                    out = out.detach().requires_grad_().clone()  # no leaf, for the same reason as in `forward`
                except RuntimeError:  # torch.vmap lets no tensor within it ask for gradients: not captured
                    return None
            call = sum(use.layer == name for use in self.uses)
            a = seen.detach()
            self.uses.append(Use(name, call, a, a._version, get_gradient_edge(out), tuple(out.shape)))
            return out if started else None

        return record

    def forward(self, x: Tensor) -> tuple[Tensor, list[Use]]:
        """(outputs, uses) of rows x, which must be a tensor that the module may write to."""
        self.uses, self._recording = [], True
        try:
            # a leaf would refuse in-place operations
            y = self.copy(x.requires_grad_().clone() if x.is_floating_point() else x)
        finally:
            self._recording = False
        uses, self.uses = self.uses, []
        return y, uses


def output_gradients(y: Tensor, uses: list[Use], cotangents: Tensor) -> list[Tensor | None]:
    """For each use the gradient of Σ_o c_qo·y_o at the layer's output, (rows, Q, *shape); None where the outputs do not depend on it.

    cotangents: (Q, O). One backward pass for each of its rows.
    """
    if not y.requires_grad or not uses:
        return [None] * len(uses)
    edges = [use.edge for use in uses]
    found: list[tuple[Tensor | None, ...]] = []
    for q, row in enumerate(cotangents):
        keep = q + 1 < len(cotangents)
        grads = torch.autograd.grad(y, edges, row.expand_as(y), retain_graph=keep, allow_unused=True)
        found.append(grads)
    if len(found) == 1:
        return [None if g is None else g.unsqueeze(1) for g in found[0]]
    return [
        None if all(g is None for g in of_use) else torch.stack([_or_zeros(g, of_use) for g in of_use], dim=1)
        for of_use in zip(*found, strict=True)
    ]


def _or_zeros(g: Tensor | None, others: tuple[Tensor | None, ...]) -> Tensor:
    if g is not None:
        return g
    return torch.zeros_like(next(other for other in others if other is not None))
