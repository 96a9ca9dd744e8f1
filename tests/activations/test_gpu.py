"""Activations on CuPy: the functions they ask of it exist (without a GPU), the values are those of the CPU (with one)."""

import ast
import importlib
from pathlib import Path

import numpy as np
import pytest
from activation_examples import ALL, ALL_IDS

from ntkdask import activations, arrays
from ntkdask.activations import derivative_from_dual, from_function, quadrature_dual

SOURCES = sorted(Path(activations.__file__).parent.glob("*.py"))
RNG = np.random.default_rng(0)


def asked_for(root):
    """Attributes that the activations take of the name `xp`, or of a call of `special`."""
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute):
                continue
            owner = node.value.func if isinstance(node.value, ast.Call) else node.value
            if isinstance(owner, ast.Name) and owner.id == root:
                yield node.attr


@pytest.mark.parametrize(("module", "roots"), [("cupy", ("xp", "namespace")), ("cupyx.scipy.special", ("special",))])
def test_cupy_has_every_function(module, roots):
    there = importlib.import_module(module)
    names = {name for root in roots for name in asked_for(root)}
    assert {"xp": "sqrt", "special": "erfcx"}[roots[0]] in names
    assert not [name for name in sorted(names) if not hasattr(there, name)]


def test_special_follows_the_array():
    assert arrays.special(np.zeros(1)).__name__ == "scipy.special"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("name", "parameters"), ALL, ids=ALL_IDS)
def test_the_gpu_agrees_with_the_cpu(name, parameters, dtype):
    sigma = activations.get(name, **parameters)
    for largest in (1.9, 9.0):
        a, b = RNG.uniform(0, largest, (6, 1)).astype(dtype), RNG.uniform(0, largest, 5).astype(dtype)
        c = RNG.uniform(-0.99, 0.99, (6, 5)).astype(dtype)
        for dual in (sigma.dual, sigma.dual_derivative):
            there = dual(*map(arrays.to_device, (a, b, c)))
            assert arrays.is_device_array(there)
            size = np.sqrt(dual(a, a, np.ones_like(a)).astype(float) * dual(b, b, np.ones_like(b)))
            tolerance = {"float32": 1e-5, "float64": 1e-12}[dtype]
            assert (np.abs(arrays.to_host(there) - dual(a, b, c)) <= tolerance * size).all()
    if name != "normalized_gaussian":
        np.testing.assert_allclose(arrays.to_host(sigma(arrays.to_device(c))), sigma(c), rtol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["hermite", "quadrature"])
def test_functions_on_the_gpu(method):
    a, b, c = RNG.uniform(0, 1, (6, 1)), RNG.uniform(0, 1, 5), RNG.uniform(-1, 1, (6, 5))
    there = [arrays.to_device(v) for v in (a, b, c)]
    sigma = from_function(np.tanh, method=method)
    for run in (sigma.dual, sigma.dual_derivative, lambda *abc: quadrature_dual(np.tanh, *abc, 20)):
        np.testing.assert_allclose(arrays.to_host(run(*there)), run(a, b, c), atol=1e-11)
    gelu = activations.get("gelu").dual
    np.testing.assert_allclose(
        arrays.to_host(derivative_from_dual(gelu, *there)), derivative_from_dual(gelu, a, b, c), atol=1e-7
    )
