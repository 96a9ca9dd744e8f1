"""FlipAveraged: the mean of four kernels, in two evaluations where that is enough; what it means for kernel ridge."""

import json
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
from contracts import peak_bytes

from ntkdask import registry
from ntkdask.errors import DtypeError, InputError, JobError
from ntkdask.jobs.spec import build_job
from ntkdask.kernels import NNGP, NTK, RBF, ArcCosine, FlipAveraged, Kernel, NNGPAndNTK, flips
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

TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


@dataclass(frozen=True)
class LeftHeavy:
    """x_i·W y_j with weights that differ between the columns: a kernel that sees left and right, and no class that flips know."""

    def __call__(self, x, y=None):
        columns = np.arange(1, x.shape[2] + 1, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 3))
        other = x if y is None else y
        k = (x * columns).reshape(len(x), -1) @ other.reshape(len(other), -1).T
        # a kernel's symmetric call is symmetric to the bit; a product of two matrices is so on some processors alone
        return (k + k.T) / 2 if y is None else k

    def diagonal(self, x):
        return np.diag(self(x)).copy()

    def workspace_bytes(self, n, m, itemsize, row_shape=None):
        return n * m * itemsize + (0 if row_shape is None else n * int(np.prod(row_shape)) * itemsize)


def one(*layers) -> Network:
    return Network((*layers, GlobalAvgPool(), Dense()))


RELU = Activation("relu")
SHORTCUT = Residual((Conv(), RELU, Conv(3, stride=2)), (Conv(1, stride=2),))
KERNELS = {
    "conv": NTK(convolutional(2, bias_variance=0.1)),
    "nngp": NNGP(convolutional(1, padding="circular")),
    "flatten": NTK(convolutional(1, readout="flatten", padding="valid")),
    "even filter": NTK(convolutional(1, filter_size=2)),
    "stride": NTK(one(Conv(3, stride=2), RELU)),
    "erf": NNGP(one(Conv((1, 2)), Activation("erf"))),
    "rbf": RBF(0.1),
    "vectors": NTK(fully_connected(2)),
    "unknown": LeftHeavy(),
}
every_kernel = pytest.mark.parametrize("name", KERNELS)
both_dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])


def images(n: int = 5, dtype: str = "float64", seed: int = 0, shape: tuple[int, ...] = (4, 6, 2)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, *shape)).astype(dtype)


def naive(kernel: Kernel, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The definition: four kernels in float64."""
    x, y = x.astype("float64"), y.astype("float64")
    fx, fy = np.flip(x, 2), np.flip(y, 2)
    return (kernel(x, y) + kernel(fx, y) + kernel(x, fy) + kernel(fx, fy)) / 4


# values


@every_kernel
@both_dtypes
def test_the_mean_of_four(name, dtype):
    kernel, x, y = KERNELS[name], images(5, dtype), images(3, dtype, seed=1)
    averaged = FlipAveraged(kernel)
    for found, expected in ((averaged(x), naive(kernel, x, x)), (averaged(x, y), naive(kernel, x, y))):
        if name == "unknown" and found.shape == (5, 5):
            expected = (expected + expected.T) / 2
        assert found.dtype == dtype
        assert np.abs(found - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max()


@every_kernel
@both_dtypes
def test_symmetric_call_and_diagonal(name, dtype):
    averaged, x = FlipAveraged(KERNELS[name]), images(4, dtype)
    x[1] = np.flip(x[0], 1)
    x[2] = (x[2] + np.flip(x[2], 1)) / 2
    x[3] = 0
    k, diagonal = averaged(x), averaged.diagonal(x)
    assert (k == k.T).all()
    assert diagonal.dtype == dtype
    scale = np.abs(diagonal).max()
    np.testing.assert_allclose(diagonal, np.diag(k), rtol=0, atol=TOLERANCE[dtype] * scale)
    # an image and its mirror image are one and the same
    np.testing.assert_allclose(k[0], k[1], rtol=0, atol=TOLERANCE[dtype] * scale)
    if name != "unknown":
        assert diagonal[2] == KERNELS[name].diagonal(x)[2]


@dataclass(frozen=True)
class Blocks:
    """k(x_i, y_j) = [[a, b], [c, a]], a the product of images, b and c of one side's left half with the other's right half."""

    passes_over_rows = True

    def entry_size(self, row_shape):
        return 2

    def __call__(self, x, y=None):
        y = x if y is None else y
        left, right = np.array([1.0, 1.0, 0.0, 0.0])[:, None], np.array([0.0, 0.0, 1.0, 1.0])[:, None]
        product = [[self._product(x, y), self._product(x * left, y[:, :, ::-1] * right)]]
        product += [[self._product(x * right, y[:, :, ::-1] * left), self._product(x, y)]]
        return np.moveaxis(np.array(product), (0, 1), (2, 3))

    @staticmethod
    def _product(x, y):
        return x.reshape(len(x), -1) @ y.reshape(len(y), -1).T

    def diagonal(self, x):
        return np.concatenate([self(x[i : i + 1])[0] for i in range(len(x))])

    def workspace_bytes(self, n, m, itemsize, row_shape=None):
        return 8 * n * m * itemsize


def test_kernels_that_give_a_block_a_pair():
    """The mean of four as for numbers, blocks transposed in the symmetric call; how such a kernel is planned is passed on."""
    averaged, x = FlipAveraged(Blocks()), images(4, "float64")[:, :, :4]
    k = averaged(x)
    expected = sum(Blocks()(a, b) for a in (x, flips.flip(x)) for b in (x, flips.flip(x))) / 4
    np.testing.assert_allclose(averaged(x, x.copy()), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(k, (expected + expected.transpose(1, 0, 3, 2)) / 2, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(averaged.diagonal(x), k[np.arange(4), np.arange(4)], rtol=1e-12, atol=1e-12)
    assert averaged.passes_over_rows
    assert averaged.entry_size(x.shape[1:]) == 2


def test_flipping_either_side_changes_nothing():
    averaged, x, y = FlipAveraged(KERNELS["even filter"]), images(3), images(4, seed=1)
    k = averaged(x, y)
    for found in (averaged(flips.flip(x), y), averaged(x, flips.flip(y)), averaged(flips.flip(x), flips.flip(y))):
        np.testing.assert_allclose(found, k, rtol=1e-12)


@pytest.mark.parametrize("name", ["conv", "even filter", "rbf"])
def test_positive_semi_definite(name):
    x = images(8)
    x = np.concatenate([x, np.flip(x[:3], 2), x[:2]])
    k = FlipAveraged(KERNELS[name])(x)
    values = np.linalg.eigvalsh(k)
    assert values[0] >= -1e-12 * values[-1]


@pytest.mark.parametrize("name", ["conv", "rbf", "vectors"])
def test_ridge_on_it_is_ridge_on_images_and_mirror_images(name):
    """α here, 2α there."""
    kernel, x, new = KERNELS[name], images(7), images(4, seed=1)
    targets, alpha = np.random.default_rng(2).standard_normal(7), 0.3
    averaged = FlipAveraged(kernel)
    here = averaged(new, x) @ np.linalg.solve(averaged(x) + alpha * np.eye(7), targets)
    doubled = np.concatenate([x, np.flip(x, 2)])
    solution = np.linalg.solve(kernel(doubled) + 2 * alpha * np.eye(14), np.tile(targets, 2))
    np.testing.assert_allclose(here, kernel(new, doubled) @ solution, rtol=1e-9)


def test_grey_images_without_channels():
    kernel, x = RBF(0.1), images(4, shape=(3, 5))
    np.testing.assert_allclose(FlipAveraged(kernel)(x), naive(kernel, x, x), rtol=1e-12)


# how many evaluations


@pytest.mark.parametrize(
    ("network", "keeps"),
    [
        (convolutional(3), True),
        (convolutional(2, filter_size=5, padding="circular"), True),
        (convolutional(1, filter_size=4, padding="valid"), True),
        (convolutional(1, filter_size=2), False),
        (convolutional(1, filter_size=(2, 3)), True),
        (convolutional(1, filter_size=(3, 2)), False),
        (convolutional(1, filter_size=2, padding="circular"), False),
        (myrtle(5), True),
        (fully_connected(2), True),
        (one(Conv(3, stride=2), RELU), False),
        (one(Conv(3, stride=(2, 1)), RELU), True),
        (one(Conv(2, stride=2), RELU), True),
        (one(Conv(1, stride=2), RELU), False),
        (one(Conv(3, stride=2, padding="valid"), RELU), False),
        (one(Conv(4, stride=2, padding="valid"), RELU), True),
        (one(Conv(3), LayerNorm(), RELU, AvgPool(2), Conv(), RELU), True),
        (one(Conv(), SHORTCUT, RELU), False),
        (one(Conv(), Residual((RELU, Conv())), RELU), True),
        (one(Conv(), Residual((RELU, Conv(2))), RELU), False),
        (Network((Conv(), RELU, Flatten(), Dense(), RELU, Dense())), True),
        (Network((Flatten(), Dense(), RELU, Dense())), True),
    ],
)
def test_which_networks_keep_mirrors(network, keeps):
    """Decided by geometry, and true: k of two mirrored images is k of the two, or it is not."""
    kernel, x, y = NTK(network), images(3, shape=(4, 8, 2)), images(2, seed=1, shape=(4, 8, 2))
    assert flips.keeps_mirrors(kernel, x.shape[1:]) is keeps
    equal = np.allclose(kernel(np.flip(x, 2), np.flip(y, 2)), kernel(x, y), rtol=1e-10, atol=0)
    # in a circle an even filter moves the mirrored image by a column, which the mean over columns does not see
    assert equal is keeps or any(layer.padding == "circular" for layer in network.layers if isinstance(layer, Conv))


def test_the_width_decides():
    network = one(Conv(3, stride=2), RELU)
    assert not flips.keeps_mirrors(NTK(network), (4, 8, 1))
    assert flips.keeps_mirrors(NTK(network), (4, 7, 1))


@pytest.mark.parametrize(("name", "symmetric", "rectangular"), [("conv", 2, 2), ("even filter", 3, 4)])
def test_evaluations(monkeypatch, name, symmetric, rectangular):
    kernel, calls = KERNELS[name], []
    call = type(kernel).__call__
    monkeypatch.setattr(type(kernel), "__call__", lambda self, x, y=None: calls.append(1) or call(self, x, y))
    FlipAveraged(kernel)(images())
    assert len(calls) == symmetric
    FlipAveraged(kernel)(images(), images(2))
    assert len(calls) == symmetric + rectangular


# the contract


def test_no_rows_and_one():
    averaged = FlipAveraged(KERNELS["conv"])
    assert averaged(images(0)).shape == (0, 0)
    assert averaged.diagonal(images(0)).shape == (0,)
    assert averaged(images(2), images(0)).shape == (2, 0)
    assert averaged(images(1)).shape == (1, 1)


@both_dtypes
def test_workspace_holds_the_peak(dtype):
    """Beyond results of arrays that NumPy holds; the kernel within is a plain one, whose own need is known."""
    shape = (16, 16, 3)
    averaged, x, y = FlipAveraged(LeftHeavy()), images(150, dtype, shape=shape), images(90, dtype, 1, shape)
    for arguments, sizes in (((x,), (150, 150)), ((x, y), (150, 90))):
        planned = averaged.workspace_bytes(*sizes, x.itemsize, shape)
        assert peak_bytes(lambda arguments=arguments: averaged(*arguments), planned) <= planned + 2**16


def test_inputs_are_not_written_to():
    x, y = images(), images(3)
    x.flags.writeable = y.flags.writeable = False
    averaged = FlipAveraged(KERNELS["even filter"])
    averaged(x), averaged(x, y), averaged.diagonal(x)


def test_it_is_described_and_built_again():
    averaged = FlipAveraged(KERNELS["conv"])
    table = json.loads(json.dumps(registry.to_config(averaged)))
    assert registry.from_config(table, "kernel") == averaged
    assert pickle.loads(pickle.dumps(averaged)) == averaged
    assert isinstance(averaged, Kernel)


@pytest.mark.parametrize("shape", [(6,), (2, 2, 2, 2)])
def test_rows_without_left_and_right_are_refused(shape):
    averaged, x = FlipAveraged(RBF(0.1)), images(3, shape=shape)
    for call in (lambda: averaged(x), lambda: averaged.diagonal(x)):
        with pytest.raises(InputError, match=r"x has shape \(3, .*only images \(n, H, W, C\), channels last"):
            call()
    with pytest.raises(InputError, match="y has shape"):
        averaged(images(2), x)


def test_other_dtypes_are_refused():
    with pytest.raises(DtypeError, match=r"uint8.*float32 or float64"):
        FlipAveraged(RBF(0.1))(images().astype("uint8"))


@pytest.mark.parametrize("kernel", [None, RBF, "NTK", convolutional(1)])
def test_what_is_no_kernel_is_refused(kernel):
    with pytest.raises(InputError, match=r"FlipAveraged: kernel is .* give one of ntkdask.kernels"):
        FlipAveraged(kernel)


def test_pairs_are_refused():
    with pytest.raises(InputError, match="NNGPAndNTK gives nngp and ntk in one call"):
        FlipAveraged(NNGPAndNTK(convolutional(1)))


# job files


def job(**kernel):
    network = {"preset": "convolutional", "depth": 2}
    return build_job({"name": "flips", "data": {"url": "d.zarr"}, "network": network, "kernel": kernel})


def test_a_job_nests_the_kernel():
    found = job(type="FlipAveraged", kernel={"type": "NTK"})
    assert found.kernel == FlipAveraged(NTK(convolutional(2)))
    resolved = found.to_config()
    assert resolved["network"]["type"] == "Network"
    assert resolved["kernel"] == {"type": "FlipAveraged", "kernel": {"type": "NTK"}}
    again = {key: resolved[key] for key in ("name", "data", "kernel")}
    again["network"] = {k: v for k, v in resolved["network"].items() if k != "type"}
    assert build_job(again).kernel == found.kernel


def test_a_job_without_the_kernel_within():
    with pytest.raises(JobError, match=r"cannot build FlipAveraged: .*kernel"):
        build_job({"name": "flips", "data": {"url": "d.zarr"}, "kernel": {"type": "FlipAveraged"}})
    with pytest.raises(JobError, match="unknown kernel 'NTKK'; did you mean 'NTK'"):
        job(type="FlipAveraged", kernel={"type": "NTKK"})
    with pytest.raises(JobError, match="RBF takes no network"):
        job(type="FlipAveraged", kernel={"type": "RBF", "gamma": 0.1})
    with pytest.raises(JobError, match="unknown kernel 'NNGPAndNTK'"):
        job(type="FlipAveraged", kernel={"type": "NNGPAndNTK"})
    assert (
        ArcCosine(1)
        == build_job(
            {
                "name": "f",
                "data": {"url": "d.zarr"},
                "kernel": {"type": "FlipAveraged", "kernel": {"type": "ArcCosine", "order": 1}},
            }
        ).kernel.kernel
    )


def test_images_that_do_not_fit_the_network():
    averaged = FlipAveraged(NTK(convolutional(2, filter_size=4, padding="valid")))
    with pytest.raises(InputError, match=r"Network: layer 2: .*4×4.*does not fit an image of 1×5"):
        averaged(images(shape=(4, 8, 2)))
