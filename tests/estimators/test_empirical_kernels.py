"""Estimators and maps of torch modules: kernel ridge, stored models, projected gradients, landmarks."""

import subprocess
import sys

import numpy as np
import pytest
from empirical_examples import classes, images, network

torch = pytest.importorskip("torch")
import ntkdask as nd  # noqa: E402
from ntkdask.errors import FingerprintError, InputError  # noqa: E402
from ntkdask.features.projected import ProjectedGradients  # noqa: E402
from ntkdask.kernels.empirical import EmpiricalNTK, PseudoNTK  # noqa: E402
from ntkdask.workflows.model import load_model  # noqa: E402


def test_kernel_ridge_takes_modules(tmp_path, client):
    x, y, kernel = images(), classes(24), PseudoNTK(network())
    here = nd.KernelRidgeClassifier(kernel, alphas=(1.0,)).fit(x, y)
    for given in ({"client": client}, {"url": tmp_path / "url"}):
        there = nd.KernelRidgeClassifier(kernel, alphas=(1.0,), **given).fit(x, y)
        assert there.alpha_ == here.alpha_
        np.testing.assert_allclose(there.decision_function(x), here.decision_function(x), rtol=0, atol=1e-3)
        assert there.kernel is kernel
        assert (there.model_.kernel.module is kernel.module) == ("url" not in given)


def test_a_stored_model_loads_where_its_module_is_known(tmp_path):
    x, y = images(30), classes(30)
    module = network(7)
    fitted = nd.KernelRidgeClassifier(PseudoNTK(module), alphas=(1.0,), url=tmp_path / "fit").fit(x, y)
    url = fitted.model_.save(tmp_path / "fit" / "state")
    scores = load_model(url).scores(x)
    np.testing.assert_allclose(scores, fitted.model_.scores(x), rtol=0, atol=1e-5)
    # another process: the code of the module, any weights
    code = (
        "import sys; sys.path[:0] = ['tests/workflows/kernel_matrix', 'tests']\n"
        "import numpy as np, torch\n"
        "from ntkdask.modules.state import shipping\n"
        "from ntkdask.workflows.model import load_model\n"
        "from test_empirical import images, network\n"
        "from ntkdask.errors import InputError\n"
        f"model = load_model({url!r})\n"
        "try:\n    model.scores(images(30))\nexcept InputError as error:\n    assert 'remember' in str(error)\n"
        "else:\n    raise SystemExit('not refused')\n"
        "shipping.remember(network(3))\n"
        f"np.save({str(tmp_path / 'scores.npy')!r}, load_model({url!r}).scores(images(30)))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy"), scores, rtol=0, atol=1e-5)


def test_ridge_and_featurize_take_projected_gradients(tmp_path, client):
    x, y, features = images(40), classes(40), ProjectedGradients(network(), 64)
    found = nd.featurize(features, x, url=tmp_path / "f", client=client).compute()
    np.testing.assert_allclose(found, features(x), rtol=0, atol=1e-5 * np.abs(found).max())
    with pytest.raises(FingerprintError, match=r"map\.module\.weights"):
        nd.featurize(ProjectedGradients(network(1), 64), x, url=tmp_path / "f", client=client)
    here = nd.RidgeClassifier(features, alphas=(0.1, 1.0)).fit(x, y)
    there = nd.RidgeClassifier(features, alphas=(0.1, 1.0), client=client).fit(x, y)
    np.testing.assert_allclose(there.decision_function(x), here.decision_function(x), rtol=0, atol=1e-3)


def test_landmarks_take_modules_to_the_workers(client):
    x, y, features = images(40), classes(40), nd.features.Nystrom(PseudoNTK(network()), n_components=10)
    here = nd.RidgeClassifier(features, alphas=(1.0,)).fit(x, y)
    there = nd.RidgeClassifier(features, alphas=(1.0,), client=client).fit(x, y)
    assert there.decision_function(x).shape == here.decision_function(x).shape
    assert there.model_.map.map.kernel.module is features.kernel.module


def test_a_full_matrix_is_no_matrix_for_kernel_ridge():
    with pytest.raises(InputError, match=r"EmpiricalNTK gives 3×3. Use output='trace'"):
        nd.KernelRidgeClassifier(EmpiricalNTK(network())).fit(images(9), classes(9))
