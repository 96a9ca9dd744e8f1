"""ProjectedGradients: the sketch of whole gradients, seeded by parameter and column, in little memory, of modules left alone."""

from itertools import pairwise

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from contracts import peak_bytes  # noqa: E402
from module_examples import AnyRows  # noqa: E402
from torch import nn  # noqa: E402

from ntkdask import seeds  # noqa: E402
from ntkdask.errors import InputError, MemoryBudgetError  # noqa: E402
from ntkdask.features import ProjectedGradients  # noqa: E402
from ntkdask.features.projected import DRAW_COLUMNS  # noqa: E402
from ntkdask.modules import ResNet18  # noqa: E402
from ntkdask.modules.jacobian.slices import CHUNK_COLUMNS, GradientSlices, cut_columns  # noqa: E402


def network(width=8, seed=0):
    """A small convolutional network, float32, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 6, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24, 3),
        )
    return module.eval()


def images(n=12, seed=0, dtype="float64"):
    return np.random.default_rng(seed).normal(size=(n, 6, 6, 3)).astype(dtype)


def gradients(module, x, names=None):
    """{parameter: (n, columns)} of φ̄ = Σ_o f_o/√O, float64, by autograd, row by row."""
    module = module.double()
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad and (names is None or n in names)}
    found = {name: [] for name in parameters}
    for row in torch.from_numpy(np.asarray(x, np.float64)).permute(0, 3, 1, 2):
        y = module(row[None])
        value = y.sum() / y.shape[1] ** 0.5
        for name, g in zip(parameters, torch.autograd.grad(value, list(parameters.values())), strict=True):
            found[name].append(g.reshape(-1).numpy())
    return {name: np.array(rows) for name, rows in found.items()}


def naive_sketch(blocks, m, seed):
    """Σ_b S_b ∇_b with dense S, column by column from the streams."""
    total = 0
    for name, g in blocks.items():
        bits = np.concatenate(
            [
                seeds.raw_bits(seed, ("projected-gradients", name), DRAW_COLUMNS, block)
                for block in range(-(-g.shape[1] // DRAW_COLUMNS))
            ]
        )[: g.shape[1]]
        sketch = np.zeros((g.shape[1], m))
        sketch[np.arange(g.shape[1]), (bits >> np.uint64(1)) % np.uint64(m)] = 1.0 - 2.0 * (bits & np.uint64(1))
        total = total + g @ sketch
    return total


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
def test_features_are_the_sketch_of_the_gradient(dtype, tolerance):
    x = images(dtype=dtype)
    found = ProjectedGradients(network(), 40, seed=3)(x)
    expected = naive_sketch(gradients(network(), x), 40, 3)
    assert found.dtype == dtype
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def test_a_parameter_of_several_streams_and_chunks():
    """A parameter wider than a chunk, whose granules do not divide a stream."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Flatten(), nn.Linear(108, 700), nn.Tanh(), nn.Linear(700, 3)).eval()
    x = images(4)
    pieces = cut_columns(
        [("1.weight", 108 * 700, 108), ("1.bias", 700, 700), ("3.weight", 2100, 700), ("3.bias", 3, 3)]
    )
    assert len(pieces) >= 3
    found = ProjectedGradients(module, 64)(x)
    expected = naive_sketch(gradients(module, x), 64, 0)
    assert np.abs(found - expected).max() <= 1e-12 * np.abs(expected).max()


def test_each_column_is_cut_once():
    columns = [
        ("a", 5, 1),
        ("b", 7 * CHUNK_COLUMNS + 11 * 3, 33),
        ("c", 3 * CHUNK_COLUMNS, 3 * CHUNK_COLUMNS),
        ("d", 1, 1),
    ]
    chunks = cut_columns([(n, c - c % g, g) for n, c, g in columns])
    seen = [piece for pieces in chunks for piece in pieces]
    for name, count, granule in columns:
        ranges = [(start, stop) for n, start, stop in seen if n == name]
        assert ranges[0][0] == 0
        assert ranges[-1][1] == count - count % granule
        assert all(a[1] == b[0] for a, b in pairwise(ranges))
        assert all(start % granule == 0 for start, _ in ranges)
    for pieces in chunks:
        assert len(pieces) == 1 or sum(stop - start for _, start, stop in pieces) <= CHUNK_COLUMNS
    assert cut_columns([]) == []


def test_products_approximate_the_pseudo_ntk():
    x, count, m = images(5), 400, 64
    module = network(4)
    exact = ProjectedGradients(module, m).target(x)
    g = np.concatenate(list(gradients(network(4), x).values()), axis=1)
    np.testing.assert_allclose(exact, g @ g.T, rtol=1e-10)
    products = np.array([(phi := naive_sketch({"": g}, m, s)) @ phi.T for s in range(count)])
    drawn = np.array([(phi := ProjectedGradients(module, m, seed=s)(x)) @ phi.T for s in range(60)])
    norms = np.diag(exact)
    bound = np.sqrt((np.outer(norms, norms) + exact**2) / m)
    for sample in (products, drawn):
        error = sample.std(axis=0, ddof=1) / np.sqrt(len(sample))
        assert (np.abs(sample.mean(axis=0) - exact) <= 4.5 * error).all()
        # a standard deviation of so few samples is off by 1/√(2·60) of itself
        assert (sample.std(axis=0, ddof=1) <= 1.4 * bound).all()


def test_streams_belong_to_names_and_columns():
    """A parameter's part of φ is the same whatever else is projected."""
    x, module = images(), network()
    first, second = (ProjectedGradients(module, 32, parameters=p)(x) for p in ("0.*", ("1.*", "3.*", "6.*")))
    np.testing.assert_allclose(
        first + second, ProjectedGradients(module, 32)(x), rtol=0, atol=1e-12 * np.abs(first).max()
    )
    assert np.abs(first).max() > 0


def test_small_memory_gives_the_same_features():
    x = images(60)
    whole = ProjectedGradients(network(), 48)(x)
    least = 2**23 + 2**21
    small = ProjectedGradients(network(), 48, memory_bytes=least)
    assert np.abs(small(x) - whole).max() <= 1e-12 * np.abs(whole).max()
    with pytest.raises(
        MemoryBudgetError, match=r"ProjectedGradients: the gradient of one row takes .* Use memory_bytes >= \d+"
    ):
        ProjectedGradients(network(), 48, memory_bytes=2**20)(x)


@pytest.mark.slow
def test_memory_is_planned_and_bounded():
    """176 000 parameters, 64 rows: 45 MB of gradients, never held."""
    module, memory_bytes = ResNet18(8).build(), 2**24
    feature_map = ProjectedGradients(module, 256, memory_bytes=memory_bytes)
    x = np.random.default_rng(0).normal(size=(64, 8, 8, 3)).astype(np.float32)
    planned = feature_map.workspace_bytes(64, 4, (8, 8, 3))
    peak = peak_bytes(lambda: feature_map(x), planned)
    assert peak <= planned
    assert planned <= 4 * peak
    # the module's copy, signs and components are beside it
    assert planned <= memory_bytes + 3 * 4 * 176_000 + 2**22


def test_the_module_is_left_alone():
    module = network()
    module[0].weight.grad = torch.ones_like(module[0].weight)
    module[6].bias.requires_grad_(False)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    generator = torch.get_rng_state()
    threads = torch.get_num_threads()
    ProjectedGradients(module, 8)(images(dtype="float32"))
    with pytest.raises(InputError):
        ProjectedGradients(module, 8)(np.ones((2, 5, 5, 4), np.float32))
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    assert torch.equal(module[0].weight.grad, torch.ones_like(module[0].weight))
    assert [p.requires_grad for p in module.parameters()] == [n != "6.bias" for n, _ in module.named_parameters()]
    assert not any(part._forward_hooks or part._backward_hooks for part in module.modules())
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.get_num_threads() == threads
    assert not module.training


def test_frozen_parameters_take_no_part():
    module = network()
    module[0].weight.requires_grad_(False)
    expected = naive_sketch(gradients(module, images()), 16, 0)
    np.testing.assert_allclose(ProjectedGradients(module, 16)(images()), expected, rtol=0, atol=1e-11)


def test_bad_modules_are_refused():
    for given in (3, nn.Linear, "resnet"):
        with pytest.raises(InputError, match="module is"):
            ProjectedGradients(given, 8)
    with pytest.raises(InputError, match=r"train mode.*eval\(\)"):
        ProjectedGradients(network().train(), 8)(images())
    with pytest.raises(InputError, match="matches none"):
        ProjectedGradients(network(), 8, parameters="layer9.*")(images())
    with pytest.raises(InputError, match="input_layout"):
        ProjectedGradients(network(), 8, input_layout="chw")


def test_a_description_and_its_module_agree():
    described, x = AnyRows(), np.random.default_rng(0).normal(size=(7, 6))
    a = ProjectedGradients(described, 32)(x)
    assert GradientSlices(described, None, None, 2**26, "test").widths(8, (6,))[0] == 6 * 8 + 8 + 16 + 2
    np.testing.assert_array_equal(a, ProjectedGradients(described.build(), 32)(x))
