"""What the benchmark of Han et al., Figure 1 computes: its exact kernels, both expansions, its table."""

import sys

import numpy as np
import pytest

from benchmarks import hermite_expansion
from ntkdask import activations


@pytest.fixture
def x():
    return hermite_expansion.inputs(30, 16, np.random.default_rng(0))


def test_inputs_have_lengths_near_one():
    lengths = np.linalg.norm(hermite_expansion.inputs(50, 256, np.random.default_rng(0)), axis=1)
    np.testing.assert_allclose(lengths, 1.0, atol=0.2)


@pytest.mark.parametrize("name", hermite_expansion.NAMES)
def test_expansions_approach_the_exact_kernel(name, x):
    sigma = activations.get(name)
    exact = hermite_expansion.exact_kernel(sigma, x)
    lengths, inner = np.linalg.norm(x, axis=1), x @ x.T
    c = inner[1, 2] / (lengths[1] * lengths[2])
    assert exact[1, 2] == pytest.approx(float(sigma.dual(lengths[1], lengths[2], c)), rel=1e-12)
    expanded, polynomial = (
        hermite_expansion.expansions(sigma, x, exact, 12, radial)
        for radial in (hermite_expansion.radial_functions, hermite_expansion.theorem_1)
    )
    assert expanded.errors.shape == expanded.seconds.shape == (12,)
    assert expanded.errors[11] < 0.05 * expanded.errors[0]
    # the coefficients of every length of a row are closer than those of length 1
    assert expanded.errors[5] <= polynomial.errors[5]
    sampled = hermite_expansion.monte_carlo(sigma, x, exact, np.random.default_rng(1))
    assert 0.2 > sampled.errors[-1] > expanded.errors[11]


def test_the_expansion_of_theorem_1_is_that_of_every_length_at_length_one():
    for name in ("gelu", "sin"):
        sigma, ones = activations.get(name), np.ones(1)
        expected = hermite_expansion.radial_functions(sigma, ones, 9)
        # the sum over i stops at the degree of the polynomial, and so do the Hermite coefficients at length 1
        np.testing.assert_allclose(hermite_expansion.theorem_1(sigma, ones, 9), expected, atol=1e-12)


def test_the_table(monkeypatch, capsys):
    arguments = ["--rows", "20", "--features", "8", "--degrees", "3", "--trials", "2", "--activations", "sin"]
    monkeypatch.setattr(sys, "argv", ["hermite_expansion", *arguments])
    hermite_expansion.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ["sin", "degree", "expanded", "polynomial"]
    assert [line.split()[0] for line in lines[2:5]] == ["1", "2", "3"]
    errors = [float(line.split()[1]) for line in lines[2:5]]
    assert errors[0] == errors[1] > errors[2]  # sin is odd
