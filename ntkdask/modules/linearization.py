"""How far a network is from its linearisation after training: |f − f_lin|, at most of the order of 1/√width.

Gradient descent on ½‖f(D; θ) − Y‖², summed over rows and outputs, θ_{t+1} = θ_t − η ∇, beside the same for the linear model

    f_lin(x; θ) = f(x; θ₀) + J(x; θ₀)(θ − θ₀)

Three errors on test rows after T steps: `taylor`, f − f_lin at the network's own θ_T, which the lecture's eq. 7 bounds by
(γ‖x‖²/2 + C‖x‖)·‖θ_T − θ₀‖²/√width; `dynamics`, f at θ_T against f_lin trained by itself, which Lee et al. 2019 bound alike; `worst`,
the largest f − f_lin that is found as far from θ₀ as θ_T. That one falls like 1/√width, as the bound does. Training does better:
it moves units by amounts whose signs cancel, and its errors fall faster, up to 1/width for smooth activations.
Products with J and its transpose come from torch.func: no Jacobian and no kernel is formed, and the module is never changed.
Source: Pleiss, "The NTK as an approximation of neural networks", §2; Lee et al. 2019, Theorem 2.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.func import functional_call, vjp

from ntkdask.arrays import Array, to_host
from ntkdask.errors import InputError
from ntkdask.modules.jacobian.capture import require_output
from ntkdask.modules.jacobian.twins import make_twin, require_module
from ntkdask.modules.tensors import as_tensor
from ntkdask.modules.torch_threads import task_threads

POWER_STEPS = 20
"""Steps of the power method that finds the learning rate."""
ASCENT_STEPS = 30
"""Steps of the ascent towards the worst parameters."""

Parameters = dict[str, torch.Tensor]
Outputs = Callable[[Parameters], torch.Tensor]


@dataclass(frozen=True)
class LinearizationError:
    """How far a network is from its linearisation after training; the first four are root mean squares over test rows and outputs.

    Parameters
    ----------
    taylor : float
        f − f_lin at the network's own θ_T.
    dynamics : float
        f at θ_T less f_lin after its own training.
    worst : float
        The largest f − f_lin that is found at parameters as far from θ₀ as θ_T.
    moved : float
        f − f₀: how far training moved the outputs.
    parameters_moved : float
        ‖θ_T − θ₀‖.
    loss : float
        ½‖f(D; θ_T) − Y‖².
    linear_loss : float
        The same of the linear model after its own training.
    learning_rate : float
        η.
    """

    taylor: float
    dynamics: float
    worst: float
    moved: float
    parameters_moved: float
    loss: float
    linear_loss: float
    learning_rate: float


def linearization_error(
    module: torch.nn.Module,
    x_train: Array,
    targets: Array,
    x_test: Array,
    *,
    steps: int = 100,
    learning_rate: float | None = None,
    input_layout: str | None = "nchw",
) -> LinearizationError:
    """Train a network and its linearisation by full-batch gradient descent from the module's weights, and compare them.

    Parameters
    ----------
    module : torch.nn.Module
        In eval mode, with outputs (n, O). Computations are in its float dtype; its weights, gradients and flags stay as they are.
    x_train : array (n, *s)
        Training rows.
    targets : array (n, O)
        Their targets.
    x_test : array (m, *s)
        Rows on which the two are compared.
    steps : int, optional
        T.
    learning_rate : float, optional
        η. None: 1/λ_max of the empirical NTK of x_train, by the power method, at which all directions of the linear model converge.
    input_layout : str or None, optional
        "nchw": 4-d rows (n, H, W, C) reach the module as (n, C, H, W); None: as they are.

    Returns
    -------
    LinearizationError
        The differences.

    Raises
    ------
    InputError
        For shapes that disagree, a module without parameters that require gradients, and training that diverged.
    """
    if steps < 1 or (learning_rate is not None and not learning_rate > 0):
        raise InputError(
            f"linearization_error: steps={steps} and learning_rate={learning_rate}; use at least 1 step, a rate > 0."
        )
    twin, start = _split(module)
    like = next(iter(start.values()))
    train, test = (as_tensor(x, like.dtype, input_layout).to(like.device) for x in (x_train, x_test))
    y = torch.as_tensor(np.asarray(to_host(targets)), dtype=like.dtype, device=like.device)

    def on(rows: torch.Tensor) -> Outputs:
        # torch.func refuses to write to what it did not make: rows and buffers are copied, for modules that do
        return lambda parameters: functional_call(twin, {**parameters, **_cloned(twin)}, (rows.clone(),))

    with torch.no_grad():
        f0, f0_test = (require_output(on(x)(start), len(x), "linearization_error") for x in (train, test))
    if f0.shape != y.shape:
        raise InputError(
            f"linearization_error: the module gives {tuple(f0.shape)} and targets have shape {tuple(y.shape)}; they must agree."
        )
    with task_threads():
        errors = _trained(on(train), on(test), start, f0, f0_test, y, steps, learning_rate)
    if not np.isfinite([errors.taylor, errors.dynamics]).all():
        raise InputError(
            f"linearization_error: training with learning_rate={errors.learning_rate:g} diverged within {steps} steps. "
            "Use a smaller one."
        )
    return errors


def _trained(
    train: Outputs,
    test: Outputs,
    start: Parameters,
    f0: torch.Tensor,
    f0_test: torch.Tensor,
    y: torch.Tensor,
    steps: int,
    learning_rate: float | None,
) -> LinearizationError:
    """Train both models, and return how they differ."""
    rate = learning_rate or 1.0 / _largest_eigenvalue(train, start, y - f0)
    theta = _descend(train, start, y, steps, rate)
    linear, change = _descend_linear(train, start, f0, y, steps, rate)
    own = _subtract(theta, start)
    with torch.no_grad():
        f, f_train = test(theta), train(theta)
        taylor = f0_test + _push(test, start, f0_test, own)
        trained = f0_test + _push(test, start, f0_test, change)
    return LinearizationError(
        _rms(f - taylor),
        _rms(f - trained),
        _rms(_worst(test, start, f0_test, own)),
        _rms(f - f0_test),
        _norm(own),
        0.5 * float(((f_train - y) ** 2).sum()),
        0.5 * float(((linear - y) ** 2).sum()),
        float(rate),
    )


def _split(module: torch.nn.Module) -> tuple[torch.nn.Module, Parameters]:
    """(a private copy, {name: initial value} of the parameters that are trained)."""
    module = require_module(module, "linearization_error")
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    if not names:
        raise InputError(
            "linearization_error: no parameter of the module requires gradients; there is nothing to train."
        )
    first = module.get_parameter(names[0])
    twin = make_twin(module, first.dtype, first.device)
    return twin, {name: twin.get_parameter(name).detach() for name in names}


def _cloned(twin: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in twin.named_buffers()}


def _vjp(f: Outputs, at: Parameters) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[Parameters]]]:
    """(f, the product with its transposed Jacobian) at some parameters."""
    outputs_and_product: Any = vjp(f, at)
    return outputs_and_product


def _descend(f: Outputs, start: Parameters, y: torch.Tensor, steps: int, rate: float) -> Parameters:
    theta = start
    for _ in range(steps):
        outputs, pull = _vjp(f, theta)
        (gradient,) = pull(outputs.detach() - y)
        theta = {name: (value - rate * gradient[name]).detach() for name, value in theta.items()}
    return theta


def _descend_linear(
    f: Outputs, start: Parameters, f0: torch.Tensor, y: torch.Tensor, steps: int, rate: float
) -> tuple[torch.Tensor, Parameters]:
    """(outputs, change of the parameters) of the linear model after its own training."""
    _, pull = _vjp(f, start)
    change, outputs = {name: torch.zeros_like(p) for name, p in start.items()}, f0
    for _ in range(steps):
        (gradient,) = pull(outputs - y)
        change = {name: (c - rate * gradient[name]).detach() for name, c in change.items()}
        outputs = f0 + _push(f, start, f0, change)
    return outputs, change


def _largest_eigenvalue(f: Outputs, start: Parameters, v: torch.Tensor) -> float:
    """λ_max of J Jᵀ, from below, by the power method from the direction `v`, that in which training begins."""
    _, pull = _vjp(f, start)
    v, size = v / v.norm().clamp_min(torch.finfo(v.dtype).tiny), 0.0
    for _ in range(POWER_STEPS):
        image = _push(f, start, v, pull(v)[0])
        size = float(image.norm())
        if not size > 0:
            raise InputError(
                "linearization_error: the outputs fit the targets already, or do not depend on the parameters."
            )
        v = image / size
    return size


def _push(f: Outputs, start: Parameters, like: torch.Tensor, v: Parameters) -> torch.Tensor:
    """J v, where J is the Jacobian of f at `start`, and `like` any tensor of the shape of the outputs of f.

    By two reverse passes: fewer operations have forward derivatives in torch, and asking for them imports its deprecated compiler.
    """
    outputs_and_product: Any = vjp(lambda u: _vjp(f, start)[1](u)[0], torch.zeros_like(like))
    return outputs_and_product[1](v)[0].detach()


def _worst(f: Outputs, start: Parameters, f0: torch.Tensor, change: Parameters) -> torch.Tensor:
    """f − f_lin at the worst θ that is found on the sphere around θ₀ through θ₀ + change, by ascent from that point.

    ∇½‖f − f_lin‖² = (J(θ) − J(θ₀))ᵀ(f − f_lin); where f is quadratic, this is the power method.
    """
    radius, v = _norm(change), change
    _, pull_start = _vjp(f, start)
    worst = torch.zeros_like(f0)
    for _ in range(ASCENT_STEPS):
        outputs, pull = _vjp(f, {name: start[name] + v[name] for name in v})
        error = outputs.detach() - f0 - _push(f, start, f0, v)
        if _rms(error) > _rms(worst):
            worst = error
        (here,), (there,) = pull(error), pull_start(error)
        uphill = {name: (here[name] - there[name]).detach() for name in v}
        size = _norm(uphill)
        if not size > 0:
            break
        v = {name: value * (radius / size) for name, value in uphill.items()}
    return worst


def _norm(parameters: Parameters) -> float:
    return sum(float((p.double() ** 2).sum()) for p in parameters.values()) ** 0.5


def _subtract(left: Parameters, right: Parameters) -> Parameters:
    return {name: value - right[name] for name, value in left.items()}


def _rms(values: torch.Tensor) -> float:
    return float((values.double() ** 2).mean().sqrt())
