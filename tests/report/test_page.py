"""Reports: what is on the page for every kind of run, that nothing of a run's text becomes markup, and equal bytes."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from report_examples import HOSTILE, classification, drawn, page_of, regression, spoilt

from ntkdask.errors import StoreError
from ntkdask.report import figures, job_words, summary
from ntkdask.report import words as wording
from ntkdask.report.page import write_report


def test_classification(tmp_path: Path) -> None:
    page = page_of(tmp_path, classification())
    assert drawn(tmp_path) == {"alpha-path", "confusion", "stages", "memory", "task-seconds"}
    assert "NTKRandomFeatures with n components 4\u202f096, sampling gaussian" in page
    for text in ("98.10\u202f%", "class-2", "373\u202fMiB", "8 × 8 × 1"):
        assert text in page
    assert "7 values of α from 10⁻⁴ to 100, chosen by generalised cross-validation (GCV) on training rows" in page
    assert "1.2×10¹²\u202fflop" in page
    assert "chosen α = 1" in page
    assert "[solver]\nselection = &#34;gcv&#34;" in page
    assert "Look at this first" not in page


def test_regression_folds(tmp_path: Path) -> None:
    page = page_of(tmp_path, regression(folds=3))
    assert drawn(tmp_path) == {"alpha-path", "scatter", "stages", "memory", "task-seconds"}
    assert "± 0.04 over 3 folds" in page
    assert '<tr class="mean"><th scope="row">Mean</th>' in page
    assert "<td>14</td></tr>" in page  # mean of 13, 14, 15


def test_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    page = page_of(tmp_path, classification())
    assert "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!#)', page)
    assert not re.findall(r"url\((?!#)", page)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_minimal(tmp_path: Path, task: str) -> None:
    page = page_of(tmp_path, {"name": "bare", "task": task})
    assert "bare" in page
    assert drawn(tmp_path) == set()
    assert "<h2>" not in page


def test_figures_of_an_earlier_report_go(tmp_path: Path) -> None:
    page_of(tmp_path, classification())
    page_of(tmp_path, {"name": "bare", "task": "classification"})
    assert drawn(tmp_path) == set()


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    metrics = classification()
    metrics.update(name=HOSTILE, blas=HOSTILE, notes=[HOSTILE], finished=HOSTILE, warnings=[HOSTILE])
    metrics["job"]["network"]["preset"] = metrics["data"]["url"] = metrics["job"]["note"] = HOSTILE
    metrics["data"]["class_names"] = [HOSTILE, "$\\frac{$", "line\nbreak\x00 猫"]
    metrics["tasks"] = {HOSTILE: metrics["tasks"]["gram-slab"]}
    metrics["seconds"] = {HOSTILE: 1.0}
    metrics["folds"][0]["score_name"] = HOSTILE
    page = page_of(tmp_path, metrics)
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_equal_metrics_give_equal_bytes(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    pages = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        page_of(folder, regression())
        pages.append({p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()})
    assert pages[0] == pages[1]
    assert dict(matplotlib.rcParams) == before


def test_nan_anywhere_is_tolerated(tmp_path: Path) -> None:
    for at, metrics in enumerate((spoilt(classification(folds=2)), spoilt(regression()))):
        folder = tmp_path / str(at)
        folder.mkdir()
        assert "is not finite" in page_of(folder, metrics)
    some = classification()
    some["folds"][0]["alpha_path"][2]["score"] = math.nan
    some["seconds"]["solve"] = None
    some["folds"][0]["alpha_path"].append({"alpha": 0.0})
    page_of(tmp_path / "1", some)
    assert "alpha-path" in drawn(tmp_path / "1")


@pytest.mark.parametrize("k", [1, 2, 20, 21])
def test_number_of_classes(tmp_path: Path, k: int) -> None:
    page = page_of(tmp_path, classification(k))
    assert ("confusion" in drawn(tmp_path)) == (k <= 20)
    assert ("The errors made most often" in page) == (k > 20)


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        (None, "ntkdask status"),
        ("{", "cannot be read as JSON"),
        ("[]", "expected a table, found list"),
        ("{}", "expected a name and a task"),
        ('{"name": "x", "task": "clustering"}', "task='clustering'"),
        ('{"name": "x", "task": "regression", "folds": {}}', None),
        ('{"name": "x", "task": "regression", "folds": {"a": 1}}', "expected 'folds' to be a list"),
        ('{"name": "x", "task": "regression", "tasks": {"a": 1}}', "a table for each"),
    ],
)
def test_missing_or_malformed_metrics(tmp_path: Path, text: str | None, advice: str | None) -> None:
    if text is not None:
        (tmp_path / "metrics.json").write_text(text)
    if advice is None:
        write_report(tmp_path)
        return
    with pytest.raises(StoreError, match=re.escape(advice)):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not a run's folder"):
        write_report(tmp_path / "nowhere")


def test_scatter_is_thinned() -> None:
    long = {"target": list(range(5000)), "predicted": list(range(4999))}
    target, predicted = summary.scatter_points([{"test": {"scatter": long}}, {"test": {}}])
    assert target.tolist() == predicted.tolist()
    assert 1000 < target.size <= summary.MAX_SCATTER_POINTS


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (45730, "45\u202f730"),
        (0.0, "0"),
        (-0.25, "−0.25"),
        (-1e-6, "−10⁻⁶"),
        (999999.6, "10⁶"),
        (0.00123456, "0.001235"),
        (6.02214e23, "6.022×10²³"),
        (math.inf, "∞"),
        (math.nan, "NaN"),
        (None, "–"),
        (True, "yes"),
    ],
)
def test_number(value: Any, text: str) -> None:
    assert wording.number(value) == text


def test_units() -> None:
    def plain(write: Any, values: tuple[Any, ...]) -> list[str]:
        return [write(value).replace("\u202f", " ") for value in values]

    assert plain(wording.byte_size, (0, 1023, 1024, 61.2 * 2**30)) == ["0 B", "1 023 B", "1 KiB", "61.2 GiB"]
    assert plain(wording.duration, (0.0, 2e-5, 0.43, 12.34)) == ["0 s", "20 µs", "430 ms", "12.3 s"]
    assert plain(wording.duration, (200, 7500, None)) == ["3 min 20 s", "2 h 05 min", "–"]
    assert wording.moment("2026-11-21T07:00:00+00:00") == "2026-11-21 07:00 UTC"


def test_network_in_words() -> None:
    layers = [
        {"type": "Conv", "filter_size": 3},
        {"type": "Residual", "branch": [{"type": "Activation", "activation": {"type": "abrelu"}}], "shortcut": []},
        {"type": "AvgPool", "window": [2, 1]},
        {"type": "Dense"},
    ]
    assert job_words.chain(layers) == "Conv 3 × 3 → (abrelu + identity) → AvgPool 2 × 1 → Dense"


def test_listing_is_toml() -> None:
    tomllib = pytest.importorskip("tomllib")
    job = {
        **classification()["job"],
        "notes": [],
        "network": {"layers": [{"type": "Conv", "size": 3}] * 9, "scale": None},
    }
    job["solver"] = {"alphas": [1e-6, math.inf, 0.1], "nested": {"deep": {"text": 'quote " and ü'}}}
    read = tomllib.loads(job_words.listing(job))
    assert read.pop("network") == {"layers": job.pop("network")["layers"]}
    assert read == job


def test_empty_data_draws_nothing() -> None:
    assert figures.alpha_path([]) is None
    assert figures.bars([("a", math.nan, "", "main")]) is None
    assert figures.task_histograms({"a": np.array([math.nan])}) is None
    assert figures.predicted_against_target(np.zeros(0), np.zeros(0)) is None
    assert figures.confusion(np.zeros((2, 2)), ["a", "b"]) is None
