"""Numbers, sizes and jobs in words. Pure functions on plain values; called by `figures` and `report`.

The job functions read the resolved job's tables and stay silent about what they do not know: a new layer or feature
map is named by its type and its numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import numpy as np

# Narrow and unbreakable: a number stays with its unit.
SPACE = "\u202f"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
SELECTIONS = {
    "gcv": "generalised cross-validation (GCV)",
    "loo": "leave-one-out errors",
    "kfold": "k-fold cross-validation",
    "holdout": "a holdout",
}


def number(value: Any, digits: int = 4) -> str:
    """A number for people: `digits` significant digits, thin spaces between thousands, powers of ten when far from 1.

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
    """Bytes in binary units: 512000000 → 488.3 MiB."""
    size = as_float(value)
    if not math.isfinite(size):
        return number(None)
    step = min(5, max(0, int(math.log2(abs(size)) // 10))) if size else 0
    return f"{number(size / 1024**step)}{SPACE}{('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[step]}"


def duration(value: Any) -> str:
    """Seconds in the unit that suits them: 0.0123 → 12.3 ms, 200 → 3 min 20 s, 7500 → 2 h 05 min."""
    seconds = as_float(value)
    if not math.isfinite(seconds):
        return number(None)
    if seconds >= 7200:
        return f"{int(seconds // 3600)}{SPACE}h {int(seconds % 3600 // 60):02d}{SPACE}min"
    if seconds >= 120:
        return f"{int(seconds // 60)}{SPACE}min {int(seconds % 60):02d}{SPACE}s"
    scale, unit = (1, "s") if seconds >= 1 or seconds == 0 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
    return f"{number(seconds * scale, 3)}{SPACE}{unit}"


def moment(value: Any) -> str:
    """An ISO time to the minute, in its own zone: 2026-11-21 07:00 UTC; any other text as it is."""
    try:
        return datetime.fromisoformat(str(value)).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return str(value)


def quantity(key: str, value: Any) -> str:
    """A value written as its key asks: bytes, seconds, flop, shapes, tables."""
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
    """`value` as a float, NaN when it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def floats(values: Any) -> np.ndarray:
    """(n,) float64 of a list in which anything may stand; what is no number becomes NaN."""
    return np.array([as_float(v) for v in values] if isinstance(values, (list, tuple)) else [], dtype=np.float64)


def describe_job(job: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A resolved job in words: (part, sentence) pairs, parts that are absent left out."""
    writers = {
        "network": _network_words,
        "features": _object_words,
        "kernel": _object_words,
        "solver": _solver_words,
        "data": _data_words,
        "run": _phrase,
    }
    described = [(part, write(job[part])) for part, write in writers.items() if isinstance(job.get(part), Mapping)]
    return [(part, text) for part, text in described if text]


def _phrase(table: Mapping[str, Any], skip: tuple[str, ...] = ()) -> str:
    """`n_components 8192, sampling spherical`: what is set, nested tables left to the listing."""
    shown = [(k, v) for k, v in table.items() if k not in skip and v is not None and not isinstance(v, (Mapping, list))]
    return ", ".join(f"{k.replace('_', ' ')} {quantity(k, v)}" for k, v in shown)


def _object_words(table: Mapping[str, Any]) -> str:
    rest = _phrase(table, skip=("type", "network"))
    return str(table.get("type", "")) + (f" with {rest}" if rest else "")


def _network_words(network: Mapping[str, Any]) -> str:
    layers = network.get("layers")
    if isinstance(layers, list) and layers:
        return chain(layers) + (", inputs scaled" if network.get("scale_inputs") else "")
    rest = _phrase(network, skip=("preset", "type", "layers"))
    return str(network.get("preset", "")).replace("_", " ") + (f": {rest}" if rest else "")


def chain(layers: Any) -> str:
    """Layers in order: `Conv 3 × 3 → relu → GlobalAvgPool → Dense`."""
    return " → ".join(_layer_words(layer) for layer in layers if isinstance(layer, Mapping)) or "identity"


def _layer_words(layer: Mapping[str, Any]) -> str:
    kind = str(layer.get("type", "layer"))
    if kind == "Activation":
        inner = next((layer[k] for k in ("activation", "name", "function") if layer.get(k)), kind)
        return str(inner.get("name") or inner.get("type")) if isinstance(inner, Mapping) else str(inner)
    if kind == "Residual":
        shortcut = layer.get("shortcut") or []
        return f"({chain(layer.get('branch_layers') or [])} + {chain(shortcut)})"
    size = next((layer[k] for k in ("filter_size", "window", "window_size", "size") if layer.get(k)), None)
    if size is None:
        return kind
    return f"{kind} {quantity('shape', size if isinstance(size, list) else [size, size])}"


def _solver_words(solver: Mapping[str, Any]) -> str:
    alphas, selection = solver.get("alphas"), str(solver.get("selection", ""))
    if isinstance(alphas, Mapping) and len(alphas.get("logspace") or []) == 3:
        low, high, count = alphas["logspace"]
        ends = [number(10.0 ** as_float(end)) for end in (low, high)]
        tried = f"{number(count)} values of α from {ends[0]} to {ends[1]}"
    elif isinstance(alphas, list) and len(alphas) > 1:
        values = floats(alphas)
        tried = f"{len(alphas)} values of α from {number(float(values.min()))} to {number(float(values.max()))}"
    else:
        tried = f"α = {quantity('alpha', alphas)}"
        return f"ridge, {tried}"
    chosen = f", chosen by {SELECTIONS.get(selection, selection)} on training rows" if selection else ""
    rest = _phrase(solver, skip=("alphas", "selection", "type"))
    return f"ridge, {tried}{chosen}" + (f"; {rest}" if rest else "")


def _data_words(data: Mapping[str, Any]) -> str:
    split, steps = data.get("split"), data.get("preprocess")
    parts = []
    if isinstance(split, Mapping):
        parts.append("split: " + _phrase(split))
    if isinstance(steps, list) and steps:
        names = (str(s.get("type", "step")) if isinstance(s, Mapping) else str(s) for s in steps)
        parts.append("preprocessing fitted on training rows: " + " → ".join(names))
    return "; ".join(parts)


def listing(table: Mapping[str, Any], path: tuple[str, ...] = ()) -> str:
    """Nested tables as TOML; keys without a value are left out, tables inside lists are written inline."""
    plain = {k: v for k, v in table.items() if v is not None and not isinstance(v, Mapping)}
    lines = [f"{k} = {_toml(v)}" for k, v in plain.items()]
    if path and lines:
        lines.insert(0, f"[{'.'.join(path)}]")
    blocks = ["\n".join(lines)] + [listing(v, (*path, str(k))) for k, v in table.items() if isinstance(v, Mapping)]
    return "\n\n".join(block for block in blocks if block)


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items() if v is not None) + " }"
    if isinstance(value, list):
        flat = [_toml(v) for v in value]
        text = ", ".join(flat)
        return f"[{text}]" if len(text) <= 100 else "[\n" + "".join(f"  {v},\n" for v in flat) + "]"
    if isinstance(value, float):
        # json writes NaN and Infinity, TOML nan and inf
        return repr(value)
    return json.dumps(value, ensure_ascii=False)
