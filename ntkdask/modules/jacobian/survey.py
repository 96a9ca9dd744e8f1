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
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

from ntkdask.errors import InputError
from ntkdask.modules.jacobian.capture import Recorder, Use, differentiable, output_gradients, require_output
from ntkdask.modules.jacobian.fallback import jacobians
from ntkdask.modules.jacobian.probe import PAIR, Probe, layers_out_of_order, require_rows_alone
from ntkdask.modules.jacobian.rules import contribution
from ntkdask.modules.jacobian.twins import owners, shaken
from ntkdask.modules.peak import PeakBytes

Tensor = torch.Tensor
T = TypeVar("T")

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
    backward pass. gradient_bytes: of a row's output gradients of all layers. calls: {layer that was watched: its calls}.
    """

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


class PathError(InputError):
    """Rows that took another path through a module than the rows of its survey; layers: those that were called otherwise."""

    def __init__(self, message: str, module: nn.Module, layers: Collection[str]) -> None:
        super().__init__(message)
        self.module, self.layers = module, frozenset(layers)


_known: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Survey]] = weakref.WeakKeyDictionary()
_apart: weakref.WeakKeyDictionary[nn.Module, frozenset[str]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def survey(module: nn.Module, key: Hashable, make: Callable[[frozenset[str]], tuple[Survey, bool]]) -> Survey:
    """The survey of `module` under `key`, made where it is not there; forgotten with the module and when its layers change.

    make(layers never to capture) gives (survey, whether its rows tell enough for it to be kept).
    """
    flags = tuple((name, type(part).__qualname__, part.training) for name, part in module.named_modules())
    frozen = tuple((name, tuple(p.shape), p.requires_grad) for name, p in module.named_parameters())
    key = (key, flags, frozen)
    with _lock:
        found, apart = _known.get(module, {}).get(key), _apart.get(module, frozenset())
    if found is None:
        found, is_kept = make(apart)
        if is_kept:
            with _lock:
                _known.setdefault(module, {})[key] = found
    return found


def set_apart(error: PathError, before: frozenset[str] = frozenset()) -> frozenset[str]:
    """From now on the layers that rows took otherwise go to the fallback. before: those of the caller's earlier errors; returns all.

    Other threads may have set them apart meanwhile. InputError where the caller did, already.
    """
    if error.layers <= before:
        raise InputError(str(error)) from error
    with _lock:
        _apart[error.module] = _apart.get(error.module, frozenset()) | error.layers
        _known.pop(error.module, None)
    return before | error.layers


def following_paths(attempt: Callable[[], T]) -> T:
    """attempt(), and again, with layers set apart, where its rows took another path."""
    apart: frozenset[str] = frozenset()
    while True:
        try:
            return attempt()
        except PathError as error:
            apart = set_apart(error, apart)


def look(copy: nn.Module, wanted: Mapping[str, int], seen: Probe, apart: Collection[str], what: str) -> Survey:
    """The survey of a private copy of a module on the rows of a probe; layers `apart` are not captured.

    InputError for outputs that are not (n, O), not differentiable, or in which rows influence one another, and where neither capture
    nor fallback agrees with autograd.
    """
    x = seen.x[:PAIR]
    with differentiable(x.device):
        exact = _reference(copy, list(wanted), x, what)
        require_rows_alone(copy, seen.x, what)
        cotangents = _weights(exact.outputs, x)[None]
        recorder = Recorder(copy)
        held = owners(copy, wanted)
        layers = {path for of in held.values() for path, _ in of if path not in apart and _is_known(copy, path)}
        recorder.watch(layers)
        trusted = layers - layers_out_of_order(recorder, seen.x, cotangents)
        with PeakBytes() as peak:
            y, uses = recorder.forward(x.clone())
            gradients = output_gradients(y, uses, cotangents)
        calls = {layer: sum(use.layer == layer for use in uses) for layer in layers}
        sites = _captured(copy, held, trusted, uses, gradients, exact)
        silent = [name for name in sites if name in exact.silent]
        if silent:
            shown = _shown(recorder, {name: held[name] for name in silent}, trusted, seen.x, cotangents, what)
            sites = {name: of for name, of in sites.items() if name not in silent or name in shown}
        recorder.watch(())
        missed = [name for name in wanted if name not in sites]
        found = jacobians(copy, missed, x, cotangents) if missed else {}
        _require_agreement({name: g[:, 0] for name, g in found.items()}, exact, what)
    sweep = -(-peak.peak // len(x))
    grads = sum(g.numel() * g.element_size() // len(x) for g in gradients if g is not None)
    return Survey(exact.outputs, dict(wanted), sites, sweep, grads, calls)


def _shown(
    recorder: Recorder,
    held: Mapping[str, list[tuple[str, str]]],
    trusted: set[str],
    x: Tensor,
    cotangents: Tensor,
    what: str,
) -> set[str]:
    """Those of some parameters, whose gradients are zero, that capture agrees on with autograd where all weights are moved.

    Zero scales and zero readouts hide what lies before them, until they are trained.
    """
    copy = recorder.copy
    with shaken(copy):
        try:
            exact = _reference(copy, list(held), x[:PAIR], what)
        except InputError:  # a module whose weights cannot be moved shows nothing
            return set()
        trusted = trusted - layers_out_of_order(recorder, x, cotangents)
        y, uses = recorder.forward(x[:PAIR].clone())
        sites = _captured(copy, held, trusted, uses, output_gradients(y, uses, cotangents), exact)
    return set(sites) - exact.silent


def _weights(outputs: int, x: Tensor) -> Tensor:
    """(O,): a cotangent in which no two logits are alike."""
    kind = x.dtype if x.is_floating_point() else None
    return torch.linspace(0.5, 1.5, outputs, dtype=kind, device=x.device)


@dataclass(frozen=True)
class _Exact:
    """Autograd's own gradients of two rows: {parameter: (rows, columns)}, the norm of each row's whole gradient, and the parameters
    that are `silent`: the outputs depend on them, with a gradient of zero in every row in which it is finite.
    """

    outputs: int
    of: Mapping[str, Tensor]
    scale: Tensor
    silent: frozenset[str]

    def agrees(self, name: str, found: Tensor) -> bool:
        """Whether `found` is the gradient of `name`; rows of NaN say nothing."""
        expected = self.of[name]
        error = (found.to(expected.dtype) - expected).norm(dim=1)
        finite = torch.isfinite(expected).all(dim=1) & torch.isfinite(self.scale)
        return bool(((error <= TOLERANCE[expected.dtype] * self.scale) | ~finite).all())


def _reference(copy: nn.Module, names: list[str], x: Tensor, what: str) -> _Exact:
    """One backward pass for each row."""
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
        weighted = (y * _weights(y.shape[1], x)).sum(dim=1)
        rows = [torch.autograd.grad(row, parameters, retain_graph=True, allow_unused=True) for row in weighted]
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if isinstance(error, (InputError, torch.cuda.OutOfMemoryError)):
            raise
        raise InputError(
            f"{what}: {type(copy).__name__} fails on rows of shape {tuple(x.shape[1:])}: {error}. Where it is the shape: rows "
            "reach the module as (n, C, H, W) with input_layout='nchw', as they are with None. Where it is an in-place operation: "
            f"make it out of place. Where it is a dtype: weights and buffers are cast to the rows' ({x.dtype}), so cast to a weight's "
            "dtype inside the module, to no fixed one."
        ) from error
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    found, silent = {}, set()
    for name, parameter, of_rows in zip(names, parameters, zip(*rows, strict=True), strict=True):
        dense = [torch.zeros_like(parameter) if g is None else g.to_dense() for g in of_rows]
        found[name] = torch.stack([g.reshape(-1) for g in dense])
        if any(g is not None for g in of_rows) and not any(g.any() and g.isfinite().all() for g in found[name]):
            silent.add(name)
    scale = torch.stack([(g.double() ** 2).sum(dim=1) for g in found.values()]).sum(dim=0).sqrt()
    return _Exact(y.shape[1], found, scale, frozenset(silent))


def _is_known(copy: nn.Module, path: str) -> bool:
    layer = copy.get_submodule(path)
    return any(contribution(layer, local) is not None for local, p in layer._parameters.items() if p is not None)


Pair = tuple[Site, Tensor, Tensor]


def _captured(
    copy: nn.Module,
    held: Mapping[str, list[tuple[str, str]]],
    trusted: Collection[str],
    uses: list[Use],
    gradients: list[Tensor | None],
    exact: _Exact,
) -> dict[str, tuple[Site, ...]]:
    """{parameter: its uses} of those whose gradients the uses of `trusted` layers make up."""
    sites = {}
    for name, of in held.items():
        pairs = _pairs(copy, of, trusted, uses, gradients, len(exact.scale))
        if pairs is not None and exact.agrees(name, _formed(copy, pairs, exact.of[name])):
            sites[name] = tuple(site for site, _, _ in pairs)
    return sites


def _pairs(
    copy: nn.Module,
    held: list[tuple[str, str]],
    trusted: Collection[str],
    uses: list[Use],
    gradients: list[Tensor | None],
    rows: int,
) -> list[Pair] | None:
    """(site, input, output gradient) of each use of a parameter; None where one of its owners is not captured."""
    pairs = []
    for path, local in held:
        if path not in trusted or contribution(copy.get_submodule(path), local) is None:
            return None
        for use, g in zip(uses, gradients, strict=True):
            if use.layer != path:
                continue
            if not use.takes(rows):
                return None
            if g is not None:
                a_bytes = use.a[0].numel() * use.a.element_size()
                site = Site(path, local, use.call, tuple(use.a.shape[1:]), use.shape[1:], a_bytes)
                pairs.append((site, use.a, g))
    return pairs


def _formed(copy: nn.Module, pairs: list[Pair], like: Tensor) -> Tensor:
    """(rows, columns): the captured gradient, summed over the parameter's uses."""
    total = torch.zeros_like(like)
    for site, a, g in pairs:
        rule = contribution(copy.get_submodule(site.layer), site.local)
        if rule is not None:
            total = total + rule.form(a, g, 0, rule.columns // rule.granule)[:, 0]
    return total


def _require_agreement(found: Mapping[str, Tensor], exact: _Exact, what: str) -> None:
    wrong = [name for name, g in found.items() if not exact.agrees(name, g)]
    if wrong:
        raise InputError(
            f"{what}: the gradients of {', '.join(wrong)} of single rows disagree with autograd's for a batch. The module computes "
            "something else for a batch than for its rows (random numbers, counters, rows folded together): make it a function of "
            "each row."
        )
