"""The figures of a sweep over pseudo- and empirical NTKs, as in Mohamadi & Sutherland. As in `figures`: plain data in, a Figure out.

Rows are those of `workflows.empirical.sweep.sweep_rows`. Called by the command `ntkdask sweep`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from ntkdask.files import write_text
from ntkdask.report.figures import INK, PAPER, label, log_axis, plain_settings, to_svg
from ntkdask.report.words import as_float, number
from ntkdask.solvers.kernel_measures import power_law


@dataclass(frozen=True)
class Measure:
    """A column of the sweep's table, its title on an axis, and whether that axis is logarithmic."""

    key: str
    title: str
    log: bool = False


MEASURES = {
    "figure-2-off-diagonal": Measure("off_diagonal_ratio", "off-diagonal / diagonal of Θ", True),
    "figure-3-frobenius": Measure("frobenius", "‖Θ − Θ̂⊗I‖ / ‖Θ‖", True),
    "figure-4-lambda-max": Measure("lambda_max_difference", "relative difference of λ_max", True),
    "figure-5-lambda-min": Measure("lambda_min_difference", "relative difference of λ_min", True),
    "figure-6-condition": Measure("condition_difference", "relative difference of λ_max/λ_min", True),
    "figure-7-predictions": Measure("prediction_difference", "‖f̂_lin − f_lin‖ / ‖f_lin‖", True),
    "figure-8-accuracies": Measure("accuracy_difference", "accuracy with Θ̂ − with Θ"),
    "figure-9-pntk-accuracy": Measure("pntk_accuracy", "test accuracy of f̂_lin (Θ̂)"),
    "figure-10-network-accuracy": Measure("accuracy", "test accuracy of f"),
    "figure-11-gain": Measure("pntk_gain", "accuracy of f̂_lin − of f"),
    "figure-12-final": Measure("pntk_final", "accuracy of f̂_lin − of f at the end"),
}
"""The measure of each figure of the paper, by file name."""


def write_figures(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write a figure folder/<name>.svg for each measure that the rows have, and one of the initial weights against width."""
    written = []
    rows = with_final(rows)
    initial = [row for row in rows if row.get("epoch") == 0]
    with plain_settings():
        for name, measure in MEASURES.items():
            for path, figure in (
                (folder / f"{name}.svg", against_epochs(rows, measure)),
                (folder / f"{name}-by-width.svg", against_width(initial, measure)),
            ):
                if figure is not None:
                    write_text(path, to_svg(figure, path.stem))
                    written.append(path)
    return written


def with_final(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `pntk_final`: the accuracy of f̂_lin less that of the network after its last epoch; Appendix C of the paper."""
    last: dict[tuple[Any, ...], tuple[float, float]] = {}
    for row in rows:
        key, at = _training(row), (as_float(row.get("epoch")), as_float(row.get("accuracy")))
        last[key] = max(last.get(key, at), at)
    return [
        dict(row) | {"pntk_final": as_float(row.get("pntk_accuracy")) - last[_training(row)][1]}
        if last[_training(row)][0] > 0
        else dict(row)
        for row in rows
    ]


def against_epochs(rows: Sequence[Mapping[str, Any]], measure: Measure) -> Figure | None:
    """A panel for each network: the measure against epochs, a line for each width, mean and deviation over seeds.

    None where there are fewer than two epochs, or no numbers.
    """
    kept = _with_numbers(rows, measure)
    if len({row["epoch"] for row in kept}) < 2:
        return None
    figure, panels = _panels(kept, measure)
    for name, axes in panels.items():
        own = [row for row in kept if row["network"] == name]
        widths = sorted({row["width"] for row in own})
        for place, width in enumerate(widths):
            colour = colormaps["viridis"](0.85 * place / max(1, len(widths) - 1))
            points = [row for row in own if row["width"] == width]
            _line(axes, *_over_seeds(points, "epoch", measure), colour, number(width))
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.legend(frameon=False, fontsize=7.5, title="width", title_fontsize=7.5)
    return figure


def against_width(rows: Sequence[Mapping[str, Any]], measure: Measure) -> Figure | None:
    """The measure against width, a line for each network, for rows of one epoch; legends have slopes where the axis is logarithmic.

    None where no network has two widths, or no numbers.
    """
    kept = _with_numbers(rows, measure)
    names = [
        n for n in dict.fromkeys(r["network"] for r in kept) if len({r["width"] for r in kept if r["network"] == n}) > 1
    ]
    if not names:
        return None
    figure = Figure(figsize=(4.8, 3.4), facecolor=PAPER, layout="constrained")
    axes = figure.add_subplot()
    _quiet(axes, measure)
    for place, name in enumerate(names):
        widths, means, deviations = _over_seeds([row for row in kept if row["network"] == name], "width", measure)
        legend = label(name)
        if measure.log and (means > 0).all():
            legend += f", slope {power_law(widths, means):.2f}"
        _line(axes, widths, means, deviations, colormaps["tab10"](place % 10), legend)
    axes.set_xscale("log", base=2)
    ticks = sorted({row["width"] for row in kept})
    axes.set_xticks(ticks, [number(t) for t in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("width")
    axes.set_ylabel(measure.title)
    axes.legend(frameon=False, fontsize=7.5)
    return figure


def _training(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What identifies the training of a network."""
    return row.get("network"), row.get("width"), row.get("seed")


def _with_numbers(rows: Sequence[Mapping[str, Any]], measure: Measure) -> list[Mapping[str, Any]]:
    """Rows with a number that the axis can show."""
    values = [(row, as_float(row.get(measure.key))) for row in rows]
    return [row for row, v in values if math.isfinite(v) and (v > 0 or not measure.log)]


def _panels(rows: Sequence[Mapping[str, Any]], measure: Measure) -> tuple[Figure, dict[str, Axes]]:
    """(a figure, {network: its panel})."""
    names = list(dict.fromkeys(row["network"] for row in rows))
    figure = Figure(figsize=(0.6 + 2.7 * len(names), 2.9), facecolor=PAPER, layout="constrained")
    panels = {}
    for place, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), place + 1)
        _quiet(axes, measure)
        axes.set_title(label(name), fontsize=9)
        if not place:
            axes.set_ylabel(measure.title)
        panels[name] = axes
    return figure, panels


def _quiet(axes: Axes, measure: Measure) -> None:
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3)
    axes.grid(color=INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)
    if measure.log:
        axes.set_yscale("log")
        log_axis(axes.yaxis)
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: number(float(v))))


def _over_seeds(
    rows: Sequence[Mapping[str, Any]], axis: str, measure: Measure
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(places ascending, mean, standard deviation) of the measure."""
    places = sorted({row[axis] for row in rows})
    values = [np.array([as_float(row[measure.key]) for row in rows if row[axis] == place]) for place in places]
    return np.array(places, np.float64), np.array([v.mean() for v in values]), np.array([v.std() for v in values])


def _line(axes: Axes, x: np.ndarray, mean: np.ndarray, deviation: np.ndarray, colour: Any, legend: str) -> None:
    """A line with error bars."""
    # a bar that would reach 0 has no place on a logarithmic axis
    below = np.minimum(deviation, 0.999 * mean) if axes.get_yscale() == "log" else deviation
    axes.errorbar(
        x,
        mean,
        yerr=np.stack([below, deviation]),
        color=colour,
        linewidth=1.5,
        marker="o",
        markersize=3,
        capsize=2,
        elinewidth=0.8,
        label=legend,
    )
