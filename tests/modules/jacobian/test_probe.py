"""What a dry run tells of unusual modules: rows that show nothing or lie in another order, random numbers, wrappers; their kernels."""

from copy import deepcopy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.func import functional_call  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from ntkdask.errors import InputError  # noqa: E402
from ntkdask.features import ProjectedGradients  # noqa: E402
from ntkdask.kernels import PseudoNTK  # noqa: E402
from ntkdask.modules.jacobian.probe import ROWS, choose_probe  # noqa: E402
from ntkdask.modules.jacobian.survey import PathError, exclude_layers, with_retries  # noqa: E402
from ntkdask.modules.tensors import as_tensor  # noqa: E402

INPUTS, OUTPUTS = 6, 3


class Net(nn.Module):
    """Two layers and a function of them and of rows."""

    def __init__(self, run, **parts):
        super().__init__()
        self.a, self.out, self.run = nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, OUTPUTS), run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


def made(run, **parts):
    """A net of seeded weights; a part nn.Linear is made here too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {name: part(INPUTS, INPUTS) if part is nn.Linear else part for name, part in parts.items()}
        return Net(run, **parts).double().eval()


def rows(n=12, seed=0):
    return np.random.default_rng(seed).standard_normal((n, INPUTS))


def exact(module, x):
    """The pseudo-NTK from one backward pass of the module itself for each row."""
    found = []
    for row in torch.from_numpy(x):
        p = {name: value.detach().clone().requires_grad_() for name, value in module.named_parameters()}
        y = functional_call(module, p, (row[None],)).sum() / OUTPUTS**0.5
        grads = torch.autograd.grad(y, list(p.values()), allow_unused=True)
        found.append(
            torch.cat(
                [torch.zeros(p[n].numel()) if g is None else g.reshape(-1) for n, g in zip(p, grads, strict=True)]
            )
        )
    j = torch.stack(found)
    return (j @ j.T).numpy()


def assert_exact(module, x):
    kernel, expected = PseudoNTK(module), exact(module, x)
    scale = np.abs(expected).max()
    assert np.abs(kernel(x) - expected).max() <= 1e-10 * scale
    assert np.abs(kernel(x[:2], x) - expected[:2]).max() <= 1e-10 * scale
    assert np.abs(kernel.diagonal(x) - np.diag(expected)).max() <= 1e-10 * scale


def used_again(m, x):
    """The layer's weight has a second use that no hook sees; it shows where x and gain are not zero."""
    return m.out(torch.tanh(m.a(x)) * m.gain + torch.tanh(x @ m.a.weight) * m.gain)


def sorted_inside(m, x):
    order = torch.argsort(x[:, 0])
    return m.out(torch.tanh(m.a(x[order]))[torch.argsort(order)])


def experts(m, x):
    """Each row goes to one of two layers; a layer without rows is not called."""
    h = torch.zeros_like(x)
    for k, layer in enumerate((m.a, m.b)):
        mine = torch.where((x[:, 0] > 0) == bool(k))[0]
        if len(mine):
            h = h.index_copy(0, mine, torch.tanh(layer(x[mine])))
    return m.out(h)


def to_expert(*which):
    x = rows(len(which))
    x[:, 0] = np.abs(x[:, 0]) * np.where(which, 1, -1)
    return x


# --- the rows of a dry run ------------------------------------------------------------------------------------------------


class Given:
    def __init__(self, x):
        self.x = torch.as_tensor(x)

    def __len__(self):
        return len(self.x)

    def batch(self, start, stop):
        return self.x[start:stop].clone()


def test_rows_that_tell_come_first():
    x = np.zeros((20, 3))
    x[1], x[4], x[5], x[17] = np.nan, 1, 1, 2
    seen = choose_probe([Given(x)])
    assert seen.informative
    assert seen.x.shape == (ROWS, 3)
    assert seen.x[:2].tolist() == [[1, 1, 1], [2, 2, 2]]
    assert seen.x.isfinite().all()


@pytest.mark.parametrize("x", [np.ones((1, 3)), np.ones((5, 3)), np.zeros((5, 3)), np.full((3, 3), np.nan)])
def test_rows_that_are_alike_do_not_tell(x):
    seen = choose_probe([Given(x)])
    assert not seen.informative
    assert len(seen.x) >= 2


def test_both_sets_of_rows_are_looked_at():
    assert choose_probe([Given(np.ones((1, 3))), Given(np.full((1, 3), 2.0))]).informative


# --- gradients that show nothing ------------------------------------------------------------------------------------------


def test_zero_rows_hide_no_use():
    module, x = made(used_again, gain=nn.Parameter(torch.ones(INPUTS))), rows()
    x[:ROWS] = 0
    assert_exact(module, x)


def test_what_zero_rows_alone_tell_is_not_kept():
    module = made(used_again, gain=nn.Parameter(torch.ones(INPUTS)))
    assert np.isfinite(PseudoNTK(module)(np.zeros((3, INPUTS)))).all()
    assert_exact(module, rows())


def test_zero_gains_hide_no_use():
    module, x = made(used_again, gain=nn.Parameter(torch.zeros(INPUTS))), rows()
    assert_exact(module, x)
    with torch.no_grad():
        module.gain.add_(1)
    assert_exact(module, x)


def test_layers_behind_zero_gains_are_captured():
    module, x = made(lambda m, x: m.out(x + m.gain(torch.tanh(m.a(x)))), gain=nn.LayerNorm(INPUTS)), rows()
    with torch.no_grad():
        module.gain.weight.zero_()
    before = {name: p.clone() for name, p in module.named_parameters()}
    assert PseudoNTK(module)._request()._call(x).survey.fallback == ()
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    with torch.no_grad():
        module.gain.weight.fill_(0.5)
    assert_exact(module, x)


def test_rows_of_nan_give_nan_alone():
    module, x = made(lambda m, x: m.out(torch.tanh(m.a(x)))), rows()
    x[:2] = np.nan
    k = PseudoNTK(module)(x)
    assert np.isnan(k[:2]).all()
    np.testing.assert_allclose(k[2:, 2:], exact(module, x[2:]), rtol=1e-10)


# --- rows in another order, or to other layers ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_rows_that_are_sorted_inside(seed):
    assert_exact(made(sorted_inside), rows(5, seed))


def test_rows_that_are_reversed_inside():
    assert_exact(made(lambda m, x: m.out(torch.tanh(m.a(x.flip(0))).flip(0))), rows())


@pytest.mark.parametrize("which", [(0, 1, 0, 1), (0, 0, 0, 1), (1,) * 9 + (0,), (0,) * 9 + (1,) * 3])
def test_rows_that_go_to_one_of_two_layers(which):
    assert_exact(made(experts, b=nn.Linear), to_expert(*which))


def test_a_later_call_may_take_another_path():
    module = made(experts, b=nn.Linear)
    assert_exact(module, to_expert(1, 1, 1, 1))
    assert_exact(module, to_expert(1, 0, 0, 0))
    assert_exact(module, to_expert(0, 0, 0, 1))


def test_layers_that_another_thread_set_apart_are_no_error():
    module = made(experts, b=nn.Linear)
    error, attempts = PathError("another path", module, ["b"]), []

    def attempt():
        attempts.append(1)
        if len(attempts) == 1:
            exclude_layers(error)  # by the other thread
            raise error
        return len(attempts)

    assert with_retries(attempt) == 2

    def hopeless():
        raise error

    with pytest.raises(InputError, match="another path") as found:
        with_retries(hopeless)
    assert type(found.value) is InputError  # it travels from workers, without the module
    assert_exact(module, to_expert(1, 0, 0, 1))


def test_an_attribute_may_choose_the_path():
    def run(m, x):
        return m.out(torch.tanh(m.a(m.a(x)) if m.twice else m.a(x)))

    module = made(run, twice=False)
    assert_exact(module, rows())
    module.twice = True
    assert_exact(module, rows())


def test_projections_follow_every_path():
    module, x = made(experts, b=nn.Linear), to_expert(*(1,) * 9, 0, 1, 0)
    fresh = deepcopy(module)
    found = ProjectedGradients(module, 32, memory_bytes=2**21 + 2**13)(x)
    np.testing.assert_allclose(found, ProjectedGradients(fresh, 32)(x[::-1].copy())[::-1], rtol=1e-10, atol=1e-12)


# --- what is refused, and what is not ---------------------------------------------------------------------------------------


def test_rows_that_lie_among_equal_ones_are_asked_too():
    module, x = made(lambda m, x: m.out(torch.tanh(m.a(x - x.mean(0))))), rows()
    x[1] = x[0]
    with pytest.raises(InputError, match="changes with the rows beside it"):
        PseudoNTK(module)(x)
    with pytest.raises(InputError, match="changes with the rows beside it"):
        PseudoNTK(module)(x[:1], x)


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: m.out(F.dropout(m.a(x), 0.01)),
        lambda m, x: m.out(m.a(x) * (torch.rand(len(x), 1) > 1e-9)),
        lambda m, x: m.out(m.a(x) + 1e-9 * torch.randn_like(x)),
        lambda m, x: m.out(F.rrelu(m.a(x), training=True)),
    ],
)
def test_random_numbers_are_refused(run):
    state = torch.get_rng_state()
    with pytest.raises(InputError, match=r"draws random numbers.*module\.eval\(\)"):
        PseudoNTK(made(run))(rows())
    torch.set_rng_state(state)


def test_what_could_draw_and_does_not_is_no_random_number():
    def run(m, x):
        seeded = torch.rand(INPUTS, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
        h = F.rrelu(F.dropout(m.a(x) * seeded, training=m.training), training=m.training)
        h = h.reshape(len(x), 1, 2, 3)
        return m.out(F.scaled_dot_product_attention(h, h, h).reshape(len(x), -1))

    assert_exact(made(run), rows())


def test_inputs_may_be_written_to():
    module, x = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(INPUTS, OUTPUTS)).double(), rows()
    before = x.copy()
    x.flags.writeable = True
    assert_exact(module, np.abs(x))
    PseudoNTK(module)(x)
    np.testing.assert_array_equal(x, before)


def test_layers_within_vmap():
    assert_exact(made(lambda m, x: torch.vmap(lambda row: m.out(torch.tanh(m.a(row))))(x)), rows())


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrappers_are_seen_through(wrap):
    module, x = made(lambda m, x: m.out(torch.tanh(m.a(x)))), rows()
    np.testing.assert_array_equal(PseudoNTK(wrap(module))(x), PseudoNTK(module)(x))


def test_modules_made_in_inference_mode():
    with torch.inference_mode():
        module = made(lambda m, x: m.out(torch.tanh(m.a(x))))
    same = made(lambda m, x: m.out(torch.tanh(m.a(x))))
    np.testing.assert_array_equal(PseudoNTK(module)(rows()), PseudoNTK(same)(rows()))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_projections_in_any_mode(dtype):
    module, x = made(lambda m, x: m.out(torch.tanh(m.a(x)))).float(), rows().astype(dtype)
    expected = ProjectedGradients(module, 8)(x)
    with torch.inference_mode():
        np.testing.assert_array_equal(ProjectedGradients(module, 8)(x), expected)


def scripted_inside():
    module = made(lambda m, x: m.out(m.a(x)))
    module.a = torch.jit.script(module.a)
    return module


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: torch.jit.script(nn.Linear(INPUTS, OUTPUTS)), "ScriptModule.*scripted or traced from"),
        (scripted_inside, "RecursiveScriptModule 'a' is a ScriptModule"),
        (lambda: nn.Linear(INPUTS, OUTPUTS, device="meta"), "'weight' lies on the meta device.*assign=True"),
        (lambda: made(lambda m, x: m.out(m.a(x.half()))), "fails on rows.*dtype.*torch.float64"),
    ],
)
def test_what_cannot_be_taken_says_why(build, message):
    with pytest.raises(InputError, match=message):
        PseudoNTK(build())(rows())


def test_probed_rows_keep_their_layout():
    x = np.random.default_rng(0).standard_normal((4, 5, 6, 3))
    module = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(24, OUTPUTS)).double()
    np.testing.assert_allclose(PseudoNTK(module)(x), exact(module, as_tensor(x).numpy()), rtol=1e-10)
