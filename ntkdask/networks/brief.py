"""Short texts of networks: arguments that differ from their defaults, and repeated layers as a multiple."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

LONGEST = 12
"""Terms of a sequence that are written, at most; of more, the first and last ones."""


class Brief:
    """A dataclass whose repr leaves out arguments at their defaults, and writes a deep network in a few lines.

    The text is the call that makes the object, but where it says that terms are left out.
    """

    def __repr__(self) -> str:
        fields = [f for f in dataclasses.fields(self) if f.init]  # type: ignore[arg-type]
        changed = [(f.name, getattr(self, f.name)) for f in fields if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{name}={_text(value)}' for name, value in changed)})"


def _text(value: Any) -> str:
    return _terms(value) if isinstance(value, tuple) and any(isinstance(v, Brief) for v in value) else repr(value)


def _terms(items: Sequence[Any]) -> str:
    """A tuple of layers as Python writes it, with *(a, b) * 3 for a, b, a, b, a, b."""
    terms, start = [], 0
    while start < len(items):
        period, count = _repetition(items[start:])
        inside = ", ".join(repr(item) for item in items[start : start + period])
        terms.append(inside if count == 1 else f"*({inside}{',' if period == 1 else ''}) * {count}")
        start += period * count
    if len(terms) > LONGEST:
        half = LONGEST // 2
        terms = [*terms[:half], f"... {len(terms) - 2 * half} more ...", *terms[-half:]]
    return f"({', '.join(terms)}{',' if len(items) == 1 else ''})"


def _repetition(items: Sequence[Any]) -> tuple[int, int]:
    """(period, count) of the repetition with which the items begin that covers the most of them; (1, 1) where nothing repeats."""
    best = (1, 1)
    for period in range(1, len(items) // 2 + 1):
        count = 1
        while items[period * count : period * (count + 1)] == items[:period]:
            count += 1
        if count > 1 and period * count > best[0] * best[1]:
            best = (period, count)
    return best
