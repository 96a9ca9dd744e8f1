"""Which kernels are slow."""

import pytest

from ntkdask.kernels import NNGP, NTK, RBF, FlipAveraged, both
from ntkdask.kernels.base import completed
from ntkdask.networks import convolutional, fully_connected, myrtle


@pytest.mark.parametrize(
    ("kernel", "slow"),
    [
        (RBF(0.1), False),
        (NTK(fully_connected(3)), False),
        (NTK(convolutional(1)), True),
        (NNGP(myrtle(5)), True),
        (both(convolutional(1)), True),
        (FlipAveraged(NTK(convolutional(1))), True),
        (FlipAveraged(RBF(0.1)), False),
    ],
)
def test_which_kernels_are_measured_before_a_run(kernel, slow):
    assert completed(kernel).is_slow is slow
