"""The steps of training a module: an epoch of stochastic gradient descent, its loss and accuracy, and all that a resume needs.

Numerics alone: nothing is written here; `workflows.empirical.train` keeps checkpoints. The order of an epoch's rows, and the random
numbers of dropout, are functions of seed and epoch, so that a resumed training takes the same steps: the same bits on the CPU at an
equal number of threads. torch's own random state is left as it was.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ntkdask import seeds
from ntkdask.arrays import FLOAT_DTYPES, Array, to_host
from ntkdask.errors import DtypeError, InputError
from ntkdask.modules.protocol import TrainingProtocol
from ntkdask.modules.state.shipping import unwrapped
from ntkdask.modules.tensors import as_tensor, require_layout

EVALUATION_ROWS = 1024
"""Rows of a forward pass without gradients."""


@dataclass(frozen=True)
class Score:
    """Mean loss over rows, and accuracy: the share of rows whose largest output is that of their target; None for one output."""

    loss: float
    accuracy: float | None


@dataclass(frozen=True)
class Examples:
    """Rows and targets on the module's device: x (n, *s) as given, targets (n,) labels or (n, O)."""

    x: Tensor
    targets: Tensor
    layout: str | None

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.x)

    def batch(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """A copy of some rows, in the layout that the module takes, and their targets; the module may write to the copy."""
        return as_tensor(self.x[chosen], layout=self.layout), self.targets[chosen]


def require_module(module: Any) -> None:
    """InputError unless the module is an object of torch.nn.Module, which training writes to."""
    if not isinstance(module, torch.nn.Module):
        found = f"the class {module.__name__}" if isinstance(module, type) else f"a {type(module).__name__}"
        raise InputError(
            f"train: module is {found}; give a torch.nn.Module, such as ResNet18().build() or FiniteNetwork(...).build()."
        )


class Training:
    """A module with its optimiser and its rows; `epoch` changes the weights in place and leaves the training flags as they were.

    Parameters
    ----------
    module : torch.nn.Module
        With outputs (n, O) and parameters that require gradients.
    protocol : TrainingProtocol
        How it is trained.
    x : array (n, *s)
        Training rows, float32 or float64.
    targets : array (n,) or (n, O)
        Integer labels, or floats.
    seed : int
        Of the order of rows, and of dropout.
    input_layout : str or None, optional
        "nchw": 4-d rows (n, H, W, C) reach the module as (n, C, H, W); None: as they are.
    """

    def __init__(
        self,
        module: nn.Module,
        protocol: TrainingProtocol,
        x: Array,
        targets: Array,
        seed: int,
        input_layout: str | None = "nchw",
    ) -> None:
        self.module, self.protocol, self.seed = module, protocol, seed
        self._own = unwrapped(module)  # whose names checkpoints keep
        self._names = {name: p for name, p in self._own.named_parameters() if p.requires_grad}
        if not self._names:
            raise InputError(f"the {type(module).__name__} has no parameter that requires gradients: nothing to train.")
        self._layout = require_layout(input_layout)
        self._first = next(iter(self._names.values()))
        self.n_outputs = self._outputs_of(x)
        self.examples = self.prepared(x, targets)
        self._initial = {name: tensor.detach().clone() for name, tensor in self._own.state_dict().items()}
        self._optimizer = self._new_optimizer(protocol.learning_rate)

    def prepared(self, x: Array, targets: Array) -> Examples:
        """Rows and targets on the module's device, in its dtype; InputError where they do not match, DtypeError for integers."""
        _require_rows(x)
        labels = np.asarray(to_host(targets))
        if len(labels) != len(x):
            raise InputError(f"{len(x)} rows have {len(labels)} targets; give one target for each row.")
        device, dtype = self._first.device, self._first.dtype
        rows = as_tensor(x, layout=None).to(device, dtype)
        return Examples(rows, self._targets(labels).to(device), self._layout)

    def epoch(self, number: int) -> Score:
        """One pass over the rows in training mode; returns mean loss and accuracy as they were on the way.

        The epoch's `number`, from 1, decides the order of rows. A last batch of one row, which would give BatchNorm no variance, is
        joined to the batch before it.
        """
        protocol, examples = self.protocol, self.examples
        order = seeds.permutation(self.seed, ("training", "order", number), examples.n)
        device = examples.x.device
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        hits = torch.zeros((), dtype=torch.int64, device=device)
        with _in_mode(self.module, True), torch.enable_grad(), self._seeded(number):
            for rows in _batches(torch.from_numpy(order), protocol.batch):
                x, targets = examples.batch(rows.to(device))
                self._optimizer.zero_grad(set_to_none=True)
                outputs = self.module(x)
                loss = _loss(outputs, targets, protocol.loss)
                loss.backward()
                self._optimizer.step()
                loss_sum += loss.detach().double() * len(rows)
                hits += _hits(outputs.detach(), targets)
            self._optimizer.zero_grad(set_to_none=True)
        return self._score(loss_sum, hits, examples.n)

    def evaluate(self, examples: Examples) -> Score:
        """Mean loss and accuracy in eval mode."""
        device = examples.x.device
        loss_sum = hits = torch.zeros((), dtype=torch.float64, device=device)
        with _in_mode(self.module, False), torch.no_grad():
            for start in range(0, examples.n, EVALUATION_ROWS):
                x, targets = examples.batch(
                    torch.arange(start, min(start + EVALUATION_ROWS, examples.n), device=device)
                )
                outputs = self.module(x)
                loss_sum = loss_sum + _loss(outputs, targets, self.protocol.loss).double() * len(x)
                hits = hits + _hits(outputs, targets)
        return self._score(loss_sum, hits, examples.n)

    def diverged(self, loss: float, initial_loss: float) -> bool:
        """Whether an epoch's loss is not finite, or too far above that of the initial weights."""
        return not math.isfinite(loss) or loss > self.protocol.divergence * max(initial_loss, math.log(2))

    def restart(self, learning_rate: float) -> None:
        """Go back to the initial weights, without momentum, with another learning rate."""
        self._own.load_state_dict(self._initial)
        self._optimizer = self._new_optimizer(learning_rate)

    def state(self) -> dict[str, Tensor]:
        """Weights, buffers and momenta by name: all that a resume needs besides the number of the epoch."""
        state = {f"weights.{name}": tensor for name, tensor in self._own.state_dict().items()}
        for name, parameter in self._names.items():
            velocity = self._optimizer.state[parameter].get("momentum_buffer")
            if velocity is not None:
                state[f"momentum.{name}"] = velocity
        return state

    def restore(self, state: Mapping[str, Tensor], learning_rate: float) -> None:
        """Go back to weights, buffers and momenta that `state` gave."""
        weights = {k.removeprefix("weights."): v for k, v in state.items() if k.startswith("weights.")}
        self._own.load_state_dict(weights)
        self._optimizer = self._new_optimizer(learning_rate)
        for name, parameter in self._names.items():
            if f"momentum.{name}" in state:
                velocity = state[f"momentum.{name}"].to(parameter, copy=True)
                self._optimizer.state[parameter]["momentum_buffer"] = velocity

    def _new_optimizer(self, learning_rate: float) -> torch.optim.SGD:
        return torch.optim.SGD(
            self._names.values(),
            lr=learning_rate,
            momentum=self.protocol.momentum,
            weight_decay=self.protocol.weight_decay,
        )

    def _outputs_of(self, x: Array) -> int:
        """O, from the first row; InputError where the module does not give (n, O)."""
        _require_rows(x)
        with _in_mode(self.module, False), torch.no_grad():
            first = as_tensor(x[:1], layout=self._layout).to(self._first.device, self._first.dtype, copy=True)
            outputs = self.module(first)
        if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != 1:
            shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise InputError(f"the {type(self.module).__name__} gives {shape} for one row, expected (1, n_outputs).")
        return int(outputs.shape[1])

    def _targets(self, targets: np.ndarray) -> Tensor:
        """Labels as int64, one-hot for the squared loss; floats (n, O) in the module's dtype. InputError for anything else."""
        if targets.dtype.kind in "iu" and targets.ndim == 1:
            low, high = int(targets.min()), int(targets.max())
            if low < 0 or high >= self.n_outputs:
                raise InputError(
                    f"labels go from {low} to {high}, but the module has {self.n_outputs} outputs: 0 to {self.n_outputs - 1}."
                )
            labels = torch.from_numpy(targets.astype(np.int64))
            if self.protocol.loss == "cross_entropy":
                return labels
            return functional.one_hot(labels, self.n_outputs).to(self._first.dtype)
        columns = targets[:, None] if targets.ndim == 1 and self.protocol.loss == "squared" else targets
        if targets.dtype.kind != "f" or columns.shape != (len(targets), self.n_outputs):
            raise InputError(
                f"targets have dtype {targets.dtype} and shape {targets.shape}; expected integer labels (n,), or floating "
                f"(n, {self.n_outputs}) for the module's {self.n_outputs} outputs."
            )
        return torch.from_numpy(np.array(columns)).to(self._first.dtype)

    @contextlib.contextmanager
    def _seeded(self, number: int) -> Iterator[None]:
        """A context in which torch's generator of the module's device is seeded for an epoch; afterwards it is as it was."""
        device = self._first.device
        is_cuda = device.type == "cuda"
        generator = torch.cuda.default_generators[device.index] if is_cuda else torch.default_generator
        with torch.random.fork_rng([device.index] if is_cuda else []):
            generator.manual_seed(int(seeds.raw_bits(self.seed, ("training", "torch", number), 1)[0]) >> 1)
            yield

    def _score(self, loss_sum: Tensor, hits: Tensor, n: int) -> Score:
        return Score(float(loss_sum) / n, float(hits) / n if self.n_outputs > 1 else None)


def _require_rows(x: Array) -> None:
    if not len(x):
        raise InputError("there are no rows to train on; give at least one.")
    if x.dtype.name not in FLOAT_DTYPES:
        raise DtypeError(
            f"the rows have dtype {x.dtype}; training takes float32 or float64, standardised: images of bytes are first scaled, as in "
            "(x / 255 - mean) / deviation."
        )


def _loss(outputs: Tensor, targets: Tensor, loss: str) -> Tensor:
    if loss == "cross_entropy":
        return functional.cross_entropy(outputs, targets)
    return (outputs - targets).square().sum(1).mean() / 2


def _hits(outputs: Tensor, targets: Tensor) -> Tensor:
    labels = targets if targets.ndim == 1 else targets.argmax(1)
    return (outputs.argmax(1) == labels).sum()


def _batches(order: Tensor, size: int) -> Iterator[Tensor]:
    """`order` cut into pieces of `size`; a last piece of one row is joined to the one before it."""
    edges = list(range(0, len(order), size))
    if len(edges) > 1 and len(order) - edges[-1] == 1:
        edges.pop()
    yield from (order[start:stop] for start, stop in zip(edges, [*edges[1:], len(order)], strict=True))


@contextlib.contextmanager
def _in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """A context in which all submodules are in training mode, or in eval mode; afterwards each is as it was."""
    before = {part: part.training for part in module.modules()}
    module.train(training)
    try:
        yield
    finally:
        for part, mode in before.items():
            part.training = mode
