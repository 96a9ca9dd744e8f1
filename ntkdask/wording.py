"""Sizes and times in words, for plans, errors and terminals."""

from __future__ import annotations

import math

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def format_bytes(n: float) -> str:
    """Bytes in binary units, three significant digits.

    >>> format_bytes(512), format_bytes(61.2 * 2**30)
    ('512 B', '61.2 GiB')
    """
    step = min(len(_UNITS) - 1, max(0, int(math.log2(abs(n)) // 10))) if n else 0
    size = n / 1024**step
    return f"{size:,.0f} {_UNITS[step]}" if step == 0 or size >= 999.5 else f"{size:.3g} {_UNITS[step]}"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits their size, or in two units.

    >>> duration(0.00152), duration(48.0), duration(725.0), duration(12000.0)
    ('1.52 ms', '48 s', '12 min 05 s', '3 h 20 min')
    """
    if seconds >= 7200:
        return f"{int(seconds // 3600):,} h {int(seconds % 3600 // 60):02d} min"
    if seconds >= 120:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    scale, unit = (1.0, "s") if seconds >= 1 or seconds == 0 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
    return f"{seconds * scale:.3g} {unit}"
