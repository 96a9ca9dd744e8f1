"""Reports of kernel ridge: heat map, spectrum, path, solves and words, whole, absent and damaged."""

from __future__ import annotations

import html
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from report_examples import (
    HOSTILE,
    activation,
    damaged,
    dense,
    drawn,
    heat_map,
    kernel_classification,
    kernel_regression,
    page_of,
    solver,
    spectrum,
    spoilt,
)

from ntkdask import registry
from ntkdask.kernels import NTK
from ntkdask.networks import fully_connected
from ntkdask.report import figures, figures_kernel, job_words, summary, summary_kernel

COMMON = {"alpha-path", "heat-map", "stages", "memory", "task-seconds"}
PARTS = [
    "spectrum",
    "solves",
    "heat_map",
    "alpha_path",
    "spectrum_note",
    "solver",
    "solver_reason",
    "smallest_alpha",
    "alpha",
]


def text_of(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", " ", page)).replace("\u202f", " ")


def test_classification_by_eigendecomposition(tmp_path: Path) -> None:
    page = page_of(tmp_path, kernel_classification())
    assert drawn(tmp_path) == COMMON | {"confusion", "spectrum"}
    text = text_of(page)
    assert "NTK of Dense → relu → Dense" in text
    assert "kernel ridge, 4 values of α from 0 to 10, chosen on training rows" in text
    assert "eigendecomposition: about 1.7 s and 376 MiB a worker; cholesky about 0.64 s" in text
    assert "From α = 6×10⁻⁶ on K + αI is safely positive definite." in text
    assert re.search(r"Kernel ridge\s+NTK\s+of Dense → relu → Dense", text)
    assert re.search(r"Solver\s+eigh\s+eigendecomposition", text)
    assert "Solves" not in text
    assert "Look at this first" not in text


def test_regression_by_gradients(tmp_path: Path) -> None:
    page = page_of(tmp_path, kernel_regression())
    assert drawn(tmp_path) == COMMON | {"scatter"}
    text = text_of(page)
    assert "RBF with γ 0.1" in text
    assert "chosen by a holdout on training rows; " in text
    assert "conjugate gradients: as asked" in text
    assert "folds 5" not in text
    assert "Effective dimension" not in text
    assert "<td>the holdout</td>" in page
    assert "<td>nothing</td>" in page
    assert "Look at this first" not in text
    svg = (tmp_path / "figures" / "heat-map.svg").read_text()
    assert "30 training rows of fold 0, sorted by target" in svg


def test_pictures_come_with_the_page(tmp_path: Path) -> None:
    page = page_of(tmp_path, kernel_classification())
    pictures = re.findall(r'(?:src|href)="(?!#)([^"]{0,22})', page)
    assert pictures
    assert set(pictures) == {"data:image/png;base64,"}
    assert "img-src data:;" in page
    assert "<script" not in page
    assert not re.findall(r"url\((?!#)", page)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for element in re.findall(r"<svg[^>]*>", page):
        assert re.search(r'role="img" aria-label="\w[^"]+"', element)


def test_equal_metrics_give_equal_bytes(tmp_path: Path) -> None:
    pages = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        page_of(folder, kernel_classification())
        pages.append({p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()})
    assert pages[0] == pages[1]


def test_a_heat_map_of_128_rows_stays_small(tmp_path: Path) -> None:
    metrics = kernel_classification()
    metrics["folds"][0]["heat_map"] = heat_map(np.linspace(0, 9, 128).round(4).tolist(), "target")
    page_of(tmp_path, metrics)
    assert (tmp_path / "figures" / "heat-map.svg").stat().st_size < 150_000


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    metrics = kernel_regression()
    metrics["job"]["kernel"] = {"type": HOSTILE, HOSTILE: HOSTILE}
    metrics["job"]["network"] = {"layers": [activation(type=HOSTILE, A=HOSTILE), dense(weight_variance=HOSTILE)]}
    metrics["job"]["solver"].update(selection=HOSTILE, solver=HOSTILE)
    metrics["plan"].update(solver=HOSTILE, reason=HOSTILE)
    metrics["data"]["class_names"] = [HOSTILE, "$\\frac{$"]
    for fold in metrics["folds"]:
        fold.update(solver=HOSTILE, solver_reason=HOSTILE, spectrum=spectrum(), spectrum_note=HOSTILE, fold=HOSTILE)
        fold["heat_map"] = heat_map([0, 0, 1, 1], "class")
        fold["solves"][0].update(alpha=HOSTILE, held_out=HOSTILE, converged=False, reason=HOSTILE, iterations=HOSTILE)
    page = page_of(tmp_path, metrics)
    assert {"heat-map", "spectrum"} <= drawn(tmp_path)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 15


@pytest.mark.parametrize("make", [kernel_classification, kernel_regression])
def test_nan_anywhere_is_tolerated(tmp_path: Path, make: Any) -> None:
    page = page_of(tmp_path, spoilt(make(folds=2)))
    assert "is not finite" in page
    assert not drawn(tmp_path) & {"heat-map", "spectrum", "alpha-path"}


def read_all(metrics: dict[str, Any]) -> None:
    """Everything that a page takes from the folds."""
    folds = metrics["folds"]
    assert summary.headline(metrics)
    assert len(summary.fold_table(folds)[1]) == len(folds) + 1
    assert isinstance(summary.find_warnings(metrics), list)
    columns, rows = summary_kernel.solve_table(folds)
    assert all(len(row) == len(columns) and all(isinstance(cell, str) for cell in row) for row in rows)
    assert isinstance(summary_kernel.solver_words(folds), str)
    found, heat = summary_kernel.spectra(folds), summary_kernel.heat_map(metrics)
    assert isinstance(summary_kernel.spectrum_remark(found), str)
    for s in found:
        assert s.ranks.shape == s.values.shape
        assert np.isfinite([s.ranks, s.values]).all()
    if heat is not None:
        m = len(heat.values)
        assert heat.values.shape == (m, m)
        assert len(heat.starts) == len(heat.names)
        assert heat.targets.size in (0, m)


@pytest.mark.parametrize("make", [kernel_classification, kernel_regression])
@pytest.mark.parametrize("part", PARTS)
def test_damaged_parts_of_a_fold_do_not_break_the_page(make: Any, part: str) -> None:
    metrics = make(folds=2)
    fold = metrics["folds"][0]
    for changed in damaged({part: fold.get(part)}):
        metrics["folds"][0] = {**fold, **changed}
        read_all(metrics)
        if part in ("alpha", "alpha_path"):
            figures.alpha_path(metrics["folds"][:1])


def test_absent_parts_do_not_break_the_page(tmp_path: Path) -> None:
    metrics = kernel_regression()
    metrics["folds"] = [{k: v for k, v in fold.items() if k not in PARTS} for fold in metrics["folds"]]
    del metrics["job"]["solver"], metrics["plan"]
    text = text_of(page_of(tmp_path, metrics))
    assert "RBF with γ 0.1" in text
    assert drawn(tmp_path) == {"scatter", "stages", "memory", "task-seconds"}
    assert "solved by" not in text


@pytest.mark.parametrize("part", ["kernel", "network", "solver"])
def test_damaged_parts_of_the_job_do_not_break_the_page(part: str) -> None:
    job = kernel_classification()["job"]
    for changed in damaged({part: job[part]}):
        described = job_words.describe_job({**job, **changed})
        assert all(isinstance(text, str) for pair in described for text in pair)
        assert isinstance(job_words.listing({**job, **changed}), str)


# the spectrum


def test_negative_eigenvalues_are_counted() -> None:
    values = [3.0, 1.0, 0.0, -1e-7, -3e-6]
    fold = {"spectrum": [[i + 1, v] for i, v in enumerate(values)]}
    remark = "2 of 5 eigenvalues below 0, the lowest −3×10⁻⁶ (drawn by their size). 1 of 5 eigenvalues 0 to rounding."
    for folds in ([fold], [fold, {**fold, "fold": 1}]):
        assert summary_kernel.spectrum_remark(summary_kernel.spectra(folds)) == remark
    assert summary_kernel.spectrum_remark([]) == ""


@pytest.mark.parametrize("negative", [1, 7, 60, 500])
def test_a_thinned_spectrum_brackets_their_number(negative: int) -> None:
    (found,) = summary_kernel.spectra([{"spectrum": spectrum(1437, negative)}])
    match = re.match(
        r"(\d+)(?: to (\d+))? of 1 437 eigenvalues below 0",
        summary_kernel.spectrum_remark([found]).replace("\u202f", " "),
    )
    assert match is not None
    least, most = int(match[1]), int(match[2] or match[1])
    assert least <= negative <= most


def test_a_note_says_that_a_spectrum_is_not_whole() -> None:
    fold = {"spectrum": [[1, 3.0], [2, -1.0]], "spectrum_note": "the leading 2, approximate"}
    remark = summary_kernel.spectrum_remark(summary_kernel.spectra([fold, {**fold, "fold": 7, "alpha": 0.0}]))
    note = "The leading 2, approximate. 1 of those known below 0, the lowest −1 (drawn by their size)."
    assert remark == f"Fold 0: {note} Fold 7: {note} The chosen α is 0, below the axis."


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


# the heat map


def test_classes_have_their_bounds_and_names() -> None:
    metrics = kernel_classification()
    metrics["data"]["class_names"] = ["cat", "dog"]
    metrics["folds"][0]["heat_map"] = heat_map([0, 0, 0, 1, 1, 4], "class")
    found = summary_kernel.heat_map(metrics)
    assert found is not None
    assert (found.starts, found.names, found.targets.size) == ((0, 3, 5), ("cat", "dog", "4"), 0)
    figure = figures_kernel.heat_map(found.values, found.rows, found.starts, found.names, found.targets)
    assert figure is not None
    axes = figure.axes[0]
    assert [(tick.get_text()) for tick in axes.get_yticklabels()] == ["cat", "dog", "4"]
    assert axes.get_yticks().tolist() == [1.0, 3.5, 5.0]
    ends = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines]
    assert ends == [(0, 2.5), (2.5, 0), (0, 4.5), (4.5, 0)]
    assert len(figure.axes) == 2
    assert axes.images[0].get_array().shape == (6, 6)


def test_targets_and_many_classes_get_a_few_names() -> None:
    figure = figures_kernel.heat_map(np.eye(50), "rows", targets=np.linspace(-1, 1, 50))
    assert figure is not None
    labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert (labels[0], labels[-1], len(labels)) == ("−1", "1", 6)
    figure = figures_kernel.heat_map(np.eye(100), "rows", range(100), [str(i) for i in range(100)])
    assert figure is not None
    assert len(figure.axes[0].get_yticklabels()) == 20
    assert not figure.axes[0].lines


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


# the path of alpha


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


# solves and warnings


def test_the_table_of_solves() -> None:
    rows = [
        {"alpha": 0.1, "held_out": 2, "residual": 1e-9, "seconds": 2.0},
        {"alpha": 0.0, "held_out": None, "residual": 0.25, "iterations": 1000, "converged": False, "reason": "stalled"},
        {"alpha": 1.0, "held_out": None, "residual": 1e-7, "inverse_trace": 30.0, "trace_error": 0.5},
    ]
    columns, table = summary_kernel.solve_table([{"selection": "kfold", "solves": rows}])
    assert columns == ["α", "Held out", "Iterations", "True relative residual", "Converged", "tr (K + αI)⁻¹", "Time"]
    assert table == [
        ["0.1", "group 2", "–", "10⁻⁹", "–", "–", "2\u202fs"],
        ["0", "nothing", "1\u202f000", "0.25", "no: stalled", "–", "–"],
        ["1", "nothing", "–", "10⁻⁷", "–", "30 ± 0.5", "–"],
    ]
    assert summary_kernel.solve_table([{}, {"solves": 3.5}]) == ([], [])
    assert summary_kernel.solve_table([{}, {"solves": rows[:1]}])[0] == [
        "Fold",
        "α",
        "Held out",
        "True relative residual",
        "Time",
    ]


def test_warnings_of_solves_that_did_not_converge() -> None:
    metrics = kernel_regression(folds=2)
    first, second = metrics["folds"]
    failed = {"converged": False, "reason": "max_iterations=1000 reached", "iterations": 1000}
    first["solves"][0].update(failed, residual=1e-3)
    first["solves"][2].update(failed, residual=0.2)
    second["solves"][3].update(failed, residual=0.01)
    fit = (
        "Fold 1: the fit itself did not converge: α = 0.1, true relative residual 0.01 after 1 000 iterations "
        "(max_iterations=1000 reached). Raise solver.max_iterations or solver.tolerance, or use larger alphas. "
        "Predictions are those of the iterate it reached."
    )
    chosen = (
        "Fold 0: 2 of the solves that α was chosen by did not converge; the worst: α = 0.001, true relative residual 0.2 after "
        "1 000 iterations (max_iterations=1000 reached). Raise solver.max_iterations or solver.tolerance, or use larger alphas."
    )
    assert [text.replace("\u202f", " ") for text in summary.find_warnings(metrics)] == [chosen, fit]


@pytest.mark.parametrize(
    ("alpha", "found"),
    [(0.0, []), (1e-3, []), (10.0, ["the chosen α = 10 is the largest tried: widen solver.alphas and run again."])],
)
def test_an_alpha_at_the_end_of_its_path(alpha: float, found: list[str]) -> None:
    metrics = kernel_classification()
    metrics["folds"][0]["alpha"] = alpha
    assert summary.find_warnings(metrics) == found


# words


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (activation(type="ABReLU", A=0.5, B=1.5), "abrelu (A 0.5, B 1.5)"),
        (activation(type="RBFActivation", A=1.0), "rbf (A 1)"),
        (activation(type="Polynomial", coefficients=[0.0, 1.0, -0.5]), "polynomial (coefficients 0, 1, −0.5)"),
        (activation(name="abrelu", A=2), "abrelu (A 2)"),
        (activation(type="Swoosh", k=2), "Swoosh (k 2)"),
        ({"type": "Activation", "function": "relu", "normalize": False}, "relu (not normalised)"),
        (dense(), "Dense"),
        (
            dense(weight_variance=2.0, bias_variance=0.1, trainable=False),
            "Dense (weight variance 2, bias variance 0.1, not trained)",
        ),
    ],
)
def test_layers_in_words(layer: dict[str, Any], words: str) -> None:
    assert job_words.chain([layer]) == words


def test_what_repeats_is_said_once() -> None:
    assert job_words.chain([dense(), activation(type="ReLU")] * 2 + [dense()]) == "Dense → relu → Dense → relu → Dense"
    network = registry.to_config(fully_connected(3))
    assert job_words.kernel_words({"kernel": {"type": "NTK"}, "network": network}) == [
        "NTK",
        "of 3 × (Dense → relu) → Dense",
    ]
    assert job_words.chain([dense()] * 4) == "4 × Dense"


def test_kernels_in_words() -> None:
    own = registry.to_config(NTK(fully_connected(1, "gelu", scale_inputs=True)))
    assert dict(job_words.describe_job({"kernel": own})) == {"kernel": "NTK of Dense → gelu → Dense, inputs scaled"}
    assert job_words.kernel_words({"kernel": {"type": "ArcCosine", "order": 2}}) == ["ArcCosine", "with order 2"]
    assert job_words.kernel_words({}) == []


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (
            solver(alphas=[0.5]),
            "kernel ridge, α = 0.5; solver auto, fit intercept yes, tolerance 10⁻⁶, max iterations 1 000",
        ),
        (
            solver(selection="kfold", solver="tiled_cholesky"),
            "kernel ridge, 4 values of α from 0 to 10, chosen by k-fold cross-validation on training rows; "
            "solver tiled Cholesky factorisation, fit intercept yes, folds 5",
        ),
        (
            solver(solver="cholesky"),
            "kernel ridge, 4 values of α from 0 to 10, chosen on training rows; "
            "solver Cholesky factorisation, fit intercept yes, holdout 0.2",
        ),
    ],
)
def test_solvers_in_words(table: dict[str, Any], words: str) -> None:
    (described,) = [w for part, w in job_words.describe_job({"kernel": {}, "solver": table}) if part == "solver"]
    assert described.replace("\u202f", " ") == words
