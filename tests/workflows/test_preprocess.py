"""Preprocessing that is killed goes on in the step, and with the slabs, that it had."""

import json

import numpy as np
import pytest
from job_examples import Counter, Killed, ridge_plan, site_of, stored

from ntkdask.datasets.rows import DatasetRows
from ntkdask.execution.progress import Record
from ntkdask.preprocessing import fit_in_memory, parse_steps
from ntkdask.store import tile_stores
from ntkdask.workflows.preprocess import fit_preprocessing

STEPS = ["standardize", "unit_norm", "zca"]
"""Moments, nothing, a covariance: 5 slabs and 4 sums of each of the first and the last."""


@pytest.fixture
def fit(tmp_path):
    """Fit to 90 of 100 images at a folder, as a new process would; the rows of the third slab are not selected."""
    x = np.random.default_rng(0).normal(size=(100, 3, 3, 2)) + 5
    url = stored(tmp_path, x, np.zeros(100)).url

    def run(folder, listener=None, client=None):
        site = site_of(folder, client, listener, Record.open(folder, {"job": 1}))
        return fit_preprocessing(DatasetRows(url), parse_steps(STEPS), ridge_plan(slab_rows=20, batch_rows=7), site)

    return x, run


def chain(fitted):
    arrays, attributes = fitted.to_state()
    return {name: a.tobytes() for name, a in arrays.items()}, attributes


@pytest.mark.parametrize("stop_at", [3, 9, 12, 17])
def test_a_kill_repeats_nothing_that_was_committed(tmp_path, fit, stop_at):
    x, run = fit
    whole = run(tmp_path / "whole", all_of := Counter())
    assert all_of.count("preprocess-slab") == 18
    np.testing.assert_allclose(whole(x), fit_in_memory(STEPS, x, "float64")(x), atol=1e-9)
    with pytest.raises(Killed):
        run(tmp_path / "cut", Counter(stop_at))
    resumed = run(tmp_path / "cut", again := Counter())
    # the task whose end was the kill is committed: its receipt is written before the listener hears of it
    assert again.count("preprocess-slab") == 18 - stop_at
    assert chain(resumed) == chain(whole)
    # sums are dropped once the chain with the step is stored, and the chain is not fitted again
    assert tile_stores(tmp_path / "cut") == []
    assert {"preprocess-0", "preprocess-2"} == set(json.loads((tmp_path / "cut" / "record.json").read_text())["stages"])
    run(tmp_path / "cut", third := Counter())
    assert not third.labels


def test_equal_bits_in_memory_and_in_a_folder(tmp_path, fit):
    _, run = fit
    assert chain(run(None)) == chain(run(tmp_path / "stored"))
