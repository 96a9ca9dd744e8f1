"""What conjugate gradients carry from one product to the next, as plain arrays where a run is to be resumed.

The method is in `conjugate_gradients`, which alone changes what is kept here; a workflow stores `State.to_state` as a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ntkdask.arrays import Array, to_device, to_host
from ntkdask.solvers.block_krylov import Process

_NUMBERS = ("cycle", "norm", "lowest", "curvature")
"""Fields of an iterate that may be infinite or NaN, and so are stored among the arrays of a state."""

RUNNING = ""
"""The reason of an alpha that is still being worked on."""


@dataclass
class Iterate:
    """One alpha: its iterate, the best iterates so far, and what is known of them.

    Parameters
    ----------
    alpha : float
        α.
    x : array (n, k)
        The iterate.
    reason : str
        Why it stopped; `RUNNING` while it is being worked on.
    best : array (n, k), optional
        The iterate of the lowest residual, by the recurrence between checks.
    residuals : array (k,)
        Relative residuals of `best`.
    sure : array (n, k), optional
        The iterate of the lowest true residual: what is left where the recurrence went astray.
    sure_residuals : array (k,)
        True relative residuals of `sure`.
    cycle : float
        The largest true residual when the present process started.
    norm : float
        The largest relative residual by the recurrence.
    lowest : float
        The lowest `norm` so far.
    lowest_at : int
        The iteration of `lowest`.
    due : bool
        Whether the next product is to check the true residual.
    curvature : float
        The lowest negative curvature met, else NaN.
    """

    alpha: float
    x: Array
    reason: str = RUNNING
    best: Array = None
    residuals: np.ndarray = field(default_factory=lambda: np.empty(0))
    sure: Array = None
    sure_residuals: np.ndarray = field(default_factory=lambda: np.empty(0))
    cycle: float = np.inf
    norm: float = np.nan
    lowest: float = np.inf
    lowest_at: int = 0
    due: bool = False
    curvature: float = np.nan


@dataclass
class State:
    """All that an interrupted solve needs to go on to the same bits; `to_state` gives it as plain arrays."""

    iterates: list[Iterate]
    processes: list[Process]
    iteration: int = 0
    columns: int = 0
    history: list[list[float]] = field(default_factory=list)

    @property
    def residuals(self) -> np.ndarray:
        """The largest relative residual over columns, (n_alphas,): the true one where an alpha is done, else the recurrence's."""
        return np.array([i.norm for i in self.iterates])

    def to_state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """(arrays, attributes) for the store; copies, so that the solver may go on."""
        arrays: dict[str, np.ndarray] = {"history": np.array(self.history).reshape(len(self.history), -1)}
        iterates, processes = [], []
        for i, one in enumerate(self.iterates):
            arrays |= {f"iterate{i}.{name}": getattr(one, name) for name in ("residuals", "sure_residuals")}
            held = {name: getattr(one, name) for name in ("x", "best", "sure")}
            arrays |= {f"iterate{i}.{name}": to_host(a).copy() for name, a in held.items() if a is not None}
            arrays[f"iterate{i}.numbers"] = np.array([getattr(one, name) for name in _NUMBERS])
            iterates.append({name: getattr(one, name) for name in ("alpha", "reason", "lowest_at", "due")})
        for i, process in enumerate(p for p in self.processes if p.active):
            inner, attributes = process.to_state()
            arrays |= {f"process{i}.{name}": array for name, array in inner.items()}
            processes.append(attributes)
        attributes = {
            "iterates": iterates,
            "processes": processes,
            "iteration": self.iteration,
            "columns": self.columns,
        }
        return arrays, attributes

    @classmethod
    def from_state(cls, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any], device: bool = False) -> State:
        """The state that `to_state` described; device: its blocks on the GPU."""

        def part(prefix: str) -> dict[str, np.ndarray]:
            return {k.removeprefix(prefix): np.array(v) for k, v in arrays.items() if k.startswith(prefix)}

        iterates = []
        for i, plain in enumerate(attributes["iterates"]):
            a: dict[str, Any] = part(f"iterate{i}.")
            numbers = dict(zip(_NUMBERS, a.pop("numbers").tolist(), strict=True))
            blocks = {name: to_device(a.pop(name), device) for name in ("x", "best", "sure") if name in a}
            iterates.append(Iterate(**blocks, **a, **plain, **numbers))
        processes = [Process.from_state(part(f"process{i}."), p, device) for i, p in enumerate(attributes["processes"])]
        history = np.asarray(arrays["history"]).tolist()
        return cls(iterates, processes, attributes["iteration"], attributes["columns"], history)
