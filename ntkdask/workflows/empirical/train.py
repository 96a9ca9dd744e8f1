"""Training a module by a `TrainingProtocol`, with checkpoints, in a folder; cut off, it goes on from its last whole epoch.

folder/record.json             fingerprint: protocol, seed, data, initial module
folder/epoch-0050.safetensors  weights after the epochs that the protocol asks for
folder/metrics.jsonl           a line for each epoch, and for a restart after divergence
folder/resume.safetensors      weights, momenta and metrics of the last epoch: written last, a resume starts from it
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntkdask.arrays import Array, to_host
from ntkdask.errors import DataError, InputError, StoreError
from ntkdask.execution.peak import peak_bytes
from ntkdask.execution.progress import DRIVER, Listener, Record
from ntkdask.execution.site import Site
from ntkdask.execution.window import Done
from ntkdask.files import exclusive, remove, write_text
from ntkdask.modules.optional import require_torch
from ntkdask.modules.protocol import TrainingProtocol
from ntkdask.registry import to_config
from ntkdask.states import content_digest

if TYPE_CHECKING:
    from ntkdask.modules.training import Examples, Score, Training

LABEL = "train-epoch"
PROGRESS = "ntkdask.training"
OWN = ("record.json", "metrics.jsonl", "resume.safetensors", "epoch-*.safetensors")
"""What a training writes to its folder, and `overwrite` removes: nothing else that lies there."""


@dataclass(frozen=True)
class Trained:
    """What `train` did: its folder, the learning rate that it ended with, and the lines of metrics.jsonl."""

    folder: Path
    learning_rate: float
    metrics: tuple[Mapping[str, Any], ...]

    def checkpoint(self, epoch: int) -> Path:
        """The file of the weights after `epoch`, for `load_weights` and a description's `weights`; InputError where none are kept."""
        path = _checkpoint(self.folder, epoch)
        if not path.exists():
            kept = sorted(int(other.stem.removeprefix("epoch-")) for other in self.folder.glob("epoch-*.safetensors"))
            raise InputError(f"no weights were kept after epoch {epoch}; there are those after {kept}.")
        return path


def train(
    module: Any,
    x: Array,
    targets: Array,
    folder: str | os.PathLike[str],
    protocol: TrainingProtocol | None = None,
    *,
    seed: int = 0,
    test: tuple[Array, Array] | None = None,
    input_layout: str | None = "nchw",
    resume_every: int = 1,
    listener: Listener | None = None,
    overwrite: bool = False,
) -> Trained:
    """Train `module` in place, on the device where it lies, or go on where `folder` stops.

    Parameters
    ----------
    module : torch.nn.Module
        With its initial weights, also to go on. It ends with the weights after the last epoch, its training flags as they were.
    x : array (n, *s), floating
        Rows as the module takes them, standardised; images NHWC. They are moved to the module's device.
    targets : array (n,) or (n, O)
        Labels, or numbers.
    folder : str or path
        Keeps checkpoints, metrics and the state that a resume starts from.
    protocol : TrainingProtocol or None
        None: the paper's.
    seed : int
        Of the order of rows.
    test : tuple of arrays (rows, targets), or None
        Scored after each epoch.
    input_layout : str or None
        "nchw": images are transposed from NHWC for the module; None passes them as they are.
    resume_every : int
        Epochs between two resume files.
    listener : Listener or None
        Hears of every epoch.
    overwrite : bool
        Whether a training in `folder` is removed and begun again.

    Returns
    -------
    Trained
        Its folder, checkpoints, learning rate and metrics.

    Raises
    ------
    MissingDependencyError
        Without torch.
    FingerprintError
        When the folder holds another training.
    StoreError
        When the folder is in use or damaged.
    DtypeError
        For rows of integers.
    InputError
        For rows, targets and modules that do not fit each other, and when training diverges at every learning rate of the protocol.

    Notes
    -----
    A line of the metrics is {"epoch", "learning_rate", "loss", "accuracy"} (measured on the way, in training mode; of epoch 0 as
    evaluated), "test_loss", "test_accuracy", and at checkpoints "train_loss", "train_accuracy", in eval mode;
    {"event": "diverged", …} before a restart. A resumed training ends with the same bits on the CPU (the same torch and number of
    threads).
    """
    require_torch("train")
    from ntkdask.modules.training import Training, require_module

    require_module(module)
    protocol = protocol or TrainingProtocol()
    if isinstance(resume_every, bool) or not isinstance(resume_every, int) or resume_every < 1:
        raise InputError(f"train: resume_every is {resume_every!r}, expected a number of epochs >= 1.")
    site = Site.at(folder, None, listener)
    fingerprint = _fingerprint(module, x, targets, protocol, seed, test, input_layout)
    training = Training(module, protocol, x, targets, seed, input_layout)
    with exclusive(site.home):
        if overwrite:
            for path in (path for pattern in OWN for path in site.home.glob(pattern)):
                remove(path)
        Record.open(site.home, fingerprint).begin()
        test_examples = None if test is None else training.prepared(*test)
        run = _Run(training, test_examples, resume_every, site)
        run.go()
    return Trained(site.home, run.learning_rate, tuple(run.lines))


class _Run:
    """The loop over epochs, and its files in the folder of the site."""

    def __init__(self, training: Training, test: Examples | None, resume_every: int, site: Site) -> None:
        self.training, self.test, self.resume_every = training, test, resume_every
        self.folder, self.listener = site.home, site.listener
        self.protocol = training.protocol
        self.learning_rate = self.protocol.learning_rate
        self.epoch = 0
        self.lines: list[dict[str, Any]] = []

    def go(self) -> None:
        """Epoch by epoch to the last, from the last one that was finished."""
        if not self._resume():
            self._begin()
        self.listener.stage(LABEL, self.protocol.epochs, self.epoch)
        while self.epoch < self.protocol.epochs:
            started = time.perf_counter()
            score = self.training.epoch(self.epoch + 1)
            if self.training.diverged(score.loss, self._initial_loss()):
                self._restart(score)
                continue
            self.epoch += 1
            self._finish(score)
            self.listener.task(LABEL, Done(score, time.perf_counter() - started, peak_bytes(), DRIVER))

    def _begin(self) -> None:
        """Record the initial weights, epoch 0."""
        self._finish(self.training.evaluate(self.training.examples))

    def _resume(self) -> bool:
        """Restore the last epoch that the folder has; False where it has none."""
        from ntkdask.modules.state.weights import load_tensors

        path = self.folder / "resume.safetensors"
        if not path.exists():
            return False
        try:
            state, metadata = load_tensors(path)
            progress = json.loads(metadata[PROGRESS])
            epoch, learning_rate, lines = (progress[key] for key in ("epoch", "learning_rate", "metrics"))
        except (DataError, KeyError, ValueError, TypeError) as error:
            raise StoreError(
                f"{path}, from which this training would go on, is damaged. Give overwrite=True to start again."
            ) from error
        self.epoch, self.learning_rate, self.lines = epoch, learning_rate, lines
        self.training.restore(state, self.learning_rate)
        self._write_metrics()
        return True

    def _finish(self, score: Score) -> None:
        """Write an epoch: its checkpoint, its metrics, and last the state that a resume starts from."""
        from ntkdask.modules.state.weights import save_weights

        line = {"epoch": self.epoch, "learning_rate": self.learning_rate, **_numbers(score)}
        is_checkpoint = self.epoch in self.protocol.checkpoints
        if self.test is not None:
            line |= _numbers(self.training.evaluate(self.test), "test_")
        if is_checkpoint:
            train_score = self.training.evaluate(self.training.examples) if self.epoch else score
            line |= _numbers(train_score, "train_")
            save_weights(self.training.module, _checkpoint(self.folder, self.epoch))
        self.lines.append(line)
        self._write_metrics()
        if is_checkpoint or self.epoch % self.resume_every == 0 or self.epoch == self.protocol.epochs:
            self._write_resume()

    def _restart(self, score: Score) -> None:
        """The initial weights at the lower learning rate; InputError where there is none left."""
        lower = self.protocol.learning_rate_if_diverged
        if lower is None or self.learning_rate != self.protocol.learning_rate or lower == self.learning_rate:
            raise InputError(
                f"training diverged at learning rate {self.learning_rate:g}: a loss of {score.loss:.3g} in epoch {self.epoch + 1}, "
                f"{self._initial_loss():.3g} at the start. Use a lower learning_rate; the inputs should be standardised."
            )
        event = {"event": "diverged", "epoch": self.epoch + 1, "learning_rate": self.learning_rate, **_numbers(score)}
        for path in self.folder.glob("epoch-*.safetensors"):
            remove(path)
        self.training.restart(lower)
        self.epoch, self.learning_rate, self.lines = 0, lower, [event]
        self._begin()

    def _initial_loss(self) -> float:
        """The loss of the initial weights; infinite where it was not finite."""
        return next((line["loss"] for line in self.lines if line["epoch"] == 0 and line["loss"] is not None), math.inf)

    def _write_metrics(self) -> None:
        write_text(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines))

    def _write_resume(self) -> None:
        from ntkdask.modules.state.weights import save_tensors

        progress = {"epoch": self.epoch, "learning_rate": self.learning_rate, "metrics": self.lines}
        path = self.folder / "resume.safetensors"
        save_tensors(self.training.state(), path, {PROGRESS: json.dumps(progress)})


def _checkpoint(folder: Path, epoch: int) -> Path:
    return folder / f"epoch-{epoch:04d}.safetensors"


def _numbers(score: Score, prefix: str = "") -> dict[str, float | None]:
    """The numbers of a score as JSON has them: None for those that are not finite."""
    named = {f"{prefix}{key}": value for key, value in asdict(score).items()}
    return {key: value if value is not None and math.isfinite(value) else None for key, value in named.items()}


def _fingerprint(
    module: Any,
    x: Array,
    targets: Array,
    protocol: TrainingProtocol,
    seed: int,
    test: tuple[Array, Array] | None,
    input_layout: str | None,
) -> dict[str, Any]:
    """Everything that decides the weights and the metrics."""
    from ntkdask.modules.state.shipping import described

    return {
        "protocol": to_config(protocol),
        "seed": seed,
        "input_layout": input_layout,
        "data": content_digest(to_host(x, "x"), to_host(targets, "targets")),
        "test": None if test is None else content_digest(*map(to_host, test)),
        "module": to_config(described(module)),
        "device": next((p.device.type for p in module.parameters()), "cpu"),
        "torch": importlib.metadata.version("torch"),
    }
