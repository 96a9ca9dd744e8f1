"""The text of a report: the metrics of a run, arranged as rows that are ready to print. Pure functions; called by `page`.

`metrics` has passed `page.read_metrics`: its parts are tables and lists. Values within them may be missing or NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ntkdask.report import summary_kernel
from ntkdask.report.summary_kernel import Metrics
from ntkdask.report.words import as_float, byte_size, duration, floats, number, percent, quantity, tables

SCORES = {"accuracy": "accuracy", "rmse": "RMSE", "r2": "R²", "mse": "MSE"}
MAX_SCATTER_POINTS = 2000
CHOSEN_BY = {"gcv": "GCV", "loo": "LOO", "kfold": "k-fold", "holdout": "a holdout"}


def headline(metrics: Metrics) -> list[tuple[str, str, str]]:
    """The cards (name, value, remark) on top: test scores, then the model, then time and memory."""
    model = [*_alpha_cards(metrics["folds"]), *summary_kernel.cards(metrics)]
    return [*_score_cards(metrics), *model, *_cost_cards(metrics)]


def _score_cards(metrics: Metrics) -> list[tuple[str, str, str]]:
    folds = metrics["folds"]
    cards: list[tuple[str, str, str]] = []
    for key in ("accuracy",) if metrics["task"] == "classification" else ("rmse", "mse", "r2"):
        mean, spread = mean_test_score(metrics, key)
        # one of the two errors is enough on top; the table of folds has both
        if not math.isfinite(mean) or (key == "mse" and cards):
            continue
        remarks = [f"± {_score(key, spread)} over {len(folds)} folds"] if len(folds) > 1 and spread >= 0 else []
        if key == "accuracy" and len(confusion_counts(folds)):
            remarks.append(f"always the largest class: {percent(largest_class(confusion_counts(folds)))}")
        cards.append((f"Test {SCORES[key]}", _score(key, mean), "; ".join(remarks)))
    return cards


def _alpha_cards(folds: Sequence[Metrics]) -> list[tuple[str, str, str]]:
    alphas = floats([f.get("alpha") for f in folds])
    dimensions = floats([chosen_row(f).get("effective_dimension") for f in folds])
    cards = []
    if np.isfinite(alphas).any():
        selection = str(folds[0].get("selection") or "")
        chosen = f"chosen by {CHOSEN_BY.get(selection, selection)} on training rows" if selection else ""
        cards.append(("Ridge α", span(alphas), "as given" if selection == "given" else chosen))
    if np.isfinite(dimensions).any():
        cards.append(("Effective dimension", span(dimensions), "at the chosen α"))
    return cards


def _cost_cards(metrics: Metrics) -> list[tuple[str, str, str]]:
    seconds, memory, workers = floats(list(metrics["seconds"].values())), metrics["memory"], metrics.get("workers")
    total = as_float(metrics["seconds"].get("total", np.nansum(seconds) if seconds.size else None))
    cards = []
    if math.isfinite(total):
        remark = f"{number(workers)} worker{'' if workers == 1 else 's'}" if workers else ""
        cards.append(("Time", duration(total), remark))
    if memory.get("measured_peak_bytes") is not None:
        budget = memory.get("budget_bytes")
        remark = f"of one worker; {byte_size(budget)} allowed" if budget else "of one worker"
        cards.append(("Peak memory", byte_size(memory["measured_peak_bytes"]), remark))
    return cards


def span(values: np.ndarray) -> str:
    """One value, or the range of several with three digits: `289 – 425`."""
    values = values[np.isfinite(values)]
    low, high = float(values.min()), float(values.max())
    return number(low) if low == high else f"{number(low, 3)} – {number(high, 3)}"


def mean_test_score(metrics: Metrics, key: str) -> tuple[float, float]:
    """(mean, standard deviation) of a test score as the run recorded them, else over its folds; NaN where they are not known."""
    if key in metrics["test"]:
        return as_float(metrics["test"][key]), as_float(metrics["test"].get(f"{key}_std"))
    values = floats([scores(f, "test").get(key) for f in metrics["folds"]])
    return (float(values.mean()), float(values.std())) if values.size else (math.nan, math.nan)


def scores(fold: Metrics, part: str) -> Mapping[str, Any]:
    """The `train` or `test` table of a fold, empty when there is none."""
    table = fold.get(part)
    return table if isinstance(table, dict) else {}


def chosen_row(fold: Metrics) -> Mapping[str, Any]:
    """The row of the fold's alpha path at its chosen alpha, empty when it has none."""
    alpha = as_float(fold.get("alpha"))
    rows = tables(fold.get("alpha_path"))
    return next((row for row in rows if math.isclose(as_float(row.get("alpha")), alpha, rel_tol=1e-9)), {})


def fold_table(folds: Sequence[Metrics]) -> tuple[list[str], list[list[str]]]:
    """(column names, rows) with a row for each fold, and a row of means where there are several."""
    columns = [(p, k) for k in SCORES for p in ("train", "test") if any(k in scores(f, p) for f in folds)]
    dimensions = [chosen_row(fold).get("effective_dimension") for fold in folds]
    known = ["Effective dimension"] if any(d is not None for d in dimensions) else []
    names = ["Fold", "Training rows", "Test rows", "α", *known]
    names += [f"{'Training' if part == 'train' else 'Test'} {SCORES[key]}" for part, key in columns]
    rows = []
    for at, fold in enumerate(folds):
        first = [fold.get("fold", at), fold.get("n_train"), fold.get("n_test"), fold.get("alpha")]
        cells = [number(v) for v in (*first, *([dimensions[at]] if known else []))]
        rows.append(cells + [_score(key, scores(fold, part).get(key)) for part, key in columns])
    if len(folds) > 1:
        means = [_score(key, float(floats([scores(f, part).get(key) for f in folds]).mean())) for part, key in columns]
        rows.append(["Mean", *[""] * (len(names) - 1 - len(columns)), *means])
    return names, rows


def _score(key: str, value: Any) -> str:
    return percent(value) if key == "accuracy" else number(value)


def class_names(metrics: Metrics) -> list[str]:
    """Names of the classes, their numbers where the data has no names."""
    given, k = metrics["data"].get("class_names"), len(confusion_counts(metrics["folds"]))
    given = given if isinstance(given, list) else []
    return [str(given[i]) if i < len(given) else str(i) for i in range(k)]


def confusion_counts(folds: Sequence[Metrics]) -> np.ndarray:
    """(k, k) float64 counts over the test rows of all folds, rows the true classes; (0, 0) when none is recorded."""
    total = np.zeros((0, 0))
    for fold in folds:
        counts = scores(fold, "test").get("confusion")
        rows = [floats(row) for row in counts] if isinstance(counts, list) else []
        square = bool(rows) and all(row.size == len(rows) and np.isfinite(row).all() for row in rows)
        if square and len(total) in (0, len(rows)):
            total = np.array(rows) + (total if total.size else 0.0)
    return total


def largest_class(matrix: np.ndarray) -> float:
    """The accuracy of a classifier that always answers the largest class; NaN without test rows."""
    return float(matrix.sum(axis=1).max() / matrix.sum()) if matrix.sum() > 0 else math.nan


def class_table(matrix: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Per class: name, test rows, recall and precision as text, recall as a number in [0, 1]."""
    rows = []
    for i, name in enumerate(names):
        hits, true, answered = matrix[i, i], matrix[i].sum(), matrix[:, i].sum()
        recall, precision = (float(hits / n) if n > 0 else math.nan for n in (true, answered))
        rows.append(
            {
                "name": name,
                "rows": number(round(float(true))),
                "recall": percent(recall),
                "share": recall if recall == recall else 0.0,
                "precision": percent(precision),
            }
        )
    return rows


def confused_pairs(matrix: np.ndarray, names: Sequence[str], count: int = 15) -> list[tuple[str, str, str, str]]:
    """The most frequent errors: (true, predicted, rows, share of the true class), ties in class order."""
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-wrong, axis=None, kind="stable")[:count]
    pairs = [divmod(int(at), len(matrix)) for at in order]
    return [
        (names[i], names[j], number(round(float(wrong[i, j]))), percent(wrong[i, j] / matrix[i].sum()))
        for i, j in pairs
        if wrong[i, j] > 0
    ]


def scatter_points(folds: Sequence[Metrics]) -> tuple[np.ndarray, np.ndarray]:
    """(targets, predictions) of all folds, thinned evenly to at most MAX_SCATTER_POINTS."""
    pairs = [scores(f, "test").get("scatter") for f in folds]
    both = [(floats(p.get("target")), floats(p.get("predicted"))) for p in pairs if isinstance(p, dict)]
    both = [(t[: p.size], p[: t.size]) for t, p in both]
    if not both:
        return np.zeros(0), np.zeros(0)
    target, predicted = (np.concatenate(side) for side in zip(*both, strict=True))
    step = -(-target.size // MAX_SCATTER_POINTS) or 1
    return target[::step], predicted[::step]


def stage_bars(seconds: Metrics) -> list[tuple[str, float, str, str]]:
    """Rows for `figures.bars`: one for each stage, then the rest of the total."""
    stages = {k: as_float(v) for k, v in seconds.items() if k != "total"}
    known = sum(v for v in stages.values() if v == v)
    total = as_float(seconds.get("total", known))
    if total > 1.005 * known and stages:
        stages["everything else"] = total - known
    whole = max(total if total == total else 0.0, known) or 1.0
    rows = [(k, v, f"{duration(v)}  ({number(100 * v / whole, 3)} %)", "main") for k, v in stages.items() if v == v]
    return [(*row[:3], "quiet") if row[0] == "everything else" else row for row in rows]


def memory_bars(memory: Metrics, plan: Metrics) -> list[tuple[str, float, str, str]]:
    """Rows for `figures.bars`: planned, measured and allowed bytes of one worker."""
    planned = memory.get("planned_bytes", plan.get("worker_bytes"))
    budget = memory.get("budget_bytes", plan.get("worker_budget_bytes"))
    measured = memory.get("measured_peak_bytes")
    rows = [("planned", planned, "main"), ("measured", measured, "measured"), ("budget", budget, "quiet")]
    return [(name, as_float(size), byte_size(size), role) for name, size, role in rows if size is not None]


def task_table(tasks: Metrics) -> list[list[str]]:
    """Per label: tasks, rows, median, shortest and longest seconds, rows a second of one task slot, peak memory."""
    table = []
    for name, row in tasks.items():
        seconds = floats(row.get("seconds"))
        seconds = seconds[np.isfinite(seconds)]
        middle = (np.median(seconds), seconds.min(), seconds.max()) if seconds.size else (None, None, None)
        speed = as_float(row.get("rows")) / float(seconds.sum()) if seconds.sum() > 0 else math.nan
        cells = [number(row.get("count", int(seconds.size))), number(row.get("rows")), *map(duration, middle)]
        table.append([name, *cells, number(speed if speed == speed else None, 3), byte_size(row.get("peak_bytes"))])
    return table


def facts(data: Metrics) -> list[tuple[str, str]]:
    """(name, value) of all that the run recorded of the dataset and its origin, in that order."""
    names = {"n": "rows", "url": "url", "row_shape": "shape of a row", "class_names": "classes"}
    own = {k: v for k, v in data.items() if k != "provenance" and v not in (None, [])}
    origin = data.get("provenance") or {}
    origin = origin if isinstance(origin, dict) else {"provenance": origin}
    return [
        (names.get(k, k).replace("_", " "), _listed(v) if k == "class_names" else quantity(k, v))
        for k, v in {**own, **{k: v for k, v in origin.items() if v is not None}}.items()
    ]


def _listed(names: Any, limit: int = 20) -> str:
    shown = ", ".join(map(str, names[:limit])) if isinstance(names, list) else str(names)
    return f"{len(names)}: {shown}" + (", …" if len(names) > limit else "")


def environment_rows(metrics: Metrics) -> list[tuple[str, str]]:
    """(name, value) of package versions, BLAS, threads, workers, and all other plain values of the metrics."""
    first = [("ntkdask", metrics.get("ntkdask")), *metrics["versions"].items()]
    known = {"name", "task", "finished", "ntkdask", "score_name"}
    rest = [(k, v) for k, v in metrics.items() if k not in known and isinstance(v, (str, int, float))]
    return [(str(k).replace("_", " "), quantity(str(k), v)) for k, v in [*first, *rest] if v is not None]


def find_warnings(metrics: Metrics) -> list[str]:
    """What a reader should doubt: more memory than planned, alpha at an end of its path, unfinished solves, scores not finite."""
    warnings, memory = [], metrics["memory"]
    measured = as_float(memory.get("measured_peak_bytes"))
    for key, limit in (("planned_bytes", "plan"), ("budget_bytes", "budget")):
        if measured > as_float(memory.get(key)):
            sizes = byte_size(measured), byte_size(memory[key])
            warnings.append(f"The peak memory of a worker, {sizes[0]}, exceeded its {limit} of {sizes[1]}.")
    for at, fold in enumerate(metrics["folds"]):
        where = f"Fold {number(fold.get('fold', at))}: " if len(metrics["folds"]) > 1 else ""
        warnings += [where + text for text in _fold_warnings(fold)]
    return warnings


def _fold_warnings(fold: Metrics) -> list[str]:
    """The warnings of one fold."""
    warnings = summary_kernel.solve_warnings(fold)
    tried = floats([row.get("alpha") for row in tables(fold.get("alpha_path"))])
    tried, alpha, test = tried[np.isfinite(tried)], as_float(fold.get("alpha")), scores(fold, "test")
    for end, edge in (("smallest", np.min), ("largest", np.max)):
        # below 0 there is nothing to try
        if tried.size > 2 and alpha > 0 and math.isclose(alpha, edge(tried), rel_tol=1e-9):
            warnings.append(f"the chosen α = {number(alpha)} is the {end} tried: widen solver.alphas and run again.")
    bad = [SCORES[k] for k in SCORES if k in test and not math.isfinite(as_float(test[k]))]
    return [*warnings, f"test {', '.join(bad)} is not finite."] if bad else warnings
