"""Modules as state: digests that see every change, skeletons that hold nothing, modules built again from stored weights."""

import json
import subprocess
import sys
from functools import partial

import cloudpickle
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from ntkdask import registry, threads  # noqa: E402
from ntkdask.errors import DataError, InputError  # noqa: E402
from ntkdask.features import Nystrom  # noqa: E402
from ntkdask.files import remove  # noqa: E402
from ntkdask.kernels import NTK, RBF, FlipAveraged, PseudoNTK  # noqa: E402
from ntkdask.modules import ResNet18, torch_threads  # noqa: E402
from ntkdask.modules.state import shipping  # noqa: E402
from ntkdask.modules.state.weight_files import file_digest  # noqa: E402
from ntkdask.modules.state.weights import save_weights  # noqa: E402
from ntkdask.networks import convolutional as nd_convolutional  # noqa: E402
from ntkdask.states import load_state, save_state  # noqa: E402
from ntkdask.workflows.ship import know_states, module_states, restored, shipped  # noqa: E402


class Scaled(nn.Module):
    """A layer whose attributes are of every kind."""

    def __init__(self, scale=2.0, activation=torch.relu):
        super().__init__()
        self.scale, self.activation, self.sizes = scale, activation, (3, 4)
        self.mask = torch.tensor([1.0, 0.0, 1.0, 1.0])
        self.inner = nn.Linear(3, 4)
        self.register_buffer("shift", torch.zeros(4), persistent=False)

    def forward(self, x):
        return self.scale * self.activation(self.inner(x)) * self.mask + self.shift


class Tied(nn.Module):
    """One matrix used twice, under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


def seeded(make, seed=0):
    """A module whose parameters are seeded normals, in eval mode; torch's own generator is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = make()
        for p in module.parameters():
            p.data = torch.randn(p.shape).to(p.dtype)
    return module.eval()


def convolutional():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))


ZOO = {
    "convolutional": (convolutional, (2, 3, 6, 6)),
    "tied": (Tied, (2, 4)),
    "scaled": (Scaled, (2, 3)),
    "gru": (partial(nn.GRU, 4, 5), (2, 3, 4)),
    "embedding": (lambda: nn.Embedding(7, 3), None),
}
every_module = pytest.mark.parametrize("name", ZOO)


def rows(name):
    shape = ZOO[name][1]
    return (
        torch.tensor([[1, 2], [3, 0]])
        if shape is None
        else torch.from_numpy(np.random.default_rng(0).normal(size=shape)).float()
    )


def output(module, x):
    with torch.no_grad():
        y = module(x)
    return y[0] if isinstance(y, tuple) else y


@every_module
def test_a_module_is_built_again_from_its_skeleton_and_weights(name):
    module, x = seeded(ZOO[name][0]), rows(name)
    skeleton = cloudpickle.loads(cloudpickle.dumps(shipping.skeleton_of(module)))
    assert all(t.is_meta for t in (*skeleton.parameters(), *skeleton.buffers()))
    again = shipping.filled(skeleton, shipping.weights_of(module))
    assert torch.equal(output(again, x), output(module, x))
    assert shipping.described(again) == shipping.described(module)
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in module.named_parameters()]
    theirs = {p.data_ptr() for p in module.parameters()}
    assert not theirs & {p.data_ptr() for p in again.parameters()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_dtype_travel_bit_for_bit(dtype):
    module = seeded(convolutional).to(dtype)
    arrays = shipping.weights_of(module)
    assert all(a.dtype.kind in "fiu" for a in arrays.values())
    again = shipping.filled(shipping.skeleton_of(module), arrays)
    for a, b in zip(module.state_dict().values(), again.state_dict().values(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_tied_weights_stay_tied_and_count_once():
    module = seeded(Tied)
    assert sum(a.size for a in shipping.weights_of(module).values()) == 16 + 4 + 4
    again = shipping.filled(shipping.skeleton_of(module), shipping.weights_of(module))
    assert again.first.weight is again.second.weight


def test_frozen_parameters_and_buffers_keep_what_they_are():
    module = seeded(convolutional)
    module[0].weight.requires_grad_(False)
    module[1].running_mean += 0.25
    again = shipping.filled(shipping.skeleton_of(module), shipping.weights_of(module))
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in module.parameters()]
    assert torch.equal(again[1].running_mean, module[1].running_mean)
    assert not again.training


def changed_weight(m):
    m[0].weight.data[0, 0, 0, 0] += 1e-6


def changed_buffer(m):
    m[1].running_var += 1


def changed_flag(m):
    m[2].train()


def changed_gradient(m):
    m[4].bias.requires_grad_(False)


def changed_stride(m):
    m[0].stride = (2, 2)


def changed_layer(m):
    m[2] = nn.GELU().eval()


CHANGES = [changed_weight, changed_buffer, changed_flag, changed_gradient, changed_stride, changed_layer]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_the_address_sees_every_change(change):
    module = seeded(convolutional)
    before = shipping.described(module)
    assert before == shipping.described(seeded(convolutional))
    change(module)
    after = shipping.described(module)
    assert after != before
    assert (after.structure == before.structure) == (change in (changed_weight, changed_buffer))


def test_the_address_sees_plain_attributes_and_tying():
    def address(make):
        return shipping.described(seeded(make)).structure

    assert address(Scaled) == address(Scaled)
    assert address(partial(Scaled, 3.0)) != address(Scaled)
    assert address(partial(Scaled, activation=torch.tanh)) != address(Scaled)
    other = seeded(Scaled)
    other.mask = torch.ones(4)
    assert shipping.described(other).structure != address(Scaled)
    loose = seeded(Tied)
    loose.second.weight = nn.Parameter(loose.first.weight.detach().clone())
    assert shipping.described(loose).structure != address(Tied)


def test_weights_are_no_part_of_the_structure():
    for make, _ in ZOO.values():
        a, b = (shipping.described(seeded(make, seed)) for seed in (0, 1))
        assert a.structure == b.structure
        assert a.weights != b.weights


def test_the_address_is_equal_in_another_process():
    code = (
        "import torch; from torch import nn; from ntkdask.modules.state import shipping\n"
        "m = nn.Sequential(nn.Linear(2, 3), nn.ReLU()).eval()\n"
        "[p.data.fill_(0.5) for p in m.parameters()]; print(shipping.described(m))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU()).eval()
    for p in module.parameters():
        p.data.fill_(0.5)
    assert found == str(shipping.described(module))


def test_the_module_is_not_touched():
    module = seeded(convolutional)
    calls = []
    handle = module[4].register_full_backward_hook(lambda *_: calls.append(1))
    module[0].weight.grad = torch.ones_like(module[0].weight)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    shipping.described(module)
    shipping.filled(shipping.skeleton_of(module), shipping.weights_of(module))
    assert torch.equal(module[0].weight.grad, torch.ones_like(module[0].weight))
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    assert len(module[4]._backward_hooks) == 1
    assert not calls
    handle.remove()


def test_what_cannot_travel_is_refused():
    module = seeded(convolutional)
    module[2].register_forward_hook(lambda m, x, y: 2 * y)
    with pytest.raises(InputError, match="2 has forward hooks"):
        shipping.skeleton_of(module)

    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo):
            raise TypeError("a lock")

    with pytest.raises(InputError, match=r"Stubborn cannot be copied.*a lock"):
        shipping.skeleton_of(Stubborn(2, 2))


def test_missing_classes():
    names = shipping.class_names(seeded(Scaled))
    assert "torch.nn.modules.linear.Linear" in names
    assert shipping.missing_classes(["torch.nn.modules.linear.Linear", "nowhere.Net", "torch.nn.Nothing"]) == [
        "nowhere.Net",
        "torch.nn.Nothing",
    ]

    class Local(nn.Module):
        """Of this function alone."""

    (name,) = shipping.class_names(Local())
    assert shipping.missing_classes([name]) == [name]


# --- addresses ----------------------------------------------------------------------------------------------------


def test_configurations_hold_the_address():
    module = seeded(Scaled)
    table = json.loads(json.dumps(registry.to_config({"module": module})))
    stored = registry.from_config(table["module"], "module")
    assert stored == shipping.described(module)
    assert registry.to_config(stored) == table["module"]


def test_an_unknown_module_is_refused_until_it_is_remembered():
    module = seeded(partial(Scaled, 17.0))
    stored = shipping.described(module)
    with pytest.raises(InputError, match=r"Scaled \(structure .* is not known to this process.*remember"):
        stored.build()
    assert shipping.remember(module) == stored
    assert torch.equal(output(stored.build(), rows("scaled")), output(module, rows("scaled")))
    assert stored.build() is not stored.build()
    other = seeded(partial(Scaled, 17.0), seed=5)
    with pytest.raises(InputError, match=r"Scaled \(weights .* is not known"):
        shipping.described(other).build()


def test_remembered_weights_do_not_follow_the_module():
    module = seeded(partial(Scaled, 18.0))
    stored = shipping.remember(module)
    module.inner.weight.data.zero_()
    assert stored.build().inner.weight.abs().min() > 0


# --- states -------------------------------------------------------------------------------------------------------


def test_shipped_modules_are_read_from_their_state(tmp_path):
    module = seeded(partial(Scaled, 19.0))
    stored = shipped(module, tmp_path)
    assert stored == shipping.described(module)
    (folder,) = [p for p in tmp_path.iterdir() if p.is_dir()]
    assert load_state(str(folder))[1] == {"torch_module": "test_shipping.Scaled"} | {"torch_module": stored.class_name}
    assert not [p for p in folder.rglob("*") if p.suffix in (".pkl", ".pickle", ".pt")]
    assert torch.equal(output(stored.build(), rows("scaled")), output(module, rows("scaled")))
    assert shipped(stored, tmp_path) is stored
    assert len(list(tmp_path.iterdir())) == 1


def test_a_result_gets_its_modules_back(tmp_path):
    module, kernel = seeded(Tied), RBF(0.5)
    features = Nystrom(PseudoNTK(module), n_components=4)
    sent = shipped(features, tmp_path / "one")
    assert isinstance(sent.kernel.module, shipping.StoredModule)
    assert module_states(sent, tmp_path) == {
        sent.kernel.module.weights: f"one/{next((tmp_path / 'one').iterdir()).name}"
    }
    assert restored(sent, features).kernel.module is module
    assert restored(sent, kernel) is sent
    assert restored(kernel, features) is kernel


def test_states_are_found_from_a_saved_model(tmp_path):
    module = seeded(partial(Scaled, 21.0), seed=9)
    shipping.remember(seeded(partial(Scaled, 21.0), seed=1))  # of equal structure
    url = save_state(tmp_path / "state", shipping.weights_of(module))
    stored = shipping.described(module)
    know_states({stored.weights: url.rpartition("/")[2]}, tmp_path / "state")
    assert torch.equal(stored.build().inner.weight, module.inner.weight)


def test_weights_lie_in_the_folder_that_names_them(tmp_path):
    """Whatever other folder has them, which may be moved or deleted; other weights in their place are refused."""
    module = seeded(partial(Scaled, 23.0), seed=4)
    stored = shipped(module, tmp_path / "one")
    assert shipped(stored, tmp_path / "two") is stored
    (place,) = module_states(stored, tmp_path / "two").values()
    assert (tmp_path / "two" / place / "zarr.json").exists()
    remove(tmp_path / "one")
    assert torch.equal(stored.build().inner.weight, module.inner.weight)
    other = save_state(tmp_path / "two", shipping.weights_of(seeded(partial(Scaled, 23.0), seed=5)))
    know_states({stored.weights: other.rpartition("/")[2]}, tmp_path / "two")
    with pytest.raises(DataError, match="are not those of digest"):
        stored.build()


def test_what_holds_no_module_passes_unchanged(tmp_path):
    for thing in (None, RBF(0.1), FlipAveraged(NTK(nd_convolutional(1))), ResNet18(width=4)):
        assert shipped(thing, tmp_path) is thing
    assert not list(tmp_path.iterdir())


# --- descriptions -------------------------------------------------------------------------------------------------


def test_a_file_of_weights_is_known_by_its_content(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(ResNet18(width=2, seed=3).build(), path)
    described = ResNet18(width=2, weights=path)
    table = registry.to_config(described)
    assert table["weights_digest"] == file_digest(path)
    again = registry.from_config(json.loads(json.dumps(table)), "module")
    assert torch.equal(next(again.build().parameters()), next(ResNet18(width=2, seed=3).build().parameters()))
    save_weights(ResNet18(width=2, seed=4).build(), path)
    assert registry.to_config(described)["weights_digest"] != table["weights_digest"]
    with pytest.raises(DataError, match="has changed: its digest is"):
        again.build()
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        registry.to_config(described)


# --- threads ------------------------------------------------------------------------------------------------------


def test_torch_follows_the_threads_of_a_task():
    before = torch.get_num_threads()
    try:
        with threads.limited(1):
            torch.set_num_threads(2)  # as in a process that loaded torch after the libraries were listed
            with torch_threads.task_threads():
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 2
            with pytest.raises(KeyError), torch_threads.task_threads():
                raise KeyError
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
