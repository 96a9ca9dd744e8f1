"""Outputs of networks as arrays, against the module itself; nothing about the module changes."""

import numpy as np
import pytest

from ntkdask.errors import DtypeError, InputError

torch = pytest.importorskip("torch")

from ntkdask.modules.outputs import outputs  # noqa: E402


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 5)
    ).eval()


@pytest.fixture(autouse=True)
def _own_random_state():
    with torch.random.fork_rng():
        yield


@pytest.mark.parametrize("batch_rows", [1, 3, 256])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_against_the_module(batch_rows, dtype):
    module, x = network(), np.random.default_rng(0).standard_normal((7, 6, 6, 3)).astype(dtype)
    with torch.no_grad():
        expected = module.to(getattr(torch, dtype))(torch.as_tensor(x).permute(0, 3, 1, 2)).numpy()
    found = outputs(module.float(), x, batch_rows=batch_rows)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected, rtol={"float32": 1e-5, "float64": 1e-12}[dtype], atol=1e-6)
    np.testing.assert_array_equal(outputs(module, x.transpose(0, 3, 1, 2), None), outputs(module, x))
    assert module[4].weight.dtype == torch.float32
    assert module[4].weight.requires_grad


def test_rows_are_never_written_to():
    x = np.random.default_rng(0).standard_normal((7, 4))
    module, before = torch.nn.Sequential(torch.nn.ReLU(inplace=True), torch.nn.Linear(4, 2)), x.copy()
    np.testing.assert_array_equal(outputs(module, x), outputs(module, np.maximum(x, 0)))
    np.testing.assert_array_equal(x, before)


def test_no_rows():
    assert outputs(network(), np.zeros((0, 6, 6, 3))).shape == (0, 5)


def test_descriptions_are_built():
    from ntkdask.modules.descriptions import FiniteNetwork
    from ntkdask.networks import fully_connected

    description, x = FiniteNetwork(fully_connected(1), 8, 2, (4,)), np.ones((3, 4), "float32")
    np.testing.assert_array_equal(outputs(description, x), outputs(description.build(), x))


def test_what_has_no_outputs_of_its_own_is_refused():
    x = np.ones((3, 6, 6, 3), "float32")
    with pytest.raises(InputError, match=r"train mode.*module\.eval\(\)"):
        outputs(network().train(), x)
    with pytest.raises(InputError, match=r"torch\.nn\.Module"):
        outputs(np.sin, x)
    with pytest.raises(InputError, match="input_layout"):
        outputs(network(), x, "nhwc")
    with pytest.raises(InputError, match="outputs"):
        outputs(torch.nn.Flatten(0), x)
    with pytest.raises(DtypeError, match="uint8"):
        outputs(network(), x.astype("uint8"))
