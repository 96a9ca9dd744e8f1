"""The recipe of kernel ridge regression, which jobs and estimators hold: plan, costs, fit, and texts of a printed plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ntkdask import registry
from ntkdask.datasets.rows import Rows
from ntkdask.execution.site import Site
from ntkdask.kernels import Kernel
from ntkdask.kernels.base import completed
from ntkdask.planning.resources import Costs, Resources
from ntkdask.preprocessing import Step
from ntkdask.wording import duration
from ntkdask.workflows.kernel_ridge.costs import kernel_costs, kernel_times
from ntkdask.workflows.kernel_ridge.fit import fit_kernel_ridge
from ntkdask.workflows.kernel_ridge.options import KernelRidgeOptions
from ntkdask.workflows.kernel_ridge.plan import KernelRidgePlan, KernelShape, measured, plan_kernel_ridge
from ntkdask.workflows.model import KernelRidgeModel, RidgeFit
from ntkdask.workflows.recipe import FitRequest, Recipe
from ntkdask.workflows.selection import stored_options


@dataclass(frozen=True)
class KernelRidgeRecipe(Recipe[KernelRidgePlan]):
    """Kernel ridge regression on a kernel matrix in tiles.

    Parameters
    ----------
    kernel : Kernel
        The kernel k(x, y) of two rows.
    options : KernelRidgeOptions
        Alphas, how to choose among them, how to solve.
    """

    kernel: Kernel
    options: KernelRidgeOptions

    def config(self) -> dict[str, Any]:
        """The fingerprint's entries "kernel" and "solver"."""
        return {"kernel": registry.to_config(self.kernel), "solver": stored_options(self.options)}

    def plan(self, request: FitRequest, resources: Resources, *, stored: bool = True) -> KernelRidgePlan:
        """Tiles and a solver that fit; MemoryBudgetError, with the numbers, when none do."""
        return plan_kernel_ridge(
            _shape(request),
            self.kernel,
            self.options,
            request.steps,
            plan=request.plan,
            resources=resources,
            stored=stored,
        )

    def stored_plan(self, table: Mapping[str, Any]) -> KernelRidgePlan:
        """The plan from the table that a run's record holds."""
        return KernelRidgePlan.from_json(table)

    def costs(self, request: FitRequest, plan: KernelRidgePlan) -> Costs:
        """Memory of every task, flops, tasks and disk of a run under a plan."""
        return kernel_costs(_shape(request), self.kernel, self.options, request.steps, plan)

    def selection(self, plan: KernelRidgePlan) -> str:
        """How alpha is chosen with the solver of the plan."""
        return self.options.selection_of(plan.solver)

    def n_groups(self, plan: KernelRidgePlan, inner_folds: int) -> int:
        """The number of groups into which training rows are dealt for choosing alpha."""
        return self.options.n_groups(plan.solver, inner_folds)

    def fit(
        self,
        rows: Rows,
        groups: Sequence[tuple[int, ...]],
        plan: KernelRidgePlan,
        site: Site,
        *,
        steps: tuple[Step, ...] = (),
        n_classes: int | None = None,
        n_targets: int = 1,
    ) -> RidgeFit:
        """Fit preprocessing, kernel matrix and dual solution to the selected rows; see `fit_kernel_ridge`.

        Parameters
        ----------
        rows : Rows
            Training rows, targets, weights and part numbers.
        groups : sequence of tuples of int
            Parts of the rows: the folds that choose alpha, or one group of all. Empty: every row, one group.
        plan : KernelRidgePlan
            Solver, sizes and threads, which decide the bits.
        site : Site
            Where the stages run; a run in its folder is resumed.
        steps : tuple of Step
            Preprocessing.
        n_classes : int or None
            Labels 0 … n_classes − 1 become zero-mean one-hot targets. None: targets are numbers.
        n_targets : int
            Columns of the targets; the rows tell them, so it is not used.
        """
        return fit_kernel_ridge(
            rows,
            groups,
            self.options,
            plan,
            kernel=self.kernel,
            steps=steps,
            n_classes=n_classes,
            site=replace(site, threads=plan.threads),
        )

    def measured(self, request: FitRequest, resources: Resources, site: Site, *, always: bool = False) -> Resources:
        """`resources` with the measured pace of a slow kernel, which bounds the tiles and the tasks of predictions."""
        if not (always or completed(self.kernel).is_slow):
            return resources
        return measured(
            resources, self.kernel, _shape(request), self.options, request.steps, plan=request.plan, site=site
        )

    def time_words(self, request: FitRequest, plan: KernelRidgePlan, resources: Resources) -> dict[str, str]:
        """Times of tiles, matrix and predictions; that of solving is not predicted."""
        pace = resources.pace
        if pace is None:
            return {}
        t = kernel_times(_shape(request), self.kernel, plan, request.n_predicted, resources)
        slots, unit = resources.slots, "GPU" if plan.device else "slot"
        on = f"on {slots} slot{'s' if slots != 1 else ''}"
        return {
            "pace": f"{duration(pace.entry_seconds)} an entry, measured on tiles of {pace.rows} × {pace.rows} with {pace.threads} "
            f"thread{'s' if pace.threads != 1 else ''}",
            "time of kernel-tile": f"{duration(t.tile_seconds)} a tile, {duration(t.matrix_seconds)} {on}: "
            f"{t.matrix_work / 3600:.3g} {unit}-hours",
            "time of predict": f"{duration(t.predict_seconds)} {on}: {t.predict_work / 3600:.3g} {unit}-hours",
        }

    def size_words(self, request: FitRequest, plan: KernelRidgePlan) -> dict[str, str]:
        """Sizes of matrix and tiles; the solver, and why it was taken."""
        n, tile = request.n_train, plan.matrix_tile
        tiles = -(-n // tile)
        words = {
            "matrix": f"{n:,} × {n:,} ({plan.dtype}), targets {request.n_targets}, fits {request.n_fits}",
            "tiles": f"{tiles * (tiles + 1) // 2} of {tile:,} × {tile:,}, one triangle",
            "solver": f"{plan.solver} ({plan.reason})",
        }
        if self.options.chooses:
            words["alphas"] = f"{len(self.options.alphas)}, chosen by {self.selection(plan)}"
        return words


def predictions_plan(model: KernelRidgeModel, rows: Rows, resources: Resources, site: Site) -> KernelRidgePlan:
    """Sizes for predicting rows with a fitted model; they do not depend on the solver that fitted it."""
    request = replace(
        FitRequest.of_rows(rows, model.intercept.size, model.preprocessor.dtype), n_train=len(model.coefficients)
    )
    recipe = KernelRidgeRecipe(model.kernel, KernelRidgeOptions(solver="cg"))
    if site.client is not None:
        resources = recipe.measured(request, resources, site)
    return recipe.plan(request, resources)


def _shape(request: FitRequest) -> KernelShape:
    """The facts on which the plan depends."""
    return KernelShape(
        n_total=request.n_total,
        n_train=request.n_train,
        row_shape=request.row_shape,
        row_bytes=request.row_bytes,
        k=request.n_targets,
        n_runs=request.n_fits,
        inner_folds=request.inner_folds,
    )
