"""`ntkdask data import`: its options, and what it says of what it took."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ntkdask.cli.commands import app
from ntkdask.errors import DataError


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Runs `ntkdask data import` in an empty folder; gives what it prints."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(app, ["data", "import", *words], catch_exceptions=False).output


def test_it_says_what_became_the_target(call):
    Path("a.csv").write_text("width,height,mass\n1,2,3\n4,5,6\n")
    told = call("a.csv", "a.zarr")
    assert "target: column 'mass', number 2 of 3, counted from 0; classification, 2 classes ('3', '6')" in told
    assert "header: yes" in told
    told = call("a.csv", "b.zarr", "--kind", "regression", "--target", "width")
    assert "target: column 'width', number 0 of 3, counted from 0; regression" in told
    np.savez("a.npz", fields=np.eye(3), response=np.arange(3.0), extra=np.ones(3))
    told = call("a.npz", "n.zarr", "--rows", "fields", "--target", "response")
    assert "target: 'response'; regression" in told
    assert "arrays left out: 'extra'" in told


def test_a_header_can_be_told(call):
    Path("b.csv").write_text("0,1,2\n3,4,5\n")
    with pytest.raises(DataError, match="--header yes or --header no"):
        call("b.csv", "c.zarr")
    assert "c.zarr" not in [path.name for path in Path().iterdir()]
    told = call("b.csv", "c.zarr", "--header", "no", "--kind", "unlabelled")
    assert ("2 rows" in told, "header: no" in told, "no target" in told) == (True, True, True)
    assert "1 rows" in call("b.csv", "d.zarr", "--header", "yes", "--kind", "unlabelled")
