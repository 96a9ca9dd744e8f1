"""All per-example gradients of a module, some columns at a time, for linear maps of the gradient such as random projections.

The columns of the parameters, in their order, are cut into chunks of about equal width; a chunk is a range of one parameter, or
several small parameters side by side. The cut depends on the module alone, never on the rows or their number. Called by
`features.projected`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ntkdask import seeds
from ntkdask.arrays import Array
from ntkdask.errors import MemoryBudgetError
from ntkdask.modules.build import build
from ntkdask.modules.jacobian.blocks import FORM_BYTES, Block
from ntkdask.modules.jacobian.gradients import ArrayRows, Gradients, ParameterPlan
from ntkdask.modules.jacobian.survey import PathError, Survey, exclude_layers
from ntkdask.modules.tensors import as_array, device_of, dtype_of
from ntkdask.modules.torch_threads import task_threads

CHUNK_COLUMNS = 2**15
"""Columns of a chunk, unless a parameter is formed in larger granules."""

OBJECT_BYTES = 2**17
"""Bytes of the Python objects of a module, of its private copy and of their hooks."""

ColumnRange = tuple[str, int, int]
"""(parameter, first column, the column after its last)."""


@dataclass(frozen=True)
class GradientSlices:
    """The gradients of φ̄ = O^{−1/2}·Σ_o f_o of a module, slice by slice.

    Parameters
    ----------
    module : torch.nn.Module, or a description of one
        With outputs f (n, O); in eval mode.
    input_layout : str or None
        "nchw" or None, see `tensors.as_tensor`.
    parameters : tuple of str or None
        Patterns (fnmatch) on dotted names; None: all that require a gradient.
    memory_bytes : int
        What a batch of rows may take; MemoryBudgetError where not even one row fits.
    caller : str
        Who asks, for messages.
    """

    module: Any
    input_layout: str | None
    parameters: tuple[str, ...] | None
    memory_bytes: int
    caller: str

    def over(self, x: Array) -> Iterator[tuple[slice, tuple[ColumnRange, ...], Array]]:
        """(rows, column ranges, gradients (rows, columns)) for every chunk of columns of every batch of rows of x (n, *s).

        Gradients are arrays of the kind and dtype of x.
        """
        with task_threads():
            surveyed, first, excluded = self._surveyed(x), 0, frozenset[str]()
            while first < x.shape[0]:
                try:
                    rows, blocks = self._collected(x, first, *surveyed)
                except PathError as error:
                    excluded = exclude_layers(error, excluded)
                    surveyed = self._surveyed(x)
                    continue
                for ranges in _cut(surveyed[2]):
                    formed = [blocks[name].slice(start, stop) for name, start, stop in ranges]
                    columns = formed[0].contiguous() if len(formed) == 1 else torch.cat(formed, dim=1)
                    del formed
                    yield rows, ranges, as_array(columns, x)
                first = rows.stop

    def _collected(
        self, x: Array, first: int, gradients: Gradients, survey: Survey, plans: list[ParameterPlan]
    ) -> tuple[slice, dict[str, Block]]:
        """(rows of the batch that begins at row `first`, {parameter: its gradients for these rows})."""
        batch = self._batch(x.shape[0], survey, plans, gradients.itemsize)
        rows = slice(first, min(first + batch, x.shape[0]))
        batch_rows = ArrayRows(x[rows], gradients.dtype, gradients.device, self.input_layout)
        with torch.inference_mode(False):
            cotangents = torch.full(
                (1, survey.outputs), survey.outputs**-0.5, dtype=gradients.dtype, device=gradients.device
            )
            return rows, {b.name: b for b in gradients.collect(batch_rows, plans, survey, cotangents, batch).blocks}

    def widths(self, itemsize: int, row_shape: tuple[int, ...]) -> tuple[int, int]:
        """(number of all columns, columns of the widest chunk) for rows of this size and shape."""
        plans = self._planned(itemsize, row_shape)[2]
        return sum(plan.columns for plan in plans), _widest(plans)

    def workspace_bytes(self, n: int, itemsize: int, row_shape: tuple[int, ...]) -> int:
        """Most bytes that `over` holds for n rows: the module's private copy, a batch of rows and a chunk of its gradients."""
        gradients, survey, plans = self._planned(itemsize, row_shape)
        copied = sum(p.numel() for p in gradients.twin.parameters()) * itemsize
        batch = self._batch(n, survey, plans, itemsize)
        forming_one_row = max(plan.form_bytes for plan in plans)
        forming = min(FORM_BYTES, batch * forming_one_row) + forming_one_row
        return OBJECT_BYTES + copied + forming + batch * self._row_bytes(survey, plans, itemsize)

    def _planned(self, itemsize: int, row_shape: tuple[int, ...]) -> tuple[Gradients, Survey, list[ParameterPlan]]:
        """As `_surveyed`, for made-up rows of a shape."""
        drawn = seeds.uniforms(0, ("rows",), 2 * math.prod(row_shape))
        with task_threads():
            return self._surveyed(drawn.reshape(2, *row_shape).astype(f"float{8 * itemsize}"), "plan")

    def _surveyed(self, x: Array, purpose: str = "call") -> tuple[Gradients, Survey, list[ParameterPlan]]:
        """(gradients, survey, a plan for each parameter) of the module for rows like x."""
        module = build(self.module, self.caller)
        with torch.inference_mode(False):  # what is made in inference mode never takes part in a graph
            gradients = Gradients(module, dtype_of(x), device_of(x), self.parameters, self.caller)
            rows = ArrayRows(x, gradients.dtype, gradients.device, self.input_layout)
            survey = gradients.survey([rows], (purpose, tuple(x.shape[1:]), self.input_layout))
        return gradients, survey, gradients.plans(survey, 1)

    def _batch(self, n: int, survey: Survey, plans: Sequence[ParameterPlan], itemsize: int) -> int:
        """Rows of a batch; MemoryBudgetError where one row does not fit."""
        row_bytes = self._row_bytes(survey, plans, itemsize)
        rows = (self.memory_bytes - FORM_BYTES) // row_bytes
        if rows < 1:
            raise MemoryBudgetError(
                f"{self.caller}: the gradient of one row takes {row_bytes / 2**20:.1f} MiB, and {FORM_BYTES / 2**20:.0f} MiB more to "
                f"form it in, of memory_bytes={self.memory_bytes}. Use memory_bytes >= {row_bytes + FORM_BYTES}."
            )
        return max(1, min(n, rows))

    def _row_bytes(self, survey: Survey, plans: Sequence[ParameterPlan], itemsize: int) -> int:
        """Bytes of a row in a batch: what is kept of it, and the larger of a pass and of a chunk that is formed and joined."""
        chunk = _widest(plans) * itemsize
        return sum(plan.kept_bytes for plan in plans) + max(survey.sweep_bytes, 3 * chunk)


def _widest(plans: Sequence[ParameterPlan]) -> int:
    """Columns of the widest chunk."""
    return max(sum(stop - start for _, start, stop in ranges) for ranges in _cut(plans))


def _cut(plans: Sequence[ParameterPlan]) -> list[tuple[ColumnRange, ...]]:
    return cut_columns([(plan.name, plan.columns, plan.granule) for plan in plans])


def cut_columns(columns: Sequence[tuple[str, int, int]]) -> list[tuple[ColumnRange, ...]]:
    """The columns of parameters (name, columns, granule), in order, cut into chunks of at most CHUNK_COLUMNS, or of one granule.

    >>> cut_columns([("a", 3, 1), ("b", 2**15, 2**14), ("c", 5, 5)])
    [(('a', 0, 3),), (('b', 0, 32768),), (('c', 0, 5),)]
    """
    chunks: list[tuple[ColumnRange, ...]] = []
    gathered: list[ColumnRange] = []
    width = 0
    for name, count, granule in columns:
        step = max(1, CHUNK_COLUMNS // granule) * granule
        for start in range(0, count, step):
            stop = min(start + step, count)
            if gathered and width + stop - start > CHUNK_COLUMNS:
                chunks.append(tuple(gathered))
                gathered, width = [], 0
            gathered.append((name, start, stop))
            width += stop - start
    return [*chunks, tuple(gathered)] if gathered else chunks
