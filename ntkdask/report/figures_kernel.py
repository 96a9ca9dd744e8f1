"""The figures of a kernel ridge run: its spectrum, and its kernel as a heat map. As in `figures`: plain data in, a Figure out.

Called by `page`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from ntkdask.report.figures import BLUE, INK, ORANGE, RED, canvas, fading, label, log_axis
from ntkdask.report.words import number

MAX_BOUNDARIES, MAX_NAMES, MAX_TARGETS = 40, 20, 6
CLIPPED = (1.0, 99.0)
"""Percentiles of the entries off the diagonal between which colours vary."""


def spectrum(curves: Sequence[tuple[np.ndarray, np.ndarray, float]]) -> Figure | None:
    """Eigenvalues against rank, both logarithmic; (ranks, values, chosen alpha) of each fold.

    Eigenvalues below 0 are drawn by their size, as hollow dots; an alpha > 0 is a horizontal line.
    """
    curves = [(r, v, a) for r, v, a in curves if (v > 0).any()]
    if not curves:
        return None
    figure, axes = canvas(4.8, 3.9)
    for ranks, values, _ in curves:
        above, below = values > 0, values < 0
        axes.plot(ranks[above], values[above], color=BLUE, linewidth=1.8, alpha=fading(len(curves)))
        hollow = {"color": ORANGE, "markersize": 4, "fillstyle": "none", "alpha": fading(len(curves))}
        axes.plot(ranks[below], -values[below], "o", **hollow)  # type: ignore[arg-type]
    alphas = sorted({a for _, _, a in curves if 0 < a < np.inf})
    for alpha in alphas:
        axes.axhline(alpha, color=RED, linewidth=1.1, linestyle="--", alpha=fading(len(alphas)))
    axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="eigenvalue")
    for axis in (axes.xaxis, axes.yaxis):
        log_axis(axis)
    _name_lines(axes, alphas, any((v < 0).any() for _, v, _ in curves))
    return figure


def _name_lines(axes: Axes, alphas: Sequence[float], negative: bool) -> None:
    if alphas:
        ends = dict.fromkeys((alphas[0], alphas[-1]))
        axes.set_title(f"chosen α = {' – '.join(number(a, 3) for a in ends)} (dashed)", color=RED, fontsize=9)
    if negative:
        axes.plot([], [], "o", color=ORANGE, markersize=4, fillstyle="none", label="below 0, by size")
        axes.legend(frameon=False, loc="lower left", fontsize=8.5)


def heat_map(
    values: np.ndarray,
    rows: str,
    starts: Sequence[int] = (),
    names: Sequence[str] = (),
    targets: np.ndarray | None = None,
) -> Figure | None:
    """A kernel (m, m) as a picture with its colour bar; NaN is left blank.

    Colours vary over most entries off the diagonal; with the diagonal in their range these would look all alike.

    Parameters
    ----------
    values : array (m, m)
        The kernel, scaled to 1 on the diagonal.
    rows : str
        What the rows are, in words.
    starts : sequence of int, optional
        First row of each class; lines are drawn between classes.
    names : sequence of str, optional
        Name of each class.
    targets : array (m,), optional
        Targets of the rows, which are sorted by them, where there are no classes.
    """
    m = len(values)
    if m == 0 or not np.isfinite(values).any():
        return None
    figure, axes = canvas(5.0, 4.1, grid=None)
    scale, extend = _colours(values)
    picture = axes.imshow(np.ma.masked_invalid(values), cmap="viridis", norm=scale, interpolation="none")
    bar = figure.colorbar(picture, ax=axes, extend=extend, shrink=0.85, pad=0.03)
    assert bar.solids is not None
    # one small picture, not 256 shapes
    bar.solids.set_rasterized(True)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: number(float(v))))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.tick_params(length=3)
    bar.set_label("kernel, scaled to 1 on the diagonal")
    if 1 < len(starts) <= MAX_BOUNDARIES:
        for start in starts[1:]:
            for line in (axes.axhline, axes.axvline):
                line(start - 0.5, color="#ffffff", linewidth=0.6, alpha=0.7)
    axes.set_xlabel(label(rows, 60))
    axes.set_xticks([])
    _name_rows(axes, m, starts, names, targets)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    return figure


def _colours(values: np.ndarray) -> tuple[Normalize, str]:
    """Limits of the colours, and whether entries lie beyond them: "neither", "min", "max" or "both"."""
    off_diagonal = values[~np.eye(len(values), dtype=bool)]
    off_diagonal = off_diagonal[np.isfinite(off_diagonal)]
    shown = off_diagonal if off_diagonal.size else values[np.isfinite(values)]
    low, high = np.percentile(shown, CLIPPED)
    if high - low < 1e-6:
        low, high = low - 0.5, high + 0.5
    finite = values[np.isfinite(values)]
    beyond = (bool((finite < low).any()), bool((finite > high).any()))
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[beyond]
    return Normalize(float(low), float(high)), extend


def _name_rows(axes: Axes, m: int, starts: Sequence[int], names: Sequence[str], targets: np.ndarray | None) -> None:
    """Tick labels: the names of classes in their middle, as many as there is room for, or a few of the targets."""
    ticks: list[tuple[float, str]] = []
    if starts:
        for start, stop, name in zip(starts, (*starts[1:], m), names, strict=True):
            middle = (start + stop - 1) / 2
            if not ticks or middle - ticks[-1][0] >= m / MAX_NAMES:
                ticks.append((middle, label(name, 14)))
    elif targets is not None and targets.size == m:
        places = np.unique(np.linspace(0, m - 1, min(m, MAX_TARGETS)).round().astype(int))
        ticks = [(float(at), number(float(targets[at]), 3)) for at in places]
        axes.set_ylabel("target")
    axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks], color=INK)
