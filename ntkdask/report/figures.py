"""The figures of a report. Pure functions: plain data in, a Matplotlib Figure out.

No pyplot, no files. A function returns None when there is nothing finite to draw. Build figures inside
`plain_settings()`, so that a user's matplotlibrc changes nothing. Ink and paper have colours of their own, which
`inline` replaces by those of the page, so that one drawing can be read on light and on dark. Called by `page`.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ntkdask.report.words import as_float, duration, floats, number, tables

# Two colours that no other part of a drawing uses: `inline` finds them in the SVG.
INK, PAPER = "#1b1f24", "#fffffe"
BLUE, ORANGE, GREEN, RED = "#3f87cf", "#d9822b", "#3a9d76", "#d1524f"
BAR_COLOURS = {"main": BLUE, "measured": ORANGE, "quiet": "#8b949e"}


@contextlib.contextmanager
def plain_settings() -> Iterator[None]:
    """A context with Matplotlib's own defaults; text stays text in an SVG."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        # names in scripts that DejaVu lacks: the reader's browser has the glyphs
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": 9.0, "axes.unicode_minus": True})
        for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"):
            matplotlib.rcParams[key] = INK
        yield


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG document; equal figures give equal text. Ids begin with `name`: a page holds many."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return re.sub(r'( id="|url\(#|href="#)', rf"\1{name}-", out.getvalue())


def inline(svg: str, title: str) -> str:
    """The `<svg>` element alone: the page's ink, no paper, and `title` (already escaped) for screen readers."""
    element = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(PAPER, "none")
    return element.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def canvas(width: float, height: float, *, grid: str | None = "both") -> tuple[Figure, Axes]:
    """A figure of this size in inches with one plain set of axes; `grid` is "x", "y", "both" or None."""
    figure = Figure(figsize=(width, height), facecolor=PAPER, layout="constrained")
    axes = figure.add_subplot()
    _quiet(axes, grid)
    return figure, axes


def _quiet(axes: Axes, grid: str | None) -> None:
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3)
    if grid:
        axes.grid(axis=grid, color=INK, alpha=0.12, linewidth=0.6)  # type: ignore[arg-type]
        axes.set_axisbelow(True)


def label(text: Any, limit: int = 24) -> str:
    """Text for a drawing: printable, at most `limit` characters, and never read as TeX."""
    kept = "".join(c if c.isprintable() else " " for c in str(text))
    kept = kept if len(kept) <= limit else kept[: limit - 1] + "…"
    return kept.replace("$", r"\$")


def fading(count: int) -> float:
    """The opacity of each of `count` curves that are drawn over each other."""
    return 1.0 if count == 1 else max(0.25, 2.0 / max(count, 1))


def log_axis(axis: Any) -> None:
    """Give a logarithmic axis few major ticks, with numbers as on the page, and minor ticks without labels."""
    axis.set_major_locator(LogLocator(numticks=7))
    axis.set_major_formatter(FuncFormatter(lambda v, _: number(float(v))))
    axis.set_minor_formatter(FuncFormatter(lambda v, _: ""))


def alpha_path(folds: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Selection score (left) and effective dimension (right) against alpha; a dot where each fold chose.

    folds: rows of metrics.json with `alpha_path`, `alpha`, `score_name`. Several folds lie over each other, fainter. The axis
    is logarithmic; an alpha of 0 has a place of its own left of the others.
    """
    curves = [(fold, *_curve(fold)) for fold in folds]
    curves = [c for c in curves if np.isfinite(c[2]).any()]
    if not curves:
        return None
    figure, axes = canvas(4.8, 3.1)
    twin = axes.twinx()
    faint = fading(len(curves))
    zero = _place_of_zero(np.concatenate([c[1] for c in curves]))
    for fold, alphas, scores, dimensions in curves:
        places = np.where(alphas > 0, alphas, zero)
        twin.plot(places, dimensions, color=ORANGE, linewidth=1.3, linestyle="--", alpha=faint)
        axes.plot(places, scores, color=BLUE, linewidth=1.8, alpha=faint, marker="o", markersize=2.5)
        chosen = as_float(fold.get("alpha"))
        if 0 <= chosen < math.inf:
            at = int(np.argmin(np.abs(alphas - chosen)))
            _mark_chosen(axes, places[at], scores[at], chosen, alone=len(curves) == 1)
    axes.set_xscale("log")
    log_axis(axes.xaxis)
    if any((alphas == 0).any() for _, alphas, _, _ in curves):
        _show_zero(axes, zero)
    scores = np.concatenate([c[2] for c in curves])
    scores = scores[np.isfinite(scores)]
    if scores.min() > 0 and scores.max() > 20 * scores.min():
        axes.set_yscale("log")
        log_axis(axes.yaxis)
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: number(float(v))))
    _finish_alpha_axes(axes, twin, str(curves[0][0].get("score_name") or "score"))
    return figure


def _curve(fold: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = [row for row in tables(fold.get("alpha_path")) if 0 <= as_float(row.get("alpha")) < math.inf]
    rows.sort(key=lambda row: as_float(row["alpha"]))
    alphas, scores, dimensions = (floats([r.get(k) for r in rows]) for k in ("alpha", "score", "effective_dimension"))
    return alphas, np.where(np.isfinite(scores), scores, np.nan), dimensions


def _place_of_zero(alphas: np.ndarray) -> float:
    """Where 0 stands on the logarithmic axis: left of the smallest alpha, by a decade or an eighth of the others' span."""
    above = alphas[alphas > 0]
    if not above.size:
        return 1.0
    return float(above.min() * 10 ** -max(1.0, math.log10(above.max() / above.min()) / 8))


def _show_zero(axes: Axes, zero: float) -> None:
    """A tick for 0, and a line where the axis breaks."""
    low, high = axes.get_xlim()
    ticks = [t for t in axes.xaxis.get_major_locator().tick_values(low, high) if zero * 2 < t <= high]
    axes.xaxis.set_major_locator(FixedLocator([zero, *ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: "0" if math.isclose(v, zero) else number(float(v))))
    if ticks:
        axes.axvline(zero * 10**0.5, color=INK, linewidth=0.8, linestyle=":", alpha=0.5)
    axes.set_xlim(low, high)


def _mark_chosen(axes: Axes, place: float, score: float, chosen: float, *, alone: bool) -> None:
    axes.plot([place], [score], "o", markersize=8, color=RED, fillstyle="none", markeredgewidth=1.8, zorder=5)
    if alone:
        axes.axvline(place, color=RED, linewidth=0.8, alpha=0.6)
        axes.set_title(f"chosen α = {number(chosen)}", color=RED, fontsize=9)


def _finish_alpha_axes(axes: Axes, twin: Axes, score_name: str) -> None:
    axes.set_xlabel("α")
    axes.set_ylabel(f"{label(score_name)}, smaller is better", color=BLUE)
    twin.set_facecolor("none")
    twin.spines["top"].set_visible(False)
    twin.set_ylabel("effective dimension (dashed)", color=ORANGE)
    twin.yaxis.set_major_formatter(FuncFormatter(lambda v, _: number(float(v))))
    twin.set_ylim(bottom=0)
    if not any(np.isfinite(line.get_ydata()).any() for line in twin.lines):
        twin.set_visible(False)


def confusion(matrix: np.ndarray, names: Sequence[str]) -> Figure | None:
    """Heat map of a (k, k) count matrix, rows the true classes; colour is the share of the row, numbers are counts."""
    k = len(matrix)
    totals = matrix.sum(axis=1, keepdims=True)
    if k == 0 or not np.isfinite(totals).all() or totals.sum() <= 0:
        return None
    side = max(3.6, 1.4 + 0.36 * k)
    figure, axes = canvas(side + 0.4, side, grid=None)
    # opacity instead of a colour map: an empty cell shows the page, light or dark
    share = matrix / np.maximum(totals, 1)
    colours = np.empty((k, k, 4))
    colours[...] = to_rgba(RED)
    colours[np.arange(k), np.arange(k)] = to_rgba(BLUE)
    colours[..., 3] = np.sqrt(share)
    axes.pcolormesh(
        np.arange(k + 1) - 0.5, np.arange(k + 1) - 0.5, colours, edgecolors=to_rgba(INK, 0.12), linewidth=0.5
    )
    for row, column in zip(*np.nonzero(matrix), strict=True):
        colour = "#ffffff" if colours[row, column, 3] > 0.6 else INK
        text = number(round(float(matrix[row, column])))
        size = 8 if len(text) < 5 else 6
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
    axes.set_xticks(range(k), [label(n, 14) for n in names], rotation=90 if k > 10 or max(map(len, names)) > 3 else 0)
    axes.set_yticks(range(k), [label(n, 14) for n in names])
    axes.set(xlabel="predicted", ylabel="true", xlim=(-0.5, k - 0.5), ylim=(k - 0.5, -0.5), aspect="equal")
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    return figure


def predicted_against_target(target: np.ndarray, predicted: np.ndarray) -> Figure | None:
    """Scatter of predictions over targets with the line on which they agree."""
    good = np.isfinite(target) & np.isfinite(predicted)
    if not good.any():
        return None
    target, predicted = target[good], predicted[good]
    low, high = min(target.min(), predicted.min()), max(target.max(), predicted.max())
    figure, axes = canvas(4.8, 3.9)
    axes.plot([low, high], [low, high], color=INK, linewidth=0.9, alpha=0.7)
    axes.plot(target, predicted, "o", markersize=3, color=BLUE, alpha=0.35, markeredgewidth=0)
    axes.set(xlabel="target", ylabel="predicted")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda v, _: number(float(v))))
    return figure


def bars(rows: Sequence[tuple[str, float, str, str]]) -> Figure | None:
    """Horizontal bars from 0; rows of (name, length, text at its end, key of BAR_COLOURS), the first on top."""
    rows = [row for row in rows if math.isfinite(row[1]) and row[1] >= 0]
    longest = max((row[1] for row in rows), default=0.0)
    if longest <= 0:
        return None
    figure, axes = canvas(4.8, 0.5 + 0.3 * len(rows), grid=None)
    for at, (_, length, text, role) in enumerate(rows):
        axes.barh(at, length, height=0.62, color=BAR_COLOURS[role])
        axes.text(length + 0.015 * longest, at, label(text, 40), va="center", fontsize=8.5)
    axes.set_yticks(range(len(rows)), [label(row[0]) for row in rows])
    axes.set(xlim=(0, 1.32 * longest), ylim=(len(rows) - 0.5, -0.5))
    axes.spines["bottom"].set_visible(False)
    axes.xaxis.set_major_locator(FixedLocator([]))
    axes.tick_params(length=0)
    return figure


def task_histograms(seconds: Mapping[str, np.ndarray]) -> Figure | None:
    """One small histogram of task durations per label, each over its own range of seconds."""
    kept = {name: s[np.isfinite(s)] for name, s in seconds.items()}
    kept = {name: s for name, s in kept.items() if s.size}
    if not kept:
        return None
    figure = Figure(figsize=(4.8, 0.35 + 1.05 * len(kept)), facecolor=PAPER, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.09)  # type: ignore[union-attr, call-arg]
    for at, (name, values) in enumerate(kept.items()):
        axes = figure.add_subplot(len(kept), 1, at + 1)
        _quiet(axes, "y")
        axes.hist(values, bins=min(24, max(6, math.isqrt(values.size) * 2)), color=GREEN, rwidth=0.92)
        axes.set_title(f"{label(name)} ({number(int(values.size))} tasks)", loc="left", fontsize=9, pad=2)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: duration(float(v))))
        axes.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    return figure
