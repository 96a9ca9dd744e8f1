"""A user's own kernel, with no more than values, diagonal and memory: planned, stored and fitted like those of the package."""

from dataclasses import dataclass

import numpy as np
import pytest

from ntkdask.errors import InputError
from ntkdask.estimators import KernelRidgeRegressor
from ntkdask.execution.site import Site
from ntkdask.kernels import NTK, RBF, FlipAveraged, both
from ntkdask.kernels.base import Computes, Kernel, completed, is_kernel, parts_of
from ntkdask.networks import convolutional, fully_connected
from ntkdask.workflows.kernel_matrix.build import kernel_matrix, plan_kernel_matrix
from ntkdask.workflows.kernel_matrix.calibrate import calibrate


@dataclass(frozen=True)
class Linear:
    def __call__(self, x, y=None):
        x, y = (None if z is None else z.reshape(len(z), -1) for z in (x, y))
        return x @ (x if y is None else y).T

    def diagonal(self, x):
        return (x.reshape(len(x), -1) ** 2).sum(axis=1)

    def workspace_bytes(self, n, m, itemsize, row_shape=None):
        return n * m * itemsize


@dataclass(frozen=True)
class OverNetwork(Linear):
    network: object
    parts = ("a", "b")
    passes_over_rows = True

    def entry_size(self, row_shape):
        return row_shape[0]


ROWS = np.random.default_rng(0).standard_normal((30, 4))


def test_what_a_kernel_leaves_out_is_as_for_most_kernels():
    kernel = completed(Linear())
    assert isinstance(kernel, Kernel)
    assert (kernel.parts, kernel.is_slow, kernel.passes_over_rows, kernel.entry_size((4,))) == ((), False, False, 1)
    np.testing.assert_array_equal(kernel(ROWS, ROWS[:3]), ROWS @ ROWS[:3].T)
    np.testing.assert_array_equal(kernel.diagonal(ROWS), (ROWS**2).sum(axis=1))
    assert kernel.workspace_bytes(2, 3, 4) == 24


def test_what_a_kernel_says_is_taken():
    slow, fast = (completed(OverNetwork(n)) for n in (convolutional(1), fully_connected(1)))
    assert (slow.is_slow, fast.is_slow) == (True, False)
    assert (slow.parts, slow.passes_over_rows, slow.entry_size((3,))) == (("a", "b"), True, 3)
    assert parts_of(OverNetwork(None)) == ("a", "b")
    assert not FlipAveraged(Linear()).is_slow


@pytest.mark.parametrize("kernel", [NTK(fully_connected(1)), both(fully_connected(1)), RBF(), FlipAveraged(RBF())])
def test_kernels_of_the_package_are_complete(kernel):
    assert completed(kernel) is kernel
    assert parts_of(kernel) == (("nngp", "ntk") if kernel == both(fully_connected(1)) else ())


def test_what_is_a_kernel():
    assert is_kernel(Linear())
    assert isinstance(Linear(), Computes)
    assert not is_kernel(Linear)
    assert not is_kernel(np.dot)


def test_planned_measured_and_fitted():
    assert calibrate(Linear(), (4,), "float64", 8, site=Site()).entry_seconds > 0
    model = KernelRidgeRegressor(Linear(), alphas=(0.1,)).fit(ROWS, ROWS[:, 0])
    np.testing.assert_allclose(model.predict(ROWS), ROWS[:, 0], atol=0.1)
    images = np.random.default_rng(0).standard_normal((3, 2, 2, 1))
    mirrored = images[:, :, ::-1]
    expected = (Linear()(images) + Linear()(mirrored) + Linear()(images, mirrored) * 2) / 4
    np.testing.assert_allclose(FlipAveraged(Linear())(images), expected, atol=1e-12)


def test_matrices_of_a_kernel_that_is_not_registered_are_refused_as_before(tmp_path):
    """A fingerprint must name the kernel."""
    with pytest.raises(InputError, match=r"give one of ntkdask\.kernels"):
        kernel_matrix(Linear(), ROWS, url=tmp_path / "k")
    with pytest.raises(InputError, match=r"give one of ntkdask\.kernels"):
        plan_kernel_matrix(Linear(), ROWS)
