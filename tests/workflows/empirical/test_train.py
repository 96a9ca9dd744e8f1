"""Training as a workflow: resumed to the bit, divergence, and what it refuses."""

import json
import math

import numpy as np
import pytest
from training_examples import SHORT, data, linear, resnet

from ntkdask import registry
from ntkdask.errors import DtypeError, FingerprintError, InputError, StoreError
from ntkdask.modules.descriptions import FiniteNetwork, ResNet18
from ntkdask.modules.protocol import TrainingProtocol
from ntkdask.networks import Dense, Network, convolutional, fully_connected

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
from torch import nn  # noqa: E402 (where torch is)

from ntkdask.modules.state.weights import load_tensors, load_weights  # noqa: E402
from ntkdask.modules.training import Training  # noqa: E402
from ntkdask.workflows.empirical import train as train_module  # noqa: E402
from ntkdask.workflows.empirical.train import train  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")


class Dropping(nn.Module):
    """Dropout and BatchNorm, and a part that its owner keeps in eval mode."""

    def __init__(self):
        super().__init__()
        self.body = FiniteNetwork(fully_connected(1), 6, 5, (192,)).build()
        self.norm, self.drop = nn.BatchNorm1d(5), nn.Dropout(0.5)
        self.body.eval()

    def forward(self, x):
        return self.drop(self.norm(self.body(x.flatten(1))))


class Sharing(nn.Module):
    """One matrix used twice, under two names."""

    def __init__(self):
        super().__init__()
        self.first = FiniteNetwork(Network((Dense(),)), 1, 192, (192,)).build()[1].core
        self.second = nn.Sequential(self.first)
        self.readout = FiniteNetwork(Network((Dense(),)), 1, 3, (192,)).build()

    def forward(self, x):
        return self.readout(torch.tanh(self.second(torch.tanh(self.first(x.flatten(1)) / 50)) / 14))


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Stopped(Exception):
    pass


class StopAfter:
    """A listener that ends the process' work after some epochs."""

    def __init__(self, epochs):
        self.left = epochs
        self.heard = []

    def stage(self, label, total, done=0):
        self.heard.append((label, total, done))

    def task(self, label, done):
        self.left -= 1
        if self.left == 0:
            raise Stopped


class TestWorkflow:
    @pytest.mark.parametrize("make", [resnet, Dropping, Sharing], ids=["resnet", "dropout", "tied"])
    @pytest.mark.parametrize(("stop", "every"), [(1, 1), (2, 1), (1, 2)])
    def test_a_resumed_training_ends_with_the_same_bits(self, make, stop, every, tmp_path):
        x, labels = data(29, classes=3)
        test = data(7, seed=1)
        whole, part = make(), make()
        once = train(whole, x, labels, tmp_path / "whole", SHORT, seed=3, test=test)
        with pytest.raises(Stopped):
            train(part, x, labels, tmp_path / "part", SHORT, seed=3, test=test, listener=StopAfter(stop))
        listener = StopAfter(0)
        resumed = make()
        twice = train(
            resumed, x, labels, tmp_path / "part", SHORT, seed=3, test=test, listener=listener, resume_every=every
        )
        assert listener.heard == [("train-epoch", 3, stop)]
        assert same(weights(resumed), weights(whole))
        assert once.metrics == twice.metrics
        for name in ("epoch-0000", "epoch-0002", "epoch-0003", "resume"):
            files = [load_tensors(tmp_path / folder / f"{name}.safetensors") for folder in ("whole", "part")]
            assert same(files[0][0], files[1][0])
            assert files[0][1] == files[1][1]
        lines = [(tmp_path / folder / "metrics.jsonl").read_text() for folder in ("whole", "part")]
        assert lines[0] == lines[1]

    def test_a_finished_training_gives_its_weights_at_once(self, tmp_path):
        x, labels = data()
        first, second = resnet(), resnet()
        train(first, x, labels, tmp_path, SHORT)
        listener = StopAfter(1)
        train(second, x, labels, tmp_path, SHORT, listener=listener)
        assert same(weights(first), weights(second))
        assert listener.left == 1

    def test_resume_files_may_be_rarer_than_epochs(self, tmp_path):
        x, labels = data()
        protocol = TrainingProtocol(epochs=5, batch=8, checkpoints=())
        with pytest.raises(Stopped):
            train(resnet(), x, labels, tmp_path / "part", protocol, resume_every=3, listener=StopAfter(4))
        listener, resumed, whole = StopAfter(0), resnet(), resnet()
        train(resumed, x, labels, tmp_path / "part", protocol, resume_every=3, listener=listener)
        train(whole, x, labels, tmp_path / "whole", protocol)
        assert listener.heard == [("train-epoch", 5, 3)]
        assert same(weights(whole), weights(resumed))

    def test_cut_off_between_a_checkpoint_and_its_resume_file(self, tmp_path, monkeypatch):
        x, labels = data()
        write = train_module._Run._write_resume

        def stop_at_two(run):
            if run.epoch == 2:
                raise Stopped
            write(run)

        monkeypatch.setattr(train_module._Run, "_write_resume", stop_at_two)
        with pytest.raises(Stopped):
            train(resnet(), x, labels, tmp_path / "part", SHORT)
        monkeypatch.undo()
        assert (tmp_path / "part" / "epoch-0002.safetensors").exists()
        resumed, whole = resnet(), resnet()
        metrics = [
            train(module, x, labels, tmp_path / name, SHORT).metrics
            for module, name in ((resumed, "part"), (whole, "whole"))
        ]
        assert metrics[0] == metrics[1]
        assert same(weights(resumed), weights(whole))

    @pytest.mark.parametrize("content", [b"", b"\x02\0\0\0\0\0\0\0{}"], ids=["empty", "another file"])
    def test_a_damaged_resume_file(self, content, tmp_path):
        x, labels = data(16, (4,))
        train(linear(), x, labels, tmp_path, SHORT)
        (tmp_path / "resume.safetensors").write_bytes(content)
        with pytest.raises(StoreError, match=r"resume.safetensors.* is damaged.*overwrite=True"):
            train(linear(), x, labels, tmp_path, SHORT)
        train(linear(), x, labels, tmp_path, SHORT, overwrite=True)

    @pytest.mark.gpu
    def test_on_a_gpu(self, tmp_path):
        """Rows of CuPy, or of NumPy to a module on the GPU: the same steps as on the CPU, to rounding."""
        import cupy

        x, labels = data()
        protocol = TrainingProtocol(epochs=2, batch=8, learning_rate=1e-3, checkpoints=(0, 2))
        modules = [resnet(), resnet().cuda(), resnet().cuda()]
        rows = [x, x, cupy.asarray(x)]
        state = torch.cuda.get_rng_state()
        for i, module in enumerate(modules):
            train(module, rows[i], labels, tmp_path / str(i), protocol, test=(rows[i][:5], labels[:5]))
        assert torch.equal(state, torch.cuda.get_rng_state())
        expected = weights(modules[0])
        for module in modules[1:]:
            for name, tensor in weights(module).items():
                torch.testing.assert_close(tensor.cpu(), expected[name], rtol=5e-3, atol=1e-3)
        again = ResNet18(2, 3, weights=str(tmp_path / "1" / "epoch-0002.safetensors")).build()
        assert same(weights(again), {name: tensor.cpu() for name, tensor in weights(modules[1]).items()})

    def test_checkpoints_and_metrics(self, tmp_path):
        x, labels = data()
        test = data(7, seed=1)
        module = resnet()
        trained = train(module, x, labels, tmp_path, SHORT, test=test)
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert lines == list(trained.metrics)
        assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
        assert [("train_loss" in line) for line in lines] == [True, False, True, True]
        assert all(0 <= line["test_accuracy"] <= 1 and line["learning_rate"] == 0.05 for line in lines)
        assert lines[0]["loss"] == lines[0]["train_loss"]
        start = resnet(seed=9)
        load_weights(start, trained.checkpoint(0))
        assert same(weights(start), weights(resnet()))
        assert same(weights(ResNet18(2, 3, weights=str(trained.checkpoint(3))).build()), weights(module))
        middle = Training(ResNet18(2, 3, weights=str(trained.checkpoint(2))).build(), SHORT, *test, 0)
        assert middle.evaluate(middle.examples).loss == pytest.approx(lines[2]["test_loss"], rel=1e-6)
        with pytest.raises(InputError, match=r"after epoch 1; there are those after \[0, 2, 3\]"):
            trained.checkpoint(1)

    def test_it_learns(self, tmp_path):
        x, labels = data(24, (20,))
        module = FiniteNetwork(fully_connected(1, scale_inputs=True), 64, 3, (20,)).build()
        protocol = TrainingProtocol(epochs=40, batch=8, checkpoints=(0, 40))
        first, *_, last = train(module, x, labels, tmp_path, protocol).metrics
        assert last["train_accuracy"] == 1
        assert last["loss"] < first["loss"] / 5

    def test_vectors_and_images_of_a_finite_network(self, tmp_path):
        x, labels = data(16)
        for name, network in (("fc", fully_connected(1, scale_inputs=True)), ("conv", convolutional(1))):
            module = FiniteNetwork(network, 4, 3, (8, 8, 3)).build()
            protocol = TrainingProtocol(epochs=1, batch=8, learning_rate=1e-3, checkpoints=())
            assert train(module, x, labels, tmp_path / name, protocol).metrics[-1]["epoch"] == 1

    def test_frozen_layers_stay(self, tmp_path):
        x, labels = data(16)
        module = FiniteNetwork(convolutional(2, trainable_ends=False), 4, 3, (8, 8, 3)).build()
        before = weights(module)
        protocol = TrainingProtocol(epochs=1, batch=8, learning_rate=1e-3, checkpoints=())
        train(module, x, labels, tmp_path, protocol)
        frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
        assert len(frozen) == 2
        assert all(torch.equal(before[name], tensor) == (name in frozen) for name, tensor in weights(module).items())

    def test_a_wrapped_module_goes_on_where_a_plain_one_stopped(self, tmp_path):
        x, labels = data(16, (4,))
        module = nn.DataParallel(linear())
        with pytest.raises(Stopped):
            train(linear(), x, labels, tmp_path / "a", SHORT, listener=StopAfter(1))
        found = train(module, x, labels, tmp_path / "a", SHORT)
        whole = linear()
        train(whole, x, labels, tmp_path / "b", SHORT)
        assert same(weights(module.module), weights(whole))
        again = linear()
        load_weights(again, found.checkpoint(3))
        assert same(weights(again), weights(whole))

    def test_other_arguments_are_refused_and_overwrite_starts_again(self, tmp_path):
        x, labels = data()
        train(resnet(), x, labels, tmp_path, SHORT)
        longer = TrainingProtocol(**{**vars(SHORT), "batch": 16})
        others = [
            ((resnet(1), x, labels), {}, "module"),
            ((resnet(), x + 1, labels), {}, "data"),
            ((resnet(), x, labels), {"seed": 1}, "seed: stored 0, asked 1"),
            ((resnet(), x, labels), {"protocol": longer}, "protocol.batch: stored 8, asked 16"),
            ((resnet(), x, labels), {"test": (x, labels)}, "test"),
        ]
        for arguments, changes, said in others:
            with pytest.raises(FingerprintError, match=said):
                train(*arguments, tmp_path, **{"protocol": SHORT, **changes})
        short = TrainingProtocol(epochs=1, batch=8, checkpoints=())
        (tmp_path / "notes.txt").write_text("of the user")
        train(resnet(), x, labels, tmp_path, short, overwrite=True)
        assert not list(tmp_path.glob("epoch-*"))
        assert (tmp_path / "notes.txt").read_text() == "of the user"

    def test_nothing_of_torch_or_of_the_module_is_left_changed(self, tmp_path):
        x, labels = data()
        module = Dropping()
        modes = [part.training for part in module.modules()]
        assert True in modes
        assert False in modes
        state, threads, x_before = torch.get_rng_state(), torch.get_num_threads(), x.copy()
        with torch.no_grad():
            train(module, x, labels, tmp_path / "a", SHORT)
            assert not torch.is_grad_enabled()
        assert torch.equal(state, torch.get_rng_state())
        assert torch.get_num_threads() == threads
        assert [part.training for part in module.modules()] == modes
        assert all(p.grad is None for p in module.parameters())
        np.testing.assert_array_equal(x, x_before)
        torch.manual_seed(1)
        again = Dropping()
        train(again, x, labels, tmp_path / "b", SHORT)
        assert same(weights(module), weights(again))


class TestDivergence:
    HOT = TrainingProtocol(4, 4, 1e6, 1e-3, 0.9, 0.0, (0, 2, 4))

    @pytest.mark.parametrize("stop", [None, 1, 3])
    def test_it_starts_again_with_the_lower_rate(self, stop, tmp_path):
        x, labels = data(16, (4,))
        folder = tmp_path / "hot"
        if stop:
            with pytest.raises(Stopped):
                train(linear(), x, labels, folder, self.HOT, listener=StopAfter(stop))
        module, calm = linear(), linear()
        trained = train(module, x, labels, folder, self.HOT)
        assert trained.learning_rate == 1e-3
        event, *lines = trained.metrics
        assert event["event"] == "diverged"
        assert (event["epoch"], event["learning_rate"]) == (1, 1e6)
        expected = train(calm, x, labels, tmp_path / "calm", TrainingProtocol(4, 4, 1e-3, None, 0.9, 0.0, (0, 2, 4)))
        assert lines == list(expected.metrics)
        assert same(weights(module), weights(calm))

    def test_not_a_number_is_divergence_and_null_in_the_metrics(self, tmp_path):
        x, labels = data(16, (4,))
        protocol = TrainingProtocol(2, 4, 1e200, 1e-3, checkpoints=(), loss="squared")
        trained = train(linear(), x, labels, tmp_path, protocol)
        assert trained.metrics[0]["event"] == "diverged"
        assert trained.metrics[0]["loss"] is None
        assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()

    @pytest.mark.parametrize("lower", [None, 1e5])
    def test_no_rate_left(self, lower, tmp_path):
        x, labels = data(16, (4,))
        protocol = TrainingProtocol(4, 4, 1e6, lower, checkpoints=())
        rate = "100000" if lower else "1e\\+06"
        with pytest.raises(InputError, match=f"diverged at learning rate {rate}.*lower learning_rate"):
            train(linear(), x, labels, tmp_path, protocol)


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"epochs": 0}, "epochs is 0"),
            ({"batch": 2.5}, "batch is 2.5"),
            ({"learning_rate": 0}, "learning_rate is 0"),
            ({"learning_rate": None}, "learning_rate"),
            ({"learning_rate_if_diverged": math.nan}, "learning_rate_if_diverged is nan"),
            ({"momentum": 1.0}, "momentum is 1.0"),
            ({"weight_decay": -1}, "weight_decay is -1"),
            ({"loss": "hinge"}, "loss is 'hinge'"),
            ({"divergence": True}, "divergence is True"),
            ({"checkpoints": 3}, "checkpoints is 3"),
            ({"checkpoints": (0, 1.5)}, "checkpoints is"),
            ({"epochs": 60}, r"checkpoints \[100, 150, 200\] come after the last epoch, 60.*epochs=200"),
        ],
    )
    def test_protocols(self, changes, said):
        with pytest.raises(InputError, match=said):
            TrainingProtocol(**changes)

    def test_checkpoints_are_sorted_and_a_protocol_is_a_table(self):
        protocol = TrainingProtocol(epochs=5, checkpoints=[5, 0, 5])
        assert protocol.checkpoints == (0, 5)
        assert registry.from_config(json.loads(json.dumps(registry.to_config(protocol))), "protocol") == protocol

    @pytest.mark.parametrize("module", [nn.Linear, fully_connected(1), "ResNet18"])
    def test_what_is_no_module(self, module, tmp_path):
        with pytest.raises(InputError, match=r"train: module is .*; give a torch\.nn\.Module"):
            train(module, np.zeros((4, 3), np.float32), np.arange(4) % 2, tmp_path)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("targets", "said"),
        [
            (np.arange(16) % 4, "labels go from 0 to 3, but the module has 3 outputs: 0 to 2"),
            (np.arange(16) % 3 - 1, "labels go from -1"),
            (np.arange(15) % 3, "16 rows have 15 targets"),
            (np.zeros((16, 2)), r"shape \(16, 2\).*\(n, 3\)"),
            (np.zeros(16), "expected integer labels"),
            (np.full(16, "cat"), "expected integer labels"),
        ],
    )
    def test_targets(self, targets, said, tmp_path):
        x, _ = data(16, (4,))
        with pytest.raises(InputError, match=said):
            train(linear(), x, targets, tmp_path, SHORT)

    def test_modules(self, tmp_path):
        x, labels = data(16, (4,))
        frozen = linear()
        frozen.requires_grad_(False)
        with pytest.raises(InputError, match="no parameter that requires gradients"):
            train(frozen, x, labels, tmp_path / "a", SHORT)
        with pytest.raises(InputError, match=r"gives \(1,\) for one row, expected \(1, n_outputs\)"):
            train(nn.Sequential(linear(n_outputs=1), nn.Flatten(0)), x, labels, tmp_path / "b", SHORT)

    def test_no_rows(self, tmp_path):
        x, labels = data(16, (4,))
        with pytest.raises(InputError, match="there are no rows"):
            train(linear(), x[:0], labels[:0], tmp_path, SHORT)

    def test_images_of_bytes(self, tmp_path):
        x, labels = data(16)
        with pytest.raises(DtypeError, match=r"dtype uint8.*x / 255"):
            train(resnet(), x.astype("uint8"), labels, tmp_path, SHORT)

    def test_resume_every(self, tmp_path):
        x, labels = data(16, (4,))
        with pytest.raises(InputError, match="resume_every is 0"):
            train(linear(), x, labels, tmp_path, SHORT, resume_every=0)
