"""Checkpoints: round trips to the bit, files of other programs, and every way in which a file may not fit."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from ntkdask import modules, registry
from ntkdask.errors import DataError, InputError, MissingDependencyError, StoreError
from ntkdask.modules.descriptions import FiniteNetwork, ResNet18
from ntkdask.networks import convolutional, fully_connected

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

from torch import nn  # noqa: E402 (where torch is)

from ntkdask.modules.state.weights import load_tensors, load_weights, save_tensors, save_weights  # noqa: E402


def network(seed=0, inputs=4):
    return FiniteNetwork(fully_connected(1, bias_variance=0.1), 3, 2, (inputs,), seed).build()


def resnet(seed=0, width=2):
    """With buffers that are not those of a new one."""
    module = ResNet18(width, 3, seed).build()
    for name, tensor in module.state_dict().items():
        if "running" in name or "num_batches" in name:
            tensor += seed + 1
    return module


class Tied(nn.Module):
    """A linear autoencoder whose decoder is its encoder, and a view of half of it."""

    def __init__(self, seed):
        super().__init__()
        values = torch.from_numpy(np.random.default_rng(seed).standard_normal((4, 4)).astype("float32"))
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.first.weight = self.second.weight = nn.Parameter(values)
        self.register_buffer("upper", values[:2])
        self.register_buffer("empty", torch.zeros(0))


def assert_equal(module, other):
    state, expected = module.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.parametrize("make", [network, resnet, Tied], ids=["finite", "resnet", "tied"])
def test_round_trip(make, tmp_path):
    path = tmp_path / "new" / "weights.safetensors"
    save_weights(make(1), path)
    module = make(2)
    before = {name: (p.data_ptr(), p.requires_grad) for name, p in module.named_parameters()}
    load_weights(module, path)
    assert_equal(module, make(1))
    assert {name: (p.data_ptr(), p.requires_grad) for name, p in module.named_parameters()} == before
    assert os.listdir(path.parent) == [path.name]


def test_tied_tensors_are_written_once_and_stay_tied(tmp_path):
    path = tmp_path / "tied.safetensors"
    save_weights(Tied(1), path)
    assert set(safetensors.load_file(path)) == {"first.weight", "upper", "empty"}
    module = Tied(2)
    load_weights(module, path)
    assert module.first.weight is module.second.weight


def test_files_of_safetensors_own_functions(tmp_path):
    """Its save_model leaves out tied names and keeps them in the metadata; ours are read by its load_model."""
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    source = Tied(1)
    del source.upper, source.empty
    safetensors.save_model(source, str(theirs))
    save_weights(source, ours)
    for path in (theirs, ours):
        module = Tied(2)
        del module.upper, module.empty
        load_weights(module, path)
        assert_equal(module, source)
    module = Tied(3)
    del module.upper, module.empty
    assert safetensors.load_model(module, str(ours)) == (set(), [])
    assert_equal(module, source)


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"net": s, "acc": 93.1, "epoch": 7}, lambda s: {"state_dict": s}]
)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_torchs_own_files(suffix, wrap, prefix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    state = {f"{prefix}{name}": tensor for name, tensor in resnet(1).state_dict().items()}
    torch.save(wrap(state), path)
    module = resnet(2)
    load_weights(module, path)
    assert_equal(module, resnet(1))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrappers_leave_names_as_they_are(wrap, tmp_path):
    save_weights(wrap(resnet(1)), tmp_path / "wrapped.safetensors")
    save_weights(resnet(1), tmp_path / "plain.safetensors")
    assert (tmp_path / "wrapped.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()
    module = resnet(2)
    load_weights(wrap(module), tmp_path / "plain.safetensors")
    assert_equal(module, resnet(1))


def test_counters_of_batches_may_be_missing_and_dtypes_are_cast(tmp_path):
    path = tmp_path / "old.safetensors"
    state = {k: v.double() for k, v in resnet(1).state_dict().items() if "num_batches" not in k}
    safetensors.save_file(state, path)
    module = resnet(2)
    load_weights(module, path)
    assert module.conv1.weight.dtype == torch.float32
    assert torch.equal(module.conv1.weight, resnet(1).conv1.weight)
    assert int(module.bn1.num_batches_tracked) == 3


def test_memory_orders_and_devices_do_not_matter(tmp_path):
    path = tmp_path / "weights.safetensors"
    module = resnet(1).to(memory_format=torch.channels_last)
    save_weights(module, path)
    again = resnet(2)
    load_weights(again, path)
    assert_equal(again, resnet(1))


class TestFilesThatDoNotFit:
    def refused(self, path, said, module=None):
        module = module or resnet(2)
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        with pytest.raises(InputError, match=said) as caught:
            load_weights(module, path)
        assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
        assert str(path) in str(caught.value)
        assert "Build the module with" in str(caught.value)

    def test_another_width(self, tmp_path):
        path = tmp_path / "wide.safetensors"
        save_weights(resnet(1, width=3), path)
        self.refused(
            path, r"ResNet.*of another shape: conv1.weight is \(3, 3, 3, 3\) there, \(2, 3, 3, 3\) here.* more"
        )

    def test_another_network(self, tmp_path):
        path = tmp_path / "other.safetensors"
        save_weights(network(), path)
        self.refused(path, r"missing: conv1.weight, .* and \d+ more; unexpected: 1.core.bias, 1.core.weight")

    def test_one_shape_alone(self, tmp_path):
        path = tmp_path / "inputs.safetensors"
        save_weights(network(inputs=5), path)
        self.refused(path, r"Sequential: of another shape: 1.core.weight is \(3, 5\) there, \(3, 4\) here\.", network())

    def test_integers_for_weights(self, tmp_path):
        path = tmp_path / "integers.safetensors"
        save_tensors({name: tensor.int() for name, tensor in network().state_dict().items()}, path)
        self.refused(path, "of another kind: 1.core.weight is torch.int32 there, torch.float32 here", network())

    def test_no_tensors_at_all(self, tmp_path):
        path = tmp_path / "empty.safetensors"
        save_tensors({}, path)
        self.refused(path, "missing: conv1.weight")


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


class TestUnreadableFiles:
    def test_missing(self, tmp_path):
        with pytest.raises(DataError, match="there is no file of weights"):
            load_weights(network(), tmp_path / "none.safetensors")

    def test_another_ending(self, tmp_path):
        with pytest.raises(DataError, match=r"ends in .safetensors, .pt, .pth"):
            load_weights(network(), tmp_path / "weights.npz")

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    @pytest.mark.parametrize("content", [b"", b"not weights", b"\x80\x02}q\x00."], ids=["empty", "text", "pickle"])
    def test_damaged(self, suffix, content, tmp_path):
        path = tmp_path / f"weights{suffix}"
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read as tensors alone"):
            load_weights(network(), path)

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    def test_cut_off(self, suffix, tmp_path):
        path = tmp_path / f"weights{suffix}"
        if suffix == ".pt":
            torch.save(resnet().state_dict(), path)
        else:
            save_weights(resnet(), path)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(DataError, match="cannot be read as tensors alone"):
            load_weights(resnet(), path)

    @pytest.mark.parametrize("zipped", [True, False])
    def test_code_is_not_run(self, zipped, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        state = {"weights": torch.zeros(2), "rest": Harmful()}
        if zipped:
            torch.save(state, tmp_path / "weights.pt")
        else:
            (tmp_path / "weights.pt").write_bytes(pickle.dumps(Harmful()))
        with pytest.raises(DataError, match="could run code"):
            load_weights(network(), tmp_path / "weights.pt")
        assert not (tmp_path / "harmed").exists()

    def test_a_file_without_names(self, tmp_path):
        torch.save([torch.zeros(2)], tmp_path / "weights.pt")
        with pytest.raises(DataError, match="no mapping of names to tensors"):
            load_weights(network(), tmp_path / "weights.pt")


class TestWriting:
    def test_another_ending(self, tmp_path):
        with pytest.raises(InputError, match="written as"):
            save_weights(network(), tmp_path / "weights.pt")

    def test_what_is_no_tensor(self, tmp_path):
        with pytest.raises(InputError, match="rest is a list"):
            save_tensors({"rest": [1]}, tmp_path / "weights.safetensors")

    def test_a_file_in_the_way(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(StoreError, match="cannot write"):
            save_weights(network(), tmp_path / "file" / "weights.safetensors")

    def test_a_folder_in_the_way_loses_nothing(self, tmp_path):
        (tmp_path / "weights.safetensors").mkdir()
        with pytest.raises(StoreError, match="cannot write"):
            save_weights(network(), tmp_path / "weights.safetensors")
        assert os.listdir(tmp_path) == ["weights.safetensors"]

    def test_metadata(self, tmp_path):
        path = tmp_path / "weights.safetensors"
        save_tensors({"a": torch.arange(3), "b": torch.tensor(2.5)}, path, {"epoch": json.dumps(3)})
        tensors, metadata = load_tensors(path)
        assert metadata["epoch"] == "3"
        assert tensors["a"].tolist() == [0, 1, 2]
        assert tensors["b"].shape == ()


def test_a_tensor_called_as_the_format(tmp_path):
    save_tensors({"pt": torch.zeros(2)}, tmp_path / "weights.safetensors")
    assert set(load_tensors(tmp_path / "weights.safetensors")[0]) == {"pt"}


class TestDescriptions:
    def test_weights_of_a_file(self, tmp_path):
        path = tmp_path / "weights.safetensors"
        save_weights(resnet(5), path)
        assert_equal(ResNet18(2, 3, weights=str(path)).build(), resnet(5))
        assert ResNet18(2, 3, weights=path) == ResNet18(2, 3, weights=str(path))

    def test_a_file_that_does_not_fit(self, tmp_path):
        path = tmp_path / "weights.safetensors"
        save_weights(resnet(5), path)
        with pytest.raises(InputError, match="does not fit the ResNet"):
            ResNet18(4, 3, weights=str(path)).build()

    def test_without_torch_it_says_how_to_get_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch", None)
        for description in (ResNet18(2), FiniteNetwork(fully_connected(1), 2, 2, (4,))):
            with pytest.raises(MissingDependencyError, match=r"pip install 'ntkdask\[torch\]'"):
                description.build()
        with pytest.raises(MissingDependencyError, match="finite_module needs PyTorch"):
            _ = modules.finite_module

    def test_describing_imports_no_torch(self):
        code = (
            "import sys, ntkdask.modules; from ntkdask.modules import ResNet18, TrainingProtocol;"
            "from ntkdask.workflows.empirical import train;"
            "from ntkdask.registry import to_config; to_config(ResNet18()), TrainingProtocol(); sys.exit('torch' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 0

    def test_finite_networks_are_tables(self):
        description = FiniteNetwork(convolutional(1), 4, 3, (4, 4, 3), 2)
        assert registry.from_config(json.loads(json.dumps(registry.to_config(description))), "module") == description

    def test_images_that_do_not_fit_are_refused_before_building(self):
        with pytest.raises(InputError, match="does not fit an image"):
            FiniteNetwork(convolutional(2, 3, "valid"), 4, 3, (4, 4, 3))
