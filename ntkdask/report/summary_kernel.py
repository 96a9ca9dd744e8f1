"""What a report says of a kernel ridge run beyond `summary`: solver, spectrum, heat map, solves. Pure functions on metrics.

Any part of a fold may be absent, NaN or damaged: what cannot be read is left out. Called by `summary` and `report`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from ntkdask.report.job_words import SOLVERS, kernel_words
from ntkdask.report.words import as_float, duration, floats, number, tables

Metrics = Mapping[str, Any]


@dataclass(frozen=True)
class Spectrum:
    """Some eigenvalues of the kernel matrix of one fold.

    Parameters
    ----------
    fold : str
        The fold's name.
    ranks : array (k,)
        Ranks of the eigenvalues, from 1.
    values : array (k,)
        The eigenvalues, descending.
    alpha : float
        The chosen alpha.
    note : str
        What the run says of the spectrum; empty for nothing.
    smallest_alpha : float
        The least alpha for which K + αI is safely positive definite.
    """

    fold: str
    ranks: np.ndarray
    values: np.ndarray
    alpha: float
    note: str
    smallest_alpha: float


@dataclass(frozen=True)
class HeatMap:
    """The kernel (m, m) of some rows, NaN where it is not known; what the rows are; the first row and the name of each class."""

    values: np.ndarray
    rows: str
    starts: tuple[int, ...]
    names: tuple[str, ...]
    targets: np.ndarray


def fold_name(fold: Metrics, at: int) -> str:
    """The name of a fold, `fold 2`: by its own number, else by its place."""
    return f"fold {number(fold.get('fold', at))}"


def cards(metrics: Metrics) -> list[tuple[str, str, str]]:
    """The cards (name, value, remark) of the kernel and of the solver that ran."""
    words = kernel_words(metrics["job"])
    found = [("Kernel ridge", words[0], " ".join(words[1:]))] if words else []
    solvers = _solvers(metrics["folds"])
    if solvers:
        names = list(dict.fromkeys(name for name, _ in solvers))
        asked = ", as asked" if all(reason == "as asked" for _, reason in solvers) else ""
        value, remark = (", ".join(words) for words in (names, [SOLVERS.get(name, name) for name in names]))
        found.append(("Solver", value.replace("_", " "), remark + asked))
    return found


def solver_words(folds: Sequence[Metrics]) -> str:
    """Which solver ran, and the plan's reason for it; empty where no fold tells."""
    return "; ".join(SOLVERS.get(name, name) + (f": {reason}" if reason else "") for name, reason in _solvers(folds))


def _solvers(folds: Sequence[Metrics]) -> list[tuple[str, str]]:
    """The (solver, reason) of all folds, each once."""
    found = [(f["solver"], str(f.get("solver_reason") or "")) for f in folds if isinstance(f.get("solver"), str)]
    return list(dict.fromkeys(found))


def spectra(folds: Sequence[Metrics]) -> list[Spectrum]:
    """The spectra of the folds that have one, in the order of ranks; pairs that are not finite are left out."""
    found = []
    for at, fold in enumerate(folds):
        rows = fold.get("spectrum")
        pairs = (
            [floats(row) for row in rows if isinstance(row, list) and len(row) == 2] if isinstance(rows, list) else []
        )
        kept = np.array(sorted(tuple(p) for p in pairs if np.isfinite(p).all() and p[0] >= 1)).reshape(-1, 2)
        if len(kept):
            alpha, smallest = as_float(fold.get("alpha")), as_float(fold.get("smallest_alpha"))
            note = fold.get("spectrum_note")
            text = note.strip() if isinstance(note, str) else ""
            found.append(Spectrum(fold_name(fold, at), kept[:, 0], kept[:, 1], alpha, text, smallest))
    return found


def spectrum_remark(spectra_of_folds: Sequence[Spectrum]) -> str:
    """What the drawing cannot show: notes of the run, eigenvalues below or at 0, an alpha of 0; once where all folds agree."""
    remarks = [(s.fold[:1].upper() + s.fold[1:] + ": ", " ".join(_spectrum_remarks(s))) for s in spectra_of_folds]
    if len({text for _, text in remarks}) == 1:
        return remarks[0][1]
    return " ".join(fold + text for fold, text in remarks if text)


def _spectrum_remarks(spectrum: Spectrum) -> list[str]:
    known = "those known" if spectrum.note else f"{number(int(spectrum.ranks[-1]))} eigenvalues"
    said = [spectrum.note[:1].upper() + spectrum.note[1:].rstrip(".") + "."] if spectrum.note else []
    negative, zero = (_count(spectrum.ranks, inside) for inside in (spectrum.values < 0, spectrum.values == 0))
    if negative:
        lowest = number(float(spectrum.values.min()), 3)
        said.append(f"{negative} of {known} below 0, the lowest {lowest} (drawn by their size).")
    if zero:
        said.append(f"{zero} of {known} 0 to rounding.")
    if spectrum.smallest_alpha > 0:
        said.append(f"From α = {number(spectrum.smallest_alpha, 3)} on K + αI is safely positive definite.")
    return said + (["The chosen α is 0, below the axis."] if spectrum.alpha == 0 else [])


def _count(ranks: np.ndarray, inside: np.ndarray) -> str:
    """How many ranks the marked places stand for, a range where ranks were left out between them; empty for none."""
    places = np.flatnonzero(inside)
    if not places.size:
        return ""
    first, last = int(places[0]), int(places[-1])
    before = ranks[first - 1] if first else 0
    after = ranks[last + 1] if last + 1 < ranks.size else ranks[-1] + 1
    least, most = int(ranks[last] - ranks[first]) + 1, int(after - before) - 1
    return number(least) if least >= most else f"{number(least)} to {number(most)}"


def heat_map(metrics: Metrics) -> HeatMap | None:
    """The first fold's heat map that can be drawn; None when there is none."""
    for at, fold in enumerate(metrics["folds"]):
        table = fold.get("heat_map")
        rows = table.get("values") if isinstance(table, Mapping) else None
        values = [floats(row) for row in rows] if isinstance(rows, list) else []
        square = bool(values) and all(row.size == len(values) for row in values)
        if not square or not np.isfinite(values).any():
            continue
        labels = floats(table.get("labels"))
        labels = labels if labels.size == len(values) else np.zeros(0)
        by_class = table.get("sorted_by") == "class"
        starts, names = _classes(labels, metrics["data"].get("class_names")) if by_class else ((), ())
        of = f" of {fold_name(fold, at)}" if len(metrics["folds"]) > 1 else ""
        order = f", sorted by {'class' if by_class else 'target'}" if labels.size else ""
        rows_words = f"{number(len(values))} training rows{of}{order}"
        return HeatMap(np.array(values), rows_words, starts, names, np.zeros(0) if by_class else labels)
    return None


def _classes(labels: np.ndarray, given: Any) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """(the first row, the name) of each run of rows of one class; `given` are the names by label."""
    given = given if isinstance(given, list) else []
    starts, names, at = [], [], 0
    for label, run in groupby(labels.tolist(), key=lambda v: v if v == v else None):
        index = int(label) if label is not None and label == label // 1 else -1
        starts.append(at)
        names.append(str(given[index]) if 0 <= index < len(given) else number(label if index < 0 else index))
        at += len(list(run))
    return tuple(starts), tuple(names)


def solve_table(folds: Sequence[Metrics]) -> tuple[list[str], list[list[str]]]:
    """(column names, rows) with a row for each solve; columns without a value are left out."""
    rows = [(at, fold, row) for at, fold in enumerate(folds) for row in tables(fold.get("solves"))]
    cells = [
        {
            "Fold": number(fold.get("fold", at)) if len(folds) > 1 else None,
            "α": number(row.get("alpha")),
            "Held out": _held_out(fold, row),
            "Iterations": None if row.get("iterations") is None else number(row["iterations"]),
            "True relative residual": number(row.get("residual"), 3),
            "Converged": _converged(row),
            "tr (K + αI)⁻¹": _trace(row),
            "Time": None if row.get("seconds") is None else duration(row["seconds"]),
        }
        for at, fold, row in rows
    ]
    columns = [name for name in (cells[0] if cells else {}) if any(row[name] is not None for row in cells)]
    return columns, [[row[name] or "–" for name in columns] for row in cells]


def _held_out(fold: Metrics, row: Metrics) -> str:
    group = row.get("held_out")
    if group is None:
        return "nothing"
    return "the holdout" if fold.get("selection") == "holdout" else f"group {number(group)}"


def _converged(row: Metrics) -> str | None:
    if not isinstance(row.get("converged"), bool):
        return None
    return "yes" if row["converged"] else f"no: {row.get('reason') or 'no reason given'}"


def _trace(row: Metrics) -> str | None:
    if row.get("inverse_trace") is None:
        return None
    return f"{number(row['inverse_trace'])} ± {number(row.get('trace_error'), 2)}"


def solve_warnings(fold: Metrics) -> list[str]:
    """Warnings of solves that did not converge: of the fit itself, and of those by which alpha was chosen."""
    rows = tables(fold.get("solves"))
    failed = [row for row in rows if row.get("converged") is False]
    alpha, found = as_float(fold.get("alpha")), []
    fit = [row for row in failed if row.get("held_out") is None and as_float(row.get("alpha")) == alpha]
    if fit:
        found.append(
            f"the fit itself did not converge: {_failure(fit[-1])} Predictions are those of the iterate it reached."
        )
    others = [row for row in failed if not any(row is own for own in fit[-1:])]
    if others:
        worst = max(others, key=lambda row: float(np.nan_to_num(as_float(row.get("residual")), nan=np.inf)))
        count = f"{number(len(others))} of the solves that α was chosen by did not converge"
        found.append(f"{count}; the worst: {_failure(worst)}")
    return found


def _failure(row: Metrics) -> str:
    after = "" if row.get("iterations") is None else f" after {number(row['iterations'])} iterations"
    why = f" ({row['reason']})" if row.get("reason") else ""
    return (
        f"α = {number(row.get('alpha'))}, true relative residual {number(row.get('residual'), 3)}{after}{why}. "
        "Raise solver.max_iterations or solver.tolerance, or use larger alphas."
    )
