"""What one dry run of two rows tells about a module: its outputs, which parameters are captured layer by layer and with what
shapes, which need `fallback`, and the bytes of a row's forward and backward pass.

Capture rests on what layers do with their parameters, and a module may use a layer's weight in ways that no hook sees (F.linear with
another layer's weight, in-place surgery, rows folded into other axes). So the captured gradients of two rows are compared, row by row,
with autograd's own; a parameter that disagrees goes to the fallback, and what disagrees there too is an error. Done once for a
module and a shape of rows.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ntkdask.errors import InputError
from ntkdask.modules.capture import Recorder, Use, differentiable, output_gradients, require_output
from ntkdask.modules.fallback import jacobians
from ntkdask.modules.peak import PeakBytes
from ntkdask.modules.rules import contribution
from ntkdask.modules.twins import owners

Tensor = torch.Tensor

ROWS = 2
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-9}
"""Largest difference of a captured gradient from autograd's, as a part of the norm of the row's whole gradient."""


@dataclass(frozen=True)
class Site:
    """One use of one layer in a parameter's gradient: layer, the parameter's name there, which call, a row's shapes and bytes."""

    layer: str
    local: str
    call: int
    a_shape: tuple[int, ...]
    g_shape: tuple[int, ...]
    a_bytes: int


@dataclass(frozen=True)
class Survey:
    """outputs: O. sites: {captured parameter: its uses}. columns: {parameter: scalars}. sweep_bytes: of one row, forward and one
    backward pass. gradient_bytes: of a row's output gradients of all layers."""

    outputs: int
    columns: Mapping[str, int]
    sites: Mapping[str, tuple[Site, ...]]
    sweep_bytes: int
    gradient_bytes: int
    calls: Mapping[str, int] = field(default_factory=dict)

    @property
    def fallback(self) -> tuple[str, ...]:
        """Parameters that are not captured."""
        return tuple(name for name in self.columns if name not in self.sites)


_known: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Survey]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def survey(module: nn.Module, key: Hashable, make: Callable[[], Survey]) -> Survey:
    """The survey of `module` under `key`, made where it is not there; forgotten with the module and when its layers change."""
    flags = tuple((name, type(part).__qualname__, part.training) for name, part in module.named_modules())
    frozen = tuple((name, tuple(p.shape), p.requires_grad) for name, p in module.named_parameters())
    key = (key, flags, frozen)
    with _lock:
        found = _known.get(module, {}).get(key)
    if found is None:
        found = make()
        with _lock:
            _known.setdefault(module, {})[key] = found
    return found


def look(copy: nn.Module, wanted: Mapping[str, int], x: Tensor, what: str) -> Survey:
    """The survey of a private copy of a module on rows x (1 or 2 of them; one is taken twice).

    InputError for outputs that are not (n, O), not differentiable, or in which rows influence one another, and where neither capture
    nor fallback agrees with autograd.
    """
    x = x if len(x) >= ROWS else torch.cat([x] * ROWS)
    with differentiable(x.device):
        expected, outputs = _reference(copy, list(wanted), x, what)
        cotangents = _weights(outputs, x)[None]
        scale = torch.stack([(g.double() ** 2).sum(dim=1) for g in expected.values()]).sum(dim=0).sqrt()
        held = owners(copy, wanted)
        recorder = Recorder(copy)
        recorder.watch({path for of in held.values() for path, _ in of if _is_known(copy, path)})
        with PeakBytes() as peak:
            y, uses = recorder.forward(x.clone())
            gradients = output_gradients(y, uses, cotangents)
        recorder.watch(())
        sites = {}
        for name in wanted:
            pairs = _pairs(copy, held[name], uses, gradients, len(x))
            if pairs is not None and _agrees(_formed(copy, pairs, wanted[name], x), expected[name], scale):
                sites[name] = tuple(site for site, _, _ in pairs)
        missed = [name for name in wanted if name not in sites]
        found = jacobians(copy, missed, x, cotangents) if missed else {}
        _require_agreement({name: g[:, 0] for name, g in found.items()}, expected, scale, what)
    sweep = -(-peak.peak // len(x))
    grads = sum(g[0].numel() * g.element_size() for g in gradients if g is not None)
    return Survey(outputs, dict(wanted), sites, sweep, grads, {use.layer: use.call + 1 for use in uses})


def _weights(outputs: int, x: Tensor) -> Tensor:
    """(O,): a cotangent in which no two logits are alike."""
    kind = x.dtype if x.is_floating_point() else None
    return torch.linspace(0.5, 1.5, outputs, dtype=kind, device=x.device)


def _reference(copy: nn.Module, names: list[str], x: Tensor, what: str) -> tuple[dict[str, Tensor], int]:
    """({parameter: (rows, columns)}, O): autograd's own gradients, one row at a time."""
    parameters = [copy.get_parameter(name) for name in names]
    for parameter in parameters:
        parameter.requires_grad_()
    try:
        y = require_output(copy(x.clone()), len(x), what)
        if not y.requires_grad:
            raise InputError(
                f"{what}: the module's output does not depend on the {len(names)} parameters asked for in a way that autograd can "
                "follow (argmax, rounding, detach(), no_grad()). Return the logits themselves."
            )
        _require_independent_rows(copy, x, y, what)
        weighted = (y * _weights(y.shape[1], x)).sum(dim=1)
        rows = [torch.autograd.grad(row, parameters, retain_graph=True, allow_unused=True) for row in weighted]
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if isinstance(error, (InputError, torch.cuda.OutOfMemoryError)):
            raise
        raise InputError(
            f"{what}: {type(copy).__name__} fails on rows of shape {tuple(x.shape[1:])}: {error}. Where it is the shape: rows "
            "reach the module as (n, C, H, W) with input_layout='nchw', as they are with None. Where it is an in-place operation: "
            "make it out of place."
        ) from error
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    found = {}
    for name, parameter, of_rows in zip(names, parameters, zip(*rows, strict=True), strict=True):
        dense = [torch.zeros_like(parameter) if g is None else g.to_dense() for g in of_rows]
        found[name] = torch.stack([g.reshape(-1) for g in dense])
    return found, y.shape[1]


def _require_independent_rows(copy: nn.Module, x: Tensor, y: Tensor, what: str) -> None:
    with torch.no_grad():
        alone = require_output(copy(x[:1].clone()), 1, what)
        both = y[:1].detach()
        if (alone - both).norm() > 1e-3 * max(float(both.norm()), float(alone.norm())):
            raise InputError(
                f"{what}: the module's output for a row changes with the rows beside it, so that rows have no gradients of their own. "
                "Take batch statistics and other mixing of rows out of it."
            )


def _is_known(copy: nn.Module, path: str) -> bool:
    layer = copy.get_submodule(path)
    return any(contribution(layer, local) is not None for local, p in layer._parameters.items() if p is not None)


Pair = tuple[Site, Tensor, Tensor]


def _pairs(
    copy: nn.Module, held: list[tuple[str, str]], uses: list[Use], gradients: list[Tensor | None], rows: int
) -> list[Pair] | None:
    """(site, input, output gradient) of each use of a parameter; None where one of its owners is not captured."""
    pairs = []
    for path, local in held:
        if contribution(copy.get_submodule(path), local) is None:
            return None
        for use, g in zip(uses, gradients, strict=True):
            if use.layer != path:
                continue
            if not use.intact or not use.a.ndim or len(use.a) != rows or use.shape[0] != rows:
                return None
            if g is not None:
                a_bytes = use.a[0].numel() * use.a.element_size()
                site = Site(path, local, use.call, tuple(use.a.shape[1:]), use.shape[1:], a_bytes)
                pairs.append((site, use.a, g))
    return pairs


def _formed(copy: nn.Module, pairs: list[Pair], columns: int, x: Tensor) -> Tensor:
    """(rows, columns): the captured gradient, summed over the parameter's uses."""
    total = None
    for site, a, g in pairs:
        rule = contribution(copy.get_submodule(site.layer), site.local)
        if rule is not None:
            part = rule.form(a, g, 0, rule.columns // rule.granule)[:, 0]
            total = part if total is None else total + part
    return torch.zeros(len(x), columns, device=x.device) if total is None else total


def _agrees(found: Tensor, expected: Tensor, scale: Tensor) -> bool:
    error = (found.to(expected.dtype) - expected).norm(dim=1)
    finite = torch.isfinite(expected).all(dim=1)  # rows of NaN say nothing
    return bool(((error <= TOLERANCE[expected.dtype] * scale) | ~finite).all())


def _require_agreement(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], scale: Tensor, what: str) -> None:
    wrong = [name for name, g in found.items() if not _agrees(g, expected[name], scale)]
    if wrong:
        raise InputError(
            f"{what}: the gradients of {', '.join(wrong)} of single rows disagree with autograd's for a batch. The module computes "
            "something else for a batch than for its rows (random numbers, counters, rows folded together): make it a function of "
            "each row."
        )
