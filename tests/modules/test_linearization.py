"""The linearisation error against models that are linear, kernels that are formed, and its slope in the width."""

from itertools import pairwise

import numpy as np
import pytest
from module_examples import one_thread

from ntkdask.errors import InputError
from ntkdask.solvers.kernel_measures import kernel_sums, power_law
from ntkdask.solvers.linearized import Linearized

torch = pytest.importorskip("torch")

from ntkdask.modules.linearization import linearization_error  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


class Wide(torch.nn.Module):
    """A network of one or two hidden layers in NTK parameterisation, W_ij ~ N(0, 1), activations with E[σ'²] about 1, float64."""

    def __init__(self, width, d=5, outputs=3, depth=1, seed=0, activation=torch.tanh):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        sizes = [d] + [width] * depth + [outputs]
        self.weights = torch.nn.ParameterList(
            torch.randn(n, m, generator=draw, dtype=torch.float64) for m, n in pairwise(sizes)
        )
        self.activation = activation

    def forward(self, x):
        for i, w in enumerate(self.weights):
            x = x @ w.T / w.shape[1] ** 0.5
            x = self.activation(x) if i + 1 < len(self.weights) else x
        return x


def rows(n=8, m=6, d=5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)), rng.standard_normal((n, 3)), rng.standard_normal((m, d))


def jacobian(module, x):
    """(n, O, P) by torch.func."""
    names = dict(module.named_parameters())
    call = lambda p, row: torch.func.functional_call(module, p, (row[None],))[0]  # noqa: E731
    parts = torch.func.vmap(torch.func.jacrev(call), (None, 0))(names, torch.as_tensor(x))
    return torch.cat([part.flatten(2) for part in parts.values()], dim=2).detach().numpy()


def empirical(module, x, y=None):
    """Θ (n, m, O, O)."""
    left = jacobian(module, x)
    right = left if y is None else jacobian(module, y)
    return np.tensordot(left, right, (2, 2)).transpose(0, 2, 1, 3)


def test_a_linear_model_is_its_own_linearisation():
    x, y, x_test = rows()
    found = linearization_error(torch.nn.Linear(5, 3, dtype=torch.float64), x, y, x_test, steps=50)
    assert found.taylor < 1e-13
    assert found.dynamics < 1e-13
    assert found.moved > 0.1
    assert found.loss == pytest.approx(found.linear_loss, rel=1e-12)


class Writing(torch.nn.Module):
    """Writes to its rows, counts its calls in a buffer, keeps what it computed, and is linear in positive rows."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(5, 3, dtype=torch.float64), None
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen = self.layer(x.relu_())
        return self.seen


def test_the_module_and_its_rows_are_never_touched():
    x, y, x_test = rows()
    module, before = Writing(), (x.copy(), x_test.copy())
    found = linearization_error(module, x, y, x_test, steps=5)
    assert found == linearization_error(module.layer, np.maximum(x, 0), y, np.maximum(x_test, 0), steps=5)
    assert module.seen is None
    assert module.calls == 0
    for rows_, kept in zip((x, x_test), before, strict=True):
        np.testing.assert_array_equal(rows_, kept)


def test_outputs_that_are_no_table_are_refused():
    x, y, x_test = rows()
    module = torch.nn.Sequential(torch.nn.Linear(5, 3, dtype=torch.float64), torch.nn.Flatten(0))
    with pytest.raises(InputError, match=r"linearization_error: the module gives \(24,\) for 8 rows"):
        linearization_error(module, x, y.ravel(), x_test)


def test_dynamics_of_the_linear_model_against_the_kernel():
    """f_lin after t steps is f₀ + Θ_TD Θ_DD⁻¹(I − (I − ηΘ_DD)^t)(Y − f₀); its distance from f is what is reported."""
    x, y, x_test = rows()
    module = Wide(32)
    dd, td = (k.transpose(0, 2, 1, 3).reshape(-1, 24) for k in (empirical(module, x), empirical(module, x_test, x)))
    rate, steps = 0.5 / np.linalg.eigvalsh(dd)[-1], 7
    found = linearization_error(module, x, y, x_test, steps=steps, learning_rate=rate)
    with torch.no_grad():
        f0, f0_test = module(torch.as_tensor(x)).numpy(), module(torch.as_tensor(x_test)).numpy()
    decay = np.linalg.matrix_power(np.eye(24) - rate * dd, steps)
    residual = (y - f0).reshape(-1)
    expected = f0_test.reshape(-1) + td @ np.linalg.solve(dd, residual - decay @ residual)
    trained = Wide(32)
    optimizer = torch.optim.SGD(trained.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * ((trained(torch.as_tensor(x)) - torch.as_tensor(y)) ** 2).sum()).backward()
        optimizer.step()
    with torch.no_grad():
        f = trained(torch.as_tensor(x_test)).numpy()
    assert found.dynamics == pytest.approx(np.sqrt(np.mean((f.reshape(-1) - expected) ** 2)), rel=1e-9)
    assert found.moved == pytest.approx(np.sqrt(np.mean((f - f0_test) ** 2)), rel=1e-9)
    change = np.concatenate(
        [(p - q).detach().numpy().ravel() for p, q in zip(trained.weights, module.weights, strict=True)]
    )
    taylor = f0_test + np.einsum("map,p->ma", jacobian(module, x_test), change)
    assert found.taylor == pytest.approx(np.sqrt(np.mean((f - taylor) ** 2)), rel=1e-9)
    assert found.parameters_moved == pytest.approx(np.linalg.norm(change), rel=1e-9)


def test_the_default_rate_is_one_over_the_largest_eigenvalue():
    x, y, x_test = rows()
    module = Wide(16)
    largest = np.linalg.eigvalsh(empirical(module, x).transpose(0, 2, 1, 3).reshape(24, 24))[-1]
    found = linearization_error(module, x, y, x_test, steps=1)
    assert 1 / found.learning_rate <= largest * (1 + 1e-12)
    assert 1 / found.learning_rate == pytest.approx(largest, rel=0.02)


@pytest.mark.parametrize(("activation", "depth"), [(torch.tanh, 1), (torch.tanh, 2)])
def test_errors_fall_like_one_over_the_root_of_the_width(activation, depth):
    """Four widths, three seeds. The worst parameters within reach attain the lecture's bound; training stays below it."""
    x, y, x_test = rows()
    widths = (16, 32, 64, 128) if depth == 2 else (16, 48, 144, 432)
    found = [
        [
            linearization_error(Wide(w, depth=depth, seed=s, activation=activation), x, y, x_test, steps=10)
            for w in widths
        ]
        for s in range(3)
    ]
    slope = {
        n: power_law(widths, [[getattr(f, n) for f in row] for row in found])
        for n in ("taylor", "dynamics", "worst", "moved")
    }
    assert -0.65 <= slope["worst"] <= -0.35, slope
    assert -1.2 <= slope["taylor"] <= -0.5, slope
    assert -1.2 <= slope["dynamics"] <= -0.5, slope
    # the network itself keeps moving
    assert abs(slope["moved"]) < 0.15, slope
    assert all(f.worst >= f.taylor for row in found for f in row)


def test_the_worst_parameters_of_a_quadratic_model():
    """f(θ) = θᵀAθ/2 on the sphere of radius r around 0: at most r²·max|λ(A)|/2."""

    class Quadratic(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
            a = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            self.register_buffer("a", a + a.T + 3 * torch.eye(6, dtype=torch.float64))
            self.register_buffer("b", torch.arange(1.0, 7.0, dtype=torch.float64))

        def forward(self, x):
            return (self.b @ self.theta + self.theta @ self.a @ self.theta / 2).reshape(1, 1).expand(len(x), 1)

    module = Quadratic()
    found = linearization_error(module, np.ones((2, 1)), np.ones((2, 1)), np.ones((3, 1)), steps=1, learning_rate=1e-3)
    largest = np.abs(np.linalg.eigvalsh(module.a.numpy())).max()
    assert found.worst == pytest.approx(found.parameters_moved**2 * largest / 2, rel=1e-4)
    assert found.taylor < found.worst


@pytest.mark.parametrize("depth", [1, 2])
def test_theorem_1_slope(depth):
    """‖Θ − Θ̂⊗I‖/‖Θ‖ and the off-diagonal ratio over four widths and three seeds. Mohamadi & Sutherland, eq. 3."""
    x, _, _ = rows(n=10)
    widths = (32, 64, 128, 256)
    relu = lambda t: torch.relu(t) * 2**0.5  # noqa: E731
    sums = [
        [kernel_sums(empirical(Wide(w, depth=depth, seed=s, activation=relu), x)) for w in widths] for s in range(3)
    ]
    for name in ("frobenius", "off_diagonal_ratio", "pooled_off_diagonal_ratio"):
        slope = power_law(widths, [[getattr(k, name) for k in row] for row in sums])
        assert -0.65 <= slope <= -0.35, (name, slope)


def test_eq_5_is_what_training_converges_to():
    """A wide network trained long enough, against f_lin of its eNTK; the pseudo-NTK's is near both."""
    x, y, x_test = rows(n=5)
    module = Wide(2048)
    with torch.no_grad():
        f0, f0_test = (module(torch.as_tensor(side)).numpy() for side in (x, x_test))
    dd, td = empirical(module, x), empirical(module, x_test, x)
    full = Linearized.fit(dd, y - f0).predict(td, f0_test)
    pseudo = Linearized.fit(dd.sum(axis=(2, 3)) / 3, y - f0).predict(td.sum(axis=(2, 3)) / 3, f0_test)
    trained = Wide(2048)
    rate = 1 / np.linalg.eigvalsh(dd.transpose(0, 2, 1, 3).reshape(15, 15))[-1]
    optimizer = torch.optim.SGD(trained.parameters(), lr=rate)
    for _ in range(200):
        optimizer.zero_grad()
        (0.5 * ((trained(torch.as_tensor(x)) - torch.as_tensor(y)) ** 2).sum()).backward()
        optimizer.step()
    with torch.no_grad():
        f = trained(torch.as_tensor(x_test)).numpy()
    moved = np.linalg.norm(f - f0_test)
    assert np.linalg.norm(full - f) < 0.05 * moved
    assert np.linalg.norm(pseudo - full) < 0.05 * moved


def test_the_module_stays_as_it_was():
    x, y, x_test = rows()
    module = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    module[0].weight.requires_grad_(False)
    module[3].bias.grad = torch.ones(3)
    module.eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = linearization_error(module, x, y, x_test, steps=3)
    assert found.moved > 0
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not module.training
    assert [p.requires_grad for p in module.parameters()] == [False] + [True] * 5
    assert torch.equal(module[3].bias.grad, torch.ones(3))
    assert module[3].weight.grad is None


def test_what_cannot_be_trained_is_refused():
    x, y, x_test = rows()
    module = torch.nn.Linear(5, 3, dtype=torch.float64)
    with pytest.raises(InputError, match=r"gives \(8, 3\) and targets have shape \(8, 2\)"):
        linearization_error(module, x, y[:, :2], x_test)
    with pytest.raises(InputError, match="diverged"):
        linearization_error(Wide(16, depth=2), x, y, x_test, steps=500, learning_rate=50.0)
    for wrong in ({"steps": 0}, {"learning_rate": 0.0}, {"learning_rate": float("nan")}):
        with pytest.raises(InputError, match="use at least 1 step"):
            linearization_error(module, x, y, x_test, **wrong)
    with torch.no_grad():
        fitted = module(torch.as_tensor(x)).numpy()
    with pytest.raises(InputError, match="fit the targets already"):
        linearization_error(module, x, fitted, x_test)
    with pytest.raises(InputError, match=r"module\.eval\(\)"):
        linearization_error(torch.nn.Sequential(torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3)), x, y, x_test)
    module.requires_grad_(False)
    with pytest.raises(InputError, match="requires gradients"):
        linearization_error(module, x, y, x_test)
