"""The sweep over pseudo- and empirical NTKs: what its cells hold, that it resumes and grows, and what its figures show."""

import csv
import json
import math

import numpy as np
import pytest
from module_examples import one_thread

from ntkdask.errors import FingerprintError, InputError, MemoryBudgetError, StoreError
from ntkdask.networks import convolutional, fully_connected
from ntkdask.planning.tiles import Plan
from ntkdask.report.figures_empirical import MEASURES, against_epochs, against_width, with_final, write_figures
from ntkdask.solvers.kernel_measures import kernel_sums, power_law, pseudo_of, stacked

torch = pytest.importorskip("torch")

from ntkdask.kernels.empirical import EmpiricalNTK  # noqa: E402
from ntkdask.modules.descriptions import FiniteNetwork  # noqa: E402
from ntkdask.modules.outputs import outputs  # noqa: E402
from ntkdask.modules.protocol import TrainingProtocol  # noqa: E402
from ntkdask.workflows.empirical import sweep as module  # noqa: E402
from ntkdask.workflows.empirical.sweep import run_pntk_sweep  # noqa: E402
from ntkdask.workflows.empirical.sweep_cells import PntkSweep, SweepData  # noqa: E402
from ntkdask.workflows.empirical.sweep_table import sweep_rows  # noqa: E402

PROTOCOL = TrainingProtocol(epochs=2, batch=8, learning_rate=0.05, checkpoints=(0, 1, 2))


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with one_thread():
        yield


def fcn(width, outputs=3):
    return FiniteNetwork(fully_connected(2), width, outputs, (6,))


def data(n=16, m=9, seed=0):
    rng = np.random.default_rng(seed)
    centres = 2 * rng.standard_normal((3, 6))
    labels, labels_test = np.arange(n) % 3, np.arange(m) % 3
    x, x_test = (centres[y] + rng.standard_normal((len(y), 6)) for y in (labels, labels_test))
    return SweepData(x, labels, x_test, labels_test, 3)


def sweep(**changes):
    options = {
        "networks": {"FCN": {24: fcn(24), 48: fcn(48)}},
        "seeds": (0, 1),
        "protocol": PROTOCOL,
        "dtype": "float64",
    }
    return PntkSweep(**(options | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    return folder, run_pntk_sweep(sweep(), data(), folder)


def test_every_cell_is_there(finished):
    folder, rows = finished
    assert [(r["width"], r["seed"], r["epoch"]) for r in rows] == [
        (w, s, e) for w in (24, 48) for s in (0, 1) for e in (0, 1, 2)
    ]
    assert rows == sweep_rows(folder)
    kept = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert len(kept) == len(rows)
    assert [float(k["frobenius"]) for k in kept] == [r["frobenius"] for r in rows]
    for key in (m.key for m in MEASURES.values()):
        assert all(math.isfinite(row[key]) for row in with_final(rows)), key
    for row in rows:
        assert row["pntk_gain"] == pytest.approx(row["pntk_accuracy"] - row["accuracy"], abs=1e-15)
        assert row["accuracy_difference"] == pytest.approx(row["pntk_accuracy"] - row["entk_accuracy"], abs=1e-15)
        assert row["pntk_resolved"] is row["entk_resolved"] is True
        assert row["pntk_alpha"] == row["entk_alpha"] == 0.0
        assert (row.get("learning_rate") == 0.05) == (row["epoch"] > 0)


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_cell_against_what_is_written_out(finished, epoch):
    folder, rows = finished
    (row,) = [r for r in rows if (r["width"], r["seed"], r["epoch"]) == (48, 1, epoch)]
    d = data()
    weights = folder / "training" / "FCN-w00048-s1" / "epoch-0002.safetensors"
    net = FiniteNetwork(fully_connected(2), 48, 3, (6,), seed=1, weights=str(weights) if epoch else None)
    theta = EmpiricalNTK(net, output="full")(d.x)
    cross = EmpiricalNTK(net, output="full")(d.x_test, d.x)
    f0, f0_test = outputs(net, d.x), outputs(net, d.x_test)
    sums = kernel_sums(theta)
    for key in ("off_diagonal_ratio", "frobenius", "norm_difference"):
        assert row[key] == pytest.approx(getattr(sums, key), rel=1e-10), key
    residual, predicted = np.eye(3)[d.labels] - f0, {}
    for name, dd, td in (("pntk", pseudo_of(theta), pseudo_of(cross)), ("entk", stacked(theta), stacked(cross))):
        values = np.linalg.eigvalsh(dd)
        assert row[f"{name}_lambda_max"] == pytest.approx(values[-1], rel=1e-9)
        assert row[f"{name}_lambda_min"] == pytest.approx(values[0], rel=1e-6)
        assert row[f"{name}_condition"] == pytest.approx(values[-1] / values[0], rel=1e-6)
        right = residual.reshape(-1, 1) if name == "entk" else residual
        predicted[name] = f0_test + (td @ np.linalg.solve(dd, right)).reshape(f0_test.shape)
        assert row[f"{name}_accuracy"] == np.mean(predicted[name].argmax(axis=1) == d.labels_test)
    expected = np.linalg.norm(predicted["pntk"] - predicted["entk"]) / np.linalg.norm(predicted["entk"])
    assert row["prediction_difference"] == pytest.approx(expected, rel=1e-6)
    assert row["accuracy"] == np.mean(f0_test.argmax(axis=1) == d.labels_test)
    assert row["parameters"] == 48 * 6 + 48 * 48 + 48 * 3


def test_a_sweep_goes_on_and_grows(finished, tmp_path, monkeypatch):
    """Cut off in the middle, it computes what is missing; more widths and seeds join what is there."""
    _, rows = finished
    measured, original = [], module.measure

    def stopping(*arguments):
        if len(measured) == 4:
            raise KeyboardInterrupt
        measured.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(module, "measure", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_pntk_sweep(sweep(networks={"FCN": {24: fcn(24)}}), data(), tmp_path)
    assert len(sweep_rows(tmp_path)) == 4

    def counted(*arguments):
        measured.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(module, "measure", counted)
    run_pntk_sweep(sweep(networks={"FCN": {24: fcn(24)}}), data(), tmp_path)
    assert len(measured) == 6
    grown = run_pntk_sweep(sweep(), data(), tmp_path)
    assert len(measured) == 12
    again = run_pntk_sweep(sweep(), data(), tmp_path)
    assert len(measured) == 12
    for found in (grown, again):
        assert [{**row, "seconds": 0} for row in found] == [{**row, "seconds": 0} for row in rows]


def test_cells_of_another_sweep_are_refused(finished, tmp_path):
    start = sweep(networks={"FCN": {24: fcn(24)}}, seeds=(0,), protocol=None)
    run_pntk_sweep(start, data(), tmp_path)
    for changes, other, key in (
        ({"alpha": 0.1}, data(), "alpha"),
        ({"dtype": "float32"}, data(), "dtype"),
        ({}, data(seed=1), "data"),
        ({"networks": {"FCN": {24: fcn(25)}}}, data(), "description.width"),
        ({"kernels": ("pntk",)}, data(), "kernels"),
    ):
        with pytest.raises(FingerprintError, match=key):
            run_pntk_sweep(PntkSweep(**({**vars(start)} | changes)), other, tmp_path)
    (path,) = (tmp_path / "cells").glob("*.json")
    edited = path.read_bytes().replace(b'"alpha": 0.0', b'"alpha": 0.5')
    assert edited != path.read_bytes()
    for damaged in (
        edited,
        path.read_bytes()[:100],
        b"{}",
        b"[1]",
        b"\xff\xfe",
        b'{"asked": {"width": 2}, "found": {}}',
    ):
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match="is damaged"):
            run_pntk_sweep(start, data(), tmp_path)
        with pytest.raises(StoreError, match="is damaged"):
            sweep_rows(tmp_path)


def test_singular_kernels_are_solved_at_the_least_safe_alpha(tmp_path):
    """Duplicate rows: the cell says which alpha it took."""
    d = data()
    d.x[1], d.labels[1] = d.x[0], d.labels[0]
    (row,) = run_pntk_sweep(
        sweep(networks={"FCN": {24: fcn(24)}}, seeds=(0,), protocol=None, dtype="float32"), d, tmp_path
    )
    assert 0 < row["pntk_alpha"] < 1e-4 * row["pntk_lambda_max"]
    assert 0 < row["entk_alpha"] < 1e-4 * row["entk_lambda_max"]
    assert row["pntk_resolved"] is row["entk_resolved"] is False
    assert 0 <= row["entk_accuracy"] <= 1


@pytest.mark.parametrize("where", ["memory", "tiles", pytest.param("cluster", marks=pytest.mark.slow)])
def test_pseudo_ntks_alone(finished, tmp_path, where, request):
    """Figures 9 to 12: no full kernel, in this process or in tiles."""
    _, rows = finished
    client = request.getfixturevalue("one_worker") if where == "cluster" else None
    plan = {"memory": None, "tiles": Plan(tile_rows=5, tile_cols=5), "cluster": Plan(tile_rows=16, tile_cols=16)}[where]
    alone = sweep(networks={"FCN": {24: fcn(24)}}, seeds=(0,), kernels=("pntk",), protocol=None)
    found = run_pntk_sweep(alone, data(), tmp_path, client=client, plan=plan)
    assert len(found) == 1
    for key in ("pntk_accuracy", "accuracy", "train_accuracy", "pntk_gain"):
        assert found[0][key] == rows[0][key]
    for key in ("pntk_lambda_max", "pntk_lambda_min"):
        assert found[0][key] == pytest.approx(rows[0][key], rel=1e-6)
    assert "frobenius" not in found[0]
    assert (tmp_path / "kernels").exists() == (where != "memory")


@pytest.mark.gpu
def test_a_gpu_gives_the_same_cells(finished, tmp_path):
    _, rows = finished
    found = run_pntk_sweep(sweep(seeds=(0,), protocol=None), data(), tmp_path)
    for row, other in zip(found, [r for r in rows if r["seed"] == r["epoch"] == 0], strict=True):
        for key in ("frobenius", "pntk_lambda_max", "entk_lambda_min", "prediction_difference"):
            assert row[key] == pytest.approx(other[key], rel=1e-6), key


def test_images_and_theorem_1(tmp_path):
    """A small convolutional network in the same sweep as a fully connected one; the difference falls with the width."""
    rng = np.random.default_rng(0)
    d = SweepData(
        rng.standard_normal((10, 6, 6, 3)), np.arange(10) % 5, rng.standard_normal((5, 6, 6, 3)), np.arange(5) % 5, 5
    )
    networks = {
        "FCN": {w: FiniteNetwork(fully_connected(1), w, 5, (6, 6, 3)) for w in (16, 32, 64, 128)},
        "ConvNet": {4: FiniteNetwork(convolutional(2), 4, 5, (6, 6, 3))},
    }
    rows = run_pntk_sweep(PntkSweep(networks, seeds=(0, 1, 2), dtype="float64"), d, tmp_path)
    assert len(rows) == 15
    for key in ("frobenius", "off_diagonal_ratio"):
        values = [[r[key] for r in rows if r["network"] == "FCN" and r["seed"] == s] for s in range(3)]
        assert -0.65 <= power_law((16, 32, 64, 128), values) <= -0.35, key
    paths = {p.name for p in write_figures(rows, tmp_path / "figures")}
    assert "figure-3-frobenius-by-width.svg" in paths
    assert "figure-3-frobenius.svg" not in paths  # one epoch


def test_what_cannot_be_swept():
    with pytest.raises(InputError, match="at least one network"):
        PntkSweep({})
    with pytest.raises(InputError, match=r"give \{width: description\}"):
        PntkSweep({"FCN": {8: torch.nn.Linear(2, 2)}})
    with pytest.raises(InputError, match="plain name"):
        PntkSweep({"../FCN": {8: fcn(8)}})
    for kernels in (("entk",), ("pntk", "ntk"), ()):
        with pytest.raises(InputError, match="a sweep's kernels"):
            sweep(kernels=kernels)
    for wrong in ({"dtype": "float16"}, {"alpha": -1.0}, {"alpha": math.nan}):
        with pytest.raises(InputError, match="alpha >= 0"):
            sweep(**wrong)
    d = data()
    with pytest.raises(InputError, match="outside 0"):
        SweepData(d.x, d.labels, d.x_test, d.labels_test, 2)
    with pytest.raises(InputError, match="one for each label"):
        SweepData(d.x, d.labels[:3], d.x_test, d.labels_test, 3)


def test_refusals_before_anything_runs(tmp_path):
    with pytest.raises(MemoryBudgetError, match="16 rows and 3 outputs"):
        run_pntk_sweep(sweep(), data(), tmp_path, plan=Plan(memory_bytes=2**20))
    with pytest.raises(InputError, match=r'kernels=\("pntk",\)'):
        run_pntk_sweep(sweep(), data(), tmp_path, client=object())
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="4 outputs for 3 classes"):
        run_pntk_sweep(sweep(networks={"FCN": {24: fcn(24, 4)}}, protocol=None), data(), tmp_path)
    with pytest.raises(StoreError, match="no cells"):
        sweep_rows(tmp_path)


# --- figures -----------------------------------------------------------------------------------------------------


def test_figures_show_what_the_table_says(finished, tmp_path):
    _, rows = finished
    measure = MEASURES["figure-3-frobenius"]
    figure = against_epochs(rows, measure)
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["24", "48"]
    for container, width in zip(axes.containers, (24, 48), strict=True):
        line = container.lines[0]
        for epoch, mean in zip(*line.get_data(), strict=True):
            values = [r["frobenius"] for r in rows if (r["width"], r["epoch"]) == (width, epoch)]
            assert mean == pytest.approx(np.mean(values))
    few = [{k: v for k, v in row.items() if k in KEYS} for row in rows]
    paths = write_figures(few, tmp_path)
    assert {p.stem for p in paths} == {
        f"figure-{n}{s}" for n in ("3-frobenius", "9-pntk-accuracy") for s in ("", "-by-width")
    }
    first = {p.name: p.read_bytes() for p in paths}
    assert first == {p.name: p.read_bytes() for p in write_figures(few, tmp_path)}


KEYS = ("network", "width", "seed", "epoch", "frobenius", "pntk_accuracy")


def test_figures_against_width_name_the_power():
    rows = [
        {"network": "N", "width": w, "seed": s, "epoch": 0, "frobenius": w**-0.5 * (1 + 0.1 * s)}
        for w in (4, 16, 64)
        for s in (0, 1)
    ]
    figure = against_width(rows, MEASURES["figure-3-frobenius"])
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["N, slope -0.50"]


def test_numbers_that_are_missing_are_left_out(tmp_path):
    measure = MEASURES["figure-5-lambda-min"]
    rows = [
        {"network": "N", "width": 4, "seed": 0, "epoch": e, measure.key: v} for e, v in ((0, None), (1, 0.0), (2, 0.1))
    ]
    assert against_epochs(rows, measure) is None
    assert against_width(rows, measure) is None
    assert against_epochs([*rows, {**rows[2], "epoch": 3}], measure) is not None
    assert write_figures(rows, tmp_path) == []
    assert json.dumps(with_final(rows)) == json.dumps([{**row, "pntk_final": math.nan} for row in rows])
