"""Sweeps over several parameters, thinned for every day: each value meets each other one somewhere, the rest are slow tests."""

from itertools import product

import pytest


def sweep(*axes, fast=None):
    """Every combination of the axes' values, as `parametrize` takes them; those that are not `fast` are marked slow.

    fast(i, j, ...): whether the combination of these indices runs every day. By default where i is j + k + ... modulo the length of
    the first axis: every pair of values of two axes occurs, as in a Latin square, if the first axis is the shortest.
    """

    def latin(first, *others):
        return first == sum(others) % len(axes[0])

    def marks(indices):
        return () if (fast or latin)(*indices) else (pytest.mark.slow,)

    grid = product(*(range(len(axis)) for axis in axes))
    return [pytest.param(*(axis[i] for axis, i in zip(axes, at, strict=True)), marks=marks(at)) for at in grid]
