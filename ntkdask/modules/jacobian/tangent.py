"""Empirical tangent kernels of a module from its per-example gradients: matrices and diagonals, within a budget of memory. MATH.md §5.

The parameters are taken in groups whose kept pairs fit half of the budget, one forward and backward pass over the rows for each group;
then layer by layer, in ranges of columns that fit the other half, the products are added to the matrix. Linear layers with one term a
row, and convolutions to few pixels, need no gradients formed (`Accumulator.add_terms`). Where a single parameter does not fit,
rows are taken in blocks. Called by `modules.empirical`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ntkdask.errors import MemoryBudgetError
from ntkdask.modules.jacobian.contributions import Terms
from ntkdask.modules.jacobian.gradients import Block, Collected, Gradients, Kept, Part, form_bytes
from ntkdask.modules.jacobian.probe import Rows
from ntkdask.modules.jacobian.products import Accumulator, rounding
from ntkdask.modules.jacobian.survey import Survey

Tensor = torch.Tensor

BATCH_ROWS = 64
DEVICE_BATCH_ROWS = 1024
"""Rows of a forward and backward pass at most, on a CPU, where more leave its caches, and on a GPU."""
DIAGONAL_ROWS = 256
"""Rows whose diagonal is taken at a time at most."""
SLICE_COLUMNS = 2**14
SLICE_GRANULES = 64
"""Columns that are formed at a time at most, or granules where those are more: enough for products, and for forming them at once."""
TERM_ROWS = 2048
"""Rows times terms of a block of `add_terms` at most."""
PASS_FLOPS = 200
"""What an elementwise pass over an entry of a product costs, in flops of products."""


@dataclass(frozen=True)
class Output:
    """What is differentiated: "pseudo" (Σ_o y_o/√O), "trace" (the mean over logits of their kernels), "full" (every pair of logits),
    or the number of one logit.
    """

    kind: str | int

    def cotangents(self, outputs: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(Q, O)."""
        if self.kind == "pseudo":
            return torch.full((1, outputs), outputs**-0.5, dtype=dtype, device=device)
        whole = torch.eye(outputs, dtype=dtype, device=device)
        if self.kind == "trace":
            return whole / math.sqrt(outputs)
        return whole if self.kind == "full" else whole[int(self.kind) : int(self.kind) + 1]

    def count(self, outputs: int) -> int:
        """Q."""
        return outputs if self.kind in ("trace", "full") else 1

    @property
    def joined(self) -> bool:
        """Whether the cotangents' kernels are summed."""
        return self.kind != "full"


@dataclass(frozen=True)
class Piece:
    """One parameter in a call: `terms` T > 0 where products of terms beat products of formed gradients, of T·depth inputs and T·units
    output gradients a row.
    """

    part: Part
    terms: int = 0
    depth: int = 0
    units: int = 0


def piece(of: Gradients, part: Part, outputs: int, joined: bool) -> Piece:
    """How the products of `part` are best taken."""
    if part.formed or part.sites is None or len(part.sites) > 1:
        return Piece(part)
    site = part.sites[0]
    rule = of.rule(site)
    if not isinstance(rule, Terms) or rule.groups > 1:
        return Piece(part)
    terms, pairs = rule.terms(site.g_shape), 1 if joined else outputs**2
    units = rule.units * (outputs if joined else 1)
    by_terms = terms**2 * (2 * rule.granule + pairs * (2 * units + PASS_FLOPS))
    by_columns = 2 * part.columns * (outputs if joined else pairs)
    return Piece(part, terms, rule.granule, rule.units) if by_terms < by_columns else Piece(part)


@dataclass(frozen=True)
class Budget:
    """How a call on `together` rows at a time is cut up, and what it holds at its peak beyond the whole matrix.

    groups: parameters of one pass; batch: rows of a forward pass; tile: rows of a side at a time, 0 for all;
    temporary_bytes: of formed gradients or of term products.
    """

    groups: tuple[tuple[Piece, ...], ...]
    batch: int
    tile: int
    temporary_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Tangent:
    """The tangent kernel of the module of `of`, in its dtype, within `memory` bytes. Errors as of `Gradients`."""

    of: Gradients
    output: Output
    memory: int
    precision: str | None = None

    def budget(self, known: Survey, n: int, m: int | None) -> Budget:
        """The cut of a call on n and m rows (None: symmetric). MemoryBudgetError where not even one row of each fits.

        Half of the memory is for what is kept, half for a pass or, after it, for products.
        """
        outputs, itemsize = self.output.count(known.outputs), self.of.itemsize
        parts, half = self.of.parts(known, outputs), max(1, self.memory // 2)
        pieces = [piece(self.of, part, outputs, self.output.joined) for part in parts]
        together, tile = max(1, n + (m or 0)), 0
        largest = max(part.kept_bytes for part in parts)
        if largest * together > half:
            tile = half // (2 * largest)
            if not tile:
                raise MemoryBudgetError(
                    f"{self.of.what}: the gradients of two rows in one parameter take {2 * largest / 2**20:.1f} MiB, more than half "
                    f"of memory_bytes={self.memory}. Use memory_bytes >= {4 * largest}."
                )
            together = 2 * tile
        groups: list[list[Piece]] = [[]]
        for one in pieces:
            if groups[-1] and together * sum(p.part.kept_bytes for p in (*groups[-1], one)) > half:
                groups.append([])
            groups[-1].append(one)
        kept = together * max(sum(p.part.kept_bytes for p in group) for group in groups)
        row_bytes = known.sweep_bytes + (outputs - 1) * known.gradient_bytes
        row_bytes += max((part.form_bytes for part in parts if part.sites is None), default=0)
        most = BATCH_ROWS if self.of.device.type == "cpu" else DEVICE_BATCH_ROWS
        batch = max(1, min(most, together if m is None else max(n, m), half // max(1, row_bytes)))
        one_row = max(part.form_bytes + min(part.granule, part.columns) * outputs * itemsize for part in parts)
        forming = max(min(form_bytes(self.of.device), batch * one_row), one_row)
        temporary = min(half, max(self._wish(p, together, outputs) for p in pieces))
        tiles = tile * tile * (1 if self.output.joined else outputs**2) * itemsize
        peak = kept + max(batch * row_bytes + forming, temporary + forming) + tiles
        return Budget(tuple(tuple(group) for group in groups), batch, tile, temporary, peak)

    def _wish(self, one: Piece, rows: int, outputs: int) -> int:
        """Bytes of temporaries with which the products of a parameter run at their best."""
        if one.terms:
            return self._term_bytes(one, min(rows, max(1, TERM_ROWS // one.terms)), outputs)
        copies = 2 if self.precision == "bfloat16" else 1
        if one.part.formed and copies == 1:
            return 0
        return copies * outputs * rows * min(one.part.columns, _widest(one.part.granule)) * self.of.itemsize

    def _term_bytes(self, one: Piece, rows: int, outputs: int) -> int:
        """Bytes of a block of `rows` × `rows` examples: both sides' factors with their copies, and the products of terms."""
        side = rows * one.terms * (one.depth + 2 * outputs * one.units)
        entries = (rows * one.terms) ** 2 * (1 if self.output.joined else outputs**2)
        return self.of.itemsize * (2 * side + 2 * entries + rows**2)

    def matrix(self, k: Tensor, known: Survey, x: Rows, y: Rows | None) -> Tensor:
        """Fill k, zeros of (n·Q', m·Q'), Q' = O for "full" and 1 otherwise, with the kernel of rows x and y (None: x)."""
        cut = self.budget(known, len(x), None if y is None else len(y))
        with rounding(self.of.device, False):
            if not cut.tile:
                return self._tile(k, known, cut, x, y)
            each = 1 if self.output.joined else known.outputs
            for i in range(0, len(x), cut.tile):
                for j in range(i if y is None else 0, len(x if y is None else y), cut.tile):
                    left = _Span(x, i, min(i + cut.tile, len(x)))
                    other = x if y is None else y
                    right = None if y is None and i == j else _Span(other, j, min(j + cut.tile, len(other)))
                    shape = (each * len(left), each * len(right or left))
                    tile = self._tile(k.new_zeros(shape), known, cut, left, right)
                    k[each * i : each * i + shape[0], each * j : each * j + shape[1]] = tile
                    if y is None and i != j:
                        k[each * j : each * j + shape[1], each * i : each * i + shape[0]] = tile.T
        return k

    def _tile(self, k: Tensor, known: Survey, cut: Budget, x: Rows, y: Rows | None) -> Tensor:
        total = Accumulator(k, y is None, self.precision)
        cotangents = self.output.cotangents(known.outputs, self.of.dtype, self.of.device)
        for group in cut.groups:
            parts = [one.part for one in group]
            left = self.of.collect(x, parts, known, cotangents, cut.batch)
            right = None if y is None else self.of.collect(y, parts, known, cotangents, cut.batch)
            self._add_panels(total, cut, left, right)
            for index, one in enumerate(group):
                if one.part.formed:
                    continue
                b = None if right is None else right.blocks[index]
                if one.terms:
                    self._add_terms(total, cut, one, left.blocks[index], b)
                else:
                    self._add_columns(total, cut, left.blocks[index], b)
            del left, right
        return total.finish()

    def _flat(self, part: Tensor) -> Tensor:
        """(rows, Q, columns) as the factor of a product: Q more columns, or Q rows for each row."""
        return part.flatten(1) if self.output.joined else part.flatten(0, 1)

    def _add_panels(self, total: Accumulator, cut: Budget, left: Collected, right: Collected | None) -> None:
        a, b = self._flat(left.panel), None if right is None else self._flat(right.panel)
        if self.precision != "bfloat16":
            total.add(a, b)
            return
        rows = len(a) + (0 if b is None else len(b))
        step = max(1, cut.temporary_bytes // (2 * rows * self.of.itemsize))
        for i in range(0, a.shape[1], step):
            total.add(a[:, i : i + step], None if b is None else b[:, i : i + step])

    def _add_columns(self, total: Accumulator, cut: Budget, left: Block, right: Block | None) -> None:
        rows = left.outputs * (left.rows + (0 if right is None else right.rows))
        each = rows * left.granule * self.of.itemsize * (2 if self.precision == "bfloat16" else 1)
        step = min(
            left.columns, max(left.granule, min(left.granule * (cut.temporary_bytes // each), _widest(left.granule)))
        )
        a, b = (None if t is None else t.like.new_empty(t.rows * t.outputs * step) for t in (left, right))
        for i in range(0, left.columns, step):
            stop = min(i + step, left.columns)
            total.add(self._flat(left.part(i, stop, a)), None if right is None else self._flat(right.part(i, stop, b)))

    def _add_terms(self, total: Accumulator, cut: Budget, one: Piece, left: Block, right: Block | None) -> None:
        outputs = left.outputs
        step = max(1, min(left.rows, TERM_ROWS // one.terms))
        while step > 1 and self._term_bytes(one, step, outputs) > cut.temporary_bytes:
            step //= 2
        a, b = left.kept[0], (left if right is None else right).kept[0]
        for i in range(0, left.rows, step):
            rows = slice(i, min(i + step, left.rows))
            seen, gradient = _factors(a, rows)
            for j in range(i if right is None else 0, len(b.a), step):
                columns = slice(j, min(j + step, len(b.a)))
                other = (seen, gradient) if right is None and i == j else _factors(b, columns)
                total.add_terms(rows, columns, seen, other[0], gradient, other[1], self.output.joined)

    def diagonal(self, out: Tensor, known: Survey, x: Rows) -> Tensor:
        """Fill out, float64 zeros (n, Q', Q'), with J_i J_iᵀ (summed over Q where joined)."""
        cotangents = self.output.cotangents(known.outputs, self.of.dtype, self.of.device)
        cut = self.budget(known, min(DIAGONAL_ROWS, len(x)), None)
        step = cut.tile or min(DIAGONAL_ROWS, len(x))
        with rounding(self.of.device, False):
            for start in range(0, len(x), step):
                rows = _Span(x, start, min(start + step, len(x)))
                for group in cut.groups:
                    kept = self.of.collect(rows, [one.part for one in group], known, cotangents, cut.batch)
                    into = out[start : start + len(rows)]
                    into += self._squares(kept.panel)
                    for block in kept.blocks:
                        if block.formed is None:
                            self._add_squares(into, cut, block)
        return out

    def _squares(self, part: Tensor) -> Tensor:
        """(rows, Q', Q') float64 sums of products of columns."""
        if self.output.joined:
            return part.square().sum(dim=(1, 2), dtype=torch.float64)[:, None, None]
        return torch.bmm(part, part.transpose(1, 2)).double()

    def _add_squares(self, into: Tensor, cut: Budget, block: Block) -> None:
        each = block.rows * block.outputs * block.granule * self.of.itemsize
        step = max(block.granule, min(block.granule * (cut.temporary_bytes // (2 * each)), _widest(block.granule)))
        for i in range(0, block.columns, step):
            into += self._squares(block.part(i, min(i + step, block.columns)))


def _widest(granule: int) -> int:
    """Columns, in whole granules, that are formed at a time at most."""
    return granule * max(1, SLICE_COLUMNS // granule, SLICE_GRANULES)


def _factors(kept: Kept, rows: slice) -> tuple[Tensor, Tensor]:
    """(rows, T, depth) inputs and (rows, Q, T, units) output gradients."""
    rule = kept.rule
    if not isinstance(rule, Terms):
        raise TypeError(f"{type(rule).__name__} is no sum of terms")
    seen = rule.windows(kept.a[rows], 0, 1).squeeze(1).transpose(1, 2)
    return seen, rule.cotangents(kept.g[rows]).transpose(2, 3)


@dataclass(frozen=True)
class _Span:
    """Rows start to stop of others."""

    rows: Rows
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def batch(self, start: int, stop: int) -> Tensor:
        """See `Rows.batch`."""
        return self.rows.batch(self.start + start, self.start + stop)
