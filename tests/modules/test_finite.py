"""Finite networks in torch: the NumPy ones of `features.finite` bit by bit in their weights, and the exact kernels in the limit."""

import copy
import itertools
import math
import threading

import numpy as np
import pytest
from activation_examples import EXAMPLES, IDS
from contracts import (
    GENERAL,
    IMAGE_FROZEN,
    IMAGE_POOLED,
    IMAGE_RESIDUAL,
    IMAGE_SHORTCUT,
    IMAGE_STRIDED,
    IMAGE_THEN_DENSE,
    RESIDUAL,
)

from ntkdask import activations
from ntkdask.activations.derivatives import derivative
from ntkdask.errors import DtypeError, InputError
from ntkdask.features.finite.network import FiniteNetwork
from ntkdask.kernels import NNGP, NTK, PseudoNTK
from ntkdask.modules import descriptions
from ntkdask.networks import (
    Activation,
    AvgPool,
    Conv,
    Dense,
    Flatten,
    GlobalAvgPool,
    LayerNorm,
    Network,
    Residual,
    convolutional,
    fully_connected,
    myrtle,
)

torch = pytest.importorskip("torch")

from ntkdask.modules.elementwise import elementwise  # noqa: E402 (it imports torch)
from ntkdask.modules.finite import finite_module  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

CIRCULAR = Network(
    (
        Conv(3, "circular", 2),
        Activation("relu"),
        Conv((5, 7), "circular", bias_variance=0.1),
        Activation("erf"),
        Conv((4, 1), "circular", (1, 3)),
        Flatten(),
        Dense(bias_variance=0.3),
    )
)
ZOO = {
    "fully connected": fully_connected(2),
    "biased erf": fully_connected(2, "erf", weight_variance=1.5, bias_variance=0.3, scale_inputs=True),
    "general": GENERAL,
    "residual": RESIDUAL,
    "gap": convolutional(2),
    "flatten": convolutional(2, 2, "circular", "flatten", "erf", 1.2, 0.1),
    "frozen ends": convolutional(2, trainable_ends=False),
    "myrtle": myrtle(5, scale_inputs=True),
    "image residual": IMAGE_RESIDUAL,
    "image pooled": IMAGE_POOLED,
    "image frozen": IMAGE_FROZEN,
    "strided": IMAGE_STRIDED,
    "circular": CIRCULAR,
    "after flatten": IMAGE_THEN_DENSE,
    "input shortcut": IMAGE_SHORTCUT,
}
IMAGE = (8, 12, 3)


def rows_for(network, n=3, seed=0, shape=None):
    shape = shape or (IMAGE if network.takes_images else (5,))
    return np.random.default_rng(seed).standard_normal((n, *shape))


def tensor(x):
    t = torch.from_numpy(x)
    return t.permute(0, 3, 1, 2) if t.ndim == 4 else t


def jacobian(module, x, output=0):
    """(n, P) of one output, over the parameters that require gradients."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    found = []
    for value in module(tensor(x))[:, output]:
        gradients = torch.autograd.grad(value, parameters, retain_graph=True)
        found.append(torch.cat([g.reshape(-1) for g in gradients]).numpy())
    return np.array(found)


@pytest.mark.parametrize("name", ZOO)
def test_it_is_the_network_of_the_gradient_features(name):
    """The same seed gives the same function, and gradients with the same inner products, as the NumPy network."""
    network = ZOO[name]
    x = rows_for(network)
    reference = FiniteNetwork(network, 5, x.shape[1:])
    parameters = reference.draw(7, x)
    expected = np.zeros((len(x), reference.n_parameters))
    reference.gradients(x, parameters, expected)
    module = finite_module(network, 5, x.shape[1:], 3, 7, "float64")
    outputs = module(tensor(x)).detach().numpy()
    assert outputs.shape == (len(x), 3)
    np.testing.assert_allclose(outputs[:, 0], reference(x, parameters), rtol=0, atol=1e-12)
    gradients = jacobian(module, x)
    kernel = expected @ expected.T
    np.testing.assert_allclose(gradients @ gradients.T, kernel, rtol=0, atol=1e-12 * np.abs(kernel).max())


@pytest.mark.parametrize("name", ["general", "image residual", "circular", "after flatten"])
def test_its_empirical_kernel_is_that_of_the_gradient_features(name):
    """By the kernel itself, from a description, with its float32 weights."""
    network = ZOO[name]
    x = rows_for(network)
    reference = FiniteNetwork(network, 5, x.shape[1:])
    rounded = {
        where: tuple(None if part is None else part.astype("float32").astype("float64") for part in parts)
        for where, parts in reference.draw(7, x).items()
    }
    gradients = np.zeros((len(x), reference.n_parameters))
    reference.gradients(x, rounded, gradients)
    found = PseudoNTK(descriptions.FiniteNetwork(network, 5, 1, x.shape[1:], 7))(x)
    expected = gradients @ gradients.T
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("name", ZOO)
def test_trainable_layers_alone_require_gradients(name):
    network = ZOO[name]
    shape = rows_for(network).shape[1:]
    module = finite_module(network, 5, shape)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert trained == FiniteNetwork(network, 5, shape).n_parameters
    assert not module.training
    assert all(not part.training for part in module.modules())


LIMITS = {
    "fully connected": (fully_connected(2), (5,), 300),
    "shallow, biased gelu": (fully_connected(1, "gelu", bias_variance=0.3, normalize=False), (5,), 600),
    "general": (GENERAL, (5,), 250),
    "residual, layer norm": (RESIDUAL, (5,), 250),
    "gap": (convolutional(2, scale_inputs=True), (3, 4, 2), 80),
    "flatten": (convolutional(1, 2, "circular", "flatten", "erf", 1.2, 0.1), (3, 4, 2), 200),
    "pooling, strides, residual with shortcut": (
        Network(
            (
                Conv(3, bias_variance=0.1),
                Residual((Activation("relu"), Conv(3, stride=2)), (Conv(1, stride=2),)),
                Activation("relu"),
                AvgPool((1, 2)),
                Conv(2, "valid", trainable=False),
                LayerNorm(),
                Activation("tanh"),
                GlobalAvgPool(),
                Dense(),
            ),
            scale_inputs=True,
        ),
        (4, 8, 2),
        80,
    ),
    "residual without shortcut": (
        Network((Conv(3), Residual((Activation("relu"), Conv(3))), Activation("relu"), Flatten())),
        (3, 3, 2),
        120,
    ),
}
SEEDS = 16


@pytest.mark.parametrize("name", LIMITS)
def test_kernels_over_seeds_tend_to_the_exact_ones(name):
    """Mean tangent kernel and output covariance over seeds at a width: NTK and NNGP to within 4 standard errors and O(1/width)."""
    network, shape, width = LIMITS[name]
    x = rows_for(network, 2, 1, shape)
    tangents, covariances = [], []
    outputs = 8
    for seed in range(SEEDS):
        module = finite_module(network, width, shape, outputs, seed, "float64")
        gradients = jacobian(module, x)
        tangents.append(gradients @ gradients.T)
        f = module(tensor(x)).detach().numpy()
        covariances.append(f @ f.T / outputs)
    for found, exact in ((tangents, NTK(network)(x)), (covariances, NNGP(network)(x))):
        scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
        error = np.abs(np.mean(found, axis=0) - exact) / scale
        noise = np.std(found, axis=0, ddof=1) / math.sqrt(SEEDS) / scale
        assert (error <= 4 * noise + 3 / width).all(), (error, noise)


@pytest.mark.parametrize(("name", "widths"), [("fully connected", (20, 80, 320)), ("gap", (10, 30, 90))])
def test_one_kernel_comes_closer_as_the_network_grows_wider(name, widths):
    """The error of one seed's kernel, on average, falls like 1/√width."""
    network, shape, _ = LIMITS[name]
    x = rows_for(network, 2, 2, shape)
    exact = NTK(network)(x)
    errors = []
    for width in widths:
        gradients = [jacobian(finite_module(network, width, shape, 1, seed, "float64"), x) for seed in range(32)]
        errors.append(np.mean([np.linalg.norm(g @ g.T - exact) for g in gradients]))
    slope = np.polyfit(np.log(widths), np.log(errors), 1)[0]
    assert -0.7 < slope < -0.35, errors


@pytest.mark.parametrize(("name", "parameters", "sigma", "slope"), EXAMPLES, ids=IDS)
def test_activations_are_those_of_the_package(name, parameters, sigma, slope):
    activation = activations.get(name, **parameters)
    grid = np.linspace(-2.5, 2.5, 41)[1::2]  # without 0, where kinks are
    t = torch.from_numpy(grid).requires_grad_()
    value = elementwise(activation, t)
    (gradient,) = torch.autograd.grad(value.sum(), t)
    for found, expected in ((value.detach().numpy(), sigma(grid)), (gradient.numpy(), slope(grid))):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max())
    assert elementwise(activation, t.detach().float()).dtype == torch.float32


@pytest.mark.parametrize(("name", "parameters"), [(name, parameters) for name, parameters, *_ in EXAMPLES], ids=IDS)
def test_at_kinks_value_and_derivative_are_those_of_the_numpy_network(name, parameters):
    activation = activations.get(name, **parameters)
    t = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    value = elementwise(activation, t)
    (gradient,) = torch.autograd.grad(value.sum(), t)
    np.testing.assert_allclose(value.detach().numpy(), activation(np.zeros(1)), atol=1e-15)
    np.testing.assert_allclose(gradient.numpy(), derivative(activation, np.zeros(1)), atol=1e-15)


class TestFunctionsOfTheUser:
    SWISH = activations.from_function(lambda t: t / (1 + np.exp(-t)))
    WITH_SLOPE = activations.from_function(np.sin, derivative=np.cos)

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch's own jvp
    @pytest.mark.parametrize("activation", [SWISH, WITH_SLOPE], ids=["differenced", "derivative given"])
    def test_gradients_forward_and_backward(self, activation):
        t = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
        value, tangent = torch.func.jvp(lambda t: elementwise(activation, t), (t.detach(),), (torch.ones(9).double(),))
        (gradient,) = torch.autograd.grad(elementwise(activation, t).sum(), t)
        numbers = t.detach().numpy()
        np.testing.assert_allclose(value.numpy(), activation(numbers), rtol=1e-15)
        expected = derivative(activation, numbers)
        np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-15)
        np.testing.assert_allclose(tangent.numpy(), expected, rtol=1e-15)

    def test_per_example_gradients_under_vmap(self):
        module = finite_module(fully_connected(2, self.WITH_SLOPE), 6, (4,), dtype="float64")
        x = rows_for(fully_connected(1), 3, 0, (4,))
        parameters = dict(module.named_parameters())

        def output(parameters, row):
            return torch.func.functional_call(module, parameters, (row[None],))[0, 0]

        found = torch.func.vmap(torch.func.grad(output), (None, 0))(parameters, torch.from_numpy(x))
        stacked = torch.cat([g.reshape(3, -1) for g in found.values()], 1).detach().numpy()
        np.testing.assert_allclose(stacked, jacobian(module, x), atol=1e-13)

    @pytest.mark.gpu
    def test_on_a_gpu(self):
        for activation in (self.SWISH, self.WITH_SLOPE):
            t = torch.linspace(-2, 2, 9, dtype=torch.float64, device="cuda", requires_grad=True)
            value = elementwise(activation, t)
            (gradient,) = torch.autograd.grad(value.sum(), t)
            numbers = t.detach().cpu().numpy()
            np.testing.assert_allclose(value.detach().cpu().numpy(), activation(numbers), rtol=1e-12)
            np.testing.assert_allclose(gradient.cpu().numpy(), derivative(activation, numbers), rtol=1e-7)

    def test_what_is_given_back_is_not_its_argument(self):
        t = torch.ones(3)
        value = elementwise(activations.from_function(lambda t: t), t)
        value += 1
        assert t.tolist() == [1, 1, 1]


def test_torch_functional_tools_take_it():
    """vmap of grad gives the per-example gradients: no layer looks at its values."""
    network = ZOO["image residual"]
    x = rows_for(network)
    module = finite_module(network, 4, IMAGE, dtype="float64")
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}

    def output(parameters, row):
        return torch.func.functional_call(module, parameters, (row[None],))[0, 0]

    found = torch.func.vmap(torch.func.grad(output), (None, 0))(parameters, tensor(x))
    stacked = torch.cat([g.reshape(len(x), -1) for g in found.values()], 1).detach().numpy()
    np.testing.assert_allclose(stacked, jacobian(module, x), atol=1e-13)


def test_layer_norm_of_equal_channels_is_zero_with_finite_gradients():
    network = Network((Dense(), LayerNorm(), Activation("relu"), Dense()))
    module = finite_module(network, 6, (3,), dtype="float64")
    x = np.zeros((2, 3))
    x[1] = 1.0
    gradients = jacobian(module, x)
    assert np.isfinite(gradients).all()
    assert not gradients[0].any()
    assert gradients[1].any()


def test_parameters_are_standard_normal_whatever_the_variances():
    module = finite_module(fully_connected(2, weight_variance=9.0, bias_variance=4.0), 300, (40,), seed=3)
    for parameter in module.parameters():
        values = parameter.detach().numpy()
        assert abs(values.std() - 1) < 5 / math.sqrt(2 * values.size)
        assert abs(values.mean()) < 5 / math.sqrt(values.size)


def test_float32_weights_are_the_float64_ones_rounded_once():
    single, double = (finite_module(ZOO["strided"], 4, IMAGE, 2, 5, dtype) for dtype in ("float32", "float64"))
    for a, b in zip(single.parameters(), double.parameters(), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float())


def test_other_seeds_give_other_weights_and_torchs_random_state_is_left_alone():
    before = torch.get_rng_state()
    a, b, c = (finite_module(ZOO["gap"], 4, IMAGE, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    pairs = [zip(a.parameters(), other.parameters(), strict=True) for other in (b, c)]
    assert all(torch.equal(p, q) for p, q in pairs[0])
    assert not any(torch.equal(p, q) for p, q in pairs[1])


def test_wider_readouts_keep_the_first_outputs():
    x = rows_for(ZOO["gap"])
    few, many = (finite_module(ZOO["gap"], 4, IMAGE, n, dtype="float64")(tensor(x)) for n in (2, 300))
    torch.testing.assert_close(few, many[:, :2])


def test_networks_of_vectors_take_images_in_the_order_of_their_rows():
    x = rows_for(ZOO["fully connected"], shape=(2, 3, 4))
    images, vectors = (finite_module(ZOO["fully connected"], 6, shape, dtype="float64") for shape in ((2, 3, 4), (24,)))
    torch.testing.assert_close(images(tensor(x)), vectors(torch.from_numpy(x.reshape(3, 24))))


def test_ragged_batches_and_a_single_row():
    module = finite_module(ZOO["strided"], 4, IMAGE, dtype="float64")
    t = tensor(rows_for(ZOO["strided"], 5))
    together = module(t)
    apart = torch.cat([module(piece) for piece in (t[:1], t[1:4], t[4:])])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-13)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ZOO)
def test_on_a_gpu_it_is_the_same_function(name):
    x = rows_for(ZOO[name])
    module = finite_module(ZOO[name], 5, x.shape[1:], 2, 7, "float64")
    expected = module(tensor(x)).detach()
    torch.testing.assert_close(module.cuda()(tensor(x).cuda()).detach().cpu(), expected, rtol=1e-10, atol=1e-10)


def test_it_can_be_copied_and_made_in_threads():
    found = {}

    def make(seed):
        found[seed] = finite_module(ZOO["gap"], 4, IMAGE, seed=seed)

    threads = [threading.Thread(target=make, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    t = tensor(rows_for(ZOO["gap"]).astype("float32"))
    for seed, module in found.items():
        torch.testing.assert_close(copy.deepcopy(module)(t), finite_module(ZOO["gap"], 4, IMAGE, seed=seed)(t))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"network": "relu"}, "give a Network"),
        ({"width": 0}, "width is 0"),
        ({"width": 2.5}, "width is 2.5"),
        ({"n_outputs": True}, "n_outputs is True"),
        ({"row_shape": ()}, "row_shape is"),
        ({"row_shape": 5}, "row_shape is 5"),
        ({"row_shape": (4, -1)}, "row_shape is"),
        ({"network": convolutional(1)}, "give \\(H, W, C\\)"),
        ({"network": myrtle(5), "row_shape": (6, 6, 3)}, "do not divide"),
        ({"network": fully_connected(1, activations.get("normalized_gaussian"))}, "known by its dual alone"),
    ],
)
def test_bad_arguments(arguments, said):
    with pytest.raises(InputError, match=said):
        finite_module(**{"network": fully_connected(1), "width": 4, "row_shape": (5,), **arguments})


def test_bad_dtype():
    with pytest.raises(DtypeError, match="float16"):
        finite_module(fully_connected(1), 4, (5,), dtype="float16")


@pytest.mark.parametrize("shape", [(2, 8, 12, 3), (2, 3, 12, 8), (2, 288)])
def test_rows_of_another_shape_are_refused(shape):
    module = finite_module(ZOO["gap"], 4, IMAGE)
    with pytest.raises(InputError, match=r"expected \(n, 3, 8, 12\).*input_layout='nchw'"):
        module(torch.zeros(shape))


def test_every_padding_against_plain_loops():
    """A convolution alone against sums over its filter written out, odd sizes, strides and paddings."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 4, 2))
    cases = itertools.product(("same", "valid", "circular"), ((1, 1), (2, 3), (4, 2), (3, 3)), (1, 2, (3, 1)))
    for padding, q, stride in cases:
        layer = Conv(q, padding, stride)
        module = finite_module(Network((layer, Flatten())), 3, (5, 4, 2), dtype="float64")
        core = module[1]
        found = core(tensor(x)).detach().numpy().transpose(0, 2, 3, 1)
        weights = core.core.weight.detach().numpy()
        height, width = layer.output_shape((5, 4))
        up, left = layer.before((5, 4))
        expected = np.zeros((2, height, width, 3))
        for i, j, a, b in itertools.product(range(height), range(width), range(q[0]), range(q[1])):
            row, column = i * layer.strides[0] + a - up, j * layer.strides[1] + b - left
            if padding == "circular":
                row, column = row % 5, column % 4
            if 0 <= row < 5 and 0 <= column < 4:
                expected[:, i, j] += x[:, row, column] @ weights[:, :, a, b].T / math.sqrt(math.prod(q))
        np.testing.assert_allclose(found, expected, atol=1e-13, err_msg=str(layer))
