"""Per-example gradients of a module, kept compactly and formed in ranges of columns.

One forward and one backward pass of each batch of rows; then for each layer and row the smaller of two things is kept: the pair of its
input and output gradient, or the gradient itself. Ranges of columns are formed from the pairs when they are asked for, so nothing
of size rows × parameters exists. `tangent` multiplies them into kernels; features project them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ntkdask.arrays import Array
from ntkdask.errors import InputError
from ntkdask.modules.jacobian.capture import Recorder, Use, differentiable, output_gradients, require_output
from ntkdask.modules.jacobian.contributions import Contribution, Terms
from ntkdask.modules.jacobian.fallback import jacobians
from ntkdask.modules.jacobian.probe import Rows, alike, probe
from ntkdask.modules.jacobian.rules import contribution
from ntkdask.modules.jacobian.survey import PathError, Site, Survey, following_paths, look, survey
from ntkdask.modules.jacobian.twins import require_module, twin, wanted_parameters
from ntkdask.modules.tensors import as_tensor

Tensor = torch.Tensor

FORM_BYTES = 2**21
DEVICE_FORM_BYTES = 2**28
"""Temporaries of forming gradients at a time, see `form_bytes`."""


@dataclass(frozen=True)
class ArrayRows:
    """The rows of an array, in the layout that a module takes."""

    x: Array
    dtype: torch.dtype
    device: torch.device
    layout: str | None

    def __len__(self) -> int:
        return int(self.x.shape[0])

    def batch(self, start: int, stop: int) -> Tensor:
        """See `Rows.batch`."""
        piece = as_tensor(self.x[start:stop], None, self.layout)
        return piece.to(self.device, self.dtype if piece.is_floating_point() else None, copy=True)


@dataclass
class Kept:
    """One use of a layer for all rows: inputs (rows, *a) and output gradients (rows, Q, *g)."""

    rule: Contribution
    a: Tensor
    g: Tensor


@dataclass
class Block:
    """The gradients of one parameter, `rows` × Q × `columns`: formed already, or pairs to form them from.

    name: its dotted name; granule: columns that are formed at a time.
    """

    name: str
    columns: int
    granule: int
    rows: int
    outputs: int
    like: Tensor
    formed: Tensor | None = None
    kept: list[Kept] = field(default_factory=list)

    def slice(self, start: int, stop: int) -> Tensor:
        """(rows·Q, stop − start): columns start to stop, in the order of `parameter.reshape(-1)`; row i·Q + q."""
        return self.part(start, stop).reshape(self.rows * self.outputs, stop - start)

    def part(self, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        """(rows, Q, stop − start). Aligned with `granule` it is formed without waste, in `buffer` (flat) where one is given."""
        if self.formed is not None:
            return self.formed[:, :, start:stop]
        first, last = start // self.granule, -(-stop // self.granule)
        shape = (self.rows, self.outputs, (last - first) * self.granule)
        out = self.like.new_empty(shape) if buffer is None else buffer[: math.prod(shape)].view(shape)
        for index, kept in enumerate(self.kept):
            add_formed(kept.rule, kept.a, kept.g, first, last, out, fresh=index == 0)
        low = start - first * self.granule
        return out[:, :, low : low + stop - start]


def form_bytes(device: torch.device) -> int:
    """Temporaries of forming gradients at a time: what a CPU's caches hold, or enough to fill a GPU."""
    return FORM_BYTES if device.type == "cpu" else DEVICE_FORM_BYTES


def add_formed(rule: Contribution, a: Tensor, g: Tensor, first: int, last: int, out: Tensor, fresh: bool) -> None:
    """out (rows, Q, columns) += the gradient's granules first to last, by as many rows as `form_bytes` allows; fresh: out = them."""
    outputs = g.shape[1]
    each = rule.scratch(tuple(a.shape[1:]), tuple(g.shape[2:]), outputs)
    step = max(1, min(len(a), form_bytes(g.device) // max(1, each * g.element_size())))
    buffers = rule.buffers(a, step) if isinstance(rule, Terms) and fresh else None
    for i in range(0, len(a), step):
        rows = slice(i, i + step)
        if fresh and isinstance(rule, Terms):
            rule.write(a[rows], g[rows], first, last, out[rows], buffers)
        elif fresh:
            out[rows] = rule.form(a[rows], g[rows], first, last)
        else:
            out[rows] += rule.form(a[rows], g[rows], first, last)


@dataclass(frozen=True)
class Part:
    """What is known of one parameter before any pass: how it is captured and what a row of it takes."""

    name: str
    columns: int
    granule: int
    sites: tuple[Site, ...] | None
    kept_bytes: int
    """Bytes that a row keeps: of the pairs, or of the formed gradient, whichever is smaller."""
    form_bytes: int
    """Bytes of temporaries to form a row's gradient, or a granule of it where pairs are kept."""
    formed: bool


class Gradients:
    """The per-example gradients of a module in `dtype` on `device`: a private copy, its survey, and passes over rows.

    parameters: patterns on dotted names (fnmatch), None for all; frozen parameters never count. cotangents(O) gives (Q, O): what is
    differentiated is Σ_o c_qo·y_o. InputError for modules that cannot be taken; see `twins` and `survey`.
    """

    def __init__(
        self, module: nn.Module, dtype: torch.dtype, device: torch.device, parameters: tuple[str, ...] | None, what: str
    ) -> None:
        self.module = require_module(module, what)
        self.dtype, self.device, self.parameters, self.what = dtype, device, parameters, what
        self.wanted = wanted_parameters(self.module, parameters, what)
        self.copy = twin(self.module, dtype, device)
        self._recorder = Recorder(self.copy)

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    def survey(self, rows: Sequence[Rows], key: tuple) -> Survey:
        """What a dry run on some of the rows tells; `key` names their purpose and shape. Kept with the module."""

        def make(apart: frozenset[str]) -> tuple[Survey, bool]:
            seen = probe(rows)
            # a plan's rows are made up, and its survey serves no others
            return look(self.copy, self.wanted, seen, apart, self.what), seen.telling or key[0] == "plan"

        return survey(self.module, (key, self.parameters, self.dtype, self.device.type), make)

    def parts(self, known: Survey, outputs: int) -> list[Part]:
        """The parameters in their order, for Q = `outputs` cotangents."""
        return [self._part(known, name, outputs) for name in known.columns]

    def _part(self, known: Survey, name: str, outputs: int) -> Part:
        columns, sites = known.columns[name], known.sites.get(name)
        whole = outputs * columns * self.itemsize
        if sites is None:
            return Part(name, columns, columns, None, whole, 2 * whole + outputs * known.sweep_bytes, True)
        rules = [self.rule(site) for site in sites]
        granules = {rule.granule for rule in rules}
        granule = granules.pop() if len(granules) == 1 else columns
        pairs = sum(site.a_bytes + outputs * math.prod(site.g_shape) * self.itemsize for site in sites)
        formed = not sites or whole <= pairs
        scratch = max((r.scratch(s.a_shape, s.g_shape, outputs) for r, s in zip(rules, sites, strict=True)), default=0)
        return Part(
            name, columns, granule, sites, min(whole, pairs) if sites else whole, scratch * self.itemsize, formed
        )

    def rule(self, site: Site) -> Contribution:
        """The contribution of the copy's own layer at `site`."""
        rule = contribution(self.copy.get_submodule(site.layer), site.local)
        if rule is None:
            raise InputError(f"{self.what}: layer {site.layer!r} changed while it was used.")
        return rule

    def collect(self, rows: Rows, parts: Sequence[Part], known: Survey, cotangents: Tensor, batch: int) -> Collected:
        """One pass over the rows, `batch` at a time, for some of the parameters."""
        store = _Store(self, parts, len(rows), len(cotangents))
        missed = [part.name for part in parts if part.sites is None]
        with differentiable(self.device):
            for start in range(0, len(rows), batch):
                stop = min(start + batch, len(rows))
                if len(missed) < len(parts):
                    self._capture(store, rows.batch(start, stop), start, known, cotangents)
                if missed:
                    for name, g in jacobians(self.copy, missed, rows.batch(start, stop), cotangents).items():
                        store.views[name][start:stop] = g
        return Collected(store.panel, store.blocks())

    def _capture(self, store: _Store, x: Tensor, start: int, known: Survey, cotangents: Tensor) -> None:
        layers = {site.layer for sites in store.sites.values() for site in sites}
        # of parameters without uses: rows that take another path may find one
        layers |= {layer for layer, calls in known.calls.items() if not calls}
        self._recorder.watch(layers)
        try:
            y, uses = self._recorder.forward(x)
            require_output(y, len(x), self.what)
            gradients = output_gradients(y, uses, cotangents)
        except RuntimeError as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            raise InputError(f"{self.what}: {type(self.module).__name__} fails on {len(x)} rows: {error}") from error
        self._require_paths(y.detach(), x, uses, layers, start, known)
        found = {(use.layer, use.call): (use.a, g) for use, g in zip(uses, gradients, strict=True)}
        del y, uses, gradients
        for name, sites in store.sites.items():
            for index, site in enumerate(sites):
                a, g = found[site.layer, site.call]
                store.put(name, index, slice(start, start + len(x)), a, g)

    def _require_paths(
        self, y: Tensor, x: Tensor, uses: Sequence[Use], layers: Iterable[str], start: int, known: Survey
    ) -> None:
        """PathError where the rows went through the layers otherwise than the survey's; InputError where they do alone."""
        calls = {layer: sum(use.layer == layer for use in uses) for layer in layers}
        other = {use.layer for use in uses if not use.takes(len(x))}
        other |= {layer for layer in layers if calls[layer] != known.calls[layer]}
        if not other:
            return
        message = (
            f"{self.what}: the module called its layers {calls} times for rows {start} to {start + len(x)}, but {dict(known.calls)} "
            "times for the first ones, or with other rows. Rows that take different paths through a module cannot share a batch."
        )
        with torch.no_grad():
            alone = [require_output(self.copy(x[i : i + 1].detach().clone()), 1, self.what) for i in range(len(x))]
        if not all(alike(y[i], row[0]) for i, row in enumerate(alone)):
            raise InputError(message)
        raise PathError(message, self.module, other)


@dataclass
class Collected:
    """What one pass kept: panel (rows, Q, F) of all gradients that are formed already, and blocks; the formed ones are its columns."""

    panel: Tensor
    blocks: list[Block]


class _Store:
    """Room for what a pass keeps, filled batch by batch."""

    def __init__(self, of: Gradients, parts: Sequence[Part], rows: int, outputs: int) -> None:
        self._of, self._parts, self._rows, self._outputs = of, parts, rows, outputs
        width = sum(part.columns for part in parts if part.formed)
        self.panel = torch.empty(rows, outputs, width, dtype=of.dtype, device=of.device)
        self.views: dict[str, Tensor] = {}
        self.sites = {part.name: part.sites for part in parts if part.sites is not None}
        self._rules = {name: [of.rule(site) for site in sites] for name, sites in self.sites.items()}
        self._kept: dict[str, list[Kept]] = {part.name: [] for part in parts}
        at = 0
        for part in parts:
            if part.formed:
                self.views[part.name] = self.panel[:, :, at : at + part.columns]
                at += part.columns
                if part.sites == ():
                    self.views[part.name].zero_()  # no output depends on it

    def put(self, name: str, index: int, rows: slice, a: Tensor, g: Tensor | None) -> None:
        """Keep one use's batch: form its gradient, or copy the pair. g: None for zeros."""
        rule = self._rules[name][index]
        if name in self.views:
            out = self.views[name][rows]
            if g is not None:
                add_formed(rule, a, g, 0, rule.columns // rule.granule, out, fresh=index == 0)
            elif index == 0:
                out.zero_()
            return
        site, kept = self.sites[name][index], self._kept[name]
        if index == len(kept):
            like = torch.empty(0, dtype=self._of.dtype, device=a.device)
            of_g = like.new_empty(self._rows, self._outputs, *site.g_shape)
            kept.append(Kept(rule, a.new_empty(self._rows, *site.a_shape), of_g))
        kept[index].a[rows] = a
        kept[index].g[rows] = 0 if g is None else g

    def blocks(self) -> list[Block]:
        """The blocks of the parts, in their order."""
        return [
            Block(
                p.name,
                p.columns,
                p.granule,
                self._rows,
                self._outputs,
                self.panel,
                self.views.get(p.name),
                self._kept[p.name],
            )
            for p in self._parts
        ]


def per_example(
    module: nn.Module, x: Tensor, cotangents: Tensor | None = None, parameters: Iterable[str] | None = None
) -> list[Block]:
    """The gradients of rows x, all at once, in one pass: a `Block` for each parameter, for as many rows as memory holds pairs of.

    x: (n, ...) as the module takes it, of the dtype and on the device of the computation. cotangents: (Q, O), None for one row of
    1/√O, the pseudo-NTK's. Errors as of `Gradients`.
    """
    patterns = None if parameters is None else tuple(parameters)
    with torch.inference_mode(False):  # what is made in inference mode never takes part in a graph
        return following_paths(lambda: _per_example(module, x, cotangents, patterns))


def _per_example(
    module: nn.Module, x: Tensor, cotangents: Tensor | None, patterns: tuple[str, ...] | None
) -> list[Block]:
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    of = Gradients(module, dtype, x.device, patterns, "per_example")
    rows = ArrayRows(x, dtype, x.device, None)
    known = of.survey([rows], ("per_example", tuple(x.shape[1:]), x.dtype))
    if cotangents is None:
        cotangents = torch.full((1, known.outputs), known.outputs**-0.5, dtype=dtype, device=x.device)
    return of.collect(rows, of.parts(known, len(cotangents)), known, cotangents, max(1, len(x))).blocks
