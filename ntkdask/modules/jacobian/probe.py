"""What a dry run looks at, and what a module must be before gradients of its rows mean anything: a function of each row.

Rows are chosen that tell modules apart: finite, different from each other, not zero. On them a module is asked whether its outputs
depend on the rows beside, whether it draws random numbers, and which of its layers take the rows one by one, in their order.
Called by `survey`.
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
"""Rows of a probe at most: the order of so many is kept by chance once in 40 320 times."""
SCANNED = 64
"""Rows among which they are looked for."""
ALIKE = 1e-3
"""Largest difference of a row's outputs with and without other rows, as a part of their norm."""
IN_ORDER = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Largest difference of an output gradient from that of its row alone, as a part of its norm."""


class Rows(Protocol):
    """Rows that are fetched batch by batch."""

    def __len__(self) -> int: ...

    def batch(self, start: int, stop: int) -> Tensor:
        """Rows start to stop as a tensor of the module's dtype and device that may be written to."""


@dataclass(frozen=True)
class Probe:
    """x: two rows or more, `ROWS` at most. telling: whether the first two are finite, not zero and differ from each other."""

    x: Tensor
    telling: bool


def probe(given: Sequence[Rows]) -> Probe:
    """The rows to look at, of one or several sets of them; a single row is taken twice."""
    telling: list[Tensor] = []
    others: list[Tensor] = []
    for rows in given:
        for start in range(0, min(len(rows), SCANNED), ROWS):
            for row in rows.batch(start, min(start + ROWS, len(rows))):
                tells = bool(row.isfinite().all() and row.any()) and not any(torch.equal(row, t) for t in telling)
                (telling if tells else others).append(row)
            if len(telling) >= PAIR:
                break
    finite = [row for row in others if row.isfinite().all()]
    chosen = (telling + finite or others)[:ROWS]
    return Probe(torch.stack(chosen if len(chosen) >= PAIR else chosen * PAIR), len(telling) >= PAIR)


def require_rows_alone(copy: nn.Module, x: Tensor, what: str) -> None:
    """InputError where the outputs of the first row change with the rows beside it, or are random."""
    with torch.no_grad():
        with _Draws() as draws:
            alone = require_output(copy(x[:1].clone()), 1, what)
        if draws.found is not None:
            raise InputError(
                f"{what}: the module draws random numbers ({draws.found}), so that its outputs are not a function of its rows. Call "
                "module.eval() first; where it draws in every mode, take that out, or draw from a torch.Generator that is seeded anew."
            )
        if not alike(alone, require_output(copy(x.clone()), len(x), what)[:1]):
            raise InputError(
                f"{what}: the module's output for a row changes with the rows beside it, so that rows have no gradients of their own. "
                "Take batch statistics and other mixing of rows out of it."
            )


def alike(y: Tensor, other: Tensor) -> bool:
    """Whether two outputs are the same but for rounding."""
    return not (y - other).norm() > ALIKE * max(float(y.norm()), float(other.norm()))


def layers_out_of_order(recorder: Recorder, x: Tensor, cotangents: Tensor) -> set[str]:
    """Those of the recorder's layers that are called with anything but the rows one by one, in their order.

    Row i of a layer's output gradient is that of row i of the outputs alone: it follows a factor on them, and no other's.
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
    expected = (g.flatten(1) * factors[:, None]).double()
    error = (h.flatten(1).double() - expected).norm(dim=1)
    return not bool((error > IN_ORDER[factors.dtype] * expected.norm(dim=1)).any())


class _Draws(TorchDispatchMode):
    """A context that notes the first operator that draws random numbers from a generator of torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.found: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operator's own result."""
        kwargs = kwargs or {}
        if self.found is None and torch.Tag.nondeterministic_seeded in func.tags and _is_random(func, args, kwargs):
            self.found = str(func)
        return func(*args, **kwargs)


def _is_random(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether its arguments let an operator draw: attention and recurrent layers can, and do not with a dropout of 0."""
    given = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    given.update(zip((a.name for a in func._schema.arguments), args, strict=False))
    given.update(kwargs)
    off = any(given.get(name, True) is False for name in ("train", "training"))
    none = any(isinstance(p := given.get(name), (int, float)) and p == 0 for name in ("dropout_p", "dropout", "p"))
    return not (off or none or given.get("generator") is not None)
