"""All per-example gradients of a module, some columns at a time: what a linear map of the gradient (a random projection) reads.

The columns of the parameters, in their order, are cut into chunks of about equal width; a chunk is a part of one parameter, or several
small ones side by side. The cut depends on the module alone, never on the rows or their number. Called by `features/projected.py`.
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
from ntkdask.modules.jacobian.gradients import FORM_BYTES, ArrayRows, Block, Gradients, Part
from ntkdask.modules.jacobian.survey import PathError, Survey, set_apart
from ntkdask.modules.tensors import as_array, device_of, dtype_of
from ntkdask.modules.torch_threads import task_threads

CHUNK_COLUMNS = 2**15
"""Columns of a chunk, unless a parameter is formed in larger granules."""

OBJECT_BYTES = 2**17
"""Of Python's objects that a module, its copy and their hooks are."""

Piece = tuple[str, int, int]
"""(parameter, first column, last column)."""


@dataclass(frozen=True)
class GradientSlices:
    """The gradients of φ̄ = O^{−1/2}·Σ_o f_o of a module (or a description of one), slice by slice, within `memory_bytes`.

    Errors as of `Gradients`; MemoryBudgetError where not even one row fits. what: who asks, for errors.
    """

    module: Any
    input_layout: str | None
    parameters: tuple[str, ...] | None
    memory_bytes: int
    what: str

    def over(self, x: Array) -> Iterator[tuple[slice, tuple[Piece, ...], Array]]:
        """(rows, columns, their gradients (rows, columns)) of x (n, *s), of its kind and dtype: every chunk of every batch of rows."""
        with task_threads():
            looked, first, apart = self._looked(x), 0, frozenset[str]()
            while first < x.shape[0]:
                try:
                    rows, blocks = self._collected(x, first, *looked)
                except PathError as error:
                    apart = set_apart(error, apart)
                    looked = self._looked(x)
                    continue
                for pieces in _cut(looked[2]):
                    formed = [blocks[name].slice(start, stop) for name, start, stop in pieces]
                    columns = formed[0].contiguous() if len(formed) == 1 else torch.cat(formed, dim=1)
                    del formed
                    yield rows, pieces, as_array(columns, x)
                first = rows.stop

    def _collected(
        self, x: Array, first: int, of: Gradients, known: Survey, parts: list[Part]
    ) -> tuple[slice, dict[str, Block]]:
        """(rows, {parameter: its gradients}) of the batch that begins at row `first`."""
        batch = self._batch(x.shape[0], known, parts, of.itemsize)
        rows = slice(first, min(first + batch, x.shape[0]))
        given = ArrayRows(x[rows], of.dtype, of.device, self.input_layout)
        with torch.inference_mode(False):
            cotangents = torch.full((1, known.outputs), known.outputs**-0.5, dtype=of.dtype, device=of.device)
            return rows, {b.name: b for b in of.collect(given, parts, known, cotangents, batch).blocks}

    def widths(self, itemsize: int, row_shape: tuple[int, ...]) -> tuple[int, int]:
        """(columns in all, columns of the widest chunk) for such rows."""
        parts = self._planned(itemsize, row_shape)[2]
        return sum(part.columns for part in parts), _widest(parts)

    def workspace_bytes(self, n: int, itemsize: int, row_shape: tuple[int, ...]) -> int:
        """Peak bytes of `over` on n such rows: the module's copy, a batch of rows and a chunk of its gradients."""
        of, known, parts = self._planned(itemsize, row_shape)
        copied = sum(p.numel() for p in of.copy.parameters()) * itemsize
        batch = self._batch(n, known, parts, itemsize)
        one = max(part.form_bytes for part in parts)
        return (
            OBJECT_BYTES + copied + min(FORM_BYTES, batch * one) + one + batch * self._row_bytes(known, parts, itemsize)
        )

    def _planned(self, itemsize: int, row_shape: tuple[int, ...]) -> tuple[Gradients, Survey, list[Part]]:
        drawn = seeds.uniforms(0, ("rows",), 2 * math.prod(row_shape))
        with task_threads():
            return self._looked(drawn.reshape(2, *row_shape).astype(f"float{8 * itemsize}"), "plan")

    def _looked(self, x: Array, purpose: str = "call") -> tuple[Gradients, Survey, list[Part]]:
        module = build(self.module, self.what)
        with torch.inference_mode(False):  # what is made in inference mode never takes part in a graph
            of = Gradients(module, dtype_of(x), device_of(x), self.parameters, self.what)
            rows = ArrayRows(x, of.dtype, of.device, self.input_layout)
            known = of.survey([rows], (purpose, tuple(x.shape[1:]), self.input_layout))
        return of, known, of.parts(known, 1)

    def _batch(self, n: int, known: Survey, parts: Sequence[Part], itemsize: int) -> int:
        """Rows of a batch."""
        each = self._row_bytes(known, parts, itemsize)
        rows = (self.memory_bytes - FORM_BYTES) // each
        if rows < 1:
            raise MemoryBudgetError(
                f"{self.what}: the gradient of one row takes {each / 2**20:.1f} MiB, and {FORM_BYTES / 2**20:.0f} MiB more to form it "
                f"in, of memory_bytes={self.memory_bytes}. Use memory_bytes >= {each + FORM_BYTES}."
            )
        return max(1, min(n, rows))

    def _row_bytes(self, known: Survey, parts: Sequence[Part], itemsize: int) -> int:
        """Of a row in a batch: what a pass keeps of it, the pass itself, or a chunk formed and put together."""
        chunk = _widest(parts) * itemsize
        return sum(part.kept_bytes for part in parts) + max(known.sweep_bytes, 3 * chunk)


def _widest(parts: Sequence[Part]) -> int:
    return max(sum(stop - start for _, start, stop in pieces) for pieces in _cut(parts))


def _cut(parts: Sequence[Part]) -> list[tuple[Piece, ...]]:
    return cut_columns([(part.name, part.columns, part.granule) for part in parts])


def cut_columns(columns: Sequence[tuple[str, int, int]]) -> list[tuple[Piece, ...]]:
    """All columns of the parameters (name, columns, granule), in order, in chunks of at most CHUNK_COLUMNS or of one granule.

    >>> cut_columns([("a", 3, 1), ("b", 2**15, 2**14), ("c", 5, 5)])
    [(('a', 0, 3),), (('b', 0, 32768),), (('c', 0, 5),)]
    """
    chunks: list[tuple[Piece, ...]] = []
    gathered: list[Piece] = []
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
