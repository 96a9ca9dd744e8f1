"""Documentation that runs: every notebook executes on a real cluster, and is stored without outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from ntkdask.execution import cluster

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_are_stripped(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


# ipykernel and jupyter_client leave sockets and event loops to the garbage collector; that is theirs, not ours
@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_attach_runs_on_a_cluster(tmp_path, monkeypatch):
    with cluster.connect(n_workers=2, cuda=False) as client:
        monkeypatch.setenv("NTKDASK_SCHEDULER", client.scheduler.address)
        monkeypatch.setenv("NTKDASK_FOLDER", str(tmp_path))
        monkeypatch.setenv("MPLBACKEND", "agg")
        notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
        NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    text = "".join(o.get("text", "") for c in notebook.cells if c.cell_type == "code" for o in c.outputs)
    assert "8 of 8 tiles committed, 0 pending" in text
    assert "relative Frobenius error" in text
