"""Every workflow that is given a client asks its workers for their memory, and refuses before anything runs when a task does not fit.

One table: a call with default arguments on a cluster whose workers have too little. The cluster is one on paper: whatever tried to run
on it would fail for want of a `submit`.
"""

import numpy as np
import pytest
from cluster_examples import PaperCluster
from job_examples import class_data, ridge_job, stored

import ntkdask as nd
from ntkdask.errors import MemoryBudgetError
from ntkdask.execution.workers import resources
from ntkdask.jobs.run import run_job
from ntkdask.matrices.factorize import factorize

X, LABELS = class_data(40)
NTK = nd.kernels.NTK(nd.fully_connected(1))
FEATURES = nd.features.NTKRandomFeatures(nd.fully_connected(1), n_components=4096)


def linearized(folder, client):
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Linear(X.shape[1], 3)).eval()
    return nd.predict_linearized(net, X, LABELS, n_classes=3, url=folder / "run", client=client)


def stored_matrix(folder):
    nd.kernel_matrix(NTK, X, url=folder / "k", plan=nd.Plan(16))
    return folder / "k"


def stored_ensemble(folder, client):
    matrices = nd.EnsembleMatrices(nngp_dd=stored_matrix(folder))
    return nd.predict_stored_ensemble(matrices, LABELS, kind="nngp", n_classes=3, url=folder / "run", client=client)


WORKFLOWS = {
    "kernel_matrix": lambda f, c: nd.kernel_matrix(NTK, X, url=f / "run", client=c),
    "plan_kernel_matrix": lambda f, c: nd.plan_kernel_matrix(NTK, X, client=c, calibrate=False),
    "featurize": lambda f, c: nd.featurize(FEATURES, X, url=f / "run", client=c),
    "predict_ensemble": lambda f, c: nd.predict_ensemble(
        nd.fully_connected(1), X, LABELS, n_classes=3, url=f / "run", client=c
    ),
    "predict_stored_ensemble": stored_ensemble,
    "predict_linearized": linearized,
    "spectrum, dense": lambda f, c: nd.spectrum(stored_matrix(f), 3, method="dense", client=c),
    "spectrum": lambda f, c: nd.spectrum(stored_matrix(f), 3, client=c),
    "factorize": lambda f, c: factorize(stored_matrix(f), 1.0, url=f / "run", client=c),
    "compare_kernels": lambda f, c: nd.compare_kernels(stored_matrix(f), outputs=2, spectra=False, client=c),
    "ridge on features": lambda f, c: nd.RidgeClassifier(FEATURES, client=c).fit(X, LABELS),
    "ridge": lambda f, c: nd.RidgeClassifier(client=c, url=f / "run").fit(X, LABELS),
    "kernel ridge": lambda f, c: nd.KernelRidgeClassifier(NTK, client=c, url=f / "run").fit(X, LABELS),
    "a job": lambda f, c: run_job(ridge_job(stored(f, X, LABELS)), f / "run", client=c, resources=resources(c)),
}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_that_does_not_fit_is_refused_before_it_starts(tmp_path, name):
    # less than a worker takes before its first task
    cluster = PaperCluster(hosts=2, cores=2, memory_limit=64 * 2**20)
    with pytest.raises(MemoryBudgetError, match=r"(MiB|KiB|GiB| B)\b") as refusal:
        WORKFLOWS[name](tmp_path, cluster)
    assert cluster.asked >= 1
    assert any(word in str(refusal.value) for word in ("Use ", "Give ", "give ")), "what to do"
    results = [p for p in (tmp_path / "run").rglob("c") if p.is_dir() and "inputs" not in p.parts]
    assert not results, "nothing was computed"


def test_what_fits_is_not_refused():
    found = nd.plan_kernel_matrix(NTK, np.zeros((5000, 20)), client=PaperCluster(), calibrate=False)
    assert found.tiles == 10
