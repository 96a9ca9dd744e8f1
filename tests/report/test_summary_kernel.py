"""Reports of kernel ridge: heat map, spectrum, path, solves and words, whole, absent and damaged."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
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
    spectrum,
    spoilt,
)

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
