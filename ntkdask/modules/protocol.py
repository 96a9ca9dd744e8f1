"""How a network is trained: the protocol of Mohamadi and Sutherland 2022, Appendix A, as arguments. No torch here.

Carried out by `training` (the steps) and `workflows.empirical.train` (the loop with its checkpoints).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ntkdask.errors import InputError
from ntkdask.registry import register

LOSSES = ("cross_entropy", "squared")


@register("protocol")
@dataclass(frozen=True)
class TrainingProtocol:
    """Stochastic gradient descent with momentum and weight decay at a constant learning rate, without data augmentation.

    v ← momentum·v + ∇loss + weight_decay·θ, θ ← θ − learning_rate·v, over batches of rows in a new order each epoch.

    Parameters
    ----------
    epochs : int, optional
        Passes over the rows.
    batch : int, optional
        Rows of a batch.
    learning_rate : float, optional
        Constant.
    learning_rate_if_diverged : float, optional
        Training starts again with it, once, where it diverges; None: that is an error at once.
    momentum : float, optional
        In [0, 1).
    weight_decay : float, optional
        Not negative.
    checkpoints : tuple of int, optional
        Epochs after which the weights are kept, 0 for the initial ones.
    loss : str, optional
        "cross_entropy" of softmax (labels or probabilities), or "squared", ½‖f − y‖². Both are means over rows.
    divergence : float, optional
        Training diverges where the loss of an epoch is not finite, or more than so many times that of the initial weights.

    Raises
    ------
    InputError
        For values that cannot be.

    Notes
    -----
    The paper names neither its loss nor the law of the initial weights; its readout is that of a classifier.

    References
    ----------
    Mohamadi and Sutherland 2022, Section 4 and Appendix A.
    """

    epochs: int = 200
    batch: int = 128
    learning_rate: float = 0.1
    learning_rate_if_diverged: float | None = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    checkpoints: tuple[int, ...] = (0, 50, 100, 150, 200)
    loss: str = "cross_entropy"
    divergence: float = 100.0

    def __post_init__(self) -> None:
        for key in ("epochs", "batch"):
            value = getattr(self, key)
            if not _is_integer(value) or value < 1:
                raise InputError(f"TrainingProtocol: {key} is {value!r}, expected an integer >= 1.")
        lower = () if self.learning_rate_if_diverged is None else ("learning_rate_if_diverged",)
        for key in ("learning_rate", *lower, "divergence"):
            if not _is_number(getattr(self, key)) or getattr(self, key) <= 0:
                raise InputError(f"TrainingProtocol: {key} is {getattr(self, key)!r}, expected a positive number.")
        for key in ("momentum", "weight_decay"):
            if not _is_number(getattr(self, key)) or getattr(self, key) < 0:
                raise InputError(f"TrainingProtocol: {key} is {getattr(self, key)!r}, expected a number >= 0.")
        if self.momentum >= 1:
            raise InputError(f"TrainingProtocol: momentum is {self.momentum}, expected a number below 1.")
        if self.loss not in LOSSES:
            raise InputError(f"TrainingProtocol: loss is {self.loss!r}, expected {' or '.join(map(repr, LOSSES))}.")
        self._set_checkpoints()

    def _set_checkpoints(self) -> None:
        given = self.checkpoints
        if not isinstance(given, (tuple, list)) or not all(_is_integer(epoch) and epoch >= 0 for epoch in given):
            raise InputError(f"TrainingProtocol: checkpoints is {given!r}, expected integers >= 0, as in (0, 50).")
        late = [epoch for epoch in given if epoch > self.epochs]
        if late:
            raise InputError(
                f"TrainingProtocol: checkpoints {late} come after the last epoch, {self.epochs}. Use checkpoints up to {self.epochs}, "
                f"as in (0, {self.epochs}), or epochs={max(late)}."
            )
        object.__setattr__(self, "checkpoints", tuple(sorted(set(given))))


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
