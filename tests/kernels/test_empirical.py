"""PseudoNTK and EmpiricalNTK against Jacobians in float64: outputs, precision, budgets of memory, bad modules and rows."""

import dataclasses
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from module_examples import AnyRows  # noqa: E402
from sklearn.base import clone  # noqa: E402
from torch import nn  # noqa: E402
from torch.func import functional_call, jacrev  # noqa: E402

from ntkdask import KernelRidgeRegressor, threads  # noqa: E402
from ntkdask.errors import InputError, MemoryBudgetError, MissingDependencyError  # noqa: E402
from ntkdask.kernels import EmpiricalNTK, PseudoNTK  # noqa: E402
from ntkdask.modules import empirical  # noqa: E402
from ntkdask.modules.jacobian.blocks import FORM_BYTES  # noqa: E402
from ntkdask.modules.peak import PeakBytes  # noqa: E402
from ntkdask.modules.tensors import as_array, as_tensor  # noqa: E402
from ntkdask.modules.torch_threads import mkl_threads  # noqa: E402

OUTPUTS = 4
ROW = (6, 5, 3)


class Net(nn.Module):
    """Convolutions with many and with few pixels, a sequence, normalisations in place and a readout."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.deep = nn.Conv2d(4, 20, 3, stride=3, bias=False)  # to 2×1 pixels: products of terms
        self.tokens = nn.Linear(20, 9)
        self.scale = nn.Parameter(torch.rand(9))
        self.out = nn.Linear(18, OUTPUTS)

    def forward(self, x):
        h = self.deep(self.relu(self.norm(self.stem(x))))
        return self.out(torch.tanh(self.tokens(h.flatten(2).transpose(1, 2)) * self.scale).flatten(1))


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Net().eval()
    with torch.no_grad():
        module.norm.running_mean.add_(0.1)
        module.norm.running_var.mul_(1.5)
    return module


def images(n, seed=0, dtype="float64"):
    return np.random.default_rng(seed).standard_normal((n, *ROW)).astype(dtype)


def full_kernel(module, x, y):
    """(n, m, O, O) from whole Jacobians in float64."""

    def jacobian(rows):
        twin = Net().double().eval()
        twin.load_state_dict(module.state_dict())
        twin.requires_grad_(False)
        p = {
            name: value.detach()
            for name, value in twin.named_parameters()
            if dict(module.named_parameters())[name].requires_grad
        }
        rows = torch.from_numpy(rows).double().permute(0, 3, 1, 2)
        found = jacrev(lambda q: functional_call(twin, q, (rows,)))(p)
        return torch.cat([g.reshape(len(rows), OUTPUTS, -1) for g in found.values()], dim=2)

    return torch.einsum("ipc,jqc->ijpq", jacobian(x), jacobian(y)).numpy()


KINDS = {
    "pseudo": (PseudoNTK, {}, lambda k: k.mean((2, 3)) * OUTPUTS),
    "trace": (EmpiricalNTK, {"output": "trace"}, lambda k: np.trace(k, axis1=2, axis2=3) / OUTPUTS),
    "logit": (EmpiricalNTK, {"output": 2}, lambda k: k[:, :, 2, 2]),
    "full": (EmpiricalNTK, {}, lambda k: k),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def error(found, exact):
    return np.abs(found.astype("float64") - exact).max() / np.abs(exact).max()


@every_kind
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-6)])
def test_kernels_are_those_of_jacobians(net, kind, dtype, tolerance):
    make, arguments, of = KINDS[kind]
    x, y = images(9, dtype=dtype), images(5, 1, dtype)
    kernel = make(net, **arguments)
    symmetric = of(full_kernel(net, x, x))
    assert kernel(x).dtype == dtype
    assert error(kernel(x), symmetric) <= tolerance
    assert error(kernel(x, x.copy()), symmetric) <= tolerance
    assert error(kernel(x, y), of(full_kernel(net, x, y))) <= tolerance
    assert error(kernel.diagonal(x), symmetric[np.arange(9), np.arange(9)]) <= tolerance
    assert kernel(x[:0]).shape == (0, 0, *symmetric.shape[2:])
    assert kernel(x, y[:0]).shape == (9, 0, *symmetric.shape[2:])
    assert kernel.diagonal(x[:0]).shape == (0, *symmetric.shape[2:])


@pytest.mark.parametrize(
    ("kind", "memory"),
    [
        ("pseudo", 40_000),
        ("full", 240_000),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("pseudo", 20_000), ("logit", 30_000), ("trace", 60_000), ("full", 60_000))
        ),
    ],
)
def test_budgets_change_nothing_but_rounding(net, kind, memory):
    """Passes over groups of parameters, then blocks of rows where one parameter is too large."""
    make, arguments, of = KINDS[kind]
    x, y = images(7), images(4, 1)
    kernel = make(net, memory_bytes=memory, **arguments)
    assert error(kernel(x), of(full_kernel(net, x, x))) <= 1e-12
    assert error(kernel(x, y), of(full_kernel(net, x, y))) <= 1e-12
    np.testing.assert_allclose(kernel.diagonal(x), make(net, **arguments).diagonal(x), rtol=1e-11, atol=1e-12)


def peak_of(call):
    call()
    with PeakBytes() as peak:
        call()
    return peak.peak


@pytest.mark.parametrize("memory", [2**30, 2**18])
@pytest.mark.parametrize(
    ("kind", "m"),
    [
        ("pseudo", None),
        pytest.param("pseudo", 30, marks=pytest.mark.slow),
        pytest.param("trace", None, marks=pytest.mark.slow),
        pytest.param("full", 30, marks=pytest.mark.slow),
    ],
)
def test_memory_is_what_is_declared(net, kind, memory, m):
    """The matrix is NumPy's memory, which the count does not see."""
    make, arguments, _ = KINDS[kind]
    kernel = make(net, memory_bytes=memory, **arguments)
    x, y = images(40, dtype="float32"), None if m is None else images(m, 1, "float32")
    matrix = 4 * 40 * (m or 40) * (OUTPUTS**2 if kind == "full" else 1)
    planned = kernel.workspace_bytes(40, m or 40, 4, ROW)
    assert peak_of(lambda: kernel(x, y)) <= planned - matrix
    assert planned - matrix <= memory + FORM_BYTES + 2**17
    assert kernel.workspace_bytes(40, m or 40, 4) >= memory


def test_one_parameter_of_one_row_too_many(net):
    with pytest.raises(MemoryBudgetError, match=r"gradients of two rows.*memory_bytes >= \d+"):
        PseudoNTK(net, memory_bytes=1000)(images(3))


@pytest.mark.parametrize(
    ("precision", "low", "high"), [("bfloat16", 1e-4, 1e-2), ("float64", 0, 1e-7), ("tf32", 0, 2e-6)]
)
def test_precisions(net, precision, low, high):
    """On a CPU "tf32" is float32; "float64" differs from exact by the result's rounding alone."""
    x, y = images(12, dtype="float32"), images(7, 1, "float32")
    kernel = PseudoNTK(net, precision=precision)
    exact = full_kernel(net, x, x).mean((2, 3)) * OUTPUTS
    assert low <= error(kernel(x), exact) <= high
    assert low <= error(kernel(x, y), full_kernel(net, x, y).mean((2, 3)) * OUTPUTS) <= high
    assert kernel(x).dtype == np.float32
    assert error(kernel.diagonal(x), np.diag(exact)) <= 2e-6


def test_frozen_and_chosen_parameters(net):
    x = images(6)
    parts = [
        PseudoNTK(net, parameters=pattern)(x)
        for pattern in ("stem.*", ("norm.*", "deep.*", "tokens.*"), ["out.*", "scale"])
    ]
    np.testing.assert_allclose(sum(parts), PseudoNTK(net)(x), rtol=1e-12)
    module = Net().eval()
    module.deep.weight.requires_grad_(False)
    assert error(PseudoNTK(module)(x), full_kernel(module, x, x).mean((2, 3)) * OUTPUTS) <= 1e-12
    module.deep.weight.requires_grad_(True)  # seen at the next call
    assert error(PseudoNTK(module)(x), full_kernel(module, x, x).mean((2, 3)) * OUTPUTS) <= 1e-12


def test_weights_are_read_at_each_call():
    module, x = nn.Sequential(nn.Flatten(), nn.Linear(90, 8), nn.Tanh(), nn.Linear(8, 2)).eval(), images(4)
    kernel = PseudoNTK(module)
    before = kernel(x)
    with torch.no_grad():
        module[1].weight.mul_(2)
    assert not np.allclose(kernel(x), before)


def test_layouts(net):
    x = images(5)
    as_they_are = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    np.testing.assert_allclose(PseudoNTK(net, input_layout=None)(as_they_are), PseudoNTK(net)(x), rtol=1e-10)
    with pytest.raises(InputError, match=r"fails on rows of shape \(6, 5, 3\).*input_layout"):
        PseudoNTK(net, input_layout=None)(x)
    with pytest.raises(InputError, match="input_layout is 'nhwc'"):
        PseudoNTK(net, input_layout="nhwc")


def test_rows_of_any_memory(net):
    x = images(6)
    x.flags.writeable = False
    expected = PseudoNTK(net)(x)
    for other in (x[::-1][::-1], np.asfortranarray(x), x.astype(">f8").astype("f8"), torch.from_numpy(x.copy())):
        np.testing.assert_allclose(PseudoNTK(net)(other), expected, rtol=1e-12)


def test_equality_and_description():
    module = nn.Linear(6, 2)
    assert PseudoNTK(module) == PseudoNTK(module)
    assert hash(PseudoNTK(module, parameters=["*"])) == hash(PseudoNTK(module, parameters=("*",)))
    assert PseudoNTK(module) != PseudoNTK(nn.Linear(6, 2))
    assert dataclasses.replace(PseudoNTK(module), precision="float64").precision == "float64"
    x = np.random.default_rng(0).standard_normal((5, 6))
    np.testing.assert_array_equal(PseudoNTK(AnyRows())(x), PseudoNTK(AnyRows().build())(x))


def test_tensors_share_memory():
    x = images(3)
    assert np.shares_memory(as_array(as_tensor(x, layout=None), x), x)
    assert as_tensor(x).shape == (3, 3, 6, 5)
    x.flags.writeable = False
    assert not np.shares_memory(as_array(as_tensor(x), x), x)


# --- what is refused ------------------------------------------------------------------------------------------------------


class Wrong(nn.Module):
    """A layer whose output goes through `wrong`."""

    def __init__(self, wrong, **parts):
        super().__init__()
        self.layer, self.wrong = nn.Linear(6, 3), wrong
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.wrong(self.layer(x))


def vectors(n=4):
    return np.random.default_rng(0).standard_normal((n, 6))


def overwritten(h):
    out = torch.exp(h)
    squares = out**2
    out += 1
    return squares


BAD = {
    "batch norm in training": (
        lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)),
        r"BatchNorm1d '1' is in train mode.*module\.eval\(\)",
    ),
    "dropout in training": (
        lambda: nn.Sequential(nn.Linear(6, 3), nn.Dropout()),
        r"Dropout '1' is in train mode.*module\.eval\(\)",
    ),
    "batch norm without statistics": (
        lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval(),
        "keeps no running statistics",
    ),
    "a vector": (lambda: Wrong(lambda h: h[:, 0]), r"gives \(2,\) for 2 rows.*y\[:, None\]"),
    "a cube": (lambda: Wrong(lambda h: h[:, :, None]), r"gives \(2, 3, 1\) for 2 rows.*Flatten"),
    "a sum over rows": (lambda: Wrong(lambda h: h.sum(0, keepdim=True)), r"gives \(1, 3\) for 2 rows"),
    "a pair": (lambda: Wrong(lambda h: (h, h)), "gives tuple, expected one tensor"),
    "argmax": (lambda: Wrong(lambda h: (h > 0).double()), "does not depend on the 2 parameters"),
    "integers": (lambda: Wrong(lambda h: h.long()), r"dtype torch\.int64"),
    "complex outputs": (lambda: Wrong(lambda h: h + 1j), "dtype torch.complex128"),
    "no gradients": (lambda: nn.Linear(6, 3).requires_grad_(False), "none of the 2 parameters.*requires_grad_"),
    "no parameters": (lambda: nn.Flatten(), "Flatten has no parameters"),
    "complex parameters": (lambda: nn.Linear(6, 3, dtype=torch.complex64), "'weight' has dtype torch.complex64"),
    "integer parameters": (
        lambda: Wrong(lambda h: h, count=nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)),
        "'count' has dtype torch.int64",
    ),
    "an uninitialised layer": (lambda: nn.LazyLinear(3), "'weight' is not initialised"),
    "written in place": (lambda: Wrong(overwritten), "modified by an inplace operation.*out of place"),
    "batch statistics": (lambda: Wrong(lambda h: h - h.mean(0)), "changes with the rows beside it"),
    "what cannot be copied": (
        lambda: Wrong(lambda h: h, stream=(i for i in range(3))),
        "cannot be copied.*__deepcopy__",
    ),
    "no module": (lambda: "resnet", "module is 'resnet'; give a torch.nn.Module"),
    "a class": (lambda: nn.Linear, "give a torch.nn.Module"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_modules_say_why(name):
    build, message = BAD[name]
    with pytest.raises(InputError, match=message):
        PseudoNTK(build())(vectors())


def test_train_mode_without_layers_that_mind_is_fine():
    module = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 2)).train()
    trained = PseudoNTK(module)(vectors())
    assert module.training
    np.testing.assert_array_equal(trained, PseudoNTK(module.eval())(vectors()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "half"}, "precision is 'half'"),
        ({"memory_bytes": 0}, "memory_bytes is 0"),
        ({"parameters": 3}, "parameters is 3"),
        ({"output": "both"}, "output is 'both'"),
        ({"output": -1}, "output is -1"),
        ({"output": True}, "output is True"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        EmpiricalNTK(nn.Linear(6, 2), **arguments)


def test_bad_rows():
    kernel = EmpiricalNTK(nn.Linear(6, 2), output=2)
    with pytest.raises(InputError, match="output is 2, but the module has 2 logits; give 0 to 1"):
        kernel(vectors())
    with pytest.raises(InputError, match="x has 6 features a row and y has 5"):
        kernel(vectors(), np.ones((2, 5)))


class Path(nn.Module):
    """A function of a batch: many rows go through the layer twice."""

    def __init__(self, few):
        super().__init__()
        self.layer, self.few = nn.Linear(6, 6), few

    def forward(self, x):
        return self.layer(self.layer(x)) if len(x) > self.few else self.layer(x)


def test_rows_that_take_another_path():
    """Seen by the first dry run, or, where that has too few rows, in the first batch."""
    with pytest.raises(InputError, match="changes with the rows beside it"):
        PseudoNTK(Path(2))(vectors(5))
    with pytest.raises(InputError, match="the module called its layers"):
        PseudoNTK(Path(8))(vectors(12))


def test_out_of_memory_goes_on_with_half(net, monkeypatch):
    """A GPU's error, raised here once in the middle of a call: nothing of the first attempt remains in the result."""
    x, failed = images(8), []
    expected = PseudoNTK(net)(x)
    original = empirical.Tangent.matrix

    def failing(self, k, *rest):
        if not failed:
            failed.append(self.memory)
            original(self, k, *rest)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        failed.append(self.memory)
        return original(self, k, *rest)

    monkeypatch.setattr(empirical.Tangent, "matrix", failing)
    with pytest.warns(empirical.MemoryWarning, match=r"going on with memory_bytes=536870912"):
        found = PseudoNTK(net)(x)
    assert failed == [2**30, 2**29]
    np.testing.assert_array_equal(found, expected)


def test_out_of_memory_ends(net, monkeypatch):
    def failing(self, k, *rest):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(empirical.Tangent, "matrix", failing)
    with pytest.raises(MemoryBudgetError, match=r"no room.*smaller tiles"), pytest.warns(empirical.MemoryWarning):
        PseudoNTK(net, memory_bytes=2**22)(images(3))


def test_torch_keeps_its_settings(net):
    before = (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_rng_state())
    PseudoNTK(net)(images(4))
    after = (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_rng_state())
    assert before[:3] == after[:3]
    assert torch.equal(before[3], after[3])


def test_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match=r"PseudoNTK needs PyTorch.*pip install 'ntkdask\[torch\]'"):
        PseudoNTK(None)


@pytest.mark.skipif(mkl_threads() is None, reason="a torch without MKL")
def test_torch_and_mkl_run_with_the_threads_of_the_task(net):
    """`limited` lowers OpenMP's threads, which torch reports; MKL keeps its own number, on which bits depend."""
    before, seen = (torch.get_num_threads(), mkl_threads()), []

    class Watched(nn.Sequential):
        def forward(self, x):
            seen.append((torch.get_num_threads(), mkl_threads()))
            return super().forward(x)

    PseudoNTK(Watched(net).eval())(images(4))
    assert set(seen) == {(threads.current(), threads.current())}
    seen.clear()
    with threads.limited(1):
        inside = torch.get_num_threads()
        PseudoNTK(Watched(net).eval())(images(4))
        assert torch.get_num_threads() == inside
    assert set(seen) == {(1, 1)}
    assert (torch.get_num_threads(), mkl_threads()) == before


def test_scikit_learn_does_not_copy_the_module(net):
    model = KernelRidgeRegressor(PseudoNTK(net), alphas=(0.1,))
    assert clone(model).kernel.module is net
