"""The recipe of ridge regression on features, which jobs and estimators hold: plan, costs, fit, and texts of a printed plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ntkdask import registry
from ntkdask.datasets.rows import Rows
from ntkdask.execution.site import Site
from ntkdask.features.base import FeatureMap
from ntkdask.planning.pace import TILE_SECONDS, elapsed_seconds
from ntkdask.planning.resources import Costs, Resources, RidgePlan
from ntkdask.preprocessing import Step
from ntkdask.wording import duration
from ntkdask.workflows.model import RidgeFit, RidgeModel
from ntkdask.workflows.recipe import FitRequest, Recipe
from ntkdask.workflows.ridge.calibrate import calibrate_features
from ntkdask.workflows.ridge.fit import fit_ridge
from ntkdask.workflows.ridge.options import RidgeOptions
from ntkdask.workflows.ridge.plan import RidgeShape, costs_of, plan_predictions, plan_ridge
from ntkdask.workflows.selection import stored_options
from ntkdask.workflows.ship import located_map


@dataclass(frozen=True)
class RidgeRecipe(Recipe[RidgePlan]):
    """Ridge regression on the features of a map.

    Parameters
    ----------
    features : FeatureMap or None
        None: the rows themselves are the features.
    options : RidgeOptions
        Alphas, how to choose among them, with which factorisation.
    """

    features: FeatureMap | None
    options: RidgeOptions

    def config(self) -> dict[str, Any]:
        """The fingerprint's entries "features" and "solver"."""
        return {"features": registry.to_config(self.features), "solver": stored_options(self.options)}

    def plan(self, request: FitRequest, resources: Resources, *, stored: bool = True) -> RidgePlan:
        """Slabs, batches and tiles that fit; MemoryBudgetError, with the numbers, when none do; see `plan_ridge`."""
        shape = self._shape(request)
        return plan_ridge(shape, self.features, request.steps, plan=request.plan, resources=resources)

    def stored_plan(self, table: Mapping[str, Any]) -> RidgePlan:
        """The plan from the table that a run's record holds."""
        return RidgePlan.from_json(table)

    def costs(self, request: FitRequest, plan: RidgePlan) -> Costs:
        """Memory of every task, flops, tasks and disk of a run under a plan."""
        return costs_of(self._shape(request), self.features, request.steps, plan)

    def selection(self, plan: RidgePlan) -> str:
        """How alpha is chosen; it does not depend on the plan."""
        return self.options.selection

    def n_groups(self, plan: RidgePlan, inner_folds: int) -> int:
        """The number of groups into which training rows are dealt for choosing alpha."""
        return self.options.n_groups(inner_folds)

    def fit(
        self,
        rows: Rows,
        groups: Sequence[tuple[int, ...]],
        plan: RidgePlan,
        site: Site,
        *,
        steps: tuple[Step, ...] = (),
        n_classes: int | None = None,
        n_targets: int = 1,
    ) -> RidgeFit:
        """Fit preprocessing, features and ridge to the selected rows; see `fit_ridge`.

        Parameters
        ----------
        rows : Rows
            Training rows, targets, weights and part numbers.
        groups : sequence of tuples of int
            Parts of the rows: the folds that choose alpha, or one group of all. Empty: every row, one group.
        plan : RidgePlan
            Sizes and threads, which decide the bits.
        site : Site
            Where the stages run; a run in its folder is resumed.
        steps : tuple of Step
            Preprocessing.
        n_classes : int or None
            Labels 0 … n_classes − 1 become zero-mean one-hot targets. None: targets are numbers.
        n_targets : int
            Columns of the targets.
        """
        return fit_ridge(
            rows,
            groups,
            self.options,
            plan,
            features=self.features,
            steps=steps,
            n_classes=n_classes,
            k=n_targets,
            site=replace(site, threads=plan.threads),
        )

    def measured(self, request: FitRequest, resources: Resources, site: Site, *, always: bool = False) -> Resources:
        """`resources` with the measured pace of a slow map, which cuts slabs by time; with `always` of any map, to predict times."""
        if not always and (self.features is None or request.plan.tile_rows is not None):
            return resources
        plan = self.plan(request, resources)
        enough = 0.0 if always else TILE_SECONDS / plan.slab_rows
        pace = calibrate_features(
            self.features if site.folder is None else located_map(self.features, site.states, site.client),
            request.row_shape,
            plan.dtype,
            plan.batch_rows,
            self._n_components(request),
            site=replace(site, threads=resources.threads),
            slots=resources.slots,
            device=plan.device,
            enough=enough,
        )
        # the pace of fast maps decides nothing, and is not told
        told = pace is not None and (always or pace.row_seconds > enough)
        return replace(resources, row_pace=pace) if told else resources

    def time_words(self, request: FitRequest, plan: RidgePlan, resources: Resources) -> dict[str, str]:
        """Times of the Gram sums (features and products) and of predictions; those of reading and solving are not predicted."""
        pace, shape, slots = resources.row_pace, self._shape(request), resources.slots
        if pace is None:
            return {}
        rows = shape.n_runs * shape.n_train * (2 if shape.selection == "loo" else 1)
        slabs, tiles = (-(-shape.n_total // size) for size in (plan.slab_rows, plan.tile_rows))
        mapped, products = (
            elapsed_seconds(work, shape.n_runs * slabs, slots)
            for work in (rows * pace.row_seconds, pace.product_seconds(rows, shape.m))
        )
        predict = elapsed_seconds(request.n_predicted * pace.row_seconds, max(1, tiles), slots)
        on = f"on {slots} slot{'s' if slots != 1 else ''}"
        return {
            "pace": f"{duration(pace.row_seconds)} a row of features, measured on batches of {pace.rows:,} with {pace.threads} "
            f"thread{'s' if pace.threads != 1 else ''}",
            "time of gram-slab": f"{duration(mapped + products)} {on}: features {duration(mapped)}, products {duration(products)}",
            "time of predict": f"{duration(predict)} {on}",
        }

    def size_words(self, request: FitRequest, plan: RidgePlan) -> dict[str, str]:
        """Numbers of features, targets and slabs."""
        shape = self._shape(request)
        return {
            "features": f"{shape.m:,} ({plan.dtype}), targets {shape.k}, fits {shape.n_runs}, groups of rows {shape.n_groups}",
            "slabs": f"{-(-shape.n_total // plan.slab_rows)} of {plan.slab_rows:,} rows, batches of {plan.batch_rows:,}",
        }

    def _n_components(self, request: FitRequest) -> int:
        return math.prod(request.row_shape) if self.features is None else self.features.n_components

    def _shape(self, request: FitRequest) -> RidgeShape:
        """The facts on which the plan depends."""
        return RidgeShape(
            n_total=request.n_total,
            n_train=request.n_train,
            row_shape=request.row_shape,
            row_bytes=request.row_bytes,
            m=self._n_components(request),
            k=request.n_targets,
            n_groups=self.options.n_groups(request.inner_folds),
            selection=self.options.selection,
            n_runs=request.n_fits,
        )


def predictions_plan(model: RidgeModel, rows: Rows, resources: Resources) -> RidgePlan:
    """Sizes for predicting rows with a fitted model; MemoryBudgetError, with the numbers, when no batch fits."""
    request = FitRequest.of_rows(rows, model.intercept.size, model.preprocessor.dtype)
    shape = RidgeRecipe(model.map, RidgeOptions())._shape(request)
    return plan_predictions(shape, model.map, model.preprocessor.dtype, resources)
