"""Per-example gradients of a module, kept compactly and formed in ranges of columns.

Each batch of rows takes one forward and one backward pass. Then the smaller of two things is kept for each layer and row: the pair
of the layer's input and output gradient, or the gradient of its parameter. Ranges of columns are formed from the pairs when they
are asked for (`blocks`), so that nothing of size rows × parameters exists. `tangent` multiplies gradients into kernels, `slices`
hands them to features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ntkdask.arrays import Array
from ntkdask.errors import InputError
from ntkdask.modules.jacobian.blocks import Block, Pair, add_formed
from ntkdask.modules.jacobian.capture import Recorder, Use, differentiable, output_gradients, require_output
from ntkdask.modules.jacobian.contributions import Contribution
from ntkdask.modules.jacobian.dry_run import take_survey
from ntkdask.modules.jacobian.fallback import jacobians
from ntkdask.modules.jacobian.probe import Rows, choose_probe, nearly_equal
from ntkdask.modules.jacobian.rules import contribution
from ntkdask.modules.jacobian.survey import PathError, Site, Survey, survey_of, with_retries
from ntkdask.modules.jacobian.twins import make_twin, require_module, wanted_parameters
from ntkdask.modules.tensors import as_tensor

Tensor = torch.Tensor


@dataclass(frozen=True)
class ArrayRows:
    """The rows of an array as a module takes them: see `probe.Rows`.

    `dtype` and `device` are those of the module; `layout` is "nchw" or None, see `tensors.as_tensor`.
    """

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


@dataclass(frozen=True)
class ParameterPlan:
    """How the gradient of one parameter is obtained, and what it takes for a row.

    Parameters
    ----------
    name : str
        Its dotted name in the module.
    columns : int
        Its number of scalars.
    granule : int
        Columns that are formed together.
    sites : tuple of Site or None
        The layers that use it; empty where the outputs do not depend on it, None where it goes through `fallback`.
    kept_bytes : int
        Bytes that are kept of a row: the pairs, or the formed gradient, whichever is smaller.
    form_bytes : int
        Bytes of temporaries to form the gradient of a row, or a granule of it where pairs are kept.
    formed : bool
        Whether the formed gradient is kept.
    """

    name: str
    columns: int
    granule: int
    sites: tuple[Site, ...] | None
    kept_bytes: int
    form_bytes: int
    formed: bool


class Gradients:
    """The per-example gradients of a module: a private copy of it, its survey, and passes over rows.

    Parameters
    ----------
    module : torch.nn.Module
        In eval mode; it is not changed.
    dtype : torch.dtype
        Of the gradients.
    device : torch.device
        Where they are computed.
    parameters : tuple of str or None
        Patterns (fnmatch) on dotted names of parameters, None for all; frozen parameters never count.
    caller : str
        Who asks, for messages.

    Raises
    ------
    InputError
        Where the module cannot be copied, rows influence one another, or no parameter is left; see `twins` and `dry_run`.
    """

    def __init__(
        self,
        module: nn.Module,
        dtype: torch.dtype,
        device: torch.device,
        parameters: tuple[str, ...] | None,
        caller: str,
    ) -> None:
        self.module = require_module(module, caller)
        self.dtype, self.device, self.parameters, self.caller = dtype, device, parameters, caller
        self.wanted = wanted_parameters(self.module, parameters, caller)
        self.twin = make_twin(self.module, dtype, device)
        self._recorder = Recorder(self.twin)

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    def survey(self, rows: Sequence[Rows], key: tuple) -> Survey:
        """What a dry run on some of the rows tells, kept with the module; `key` is (their purpose, their shape, ...)."""

        def make(excluded: frozenset[str]) -> tuple[Survey, bool]:
            probe = choose_probe(rows)
            # the rows of a plan are made up, and its survey serves plans alone
            is_kept = probe.informative or key[0] == "plan"
            return take_survey(self.twin, self.wanted, probe, excluded, self.caller), is_kept

        return survey_of(self.module, (key, self.parameters, self.dtype, self.device.type), make)

    def plans(self, survey: Survey, outputs: int) -> list[ParameterPlan]:
        """A plan for each parameter, in their order, for Q = `outputs` cotangents."""
        return [self._plan(survey, name, outputs) for name in survey.columns]

    def _plan(self, survey: Survey, name: str, outputs: int) -> ParameterPlan:
        columns, sites = survey.columns[name], survey.sites.get(name)
        whole = outputs * columns * self.itemsize
        if sites is None:
            return ParameterPlan(name, columns, columns, None, whole, 2 * whole + outputs * survey.sweep_bytes, True)
        rules = [self.rule(site) for site in sites]
        granules = {rule.granule for rule in rules}
        granule = granules.pop() if len(granules) == 1 else columns
        pairs = sum(site.a_bytes + outputs * math.prod(site.g_shape) * self.itemsize for site in sites)
        formed = not sites or whole <= pairs
        scratch = max((r.scratch(s.a_shape, s.g_shape, outputs) for r, s in zip(rules, sites, strict=True)), default=0)
        return ParameterPlan(
            name, columns, granule, sites, min(whole, pairs) if sites else whole, scratch * self.itemsize, formed
        )

    def rule(self, site: Site) -> Contribution:
        """How the private copy's layer at `site` contributes to the gradient."""
        rule = contribution(self.twin.get_submodule(site.layer), site.parameter_name)
        if rule is None:
            raise InputError(f"{self.caller}: layer {site.layer!r} changed while it was used.")
        return rule

    def collect(
        self, rows: Rows, plans: Sequence[ParameterPlan], survey: Survey, cotangents: Tensor, batch: int
    ) -> Collected:
        """The gradients of some parameters for all rows, from passes over `batch` rows at a time.

        Row q of `cotangents` (Q, O) says that Σ_o c_qo·y_o is differentiated.
        """
        store = _Store(self, plans, len(rows), len(cotangents))
        missed = [plan.name for plan in plans if plan.sites is None]
        with differentiable(self.device):
            for start in range(0, len(rows), batch):
                stop = min(start + batch, len(rows))
                if len(missed) < len(plans):
                    self._capture(store, rows.batch(start, stop), start, survey, cotangents)
                if missed:
                    for name, g in jacobians(self.twin, missed, rows.batch(start, stop), cotangents).items():
                        store.views[name][start:stop] = g
        return Collected(store.panel, store.blocks())

    def _capture(self, store: _Store, x: Tensor, start: int, survey: Survey, cotangents: Tensor) -> None:
        """One forward and one backward pass over a batch, which begins at row `start`; its pairs go to the store."""
        layers = {site.layer for sites in store.sites.values() for site in sites}
        # layers that the survey's rows did not use: rows that take another path may use them
        layers |= {layer for layer, calls in survey.calls.items() if not calls}
        self._recorder.watch(layers)
        try:
            y, uses = self._recorder.forward(x)
            require_output(y, len(x), self.caller)
            gradients = output_gradients(y, uses, cotangents)
        except RuntimeError as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            raise InputError(f"{self.caller}: {type(self.module).__name__} fails on {len(x)} rows: {error}") from error
        self._require_paths(y.detach(), x, uses, layers, start, survey)
        pairs = {(use.layer, use.call): (use.a, g) for use, g in zip(uses, gradients, strict=True)}
        del y, uses, gradients
        for name, sites in store.sites.items():
            for index, site in enumerate(sites):
                a, g = pairs[site.layer, site.call]
                store.put(name, index, slice(start, start + len(x)), a, g)

    def _require_paths(
        self, y: Tensor, x: Tensor, uses: Sequence[Use], layers: Iterable[str], start: int, survey: Survey
    ) -> None:
        """PathError where the rows used other layers, or used layers otherwise, than the rows of the survey.

        InputError where the outputs for the batch also differ from those for its rows alone.
        """
        calls = {layer: sum(use.layer == layer for use in uses) for layer in layers}
        differing = {use.layer for use in uses if not use.takes(len(x))}
        differing |= {layer for layer in layers if calls[layer] != survey.calls[layer]}
        if not differing:
            return
        message = (
            f"{self.caller}: the module called its layers {calls} times for rows {start} to {start + len(x)}, but "
            f"{dict(survey.calls)} times for the first ones, or with other rows. Rows that take different paths through a module "
            "cannot share a batch."
        )
        with torch.no_grad():
            alone = [require_output(self.twin(x[i : i + 1].detach().clone()), 1, self.caller) for i in range(len(x))]
        if not all(nearly_equal(y[i], row[0]) for i, row in enumerate(alone)):
            raise InputError(message)
        raise PathError(message, self.module, differing)


@dataclass
class Collected:
    """The gradients of some parameters for all rows.

    `panel` (rows, Q, F) holds all that are formed, side by side; of `blocks`, one for each parameter, the formed ones are views of it.
    """

    panel: Tensor
    blocks: list[Block]


class _Store:
    """The memory for what passes keep of some parameters, filled batch by batch."""

    def __init__(self, gradients: Gradients, plans: Sequence[ParameterPlan], rows: int, outputs: int) -> None:
        self._gradients, self._plans, self._rows, self._outputs = gradients, plans, rows, outputs
        width = sum(plan.columns for plan in plans if plan.formed)
        self.panel = torch.empty(rows, outputs, width, dtype=gradients.dtype, device=gradients.device)
        self.views: dict[str, Tensor] = {}
        self.sites = {plan.name: plan.sites for plan in plans if plan.sites is not None}
        self._rules = {name: [gradients.rule(site) for site in sites] for name, sites in self.sites.items()}
        self._pairs: dict[str, list[Pair]] = {plan.name: [] for plan in plans}
        at = 0
        for plan in plans:
            if plan.formed:
                self.views[plan.name] = self.panel[:, :, at : at + plan.columns]
                at += plan.columns
                if plan.sites == ():
                    self.views[plan.name].zero_()  # no output depends on it

    def put(self, name: str, index: int, rows: slice, a: Tensor, g: Tensor | None) -> None:
        """Keep what a batch gave for the use number `index` of a parameter: its formed gradient, or the pair; g None: zeros."""
        rule = self._rules[name][index]
        if name in self.views:
            out = self.views[name][rows]
            if g is not None:
                add_formed(rule, a, g, 0, rule.columns // rule.granule, out, overwrite=index == 0)
            elif index == 0:
                out.zero_()
            return
        site, pairs = self.sites[name][index], self._pairs[name]
        if index == len(pairs):
            shape = (self._rows, self._outputs, *site.g_shape)
            output_gradients_of_all = torch.empty(shape, dtype=self._gradients.dtype, device=a.device)
            pairs.append(Pair(rule, a.new_empty(self._rows, *site.a_shape), output_gradients_of_all))
        pairs[index].a[rows] = a
        pairs[index].g[rows] = 0 if g is None else g

    def blocks(self) -> list[Block]:
        """A block for each parameter, in the order of the plans."""
        return [
            Block(
                p.name,
                p.columns,
                p.granule,
                self._rows,
                self._outputs,
                self.panel,
                self.views.get(p.name),
                self._pairs[p.name],
            )
            for p in self._plans
        ]


def per_example(
    module: nn.Module, x: Tensor, cotangents: Tensor | None = None, parameters: Iterable[str] | None = None
) -> list[Block]:
    """The per-example gradients of all rows from one pass, a `Block` for each parameter; memory must hold the pairs of all rows.

    Parameters
    ----------
    module : torch.nn.Module
        In eval mode.
    x : tensor (n, ...)
        Rows as the module takes them, of the dtype and on the device of the computation.
    cotangents : tensor (Q, O), optional
        Row q says that Σ_o c_qo·y_o is differentiated; None: one row of 1/√O, that of the pseudo-NTK.
    parameters : iterable of str, optional
        Patterns on dotted names; None: all that require a gradient.
    """
    patterns = None if parameters is None else tuple(parameters)
    with torch.inference_mode(False):  # what is made in inference mode never takes part in a graph
        return with_retries(lambda: _per_example(module, x, cotangents, patterns))


def _per_example(
    module: nn.Module, x: Tensor, cotangents: Tensor | None, patterns: tuple[str, ...] | None
) -> list[Block]:
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    gradients = Gradients(module, dtype, x.device, patterns, "per_example")
    rows = ArrayRows(x, dtype, x.device, None)
    survey = gradients.survey([rows], ("per_example", tuple(x.shape[1:]), x.dtype))
    if cotangents is None:
        cotangents = torch.full((1, survey.outputs), survey.outputs**-0.5, dtype=dtype, device=x.device)
    return gradients.collect(rows, gradients.plans(survey, len(cotangents)), survey, cotangents, max(1, len(x))).blocks
