"""Numbers and sizes in words, and numbers from values that may be damaged. Pure functions; called by the modules of the report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import numpy as np

from ntkdask import wording
from ntkdask.wording import format_bytes

# Narrow and unbreakable: a number stays with its unit.
SPACE = "\u202f"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: Any, digits: int = 4) -> str:
    """A number for readers: `digits` significant digits, thin spaces between thousands, a power of ten where it is far from 1.

    >>> number(0.98104321), number(1e-6), number(1.25e12), number(None)
    ('0.981', '10⁻⁶', '1.25×10¹²', '–')
    """
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return f"{value:,}".replace(",", SPACE).replace("-", "−")
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    mantissa, power = mantissa.rstrip("0").rstrip("."), int(exponent)
    if value == 0 or -3 <= power < 6:
        text = f"{value:,.{max(0, digits - 1 - power)}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    else:
        power_of_ten = "10" + str(power).translate(_SUPERSCRIPTS)
        text = f"{mantissa}×{power_of_ten}" if mantissa.lstrip("-") != "1" else mantissa[:-1] + power_of_ten
    return text.replace(",", SPACE).replace("-", "−")


def percent(value: Any) -> str:
    """A share as a percentage with two decimals: 0.98104 → 98.10 %."""
    share = as_float(value)
    return f"{100 * share:.2f}{SPACE}%" if math.isfinite(share) else number(None)


def byte_size(value: Any) -> str:
    """Bytes in binary units: 512000000 → 488 MiB."""
    size = as_float(value)
    if not math.isfinite(size):
        return number(None)
    return format_bytes(size).replace(",", SPACE).replace(" ", SPACE)


def duration(value: Any) -> str:
    """Seconds in the unit that suits them: 0.0123 → 12.3 ms, 200 → 3 min 20 s, 7500 → 2 h 05 min."""
    seconds = as_float(value)
    if not math.isfinite(seconds):
        return number(None)
    return wording.duration(seconds).replace(",", SPACE).replace(" ", SPACE)


def moment(value: Any) -> str:
    """An ISO time to the minute, in its own zone: 2026-11-21 07:00 UTC; any other text as it is."""
    try:
        return datetime.fromisoformat(str(value)).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return str(value)


def quantity(key: str, value: Any) -> str:
    """A value in the unit that its key names: bytes, seconds, flop, or a shape or table."""
    if isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (list, tuple)):
        return (" × " if key.endswith("shape") else ", ").join(map(number, value)) or number(None)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if key.endswith("bytes"):
            return byte_size(value)
        if key.endswith("seconds"):
            return duration(value)
        return f"{number(float(value))}{SPACE}flop" if key == "flops" else number(value)
    return number(value)


def as_float(value: Any) -> float:
    """`value` as a float; NaN where it is no number."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def floats(values: Any) -> np.ndarray:
    """A list of any values as an array (n,) float64; what is no number becomes NaN."""
    return np.array([as_float(v) for v in values] if isinstance(values, (list, tuple)) else [], dtype=np.float64)


def tables(value: Any) -> list[Mapping[str, Any]]:
    """The tables in a list of any values; [] where `value` is no list."""
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, (list, tuple)) else []
