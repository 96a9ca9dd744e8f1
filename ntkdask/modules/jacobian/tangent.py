"""Empirical tangent kernels of a module from its per-example gradients: matrices and diagonals, within a budget of memory. MATH.md §5.

The parameters are taken in groups; what a pass keeps of one group (`gradients`) fits half of the budget. For each group there is
one forward and backward pass over the rows. Then the products of gradients are added to the matrix, parameter by parameter, in
ranges of columns that fit the other half. Linear layers with one term a row, and convolutions with few output pixels, do without
formed gradients (`Accumulator.add_terms`). Where a single parameter does not fit, rows are taken in blocks. Called by
`modules.empirical`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ntkdask.errors import MemoryBudgetError
from ntkdask.modules.jacobian.blocks import Block, Pair, form_bytes
from ntkdask.modules.jacobian.contributions import Terms
from ntkdask.modules.jacobian.gradients import Collected, Gradients, ParameterPlan
from ntkdask.modules.jacobian.probe import Rows
from ntkdask.modules.jacobian.products import Accumulator, rounding
from ntkdask.modules.jacobian.survey import Survey

Tensor = torch.Tensor

BATCH_ROWS = 64
DEVICE_BATCH_ROWS = 1024
"""Most rows of a forward and backward pass, on a CPU (more would leave its caches) and on a GPU."""
DIAGONAL_ROWS = 256
"""Most rows whose diagonal is computed at a time."""
SLICE_COLUMNS = 2**14
SLICE_GRANULES = 64
"""Most columns that are formed at a time, and most granules; the larger of the two counts."""
TERM_ROWS = 2048
"""Most rows, times terms, of a block of `add_terms`."""
PASS_FLOPS = 200
"""Cost of an elementwise pass over one entry, in operations of a matrix product."""


@dataclass(frozen=True)
class Output:
    """Which kernel is computed of a module with O logits y_o, and by which cotangents.

    "pseudo": of Σ_o y_o/√O; "trace": the mean over logits of their kernels; "full": of every pair of logits; a number: of that logit.
    """

    kind: str | int

    def cotangents(self, outputs: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The cotangents (Q, O): row q says that Σ_o c_qo·y_o is differentiated."""
        if self.kind == "pseudo":
            return torch.full((1, outputs), outputs**-0.5, dtype=dtype, device=device)
        whole = torch.eye(outputs, dtype=dtype, device=device)
        if self.kind == "trace":
            return whole / math.sqrt(outputs)
        return whole if self.kind == "full" else whole[int(self.kind) : int(self.kind) + 1]

    def count(self, outputs: int) -> int:
        """Q, the number of cotangents."""
        return outputs if self.kind in ("trace", "full") else 1

    @property
    def joined(self) -> bool:
        """Whether the kernels of the cotangents are summed to one; otherwise the matrix has Q rows and columns for an example."""
        return self.kind != "full"


@dataclass(frozen=True)
class ProductPlan:
    """How the products of one parameter's gradients are computed: from formed gradients, or term by term where that costs less.

    Parameters
    ----------
    parameter : ParameterPlan
        The parameter.
    terms : int, optional
        T, the terms of a row's gradient Σ_t g_t a_tᵀ; 0 where gradients are formed.
    depth : int, optional
        Numbers of a_t, an input of a term.
    units : int, optional
        Numbers of g_t, an output gradient of a term.
    """

    parameter: ParameterPlan
    terms: int = 0
    depth: int = 0
    units: int = 0


def plan_product(gradients: Gradients, plan: ParameterPlan, outputs: int, joined: bool) -> ProductPlan:
    """The cheaper way to compute the products of a parameter, by counts of operations."""
    if plan.formed or plan.sites is None or len(plan.sites) > 1:
        return ProductPlan(plan)
    site = plan.sites[0]
    rule = gradients.rule(site)
    if not isinstance(rule, Terms) or rule.groups > 1:
        return ProductPlan(plan)
    terms, pairs = rule.terms(site.g_shape), 1 if joined else outputs**2
    units = rule.units * (outputs if joined else 1)
    by_terms = terms**2 * (2 * rule.granule + pairs * (2 * units + PASS_FLOPS))
    by_columns = 2 * plan.columns * (outputs if joined else pairs)
    return ProductPlan(plan, terms, rule.granule, rule.units) if by_terms < by_columns else ProductPlan(plan)


@dataclass(frozen=True)
class Budget:
    """How a call is cut into passes, and what it holds.

    Parameters
    ----------
    groups : tuple of tuples of ProductPlan
        The parameters of each pass.
    batch : int
        Rows of a forward and backward pass.
    tile : int
        Rows of x, and of y, that are taken at a time; 0: all.
    temporary_bytes : int
        For formed gradients, or for the products of terms.
    peak_bytes : int
        Most bytes held at once, the matrix not counted.
    """

    groups: tuple[tuple[ProductPlan, ...], ...]
    batch: int
    tile: int
    temporary_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Tangent:
    """The tangent kernel of a module, in the dtype of its gradients.

    Parameters
    ----------
    gradients : Gradients
        The per-example gradients of the module; errors are those of its methods.
    output : Output
        Which kernel.
    memory : int
        Bytes that a call may hold besides the matrix.
    precision : str, optional
        What the factors of products are rounded to: "tf32", "bfloat16", or None for nothing.
    """

    gradients: Gradients
    output: Output
    memory: int
    precision: str | None = None

    def budget(self, survey: Survey, n: int, m: int | None) -> Budget:
        """How a call on n rows of x and m of y (None: x itself) is cut; MemoryBudgetError where not even one row of each fits.

        Half of the memory is for what passes keep, the other half for a pass and, after it, for products.
        """
        outputs, itemsize = self.output.count(survey.outputs), self.gradients.itemsize
        plans, half = self.gradients.plans(survey, outputs), max(1, self.memory // 2)
        products = [plan_product(self.gradients, plan, outputs, self.output.joined) for plan in plans]
        together, tile = max(1, n + (m or 0)), 0
        largest = max(plan.kept_bytes for plan in plans)
        if largest * together > half:
            tile = half // (2 * largest)
            if not tile:
                raise MemoryBudgetError(
                    f"{self.gradients.caller}: the gradients of two rows in one parameter take {2 * largest / 2**20:.1f} MiB, more "
                    f"than half of memory_bytes={self.memory}. Use memory_bytes >= {4 * largest}."
                )
            together = 2 * tile
        groups: list[list[ProductPlan]] = [[]]
        for product in products:
            if groups[-1] and together * sum(p.parameter.kept_bytes for p in (*groups[-1], product)) > half:
                groups.append([])
            groups[-1].append(product)
        kept = together * max(sum(p.parameter.kept_bytes for p in group) for group in groups)
        row_bytes = survey.sweep_bytes + (outputs - 1) * survey.gradient_bytes
        row_bytes += max((plan.form_bytes for plan in plans if plan.sites is None), default=0)
        most_rows = BATCH_ROWS if self.gradients.device.type == "cpu" else DEVICE_BATCH_ROWS
        batch = max(1, min(most_rows, together if m is None else max(n, m), half // max(1, row_bytes)))
        one_row = max(plan.form_bytes + min(plan.granule, plan.columns) * outputs * itemsize for plan in plans)
        forming = max(min(form_bytes(self.gradients.device), batch * one_row), one_row)
        temporary = min(half, max(self._temporary_bytes(p, together, outputs) for p in products))
        tiles = tile * tile * (1 if self.output.joined else outputs**2) * itemsize
        peak = kept + max(batch * row_bytes + forming, temporary + forming) + tiles
        return Budget(tuple(tuple(group) for group in groups), batch, tile, temporary, peak)

    def _temporary_bytes(self, product: ProductPlan, rows: int, outputs: int) -> int:
        """Bytes of temporaries beyond which more would not make the products of a parameter faster."""
        if product.terms:
            return self._term_bytes(product, min(rows, max(1, TERM_ROWS // product.terms)), outputs)
        copies = 2 if self.precision == "bfloat16" else 1
        if product.parameter.formed and copies == 1:
            return 0
        columns = min(product.parameter.columns, _widest(product.parameter.granule))
        return copies * outputs * rows * columns * self.gradients.itemsize

    def _term_bytes(self, product: ProductPlan, rows: int, outputs: int) -> int:
        """Bytes of a block of `rows` × `rows` examples: the factors of both sides with their copies, and the products of terms."""
        side = rows * product.terms * (product.depth + 2 * outputs * product.units)
        entries = (rows * product.terms) ** 2 * (1 if self.output.joined else outputs**2)
        return self.gradients.itemsize * (2 * side + 2 * entries + rows**2)

    def matrix(self, k: Tensor, survey: Survey, x: Rows, y: Rows | None) -> Tensor:
        """Fill `k`, zeros (n·Q′, m·Q′), with the kernel of the rows x and y (None: x), and return it; Q′ is O for "full", else 1."""
        budget = self.budget(survey, len(x), None if y is None else len(y))
        with rounding(self.gradients.device, False):
            if not budget.tile:
                return self._tile(k, survey, budget, x, y)
            entry_rows = 1 if self.output.joined else survey.outputs
            for i in range(0, len(x), budget.tile):
                for j in range(i if y is None else 0, len(x if y is None else y), budget.tile):
                    left = _RowRange(x, i, min(i + budget.tile, len(x)))
                    other = x if y is None else y
                    right = None if y is None and i == j else _RowRange(other, j, min(j + budget.tile, len(other)))
                    shape = (entry_rows * len(left), entry_rows * len(right or left))
                    tile = self._tile(k.new_zeros(shape), survey, budget, left, right)
                    at, across = entry_rows * i, entry_rows * j
                    k[at : at + shape[0], across : across + shape[1]] = tile
                    if y is None and i != j:
                        k[across : across + shape[1], at : at + shape[0]] = tile.T
        return k

    def _tile(self, k: Tensor, survey: Survey, budget: Budget, x: Rows, y: Rows | None) -> Tensor:
        """`k`, zeros, filled with the kernel of rows whose kept gradients fit the budget together."""
        total = Accumulator(k, y is None, self.precision)
        cotangents = self.output.cotangents(survey.outputs, self.gradients.dtype, self.gradients.device)
        for group in budget.groups:
            plans = [product.parameter for product in group]
            left = self.gradients.collect(x, plans, survey, cotangents, budget.batch)
            right = None if y is None else self.gradients.collect(y, plans, survey, cotangents, budget.batch)
            self._add_panels(total, budget, left, right)
            for index, product in enumerate(group):
                if product.parameter.formed:
                    continue
                b = None if right is None else right.blocks[index]
                if product.terms:
                    self._add_terms(total, budget, product, left.blocks[index], b)
                else:
                    self._add_columns(total, budget, left.blocks[index], b)
            del left, right
        return total.finish()

    def _factor(self, gradients: Tensor) -> Tensor:
        """Gradients (rows, Q, columns) as the factor of a product: (rows, Q·columns) where joined, else (rows·Q, columns)."""
        return gradients.flatten(1) if self.output.joined else gradients.flatten(0, 1)

    def _add_panels(self, total: Accumulator, budget: Budget, left: Collected, right: Collected | None) -> None:
        """Add the products of all gradients that a pass has formed."""
        a, b = self._factor(left.panel), None if right is None else self._factor(right.panel)
        if self.precision != "bfloat16":
            total.add(a, b)
            return
        rows = len(a) + (0 if b is None else len(b))
        step = max(1, budget.temporary_bytes // (2 * rows * self.gradients.itemsize))
        for i in range(0, a.shape[1], step):
            total.add(a[:, i : i + step], None if b is None else b[:, i : i + step])

    def _add_columns(self, total: Accumulator, budget: Budget, left: Block, right: Block | None) -> None:
        """Add the products of one parameter's gradients, which are formed a range of columns at a time."""
        rows = left.outputs * (left.rows + (0 if right is None else right.rows))
        granule_bytes = rows * left.granule * self.gradients.itemsize * (2 if self.precision == "bfloat16" else 1)
        fitting = left.granule * (budget.temporary_bytes // granule_bytes)
        step = min(left.columns, max(left.granule, min(fitting, _widest(left.granule))))
        a, b = (None if t is None else t.template.new_empty(t.rows * t.outputs * step) for t in (left, right))
        for i in range(0, left.columns, step):
            stop = min(i + step, left.columns)
            total.add(
                self._factor(left.form_range(i, stop, a)),
                None if right is None else self._factor(right.form_range(i, stop, b)),
            )

    def _add_terms(
        self, total: Accumulator, budget: Budget, product: ProductPlan, left: Block, right: Block | None
    ) -> None:
        """Add the products of one parameter's gradients term by term, a block of examples at a time."""
        outputs = left.outputs
        step = max(1, min(left.rows, TERM_ROWS // product.terms))
        while step > 1 and self._term_bytes(product, step, outputs) > budget.temporary_bytes:
            step //= 2
        a, b = left.pairs[0], (left if right is None else right).pairs[0]
        for i in range(0, left.rows, step):
            rows = slice(i, min(i + step, left.rows))
            inputs, gradient = _factors(a, rows)
            for j in range(i if right is None else 0, len(b.a), step):
                columns = slice(j, min(j + step, len(b.a)))
                other = (inputs, gradient) if right is None and i == j else _factors(b, columns)
                total.add_terms(rows, columns, inputs, other[0], gradient, other[1], self.output.joined)

    def diagonal(self, out: Tensor, survey: Survey, x: Rows) -> Tensor:
        """Fill `out`, float64 zeros (n, Q′, Q′), with J_i J_iᵀ, summed over Q where joined, and return it."""
        cotangents = self.output.cotangents(survey.outputs, self.gradients.dtype, self.gradients.device)
        budget = self.budget(survey, min(DIAGONAL_ROWS, len(x)), None)
        step = budget.tile or min(DIAGONAL_ROWS, len(x))
        with rounding(self.gradients.device, False):
            for start in range(0, len(x), step):
                rows = _RowRange(x, start, min(start + step, len(x)))
                for group in budget.groups:
                    kept = self.gradients.collect(
                        rows, [product.parameter for product in group], survey, cotangents, budget.batch
                    )
                    squares = out[start : start + len(rows)]
                    squares += self._squares(kept.panel)
                    for block in kept.blocks:
                        if block.formed is None:
                            self._add_squares(squares, budget, block)
        return out

    def _squares(self, gradients: Tensor) -> Tensor:
        """J_i J_iᵀ (rows, Q′, Q′) float64 of gradients (rows, Q, columns)."""
        if self.output.joined:
            return gradients.square().sum(dim=(1, 2), dtype=torch.float64)[:, None, None]
        return torch.bmm(gradients, gradients.transpose(1, 2)).double()

    def _add_squares(self, squares: Tensor, budget: Budget, block: Block) -> None:
        """Add J_i J_iᵀ of one parameter, whose gradients are formed a range of columns at a time."""
        granule_bytes = block.rows * block.outputs * block.granule * self.gradients.itemsize
        fitting = block.granule * (budget.temporary_bytes // (2 * granule_bytes))
        step = max(block.granule, min(fitting, _widest(block.granule)))
        for i in range(0, block.columns, step):
            squares += self._squares(block.form_range(i, min(i + step, block.columns)))


def _widest(granule: int) -> int:
    """Most columns that are formed at a time, a whole number of granules."""
    return granule * max(1, SLICE_COLUMNS // granule, SLICE_GRANULES)


def _factors(pair: Pair, rows: slice) -> tuple[Tensor, Tensor]:
    """Inputs (rows, T, depth) and output gradients (rows, Q, T, units) of each term, for some rows."""
    rule = pair.rule
    if not isinstance(rule, Terms):
        raise TypeError(f"{type(rule).__name__} is no sum of terms")
    inputs = rule.windows(pair.a[rows], 0, 1).squeeze(1).transpose(1, 2)
    return inputs, rule.cotangents(pair.g[rows]).transpose(2, 3)


@dataclass(frozen=True)
class _RowRange:
    """Rows `start` to `stop` of `rows`."""

    rows: Rows
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def batch(self, start: int, stop: int) -> Tensor:
        """See `Rows.batch`."""
        return self.rows.batch(self.start + start, self.start + stop)
