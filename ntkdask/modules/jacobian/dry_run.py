"""A dry run of a few rows: which parameters of a module can be captured layer by layer, and the bytes of a pass.

Capture relies on what layers do with their parameters, but a module may use a layer's weight in ways that no hook sees (F.linear with
another layer's weight, in-place changes, rows folded into other axes). So the captured gradients of two rows are compared, row by row,
with those of autograd. A parameter for which they differ goes to the fallback; where the fallback differs, too, that is an error.
Called by `gradients`, which keeps the survey with the module.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ntkdask.errors import InputError
from ntkdask.modules.jacobian.capture import Recorder, Use, differentiable, output_gradients, require_output
from ntkdask.modules.jacobian.fallback import jacobians
from ntkdask.modules.jacobian.probe import PAIR, Probe, layers_out_of_order, require_independent_rows
from ntkdask.modules.jacobian.rules import contribution
from ntkdask.modules.jacobian.survey import Site, Survey
from ntkdask.modules.jacobian.twins import find_owners, perturbed
from ntkdask.modules.peak import PeakBytes

Tensor = torch.Tensor
Owners = Mapping[str, list[tuple[str, str]]]
"""As `twins.find_owners` gives them."""

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-9}
"""Largest difference of a captured gradient from autograd's, relative to the norm of the row's gradient in all parameters."""


def take_survey(
    twin: nn.Module, wanted: Mapping[str, int], probe: Probe, excluded: Collection[str], caller: str
) -> Survey:
    """Survey a module on the rows of a probe.

    Parameters
    ----------
    twin : torch.nn.Module
        A private copy of the module.
    wanted : mapping of str to int
        {parameter: its number of scalars}.
    probe : Probe
        The rows.
    excluded : collection of str
        Layers that are never captured.
    caller : str
        Who asks, for messages.

    Raises
    ------
    InputError
        Where outputs are not (n, O) or not differentiable, rows influence one another, or the fallback disagrees with autograd.
    """
    x = probe.x[:PAIR]
    with differentiable(x.device):
        exact = _reference(twin, list(wanted), x, caller)
        require_independent_rows(twin, probe.x, caller)
        cotangents = _weights(exact.outputs, x)[None]
        recorder = Recorder(twin)
        owners = find_owners(twin, wanted)
        owning_layers = {layer for places in owners.values() for layer, _ in places}
        layers = {layer for layer in owning_layers - set(excluded) if _has_captured_parameter(twin, layer)}
        recorder.watch(layers)
        trusted = layers - layers_out_of_order(recorder, probe.x, cotangents)
        with PeakBytes() as peak:
            y, uses = recorder.forward(x.clone())
            gradients = output_gradients(y, uses, cotangents)
        calls = {layer: sum(use.layer == layer for use in uses) for layer in layers}
        sites = _captured(_Pass(twin, trusted, uses, gradients), owners, exact)
        vanishing = [name for name in sites if name in exact.vanishing]
        if vanishing:
            owners_of_vanishing = {name: owners[name] for name in vanishing}
            confirmed = _confirmed(recorder, owners_of_vanishing, trusted, probe.x, cotangents, caller)
            sites = {name: uses_ for name, uses_ in sites.items() if name not in vanishing or name in confirmed}
        recorder.watch(())
        missed = [name for name in wanted if name not in sites]
        fallback = jacobians(twin, missed, x, cotangents) if missed else {}
        _require_agreement({name: g[:, 0] for name, g in fallback.items()}, exact, caller)
    sweep_bytes = -(-peak.peak // len(x))
    gradient_bytes = sum(g.numel() * g.element_size() // len(x) for g in gradients if g is not None)
    return Survey(exact.outputs, dict(wanted), sites, sweep_bytes, gradient_bytes, calls)


def _confirmed(
    recorder: Recorder, owners: Owners, trusted: set[str], x: Tensor, cotangents: Tensor, caller: str
) -> set[str]:
    """Of some parameters whose gradients are zero, those for which capture and autograd agree after all weights are perturbed.

    Zero scales and zero readouts make the gradients of the layers before them vanish until they are trained; zeros agree with
    anything.
    """
    twin = recorder.twin
    with perturbed(twin):
        try:
            exact = _reference(twin, list(owners), x[:PAIR], caller)
        except InputError:  # the module fails with other weights: nothing is confirmed
            return set()
        trusted = trusted - layers_out_of_order(recorder, x, cotangents)
        y, uses = recorder.forward(x[:PAIR].clone())
        sites = _captured(_Pass(twin, trusted, uses, output_gradients(y, uses, cotangents)), owners, exact)
    return set(sites) - exact.vanishing


def _weights(outputs: int, x: Tensor) -> Tensor:
    """A cotangent (O,) in which no two logits have the same weight."""
    dtype = x.dtype if x.is_floating_point() else None
    return torch.linspace(0.5, 1.5, outputs, dtype=dtype, device=x.device)


@dataclass(frozen=True)
class _Exact:
    """Autograd's own gradients of two rows.

    `gradients` is {parameter: (rows, columns)}; `scale` (rows,) is the norm of each row's gradient in all parameters. The outputs
    depend on the `vanishing` parameters, but their gradient is zero in every row in which it is finite.
    """

    outputs: int
    gradients: Mapping[str, Tensor]
    scale: Tensor
    vanishing: frozenset[str]

    def agrees(self, name: str, gradient: Tensor) -> bool:
        """Whether `gradient` is that of the parameter `name`; rows with NaN are not compared."""
        expected = self.gradients[name]
        error = (gradient.to(expected.dtype) - expected).norm(dim=1)
        finite = torch.isfinite(expected).all(dim=1) & torch.isfinite(self.scale)
        return bool(((error <= TOLERANCE[expected.dtype] * self.scale) | ~finite).all())


def _reference(twin: nn.Module, names: list[str], x: Tensor, caller: str) -> _Exact:
    """The gradients of autograd, by one backward pass for each row."""
    parameters = [twin.get_parameter(name) for name in names]
    for parameter in parameters:
        parameter.requires_grad_()
    try:
        y = require_output(twin(x.clone()), len(x), caller)
        if not y.requires_grad:
            raise InputError(
                f"{caller}: the module's output does not depend on the {len(names)} parameters asked for in a way that autograd can "
                "follow (argmax, rounding, detach(), no_grad()). Return the logits themselves."
            )
        weighted = (y * _weights(y.shape[1], x)).sum(dim=1)
        rows = [torch.autograd.grad(row, parameters, retain_graph=True, allow_unused=True) for row in weighted]
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if isinstance(error, (InputError, torch.cuda.OutOfMemoryError)):
            raise
        raise InputError(
            f"{caller}: {type(twin).__name__} fails on rows of shape {tuple(x.shape[1:])}: {error}. Where it is the shape: rows "
            "reach the module as (n, C, H, W) with input_layout='nchw', as they are with None. Where it is an in-place operation: "
            f"make it out of place. Where it is a dtype: weights and buffers are cast to the rows' ({x.dtype}), so cast to a weight's "
            "dtype inside the module, to no fixed one."
        ) from error
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    gradients, vanishing = {}, set()
    for name, parameter, gradients_of_rows in zip(names, parameters, zip(*rows, strict=True), strict=True):
        dense = [torch.zeros_like(parameter) if g is None else g.to_dense() for g in gradients_of_rows]
        gradients[name] = torch.stack([g.reshape(-1) for g in dense])
        is_reached = any(g is not None for g in gradients_of_rows)
        if is_reached and not any(g.any() and g.isfinite().all() for g in gradients[name]):
            vanishing.add(name)
    scale = torch.stack([(g.double() ** 2).sum(dim=1) for g in gradients.values()]).sum(dim=0).sqrt()
    return _Exact(y.shape[1], gradients, scale, frozenset(vanishing))


def _has_captured_parameter(twin: nn.Module, path: str) -> bool:
    """Whether a parameter of the layer at `path` can be captured."""
    layer = twin.get_submodule(path)
    return any(contribution(layer, name) is not None for name, p in layer._parameters.items() if p is not None)


@dataclass(frozen=True)
class _Pass:
    """A forward and a backward pass: uses of layers with their output gradients. `trusted` layers take rows one by one, in order."""

    twin: nn.Module
    trusted: Collection[str]
    uses: list[Use]
    gradients: list[Tensor | None]


_CapturedUse = tuple[Site, Tensor, Tensor]


def _captured(taken: _Pass, owners: Owners, exact: _Exact) -> dict[str, tuple[Site, ...]]:
    """{parameter: its uses} of the parameters whose gradient is that of autograd when it is formed from uses of trusted layers."""
    sites = {}
    for name, places in owners.items():
        uses = _captured_uses(taken, places, len(exact.scale))
        if uses is not None and exact.agrees(name, _formed(taken.twin, uses, exact.gradients[name])):
            sites[name] = tuple(site for site, _, _ in uses)
    return sites


def _captured_uses(taken: _Pass, places: list[tuple[str, str]], rows: int) -> list[_CapturedUse] | None:
    """(site, input, output gradient) of each use of a parameter; None where one of its layers is not captured."""
    captured = []
    for layer, parameter_name in places:
        if layer not in taken.trusted or contribution(taken.twin.get_submodule(layer), parameter_name) is None:
            return None
        for use, g in zip(taken.uses, taken.gradients, strict=True):
            if use.layer != layer:
                continue
            if not use.takes(rows):
                return None
            if g is not None:
                a_bytes = use.a[0].numel() * use.a.element_size()
                site = Site(layer, parameter_name, use.call, tuple(use.a.shape[1:]), use.shape[1:], a_bytes)
                captured.append((site, use.a, g))
    return captured


def _formed(twin: nn.Module, uses: list[_CapturedUse], template: Tensor) -> Tensor:
    """The captured gradient of a parameter, summed over its uses, in the shape (rows, columns) and dtype of `template`."""
    total = torch.zeros_like(template)
    for site, a, g in uses:
        rule = contribution(twin.get_submodule(site.layer), site.parameter_name)
        if rule is not None:
            total = total + rule.form(a, g, 0, rule.columns // rule.granule)[:, 0]
    return total


def _require_agreement(gradients: Mapping[str, Tensor], exact: _Exact, caller: str) -> None:
    """InputError where gradients of the fallback, {parameter: (rows, columns)}, differ from those of autograd."""
    wrong = [name for name, g in gradients.items() if not exact.agrees(name, g)]
    if wrong:
        raise InputError(
            f"{caller}: the gradients of {', '.join(wrong)} of single rows disagree with autograd's for a batch. The module computes "
            "something else for a batch than for its rows (random numbers, counters, rows folded together): make it a function of "
            "each row."
        )
