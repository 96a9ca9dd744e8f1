"""Every example in a docstring runs."""

import doctest
import importlib
import pkgutil

import pytest

import ntkdask

MODULES = [
    "ntkdask",
    *(m.name for m in pkgutil.walk_packages(ntkdask.__path__, "ntkdask.") if "__main__" not in m.name),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    examples = sum(len(t.examples) for name in MODULES for t in finder.find(importlib.import_module(name)))
    assert examples >= 10
