"""The rows of a dry run, and its first question: whether a module is a function of each row by itself.

Only then does a row have a gradient of its own. The rows that are chosen tell modules apart: they are finite, different from each
other, not zero. On them it is checked whether the outputs for a row depend on the rows beside it, whether the module draws random
numbers, and which of its layers take the rows one by one, in their order. Called by `survey`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ntkdask.errors import InputError
from ntkdask.modules.jacobian.capture import Recorder, output_gradients, require_output

Tensor = torch.Tensor

PAIR = 2
"""Rows whose gradients are compared with autograd's."""
ROWS = 8
"""Most rows of a probe. A layer that reorders so many at random keeps their order once in 8! = 40 320 times."""
SCANNED = 64
"""Rows among which those of a probe are looked for."""
ALIKE = 1e-3
"""Largest difference of the outputs for a row with and without other rows beside it, relative to their norm."""
IN_ORDER = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Largest difference of an output gradient from that of its row alone, relative to its norm."""


class Rows(Protocol):
    """Rows that are fetched batch by batch."""

    def __len__(self) -> int: ...

    def batch(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` as a tensor of the module's dtype, on its device, that the module may write to."""


@dataclass(frozen=True)
class Probe:
    """The rows of a dry run.

    Parameters
    ----------
    x : tensor (n, ...)
        2 ≤ n ≤ `ROWS` rows.
    informative : bool
        Whether the first two are finite, not zero, and differ from each other.
    """

    x: Tensor
    informative: bool


def choose_probe(row_sets: Sequence[Rows]) -> Probe:
    """The rows of a dry run, chosen from one or several sets; a single row is taken twice."""
    informative: list[Tensor] = []
    others: list[Tensor] = []
    for rows in row_sets:
        for start in range(0, min(len(rows), SCANNED), ROWS):
            for row in rows.batch(start, min(start + ROWS, len(rows))):
                is_informative = bool(row.isfinite().all() and row.any()) and not any(
                    torch.equal(row, t) for t in informative
                )
                (informative if is_informative else others).append(row)
            if len(informative) >= PAIR:
                break
    finite = [row for row in others if row.isfinite().all()]
    chosen = (informative + finite or others)[:ROWS]
    return Probe(torch.stack(chosen if len(chosen) >= PAIR else chosen * PAIR), len(informative) >= PAIR)


def require_independent_rows(twin: nn.Module, x: Tensor, caller: str) -> None:
    """InputError where the outputs for the first row change with the rows beside it, or are random."""
    with torch.no_grad():
        with _Draws() as draws:
            alone = require_output(twin(x[:1].clone()), 1, caller)
        if draws.operator is not None:
            raise InputError(
                f"{caller}: the module draws random numbers ({draws.operator}), so that its outputs are not a function of its rows. "
                "Call module.eval() first; where it draws in every mode, take that out, or draw from a torch.Generator that is seeded "
                "anew."
            )
        if not nearly_equal(alone, require_output(twin(x.clone()), len(x), caller)[:1]):
            raise InputError(
                f"{caller}: the module's output for a row changes with the rows beside it, so that rows have no gradients of their "
                "own. Take batch statistics and other mixing of rows out of it."
            )


def nearly_equal(y: Tensor, other: Tensor) -> bool:
    """Whether two outputs are equal up to rounding."""
    return not (y - other).norm() > ALIKE * max(float(y.norm()), float(other.norm()))


def layers_out_of_order(recorder: Recorder, x: Tensor, cotangents: Tensor) -> set[str]:
    """Those of the recorder's layers that are called with anything but the rows one by one, in their order.

    A second pass multiplies the cotangents of row i by a factor f_i. Where row i of a layer's output belongs to row i alone, row i
    of its output gradient is multiplied by f_i, too.
    """
    factors = ((-2.0) ** torch.arange(len(x))).to(cotangents)
    y, uses = recorder.forward(x.clone())
    plain = output_gradients(y, uses, cotangents)
    y, again = recorder.forward(x.clone())
    weighted = output_gradients(y * factors[:, None], again, cotangents)
    if [(use.layer, use.shape) for use in uses] != [(use.layer, use.shape) for use in again]:
        return {use.layer for use in (*uses, *again)}
    mixed = set()
    for use, g, h in zip(uses, plain, weighted, strict=True):
        if not use.takes(len(x)) or (g is not None and h is not None and not _follows(h, g, factors)):
            mixed.add(use.layer)
    return mixed


def _follows(h: Tensor, g: Tensor, factors: Tensor) -> bool:
    """Whether row i of h is row i of g times factors[i], up to rounding."""
    expected = (g.flatten(1) * factors[:, None]).double()
    error = (h.flatten(1).double() - expected).norm(dim=1)
    return not bool((error > IN_ORDER[factors.dtype] * expected.norm(dim=1)).any())


class _Draws(TorchDispatchMode):
    """A context that keeps the name of the first operator that draws random numbers from one of torch's default generators."""

    def __init__(self) -> None:
        super().__init__()
        self.operator: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The result of the operator, unchanged."""
        kwargs = kwargs or {}
        if self.operator is None and torch.Tag.nondeterministic_seeded in func.tags and _is_random(func, args, kwargs):
            self.operator = str(func)
        return func(*args, **kwargs)


def _is_random(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operator that can draw random numbers does so with these arguments: attention does not with a dropout of 0."""
    values = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    values.update(zip((a.name for a in func._schema.arguments), args, strict=False))
    values.update(kwargs)
    in_eval = any(values.get(name, True) is False for name in ("train", "training"))
    no_dropout = any(
        isinstance(p := values.get(name), (int, float)) and p == 0 for name in ("dropout_p", "dropout", "p")
    )
    return not (in_eval or no_dropout or values.get("generator") is not None)
