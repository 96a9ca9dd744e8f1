"""Linearised prediction as a workflow: arrays, stored tiles, resumes and clusters give eqs. 5 and 6 as they are written."""

import copy
import json
import sys

import numpy as np
import pytest
from cluster_examples import PaperCluster

from ntkdask.datasets import write_dataset
from ntkdask.errors import InputError, MemoryBudgetError, MissingDependencyError
from ntkdask.kernels import NTK, PseudoNTK
from ntkdask.networks import fully_connected
from ntkdask.planning.resources import Resources
from ntkdask.planning.tiles import Plan
from ntkdask.solvers.kernel_measures import stacked
from ntkdask.workflows.empirical import linearized_solve as module
from ntkdask.workflows.empirical.linearized import predict_linearized, predict_stored_linearized
from ntkdask.workflows.kernel_matrix.build import kernel_matrix
from ntkdask.workflows.kernel_ridge.plan import KernelRidgePlan

KERNEL = NTK(fully_connected(2))
"""Stands for a pseudo-NTK where nothing asks where the matrices come from."""


def problem(n=30, m=8, d=5, outputs=3, seed=0):
    rng = np.random.default_rng(seed)
    x, x_test = rng.standard_normal((n, d)), rng.standard_normal((m, d))
    labels, labels_test = np.arange(n) % outputs, np.arange(m) % outputs
    return x, labels, x_test, labels_test, rng.standard_normal((n, outputs)), rng.standard_normal((m, outputs))


def naive(matrix, cross, y, f0, f0_test, alpha):
    """Eq. 6, or eq. 5 for matrices in order i·O + o."""
    full = len(matrix) != len(y)
    right = (y - f0).reshape(-1, 1) if full else y - f0
    return f0_test + (cross @ np.linalg.solve(matrix + alpha * np.eye(len(matrix)), right)).reshape(f0_test.shape)


def random_entk(n=12, m=5, outputs=3, seed=0):
    """(Θ (n, n, O, O), Θ (m, n, O, O)) of random Jacobians."""
    rng = np.random.default_rng(seed)
    train, test = rng.standard_normal((n, outputs, 90)), rng.standard_normal((m, outputs, 90))
    return np.einsum("nap,mbp->nmab", train, train), np.einsum("nap,mbp->nmab", test, train)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_arrays(alpha):
    x, labels, x_test, labels_test, f0, f0_test = problem()
    matrix, cross, y = KERNEL(x), KERNEL(x_test, x), np.eye(3)[labels]
    found = predict_stored_linearized(
        matrix, cross, labels, f0, f0_test, alpha=alpha, n_classes=3, test_targets=labels_test
    )
    expected = naive(matrix, cross, y, f0, f0_test, alpha)
    np.testing.assert_allclose(found.predictions, expected, atol=1e-8)
    np.testing.assert_array_equal(found.prior, f0_test)
    assert (found.full, found.alpha, found.solver, found.note) == (False, alpha, "cholesky", "")
    assert found.accuracy == np.mean(expected.argmax(axis=1) == labels_test)
    assert found.prior_accuracy == np.mean(f0_test.argmax(axis=1) == labels_test)
    # the same targets as numbers; nothing to score
    other = predict_stored_linearized(matrix, cross, y, f0, f0_test, alpha=alpha)
    np.testing.assert_array_equal(other.predictions, found.predictions)
    assert other.accuracy is other.prior_accuracy is None


def test_full_arrays():
    theta, theta_td = random_entk()
    rng = np.random.default_rng(1)
    y, f0, f0_test = rng.standard_normal((12, 3)), rng.standard_normal((12, 3)), rng.standard_normal((5, 3))
    found = predict_stored_linearized(theta, theta_td, y, f0, f0_test, alpha=0.1)
    expected = naive(stacked(theta), stacked(theta_td), y, f0, f0_test, 0.1)
    assert found.full
    np.testing.assert_allclose(found.predictions, expected, atol=1e-10)


def store(folder, dtype="float64", tile=8):
    """Urls of KERNEL between training rows and of test with training rows, and the matrices."""
    x, _, x_test, _, _, _ = problem()
    plan = Plan(tile_rows=tile, tile_cols=tile, dtype=dtype)
    matrix = kernel_matrix(KERNEL, x, url=folder / "dd", plan=plan).compute()
    cross = kernel_matrix(KERNEL, x_test, x, url=folder / "td", plan=plan).compute()
    return folder / "dd", folder / "td", matrix, cross


@pytest.mark.parametrize("solver", ["auto", "eigh", "cholesky", "tiled_cholesky", "cg"])
def test_stored_matrices(tmp_path, solver):
    _, labels, _, _, f0, f0_test = problem()
    dd, td, matrix, cross = store(tmp_path)
    found = predict_stored_linearized(
        dd, td, labels, f0, f0_test, alpha=0.3, n_classes=3, solver=solver, url=tmp_path / "run"
    )
    tolerance = 1e-4 if solver == "cg" else 1e-9
    np.testing.assert_allclose(
        found.predictions, naive(matrix, cross, np.eye(3)[labels], f0, f0_test, 0.3), atol=tolerance
    )
    assert found.solver == solver or (solver == "auto" and found.solver == "eigh")


def test_a_stored_matrix_without_a_folder_is_read_here(tmp_path):
    _, labels, _, _, f0, f0_test = problem()
    dd, td, matrix, cross = store(tmp_path)
    found = predict_stored_linearized(dd, td, labels, f0, f0_test, alpha=0.3, n_classes=3)
    expected = naive(matrix, cross, np.eye(3)[labels], f0, f0_test, 0.3)
    np.testing.assert_allclose(found.predictions, expected, atol=1e-10)
    # and rows that are there as an array
    found = predict_stored_linearized(dd, cross, labels, f0, f0_test, alpha=0.3, n_classes=3, url=tmp_path / "run")
    np.testing.assert_allclose(found.predictions, expected, atol=1e-9)


@pytest.mark.parametrize("solver", ["auto", "tiled_cholesky"])
def test_solutions_are_kept_by_what_they_solve(tmp_path, monkeypatch, solver):
    """The same residual and alpha are not solved twice; another alpha, or other targets, beside them."""
    _, labels, _, _, f0, f0_test = problem()
    dd, td, matrix, cross = store(tmp_path)
    solves = []
    original = module.solve_stored

    def counted(*arguments, **keywords):
        solves.append(arguments)
        return original(*arguments, **keywords)

    monkeypatch.setattr(module, "solve_stored", counted)

    def run(alpha, f):
        found = predict_stored_linearized(
            dd, td, labels, f, f0_test, alpha=alpha, n_classes=3, solver=solver, url=tmp_path / "run"
        )
        expected = naive(matrix, cross, np.eye(3)[labels], f, f0_test, alpha)
        np.testing.assert_allclose(found.predictions, expected, atol=1e-9)

    run(0.3, f0)
    run(0.3, f0)
    assert len(solves) == 1
    run(0.5, f0)
    run(0.3, f0 + 1)
    assert len(solves) == 3


def test_a_cluster_gives_the_same(tmp_path, two_workers):
    _, labels, _, _, f0, f0_test = problem()
    dd, td, matrix, cross = store(tmp_path)
    for solver in ("auto", "tiled_cholesky"):
        found = predict_stored_linearized(
            dd,
            td,
            labels,
            f0,
            f0_test,
            alpha=0.3,
            n_classes=3,
            solver=solver,
            url=tmp_path / solver,
            client=two_workers,
        )
        expected = naive(matrix, cross, np.eye(3)[labels], f0, f0_test, 0.3)
        np.testing.assert_allclose(found.predictions, expected, atol=1e-9)


def test_a_solve_that_does_not_fit_is_refused(tmp_path):
    _, labels, _, _, f0, f0_test = problem()
    dd, td, _, _ = store(tmp_path)
    with pytest.raises(MemoryBudgetError, match="30 training rows"):
        predict_stored_linearized(
            dd, td, labels, f0, f0_test, n_classes=3, url=tmp_path / "run", plan=Plan(memory_bytes=2**20)
        )


class Planned(Exception):
    """Ends a solve where it would begin."""


def test_the_solve_is_planned_with_what_the_workers_have(tmp_path, monkeypatch):
    """Each alone on 16 cores: their threads, and 90 % of their memory, since the nanny ends what takes all."""
    _, labels, _, _, f0, f0_test = problem()
    dd, td, _, _ = store(tmp_path)
    plans = []

    def stop(*arguments, **keywords):
        plans.extend(a for a in (*arguments, *keywords.values()) if isinstance(a, KernelRidgePlan))
        raise Planned

    monkeypatch.setattr(module, "solve_stored", stop)
    workers = PaperCluster(hosts=4, cores=16, memory_limit=10 * 2**30)
    with pytest.raises(Planned):
        predict_stored_linearized(
            dd, td, labels, f0, f0_test, alpha=0.3, n_classes=3, url=tmp_path / "run", client=workers
        )
    assert [(p.threads, p.solve_threads, p.memory_bytes) for p in plans] == [(16, 16, 9 * 2**30)]
    assert workers.asked == 1


def test_a_singular_matrix_says_which_alpha_would_do(tmp_path):
    """Duplicate rows."""
    x, labels, x_test, _, f0, f0_test = problem()
    x[1] = x[0]
    matrix, cross = KERNEL(x), KERNEL(x_test, x)
    with pytest.raises(InputError, match="Use alpha="):
        predict_stored_linearized(matrix, cross, labels, f0, f0_test, n_classes=3)


def test_what_does_not_belong_together(tmp_path):
    x, labels, x_test, _, f0, f0_test = problem()
    matrix, cross = KERNEL(x), KERNEL(x_test, x)
    good = {"targets": labels, "prior": f0, "prior_test": f0_test, "n_classes": 3}

    def run(matrix=matrix, cross=cross, **changes):
        arguments = good | changes
        return predict_stored_linearized(
            matrix, cross, arguments.pop("targets"), arguments.pop("prior"), arguments.pop("prior_test"), **arguments
        )

    with pytest.raises(InputError, match=r"targets have shape \(30, 4\) and the network's outputs \(30, 3\)"):
        run(n_classes=4)
    with pytest.raises(InputError, match=r"targets have shape \(30, 1\)"):
        run(targets=labels.astype(float), n_classes=None)
    with pytest.raises(InputError, match="give numbers"):
        run(targets=np.array(["a"] * 30), n_classes=None)
    with pytest.raises(InputError, match="NaN"):
        run(prior=np.full((30, 3), np.nan))
    with pytest.raises(InputError, match=r"give labels \(8,\)"):
        run(test_targets=labels)
    with pytest.raises(InputError, match="'cholesky' or 'eigh'"):
        run(solver="cg")
    with pytest.raises(InputError, match="30 training rows of 3 outputs"):
        run(matrix=matrix[:20, :20])
    with pytest.raises(InputError, match=r"expected \(8, 30\)"):
        run(cross=cross[:, :20])
    with pytest.raises(InputError, match="give a url"):
        run(client=object())
    dd, td, _, _ = store(tmp_path)
    with pytest.raises(InputError, match=r"expected \(7, 30\)"):
        run(matrix=dd, cross=td, prior_test=f0_test[:7])


# --- of modules --------------------------------------------------------------------------------------------------

torch = pytest.importorskip("torch")


class Small(torch.nn.Module):
    """5 inputs, 3 outputs, smooth."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.first, self.last = torch.nn.Linear(5, 40), torch.nn.Linear(40, 3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=draw) / p.shape[-1] ** 0.5)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def jacobian(net, x):
    """(n, O, P) float64."""
    net = Small().double()
    names = dict(net.named_parameters())
    call = lambda p, row: torch.func.functional_call(net, p, (row[None],))[0]  # noqa: E731
    parts = torch.func.vmap(torch.func.jacrev(call), (None, 0))(names, torch.as_tensor(x))
    return torch.cat([part.flatten(2) for part in parts.values()], dim=2).detach().numpy()


def expected_of(net, x, x_test, y, alpha, kernel):
    left, right = jacobian(net, x), jacobian(net, x_test)
    with torch.no_grad():
        f0, f0_test = (Small().double()(torch.as_tensor(side)).numpy() for side in (x, x_test))
    if kernel == "entk":
        dd, td = (np.tensordot(side, left, (2, 2)).reshape(-1, left.shape[0] * 3) for side in (left, right))
    else:
        a, b = (side.sum(axis=1) / 3**0.5 for side in (left, right))
        dd, td = a @ a.T, b @ a.T
    return naive(dd, td, y, f0, f0_test, alpha), f0_test


@pytest.mark.parametrize("kernel", ["pntk", "entk"])
@pytest.mark.parametrize("where", ["memory", "stored"])
def test_of_a_module(tmp_path, kernel, where):
    x, labels, x_test, labels_test, _, _ = problem(n=14)
    net = Small().eval()
    expected, f0_test = expected_of(net, x, x_test, np.eye(3)[labels], 0.2, kernel)
    found = predict_linearized(
        net,
        x,
        labels,
        x_test,
        kernel=kernel,
        alpha=0.2,
        n_classes=3,
        test_targets=labels_test,
        url=None if where == "memory" else tmp_path / "run",
        plan=Plan(tile_rows=6, tile_cols=6) if where == "stored" else None,
    )
    assert found.full == (kernel == "entk")
    np.testing.assert_allclose(found.prior, f0_test, atol=1e-12)
    np.testing.assert_allclose(found.predictions, expected, atol=1e-8)
    assert found.accuracy == np.mean(expected.argmax(axis=1) == labels_test)


def test_a_solve_that_cannot_fit_is_refused_before_the_kernel_is_computed(tmp_path):
    x, labels, x_test, _, _, _ = problem(n=14)
    asked = {"alpha": 0.2, "n_classes": 3, "url": tmp_path / "run", "solver": "eigh"}
    for kernel, rows in (("pntk", 14), ("entk", 42)):
        with pytest.raises(MemoryBudgetError, match=f"for {rows} training rows"):
            predict_linearized(
                Small().eval(), x, labels, x_test, kernel=kernel, resources=Resources(memory_bytes=2**20), **asked
            )
    workers = PaperCluster(memory_limit=2**28)
    with pytest.raises(MemoryBudgetError, match="for 14 training rows"):
        predict_linearized(Small().eval(), x, labels, x_test, client=workers, **asked)
    assert workers.asked == 1
    assert not (tmp_path / "run").exists()


def test_of_a_dataset_whose_labels_are_taken(tmp_path):
    x, labels, x_test, labels_test, _, _ = problem(n=14)
    x, x_test = x.astype("float32"), x_test.astype("float32")  # as datasets keep them
    net, names = Small().eval(), ("a", "b", "c")
    train = write_dataset(tmp_path / "train.zarr", x, labels, kind="classification", class_names=names)
    test = write_dataset(tmp_path / "test.zarr", x_test, labels_test, kind="classification", class_names=names)
    direct = predict_linearized(net, x, labels, x_test, alpha=0.2, n_classes=3, test_targets=labels_test)
    for url in (None, tmp_path / "run"):
        found = predict_linearized(net, train.url, None, test, alpha=0.2, url=url)
        np.testing.assert_allclose(found.predictions, direct.predictions, atol=1e-4)
        assert (found.accuracy, found.prior_accuracy) == (direct.accuracy, direct.prior_accuracy)
    assert json.loads((tmp_path / "run" / "linearized" / "record.json").read_text())["stages"]


def test_training_rows_are_interpolated_without_a_ridge():
    x, labels, _, _, _, _ = problem(n=14)
    for kernel in ("pntk", "entk"):
        found = predict_linearized(Small().eval(), x, labels, kernel=kernel, n_classes=3, test_targets=labels)
        np.testing.assert_allclose(found.predictions, np.eye(3)[labels], atol=1e-6)
        assert found.accuracy == 1.0


def test_a_kernel_brings_its_layout_and_is_of_the_module(tmp_path):
    """Images of channels first: what the kernel takes, the prior mean takes."""
    rng = np.random.default_rng(0)
    x, x_test = rng.standard_normal((6, 1, 5, 4)), rng.standard_normal((3, 1, 5, 4))
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(12, 3)).double().eval()
    kernel, y = PseudoNTK(net, input_layout=None), np.eye(3)[np.arange(6) % 3]
    named = predict_linearized(net, x, y, x_test, alpha=0.1, input_layout=None)
    found = predict_linearized(net, x, y, x_test, kernel=kernel, alpha=0.1)
    np.testing.assert_array_equal(found.predictions, named.predictions)
    with pytest.raises(InputError, match="PseudoNTK is of another module"):
        predict_linearized(copy.deepcopy(net), x, y, x_test, kernel=kernel)


def test_without_torch_it_says_how_to_get_it(monkeypatch):
    x, labels, _, _, _, _ = problem(n=14)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'ntkdask\[torch\]'"):
        predict_linearized(object(), x, labels, n_classes=3)


def test_modules_and_rows_that_do_not_fit():
    x, labels, x_test, _, _, _ = problem(n=14)
    net = Small().eval()
    with pytest.raises(InputError, match='"pntk", "entk"'):
        predict_linearized(net, x, labels, x_test, kernel="ntk", n_classes=3)
    with pytest.raises(InputError, match="they must agree"):
        predict_linearized(net, x, labels, x_test[:, :4], n_classes=3)
    with pytest.raises(InputError, match=r"targets have shape \(13, 3\) .* for 14 training rows"):
        predict_linearized(net, x, labels[:13], x_test, n_classes=3)
    with pytest.raises(InputError, match="no targets"):
        predict_linearized(net, x, None, x_test)
    with pytest.raises(InputError, match=r"outputs \(14, 3\)"):
        predict_linearized(net, x, labels, x_test, n_classes=4)
    x[3, 2] = np.nan
    with pytest.raises(InputError, match="row 3"):
        predict_linearized(net, x, labels, x_test, n_classes=3)
