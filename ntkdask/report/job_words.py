"""A resolved job in words and as a listing. Pure functions on plain tables; called by `summary_kernel` and `page`.

A layer, kernel or feature map for which there are no words here is named by its type and its numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

# activations: it registers the names that jobs use
from ntkdask import activations, registry  # noqa: F401
from ntkdask.report.words import as_float, floats, number, quantity, tables

SELECTIONS = {
    "gcv": "generalised cross-validation (GCV)",
    "loo": "leave-one-out errors",
    "kfold": "k-fold cross-validation",
    "holdout": "a holdout",
}
SOLVERS = {
    "eigh": "eigendecomposition",
    "cholesky": "Cholesky factorisation",
    "tiled_cholesky": "tiled Cholesky factorisation",
    "cg": "conjugate gradients",
}
SYMBOLS = {"gamma": "γ"}
USUAL = {"weight_variance": 1.0, "bias_variance": 0.0}
ITERATIVE = ("tolerance", "max_iterations")
MAX_PERIOD = 8


def describe_job(job: Mapping[str, Any], solved_by: str = "") -> list[tuple[str, str]]:
    """A resolved job in words: (part, sentence) for each part that it has.

    The network of a kernel is named with the kernel. `solved_by` is the solver that ran, in words.
    """
    parts = {k: v for k, v in job.items() if isinstance(v, Mapping)}
    words = {
        "network": "" if "kernel" in parts else _network_words(parts.get("network", {})),
        "features": _object_words(parts.get("features", {})),
        "kernel": " ".join(kernel_words(job)),
        "solver": _solver_words(parts["solver"], "kernel" in parts) if "solver" in parts else "",
        "solved by": solved_by,
        "data": _data_words(parts.get("data", {})),
        "run": _phrase(parts.get("run", {})),
    }
    return [(part, text) for part, text in words.items() if text]


def kernel_words(job: Mapping[str, Any]) -> list[str]:
    """A job's kernel in words, name and details: ["NTK", "of Dense → relu → Dense"], ["RBF", "with γ 0.1"]; [] without a kernel."""
    kernel = job.get("kernel")
    if not isinstance(kernel, Mapping):
        return []
    if isinstance(kernel.get("kernel"), Mapping):
        inner = kernel_words({**job, "kernel": kernel["kernel"]})
        if kernel.get("type") == "FlipAveraged" and inner:
            return [*inner[:-1], f"{inner[-1]}, averaged over flips"]
        return [str(kernel.get("type") or "unnamed kernel"), *(["of", *inner] if inner else [])]
    network = kernel.get("network") or job.get("network")
    described = _network_words(network) if isinstance(network, Mapping) else ""
    rest = _phrase(kernel, skip=("type", "network"))
    words = [str(kernel.get("type") or "unnamed kernel")]
    words += [f"of {described}"] if described else []
    return words + ([f"with {rest}"] if rest else [])


def _phrase(table: Mapping[str, Any], skip: tuple[str, ...] = ()) -> str:
    """The settings of a table, without nested tables: `n components 8192, sampling spherical`."""
    shown = [(k, v) for k, v in table.items() if k not in skip and v is not None and not isinstance(v, (Mapping, list))]
    return ", ".join(f"{SYMBOLS.get(k, k.replace('_', ' '))} {quantity(k, v)}" for k, v in shown)


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
    """Layers in order, with repeated blocks written once: `3 × (Conv 3 × 3 → relu) → GlobalAvgPool → Dense`."""
    return " → ".join(_folded([_layer_words(layer) for layer in tables(layers)])) or "identity"


def _folded(words: Sequence[str]) -> list[str]:
    """`words` with runs of a repeated block, of up to MAX_PERIOD words, written as one."""
    out, at = [], 0
    while at < len(words):
        taken = 1
        for period in range(1, MAX_PERIOD + 1):
            block, count = list(words[at : at + period]), 1
            while list(words[at + count * period : at + (count + 1) * period]) == block:
                count += 1
            if count >= 3:
                out.append(f"{count} × ({' → '.join(block)})" if period > 1 else f"{count} × {block[0]}")
                taken = count * period
                break
        else:
            out.append(words[at])
        at += taken
    return out


def _layer_words(layer: Mapping[str, Any]) -> str:
    kind = str(layer.get("type", "layer"))
    if kind == "Activation":
        return _activation_words(layer)
    if kind == "Residual":
        return f"({chain(layer.get('branch'))} + {chain(layer.get('shortcut'))})"
    size = next((layer[k] for k in ("filter_size", "window", "window_size", "size") if layer.get(k)), None)
    if size is not None:
        kind = f"{kind} {quantity('shape', size if isinstance(size, list) else [size, size])}"
    unusual = [f"{k.replace('_', ' ')} {number(layer[k])}" for k, v in USUAL.items() if layer.get(k, v) != v]
    return _with_details(kind, unusual + (["not trained"] if layer.get("trainable") is False else []))


def _activation_words(layer: Mapping[str, Any]) -> str:
    """An activation by its name, or by its type where it has none, with its parameters: `abrelu (A 0.5, B 1.5)`."""
    inner = next((layer[k] for k in ("activation", "name", "function") if layer.get(k)), "Activation")
    table = inner if isinstance(inner, Mapping) else {"name": inner}
    kind = str(table.get("name") or table.get("type") or "Activation")
    kind = str(registry.lookup(kind).name) if kind in registry.names("activation") else kind  # type: ignore[attr-defined]
    details = [f"{k} {quantity(k, v)}" for k, v in table.items() if k not in ("name", "type") and v is not None]
    return _with_details(kind, details + (["not normalised"] if layer.get("normalize") is False else []))


def _with_details(kind: str, details: Sequence[str]) -> str:
    return f"{kind} ({', '.join(details)})" if details else kind


def _solver_words(solver: Mapping[str, Any], kernel: bool) -> str:
    name = "kernel ridge" if kernel else "ridge"
    alphas, selection = solver.get("alphas"), str(solver.get("selection") or "")
    if isinstance(alphas, Mapping) and len(alphas.get("logspace") or []) == 3:
        low, high, count = alphas["logspace"]
        ends = [number(10.0 ** as_float(end)) for end in (low, high)]
        tried = f"{number(count)} values of α from {ends[0]} to {ends[1]}"
    elif isinstance(alphas, list) and len(alphas) > 1:
        values = floats(alphas)
        tried = f"{len(alphas)} values of α from {number(float(values.min()))} to {number(float(values.max()))}"
    else:
        return f"{name}, α = {quantity('alpha', alphas)}" + _rest(solver, ("folds", "holdout"))
    by = f" by {SELECTIONS.get(selection, selection)}" if selection not in ("", "auto") else ""
    chosen = f", chosen{by} on training rows" if selection else ""
    folds = () if selection == "kfold" else ("folds",)
    holdout = () if selection in ("holdout", "auto") else ("holdout",)
    return f"{name}, {tried}{chosen}" + _rest(solver, (*folds, *holdout))


def _rest(solver: Mapping[str, Any], unused: tuple[str, ...]) -> str:
    """The other settings of the solver, without those that play no part."""
    iterative = () if solver.get("solver", "auto") in ("auto", "cg") else ITERATIVE
    asked = solver.get("solver")
    shown = {**solver, "solver": SOLVERS.get(asked, asked)} if isinstance(asked, str) else solver
    rest = _phrase(shown, skip=("alphas", "selection", "type", *unused, *iterative))
    return f"; {rest}" if rest else ""


def _data_words(data: Mapping[str, Any]) -> str:
    split, steps = data.get("split"), data.get("preprocess")
    parts = []
    if isinstance(split, Mapping):
        parts.append("split: " + _phrase(split))
    rows = {k: data[k] for k in ("train_rows", "test_rows") if data.get(k)}
    if rows:
        parts.append("at random: " + _phrase(rows))
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
