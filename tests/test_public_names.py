"""What `import ntkdask` shows: the public names, all of them, and nothing else."""

import importlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize("package", ["", ".activations", ".features", ".kernels", ".modules"])
def test_dir_shows_public_names_alone(package):
    module = importlib.import_module(f"ntkdask{package}")
    assert dir(module) == sorted(module.__all__)
    assert all(not name.startswith("_") for name in dir(module))


def test_dir_is_the_same_after_everything_was_used():
    """In a process of its own: submodules that were imported are no public names."""
    code = "import ntkdask as nd; [getattr(nd, n) for n in dir(nd)]; print(dir(nd) == sorted(nd.__all__))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["True"]
