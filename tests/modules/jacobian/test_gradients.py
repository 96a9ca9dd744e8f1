"""Per-example gradients of modules against torch.func.jacrev in float64, over a zoo of layers and ways to use them."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.func import functional_call, jacrev  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from ntkdask.errors import InputError  # noqa: E402
from ntkdask.modules.jacobian.fallback import jacobians  # noqa: E402
from ntkdask.modules.jacobian.gradients import ArrayRows, Gradients, per_example  # noqa: E402
from ntkdask.modules.jacobian.twins import make_twin  # noqa: E402
from ntkdask.modules.peak import PeakBytes  # noqa: E402

ROWS, OUTPUTS = 5, 3
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # of torch.func in the reference
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]


class Forward(nn.Module):
    """Named parts and a function of them and of rows."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


def head(inputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, OUTPUTS))


def images(*layers, features):
    return nn.Sequential(*layers, nn.Tanh(), head(features))


class Residual(nn.Module):
    """A ResNet's block between a convolution and a readout, with ReLU in place."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.one, self.two = nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.short = nn.Conv2d(4, 6, 1, 2, bias=False)
        self.relu, self.out = nn.ReLU(inplace=True), nn.Linear(6, OUTPUTS)

    def forward(self, x):
        h = self.relu(self.norm(self.stem(x)))
        branch = self.two(self.relu(self.one(h)))
        branch += self.short(h)
        return self.out(self.relu(branch).mean((2, 3)))


class FunctionalUse(nn.Module):
    """A layer's weight used again in a way that no hook sees."""

    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(6, 6), nn.Linear(6, OUTPUTS)

    def forward(self, x):
        return self.out(torch.tanh(F.linear(torch.tanh(self.layer(x)), self.layer.weight.T)))


def tied():
    """An embedding whose table is the readout of a language model too."""
    table = nn.Embedding(OUTPUTS, 4)
    out = nn.Linear(4, OUTPUTS, bias=False)
    out.weight = table.weight
    return Forward(lambda m, x: m.out(torch.tanh(m.table(x.long()).sum(1))), table=table, out=out)


def old_weight_norm():
    with pytest.warns(FutureWarning):
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, OUTPUTS))


def moved(norm):
    """A normalisation with statistics and scales that are not its first ones."""
    for name in ("running_mean", "running_var", "weight", "bias"):
        tensor = getattr(norm, name, None)
        if tensor is not None:
            with torch.no_grad():
                tensor.uniform_(0.5, 1.5)
    return norm


VECTOR, IMAGE, LINE, VOLUME, SEQUENCE, TOKENS = (6,), (3, 7, 6), (3, 9), (2, 4, 5, 3), (4, 6), (5,)
CAPTURED = {
    "linear": (VECTOR, lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, OUTPUTS, bias=False))),
    "linear of a sequence": (SEQUENCE, lambda: images(nn.Linear(6, 7), features=28)),
    "linear of pixels": (IMAGE, lambda: images(nn.Linear(6, 2), features=42)),
    "conv2d": (IMAGE, lambda: images(nn.Conv2d(3, 4, 3), features=80)),
    "conv2d odd stride": (IMAGE, lambda: images(nn.Conv2d(3, 4, (2, 3), stride=(3, 2), padding=(2, 1)), features=48)),
    "conv2d dilated": (IMAGE, lambda: images(nn.Conv2d(3, 4, 3, padding=2, dilation=(2, 1)), features=224)),
    "conv2d same": (IMAGE, lambda: images(nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(1, 2)), features=168)),
    "conv2d circular": (
        IMAGE,
        lambda: images(nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="circular"), features=4 * 9 * 6),
    ),
    "conv2d reflect": (IMAGE, lambda: images(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), features=168)),
    "conv2d same circular": (
        IMAGE,
        lambda: images(nn.Conv2d(3, 4, (2, 3), padding="same", padding_mode="circular"), features=168),
    ),
    "conv2d groups": (IMAGE, lambda: images(nn.Conv2d(3, 6, 3, groups=3, padding=1), features=252)),
    "conv2d few groups": (
        IMAGE,
        lambda: images(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, stride=2, groups=2), features=6 * 3 * 2),
    ),
    "conv2d to one pixel": (IMAGE, lambda: images(nn.Conv2d(3, 8, (7, 6)), features=8)),
    "conv2d to one pixel in groups": (IMAGE, lambda: images(nn.Conv2d(3, 6, (7, 6), groups=3), features=6)),
    "conv1d": (LINE, lambda: images(nn.Conv1d(3, 4, 4, stride=2, padding=3, dilation=2), features=20)),
    "conv3d": (VOLUME, lambda: images(nn.Conv3d(2, 3, (2, 3, 1), padding=(0, 1, 1), stride=(1, 2, 1)), features=135)),
    "batch norm": (IMAGE, lambda: images(moved(nn.BatchNorm2d(3)), features=126)),
    "batch norm of vectors": (VECTOR, lambda: images(nn.Linear(6, 5), moved(nn.BatchNorm1d(5)), features=5)),
    "layer norm": (SEQUENCE, lambda: images(moved(nn.LayerNorm(6)), features=24)),
    "layer norm of two axes": (SEQUENCE, lambda: images(moved(nn.LayerNorm((4, 6))), features=24)),
    "rms norm": (SEQUENCE, lambda: images(moved(nn.RMSNorm(6)), features=24)),
    "group norm": (VOLUME, lambda: images(nn.Conv3d(2, 4, 1), moved(nn.GroupNorm(2, 4)), features=240)),
    "instance norm": (IMAGE, lambda: images(moved(nn.InstanceNorm2d(3, affine=True)), features=126)),
    "instance norm with statistics": (
        IMAGE,
        lambda: images(moved(nn.InstanceNorm2d(3, affine=True, track_running_stats=True)), features=126),
    ),
    "prelu": (IMAGE, lambda: images(nn.PReLU(3), nn.PReLU(), features=126)),
    "embedding": (
        TOKENS,
        lambda: Forward(lambda m, x: m.out(m.table(x.long())), table=nn.Embedding(7, 4, padding_idx=1), out=head(20)),
    ),
    "residual": (IMAGE, Residual),
    "a layer twice": (
        VECTOR,
        lambda: Forward(
            lambda m, x: m.out(torch.tanh(m.layer(torch.tanh(m.layer(x))))),
            layer=nn.Linear(6, 6),
            out=nn.Linear(6, OUTPUTS),
        ),
    ),
    "a convolution twice": (
        IMAGE,
        lambda: Forward(
            lambda m, x: m.out(m.conv(torch.tanh(m.conv(x)))), conv=nn.Conv2d(3, 3, 3, padding=1), out=head(126)
        ),
    ),
    "a readout of one pixel": (IMAGE, lambda: Forward(lambda m, x: m.out(x[:, :, 1, 2]), out=nn.Linear(3, OUTPUTS))),
    "tied embedding": (TOKENS, tied),
    "a layer unused": (VECTOR, lambda: Forward(lambda m, x: m.a(x), a=nn.Linear(6, OUTPUTS), b=nn.Linear(6, 2))),
    "a layer without effect": (
        VECTOR,
        lambda: Forward(lambda m, x: m.a(x) + 0 * m.b(x).detach(), a=nn.Linear(6, OUTPUTS), b=nn.Linear(6, OUTPUTS)),
    ),
}
FALLBACK = {
    "a bare parameter": (
        VECTOR,
        lambda: Forward(lambda m, x: m.out(x * m.scale), scale=nn.Parameter(torch.rand(6)), out=nn.Linear(6, OUTPUTS)),
        {"scale"},
    ),
    "functional use": (VECTOR, FunctionalUse, {"layer.weight"}),
    "weight norm": (
        VECTOR,
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, OUTPUTS)),
        {"0.parametrizations.weight.original0", "0.parametrizations.weight.original1", "0.bias"},
    ),
    "old weight norm": (VECTOR, old_weight_norm, {"0.weight_g", "0.weight_v"}),
    "transposed convolution": (
        IMAGE,
        lambda: images(nn.ConvTranspose2d(3, 2, 3), features=144),
        {"0.weight", "0.bias"},
    ),
    "recurrent": (
        SEQUENCE,
        lambda: Forward(
            lambda m, x: m.out(m.cell(x)[0][:, -1]), cell=nn.GRU(6, 4, batch_first=True), out=nn.Linear(4, 3)
        ),
        {"cell.weight_ih_l0", "cell.weight_hh_l0", "cell.bias_ih_l0", "cell.bias_hh_l0"},
    ),
    "attention": (
        SEQUENCE,
        lambda: Forward(
            lambda m, x: m.out(m.mix(x, x, x, need_weights=False)[0]),
            mix=nn.MultiheadAttention(6, 2, batch_first=True),
            out=head(24),
        ),
        {"mix.in_proj_weight", "mix.in_proj_bias", "mix.out_proj.weight", "mix.out_proj.bias"},
    ),
    "rows last": (
        SEQUENCE,
        lambda: Forward(
            lambda m, x: m.out(m.layer(x.transpose(0, 1)).transpose(0, 1)), layer=nn.Linear(6, 6), out=head(24)
        ),
        {"layer.weight", "layer.bias"},
    ),
    "rows folded": (
        SEQUENCE,
        lambda: Forward(
            lambda m, x: m.out(m.layer(x.reshape(-1, 6)).reshape(len(x), -1)), layer=nn.Linear(6, 6), out=head(24)
        ),
        {"layer.weight", "layer.bias"},
    ),
    "input overwritten": (
        VECTOR,
        lambda: Forward(
            lambda m, x: overwriting(m, torch.tanh(m.first(x))), first=nn.Linear(6, 6), layer=nn.Linear(6, 3)
        ),
        {"layer.weight"},
    ),
    "a parameter of captured and other layers": (VECTOR, lambda: shared_with_bare(), {"again"}),
}


def overwriting(m, h):
    """The layer's input is written to after its use: allowed, for autograd keeps a copy of it (h * 1 is a new tensor)."""
    seen = h * 1
    out = F.linear(h, m.layer.weight) + m.layer.bias
    with torch.no_grad():
        seen.zero_()
    return out


def shared_with_bare():
    layer = nn.Linear(6, 6, bias=False)
    m = Forward(lambda m, x: m.out(m.layer(x) @ m.again), layer=layer, out=nn.Linear(6, OUTPUTS))
    m.again = layer.weight
    return m


def made(build, seed=0):
    torch.manual_seed(seed)
    return build().double().eval()


def rows_of(shape, n=ROWS, seed=1):
    draw = np.random.default_rng(seed)
    x = draw.integers(0, OUTPUTS, (n, *shape)).astype(float) if shape == TOKENS else draw.standard_normal((n, *shape))
    return torch.from_numpy(x)


def jacobian(module, x, cotangents):
    """{parameter: (rows, Q, columns)} by torch.func, of the whole batch at a time."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    found = jacrev(lambda p: functional_call(module, p, (x,)) @ cotangents.T)(parameters)
    return {name: g.reshape(len(x), len(cotangents), -1) for name, g in found.items()}


@pytest.fixture(autouse=True)
def generator():
    """torch's generator as it was."""
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


@pytest.mark.parametrize("outputs", [1, OUTPUTS])
@pytest.mark.parametrize("name", [*CAPTURED, *FALLBACK])
def test_gradients_are_those_of_torch_func(name, outputs):
    shape, build, *_ = CAPTURED.get(name) or FALLBACK[name]
    module, x = made(build), rows_of(shape)
    cotangents = torch.linspace(-1, 2, outputs * OUTPUTS, dtype=torch.float64).reshape(outputs, OUTPUTS)
    exact = jacobian(module, x, cotangents)
    blocks = per_example(module, x, cotangents)
    assert [b.name for b in blocks] == [n for n, _ in module.named_parameters()]
    total = sum(g.norm() ** 2 for g in exact.values()).sqrt()
    for block in blocks:
        whole = exact[block.name]
        assert block.columns == whole.shape[2]
        assert (block.form_range(0, block.columns) - whole).norm() <= 1e-10 * total
        flat = whole.reshape(-1, block.columns)
        for start, stop in ((0, 1), (block.columns // 3, block.columns), (block.columns // 2, block.columns // 2 + 1)):
            assert (block.slice(start, stop) - flat[:, start:stop]).norm() <= 1e-10 * total


def surveyed(module, x):
    of = Gradients(module, x.dtype, x.device, None, "test")
    return of.survey([ArrayRows(x, x.dtype, x.device, None)], ("test", tuple(x.shape[1:])))


@pytest.mark.parametrize("name", [*CAPTURED, *FALLBACK])
def test_only_what_must_goes_to_the_fallback(name):
    shape, build, *missed = CAPTURED.get(name) or FALLBACK[name]
    expected = missed[0] if missed else set()
    found = set(surveyed(made(build), rows_of(shape)).fallback)
    assert found >= expected
    assert found - expected <= {"layer.bias"}  # of a layer that is never called as one
    assert missed or not found


@pytest.mark.parametrize("name", ["residual", "conv2d groups", "layer norm", "tied embedding", "recurrent"])
def test_float32_agrees(name):
    shape, build, *_ = CAPTURED.get(name) or FALLBACK[name]
    module, x = made(build), rows_of(shape)
    exact = jacobian(module, x, torch.full((1, OUTPUTS), OUTPUTS**-0.5, dtype=torch.float64))
    total = sum(g.norm() ** 2 for g in exact.values()).sqrt()
    for block in per_example(module, x.float()):
        assert block.slice(0, block.columns).dtype == torch.float32
        assert (block.form_range(0, block.columns).double() - exact[block.name]).norm() <= 1e-5 * total


def test_rows_do_not_need_to_be_captured_at_once():
    module, x = made(Residual), rows_of(IMAGE, 7)
    of = Gradients(module, x.dtype, x.device, None, "test")
    rows, known = ArrayRows(x, x.dtype, x.device, None), surveyed(module, x)
    cotangents = torch.ones(1, OUTPUTS, dtype=torch.float64)
    parts = of.plans(known, 1)
    whole, pieces = (of.collect(rows, parts, known, cotangents, batch).blocks for batch in (7, 3))
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one.slice(0, one.columns), other.slice(0, other.columns), rtol=1e-12, atol=1e-14)


def test_rows_that_vmap_cannot_follow_go_one_by_one():
    module = made(
        lambda: Forward(lambda m, x: x * m.scale if x.sum() > 0 else x * 2 * m.scale, scale=nn.Parameter(torch.rand(3)))
    )
    x = rows_of((3,))
    private = make_twin(module, torch.float64, x.device)
    found = jacobians(private, ["scale"], x, torch.eye(3, dtype=torch.float64))["scale"]
    doubled = torch.where(x.sum(1, keepdim=True) > 0, 1.0, 2.0)
    torch.testing.assert_close(found, torch.diag_embed(x * doubled))


def test_patterns_and_frozen_parameters():
    module, x = made(Residual), rows_of(IMAGE)
    module.two.weight.requires_grad_(False)
    names = [b.name for b in per_example(module, x, parameters=("two.*", "*.bias"))]
    assert names == ["norm.bias", "one.bias", "two.bias", "out.bias"]
    with pytest.raises(InputError, match=r"matches none of Residual; did you mean 'two.weight'"):
        per_example(module, x, parameters=("two.weigth",))
    with pytest.raises(InputError, match="none of the 1 parameters asked for requires a gradient"):
        per_example(module, x, parameters=("two.weight",))


def state_of(module):
    return (
        {
            name: (t.clone(), t.data_ptr(), t.requires_grad, t._version)
            for name, t in module.state_dict(keep_vars=True).items()
        },
        {name: p.grad for name, p in module.named_parameters()},
        [
            (name, part.training, len(part._forward_hooks), len(part._backward_hooks))
            for name, part in module.named_modules()
        ],
    )


def assert_untouched(before, after):
    assert before[2] == after[2]
    for name, (tensor, *rest) in before[0].items():
        assert rest == list(after[0][name][1:])
        assert torch.equal(tensor, after[0][name][0])
    assert all(after[1][name] is grad for name, grad in before[1].items())


@pytest.mark.parametrize("name", ["residual", "instance norm with statistics", "attention", "functional use"])
def test_the_module_is_never_touched(name):
    shape, build, *_ = CAPTURED.get(name) or FALLBACK[name]
    module, x = made(build), rows_of(shape)
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    next(module.parameters()).grad = torch.ones_like(next(module.parameters()))
    before, rows = state_of(module), x.clone()
    per_example(module, x)
    assert_untouched(before, state_of(module))
    module.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        per_example(module, x)
    assert_untouched((*before[:2], state_of(module)[2]), state_of(module))
    assert torch.equal(x, rows)


def test_modes_around_the_call_do_not_matter():
    module, x = made(Residual), rows_of(IMAGE)
    expected = [b.slice(0, b.columns) for b in per_example(module, x)]
    for around in (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")):
        with around():
            found = [b.slice(0, b.columns) for b in per_example(module, x)]
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


def test_peak_counts_new_storages_alone():
    x = torch.ones(1000)
    with PeakBytes() as peak:
        y = x + 1
        z = y.view(10, 100) * 2
        del y
        (z[0] + 1).sum()
    assert peak.peak == 8000
    assert peak.held == 4000
