"""What type checkers and editors see of the package: its classes, as `make` installs it, and arguments that do not exist."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

USER = """
import numpy as np
import ntkdask as nd

network = nd.fully_connected(2)
features = nd.features.NTKRandomFeatures(network, n_components=3)
kernel = nd.kernels.NTK(nd.Network([nd.Dense(), nd.Activation("relu"), nd.Dense()]))
nd.RidgeClassifier(features, alphas=np.logspace(-3, 3, 7))
nd.KernelRidgeRegressor(kernel, alphas=1.0)
reveal_type(nd.features.NTKRandomFeatures(network, 3))
reveal_type(kernel)
reveal_type(network.layers)
nd.features.NTKRandomFeatures(network, n_componentz=3)
nd.RidgeClassifier(alpha=1.0)
"""


def test_an_editable_install_is_a_path_that_type_checkers_follow(tmp_path):
    """Not an import hook, which they cannot run."""
    pytest.importorskip("setuptools")
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    source.mkdir()
    wheels.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "ntkdask").mkdir()
    for name in ("__init__.py", "py.typed"):
        shutil.copy(ROOT / "ntkdask" / name, source / "ntkdask")
    code = f"from setuptools.build_meta import build_editable; build_editable({str(wheels)!r})"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=source, check=True, capture_output=True, timeout=120
    )
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        added = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert [Path(name).suffix for name in added] == [".pth"]
        assert Path(archive.read(added[0]).decode().strip()).resolve() == source.resolve()


@pytest.mark.slow
def test_mypy_knows_classes_and_their_arguments(tmp_path):
    (tmp_path / "user.py").write_text(USER)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--ignore-missing-imports", "--follow-imports=silent", "user.py"],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("user.py")]
    revealed = [line.split('"')[1] for line in lines if "Revealed type" in line]
    assert revealed[:2] == ["ntkdask.features.ntk_random.NTKRandomFeatures", "ntkdask.kernels.neural.NTK"]
    assert "ntkdask.networks.layers.Dense" in revealed[2]
    errors = [line for line in lines if ": error:" in line]
    assert len(errors) == 2, done.stdout + done.stderr
    assert 'Unexpected keyword argument "n_componentz" for "NTKRandomFeatures"' in errors[0]
    assert 'Unexpected keyword argument "alpha" for "RidgeClassifier"' in errors[1]
