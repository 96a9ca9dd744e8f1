"""Sizes and times in words, and text from outside that is safe to print: for plans, errors and terminals."""

from __future__ import annotations

import math
import unicodedata

# control characters, halves of surrogate pairs, marks that turn the direction of text, line and paragraph separators
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
# of scripts that need them, and of emoji
_JOINERS = "\u200c\u200d"
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


def printable(text: object, lines: bool = False) -> str:
    r"""Text from outside, such as a file's name, for a terminal: what would act on the terminal or hide is written as an escape.

    `lines` keeps line feeds, for messages of several lines.

    >>> print(printable("naïve 猫 \x1b[31m"))
    naïve 猫 \x1b[31m
    """
    return "".join(c if _is_shown(c) or (lines and c == "\n") else _escaped(c) for c in str(text))


def _is_shown(character: str) -> bool:
    """Whether a terminal shows the character and does nothing else."""
    return unicodedata.category(character) not in _HIDDEN or character in _JOINERS


def _escaped(character: str) -> str:
    """The character as Python writes it in a string."""
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")
