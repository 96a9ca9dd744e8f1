"""A run's `metrics.json` as one self-contained page, `report.html`, with its figures as files in `figures/`.

Nothing is computed anew: the page shows what the run recorded, and leaves out what it did not record. Equal metrics give equal bytes.
Called by the command line at the end of a run and by `ntkdask report`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ntkdask.errors import StoreError
from ntkdask.files import home_expanded, remove, write_text
from ntkdask.report import figures, figures_kernel, job_words, summary, summary_kernel
from ntkdask.report import words as wording
from ntkdask.report.summary_kernel import Metrics
from ntkdask.report.words import floats, quantity

TASKS = ("classification", "regression")
TABLES = ("versions", "job", "plan", "data", "seconds", "test", "tasks", "memory")
FIGURES = {
    "alpha-path": "Selection score, and effective dimension where it is known, along the path of α",
    "confusion": "Confusion matrix of the test rows: counts, coloured by their share of the true class",
    "scatter": "Predictions against targets, test rows",
    "heat-map": "Kernel between training rows, sorted by class, with lines between them, or by target",
    "spectrum": "Eigenvalues of the kernel matrix of the training rows against their rank, and the chosen α",
    "stages": "Seconds by stage",
    "memory": "Peak memory of a worker: planned, allowed and measured",
    "task-seconds": "Seconds a task took, by label",
}
MAX_HEAT_MAP_CLASSES = 20


def write_report(run: Path) -> Path:
    """Write `run/report.html` and `run/figures/*.svg` from `run/metrics.json`; returns the page's path.

    StoreError, which says what to do, where the metrics are missing or not what a run writes.
    """
    run = home_expanded(run)
    metrics = read_metrics(run)
    drawn = draw(metrics)
    for name in FIGURES:
        path = run / "figures" / f"{name}.svg"
        if name in drawn:
            write_text(path, drawn[name])
        else:
            remove(path)
    write_text(run / "report.html", render(metrics, drawn))
    return run / "report.html"


def read_metrics(run: Path) -> dict[str, Any]:
    """The content of `run/metrics.json`; StoreError where its outline is wrong. Absent parts become empty ones."""
    path = run / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        state = "has no metrics.json: this run has not finished" if run.is_dir() else "is not a run's folder"
        raise StoreError(f"{run} {state}. Look at it with: ntkdask status {run}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise _malformed(path, f"it cannot be read as JSON ({error})") from error
    if not isinstance(metrics, dict):
        raise _malformed(path, f"expected a table, found {type(metrics).__name__}")
    if not isinstance(metrics.get("name"), str) or metrics.get("task") not in TASKS:
        found = f"name={metrics.get('name')!r}, task={metrics.get('task')!r}"
        raise _malformed(path, f"expected a name and a task ({' or '.join(TASKS)}), found {found}")
    for keys, kind in ((TABLES, dict), (("folds", "notes", "warnings"), list)):
        for key in keys:
            if not isinstance(metrics.setdefault(key, kind()) or kind(), kind):
                raise _malformed(path, f"expected {key!r} to be a {kind.__name__}, found {metrics[key]!r:.60}")
            metrics[key] = metrics[key] or kind()
    if not all(isinstance(row, dict) for row in [*metrics["folds"], *metrics["tasks"].values()]):
        raise _malformed(path, "expected a table for each of 'folds' and 'tasks'")
    return metrics


def _malformed(path: Path, reason: str) -> StoreError:
    """The error for metrics of another outline."""
    return StoreError(f"{path} is malformed: {reason}. Run the job again: committed tiles are kept.")


def draw(metrics: Metrics) -> dict[str, str]:
    """{name: SVG document} of the figures for which the metrics have data."""
    folds, matrix = metrics["folds"], summary.confusion_counts(metrics["folds"])
    seconds = {name: floats(row.get("seconds")) for name, row in metrics["tasks"].items()}
    spectra = [(s.ranks, s.values, s.alpha) for s in summary_kernel.spectra(folds)]
    heat = summary_kernel.heat_map(metrics)
    with figures.plain_settings():
        drawn = {
            "alpha-path": figures.alpha_path(folds),
            "scatter": figures.predicted_against_target(*summary.scatter_points(folds)),
            "spectrum": figures_kernel.spectrum(spectra),
            "stages": figures.bars(summary.stage_bars(metrics["seconds"])),
            "memory": figures.bars(summary.memory_bars(metrics["memory"], metrics["plan"])),
            "task-seconds": figures.task_histograms(seconds),
        }
        if len(matrix) <= MAX_HEAT_MAP_CLASSES:
            drawn["confusion"] = figures.confusion(matrix, summary.class_names(metrics))
        if heat is not None:
            drawn["heat-map"] = figures_kernel.heat_map(heat.values, heat.rows, heat.starts, heat.names, heat.targets)
        return {name: figures.to_svg(figure, name) for name, figure in drawn.items() if figure is not None}


def render(metrics: Metrics, drawn: Mapping[str, str]) -> str:
    """The page as HTML, with the figures `drawn`; every text of the metrics is escaped."""
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["moment"] = wording.moment
    matrix, names = summary.confusion_counts(metrics["folds"]), summary.class_names(metrics)
    columns, rows = summary.fold_table(metrics["folds"])
    solve_columns, solve_rows = summary_kernel.solve_table(metrics["folds"])
    return environment.get_template("report.html").render(
        metrics=metrics,
        figures={name: Markup(figures.inline(svg, escape(FIGURES[name]))) for name, svg in drawn.items()},
        captions=FIGURES,
        remarks={"spectrum": summary_kernel.spectrum_remark(summary_kernel.spectra(metrics["folds"]))},
        headline=summary.headline(metrics),
        warnings=[*map(str, metrics["warnings"]), *summary.find_warnings(metrics)],
        words=job_words.describe_job(metrics["job"], summary_kernel.solver_words(metrics["folds"])),
        listing=job_words.listing(metrics["job"]),
        facts=summary.facts(metrics["data"]),
        fold_columns=columns,
        fold_rows=rows,
        solve_columns=solve_columns,
        solve_rows=solve_rows,
        classes=summary.class_table(matrix, names),
        confused=summary.confused_pairs(matrix, names) if len(matrix) > MAX_HEAT_MAP_CLASSES else [],
        tasks=summary.task_table(metrics["tasks"]),
        plan=[(k.replace("_", " "), quantity(k, v)) for k, v in metrics["plan"].items() if v is not None],
        environment=summary.environment_rows(metrics),
    )
