"""A job that fits kernel ridge: its plan, its costs, its fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ntkdask import registry
from ntkdask.execution import site as execution
from ntkdask.jobs.training import Fold, Site, TrainingJob
from ntkdask.kernels import Kernel
from ntkdask.kernels.base import completed
from ntkdask.planning.resources import Costs, Resources, RidgePlan
from ntkdask.wording import duration
from ntkdask.workflows.kernel_ridge.costs import kernel_costs, kernel_times
from ntkdask.workflows.kernel_ridge.fit import fit_kernel_ridge
from ntkdask.workflows.kernel_ridge.options import KernelRidgeOptions
from ntkdask.workflows.kernel_ridge.plan import KernelRidgePlan, KernelShape, measured, plan_kernel_ridge
from ntkdask.workflows.model import RidgeFit


@dataclass(frozen=True)
class KernelRidgeJob(TrainingJob):
    """Kernel ridge regression on a kernel matrix in tiles."""

    kernel: Kernel
    options: KernelRidgeOptions

    def selection_under(self, plan: RidgePlan) -> str:
        """How alpha is chosen with the plan's solver."""
        return self.options.selection_of(_solver(plan))

    def n_inner(self, plan: RidgePlan) -> int:
        """Into how many groups training rows are dealt for choosing alpha."""
        return self.options.n_groups(_solver(plan), self.inner_folds)

    def model_config(self) -> dict[str, Any]:
        """Kernel and solver."""
        solver = {**asdict(self.options), "folds": self.inner_folds, "holdout": self.holdout}
        return {"kernel": registry.to_config(self.kernel), "solver": solver}

    def shape(self) -> KernelShape:
        """What the plan depends on."""
        data = self.train
        return KernelShape(
            data.n, self.n_train, data.row_shape, self.row_bytes, self.n_targets, self.n_outer, self.inner_folds
        )

    def plan_for(self, resources: Resources) -> tuple[KernelRidgePlan, Costs]:
        """Tiles and the solver that fit, and what they cost; MemoryBudgetError when nothing fits."""
        plan = plan_kernel_ridge(
            self.shape(), self.kernel, self.options, self.steps, plan=self.plan, resources=resources
        )
        return plan, self.costs_under(plan)

    def costs_under(self, plan: RidgePlan) -> Costs:
        """What a run under a stored plan costs."""
        assert isinstance(plan, KernelRidgePlan)
        return kernel_costs(self.shape(), self.kernel, self.options, self.steps, plan)

    def stored_plan(self, table: Mapping[str, Any]) -> KernelRidgePlan:
        """The plan that a run's record holds."""
        return KernelRidgePlan(**table)

    def fit(self, fold: Fold, plan: RidgePlan, site: Site) -> RidgeFit:
        """Preprocessing, kernel matrix and dual solution on the training rows of one outer fold."""
        assert isinstance(plan, KernelRidgePlan)
        return fit_kernel_ridge(
            fold.train,
            fold.groups,
            self.options,
            plan,
            kernel=self.kernel,
            steps=self.steps,
            n_classes=self.n_classes,
            site=execution.Site(site.url, site.client, site.listener, site.record, site.name, plan.threads),
        )

    def measured(self, resources: Resources, client: Any = None, *, always: bool = False) -> Resources:
        """With the pace of the kernel where it is slow: that bounds tiles and tasks of predictions."""
        if not (always or completed(self.kernel).is_slow):
            return resources
        where = execution.Site(client=client)
        return measured(resources, self.kernel, self.shape(), self.options, self.steps, plan=self.plan, site=where)

    def time_words(self, plan: RidgePlan, resources: Resources) -> dict[str, str]:
        """Seconds of tiles, matrix and predictions; solving is not among them."""
        assert isinstance(plan, KernelRidgePlan)
        pace = resources.pace
        if pace is None:
            return {}
        t = kernel_times(self.shape(), self.kernel, plan, self.n_predicted, resources)
        slots, unit = resources.slots, "GPU" if plan.device else "slot"
        on = f"on {slots} slot{'s' if slots != 1 else ''}"
        return {
            "pace": f"{duration(pace.entry_seconds)} an entry, measured on tiles of {pace.rows} × {pace.rows} with {pace.threads} "
            f"thread{'s' if pace.threads != 1 else ''}",
            "time of kernel-tile": f"{duration(t.tile_seconds)} a tile, {duration(t.matrix_seconds)} {on}: "
            f"{t.matrix_work / 3600:.3g} {unit}-hours",
            "time of predict": f"{duration(t.predict_seconds)} {on}: {t.predict_work / 3600:.3g} {unit}-hours",
        }

    def size_words(self, plan: RidgePlan) -> dict[str, str]:
        """Matrix, tiles and solver."""
        assert isinstance(plan, KernelRidgePlan)
        n, tile = self.n_train, plan.matrix_tile
        tiles = -(-n // tile)
        words = {
            "matrix": f"{n:,} × {n:,} ({plan.dtype}), targets {self.n_targets}, fits {self.n_outer}",
            "tiles": f"{tiles * (tiles + 1) // 2} of {tile:,} × {tile:,}, one triangle",
            "solver": f"{plan.solver} ({plan.reason})",
        }
        if self.options.chooses:
            words["alphas"] = f"{len(self.options.alphas)}, chosen by {self.selection_under(plan)}"
        return words


def _solver(plan: RidgePlan) -> str:
    assert isinstance(plan, KernelRidgePlan)
    return plan.solver
