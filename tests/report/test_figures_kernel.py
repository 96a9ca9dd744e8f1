"""Figures of kernel ridge: spectrum, heat map, path of alpha; whole, absent and damaged."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from report_examples import kernel_classification, kernel_regression

from ntkdask.report import figures, figures_kernel, summary_kernel


def test_the_spectrum_shows_every_sign_and_the_chosen_alpha() -> None:
    curves = [(np.array([1.0, 2.0, 3.0]), np.array([4.0, 1.0, -2.0]), alpha) for alpha in (0.5, 0.1, 0.0)]
    figure = figures_kernel.spectrum(curves)
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_xscale() == axes.get_yscale() == "log"
    lines = [(line.get_xdata(), np.asarray(line.get_ydata())) for line in axes.lines]
    heights = sorted(float(y[0]) for _, y in lines if y.size == 2 and y[0] == y[1])
    assert heights == [0.1, 0.5]
    assert sum(y.tolist() == [4.0, 1.0] for _, y in lines) == sum(y.tolist() == [2.0] for _, y in lines) == 3
    assert axes.get_title() == "chosen α = 0.1 – 0.5 (dashed)"
    assert axes.get_legend() is not None


def test_a_spectrum_without_positive_eigenvalues_is_not_drawn() -> None:
    assert figures_kernel.spectrum([]) is None
    assert figures_kernel.spectrum([(np.array([1.0]), np.array([-1.0]), 1.0)]) is None


def test_colours_span_what_lies_off_the_diagonal() -> None:
    values = np.full((4, 4), 0.01) + np.diag([0.99] * 4)
    values[0, 1] = values[1, 0] = 0.03
    figure = figures_kernel.heat_map(values, "rows")
    assert figure is not None
    image = figure.axes[0].images[0]
    assert (image.norm.vmin, image.norm.vmax) == pytest.approx((0.01, 0.03))
    assert image.colorbar.extend == "max"
    assert to_hex(image.to_rgba(0.01)) != to_hex(image.to_rgba(0.03)) == to_hex(image.to_rgba(1.0))


@pytest.mark.parametrize("values", [[[1.0]], [[1.0, 1.0], [1.0, 1.0]], [[1.0, math.nan], [math.nan, 1.0]]])
def test_alike_and_unknown_entries_are_drawn(values: list[list[float]]) -> None:
    figure = figures_kernel.heat_map(np.array(values), "rows")
    assert figure is not None
    norm = figure.axes[0].images[0].norm
    assert norm.vmin < norm.vmax


@pytest.mark.parametrize("values", [np.zeros((0, 0)), np.full((3, 3), np.nan)])
def test_nothing_known_is_no_heat_map(values: np.ndarray) -> None:
    assert figures_kernel.heat_map(values, "rows") is None


def test_a_damaged_heat_map_gives_way_to_the_next_fold() -> None:
    metrics = kernel_regression(folds=2)
    metrics["folds"][0]["heat_map"]["values"].pop()
    found = summary_kernel.heat_map(metrics)
    assert found is not None
    assert found.rows == "30 training rows of fold 1, sorted by target"
    metrics["folds"][1]["heat_map"]["labels"].pop()
    unnamed = summary_kernel.heat_map(metrics)
    assert unnamed is not None
    assert (unnamed.rows, unnamed.targets.size) == ("30 training rows of fold 1", 0)


def labels_of(figure: Any) -> list[str]:
    axis = figure.axes[0].xaxis
    return [axis.get_major_formatter()(v, 0) for v in axis.get_majorticklocs()]


def test_alpha_0_has_a_place_on_the_logarithmic_axis() -> None:
    path = [{"alpha": a, "score": s} for a, s in ((0.0, 0.2), (1e-3, 0.1), (1.0, 0.3))]
    figure = figures.alpha_path([{"alpha": 0.0, "alpha_path": path, "score_name": "holdout MSE"}])
    assert figure is not None
    axes = figure.axes[0]
    curve = next(line for line in axes.lines if len(line.get_xdata()) == 3)
    places = np.asarray(curve.get_xdata())
    assert places == pytest.approx([1e-4, 1e-3, 1.0])
    assert labels_of(figure)[0] == "0"
    assert labels_of(figure).count("0") == 1
    assert axes.get_title() == "chosen α = 0"
    assert axes.get_xlim()[0] < 1e-4
    dots = [line for line in axes.lines if line.get_markersize() == 8]
    assert [(d.get_xdata()[0], d.get_ydata()[0]) for d in dots] == [(pytest.approx(1e-4), 0.2)]
    assert not figure.axes[1].get_visible()


def test_a_path_of_0_alone_and_one_without_0() -> None:
    only = figures.alpha_path([{"alpha": 0.0, "alpha_path": [{"alpha": 0.0, "score": 0.2}]}])
    assert only is not None
    assert "0" in labels_of(only)
    without = figures.alpha_path(
        [{"alpha": 0.1, "alpha_path": [{"alpha": 0.1, "score": 0.2}, {"alpha": 1.0, "score": 0.3}]}]
    )
    assert without is not None
    assert "0" not in labels_of(without)


def test_an_infinite_score_leaves_the_others_visible() -> None:
    figure = figures.alpha_path(kernel_classification()["folds"])
    assert figure is not None
    low, high = figure.axes[0].get_ylim()
    assert 0 < low < 0.005 < 0.02 < high < 1
