"""A job that fits ridge regression on features: its plan, its costs, its fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ntkdask import registry
from ntkdask.features.base import FeatureMap
from ntkdask.jobs.training import Fold, Site, TrainingJob
from ntkdask.planning.pace import elapsed_seconds
from ntkdask.planning.resources import Costs, Resources, RidgePlan
from ntkdask.wording import duration
from ntkdask.workflows.model import RidgeFit
from ntkdask.workflows.ridge.calibrate import calibrate_features
from ntkdask.workflows.ridge.fit import RidgeOptions, fit_ridge
from ntkdask.workflows.ridge.plan import RidgeShape, costs_of, plan_ridge


@dataclass(frozen=True)
class RidgeJob(TrainingJob):
    """Ridge regression on the features of a map (None: on the rows themselves)."""

    features: FeatureMap | None
    options: RidgeOptions

    def selection_under(self, plan: RidgePlan) -> str:
        """How alpha is chosen."""
        return self.options.selection

    def n_inner(self, plan: RidgePlan) -> int:
        """Into how many groups training rows are dealt for choosing alpha."""
        return self._n_groups

    def model_config(self) -> dict[str, Any]:
        """Features and solver."""
        solver = {**asdict(self.options), "folds": self.inner_folds, "holdout": self.holdout}
        return {"features": registry.to_config(self.features), "solver": solver}

    def shape(self) -> RidgeShape:
        """What the plan depends on."""
        data = self.train
        m = int(np.prod(data.row_shape)) if self.features is None else self.features.n_components
        return RidgeShape(
            data.n,
            self.n_train,
            data.row_shape,
            self.row_bytes,
            m,
            self.n_targets,
            self._n_groups,
            self.options.selection,
            self.n_outer,
        )

    @property
    def _n_groups(self) -> int:
        return self.options.n_groups(self.inner_folds)

    def plan_for(self, resources: Resources) -> tuple[RidgePlan, Costs]:
        """Sizes that fit, and what they cost; MemoryBudgetError when nothing fits."""
        plan = plan_ridge(self.shape(), self.features, self.steps, plan=self.plan, resources=resources)
        return plan, self.costs_under(plan)

    def costs_under(self, plan: RidgePlan) -> Costs:
        """What a run under a stored plan costs."""
        return costs_of(self.shape(), self.features, self.steps, plan)

    def stored_plan(self, table: Mapping[str, Any]) -> RidgePlan:
        """The plan that a run's record holds."""
        return RidgePlan(**table)

    def fit(self, fold: Fold, plan: RidgePlan, site: Site) -> RidgeFit:
        """Preprocessing, Gram sums and ridge on the training rows of one outer fold."""
        return fit_ridge(
            fold.train,
            fold.groups,
            self.options,
            plan,
            features=self.features,
            steps=self.steps,
            n_classes=self.n_classes,
            k=self.n_targets,
            url=site.url,
            client=site.client,
            listener=site.listener,
            record=site.record,
            name=site.name,
        )

    def measured(self, resources: Resources, client: Any = None, *, always: bool = False) -> Resources:
        """With the pace of the map where the time is to be told; it decides nothing."""
        if not always:
            return resources
        plan, m = self.plan_for(resources)[0], self.shape().m
        pace = calibrate_features(
            self.features,
            self.train.row_shape,
            plan.dtype,
            plan.batch_rows,
            m,
            client=client,
            slots=resources.slots,
            n_threads=resources.threads,
            device=plan.device,
        )
        return replace(resources, row_pace=pace)

    def time_words(self, plan: RidgePlan, resources: Resources) -> dict[str, str]:
        """Seconds of the Gram sums, features and products, and of predictions; neither reading nor solving is among them."""
        pace, shape, slots = resources.row_pace, self.shape(), resources.slots
        if pace is None:
            return {}
        rows = shape.n_runs * shape.n_train * (2 if shape.selection == "loo" else 1)
        slabs, tiles = (-(-shape.n_total // size) for size in (plan.slab_rows, plan.tile_rows))
        mapped, products = (
            elapsed_seconds(work, shape.n_runs * slabs, slots)
            for work in (rows * pace.row_seconds, pace.product_seconds(rows, shape.m))
        )
        predict = elapsed_seconds(self.n_predicted * pace.row_seconds, max(1, tiles), slots)
        on = f"on {slots} slot{'s' if slots != 1 else ''}"
        return {
            "pace": f"{duration(pace.row_seconds)} a row of features, measured on batches of {pace.rows:,} with {pace.threads} "
            f"thread{'s' if pace.threads != 1 else ''}",
            "time of gram-slab": f"{duration(mapped + products)} {on}: features {duration(mapped)}, products {duration(products)}",
            "time of predict": f"{duration(predict)} {on}",
        }

    def size_words(self, plan: RidgePlan) -> dict[str, str]:
        """Features and slabs."""
        shape = self.shape()
        return {
            "features": f"{shape.m:,} ({plan.dtype}), targets {shape.k}, fits {shape.n_runs}, groups of rows {shape.n_groups}",
            "slabs": f"{-(-shape.n_total // plan.slab_rows)} of {plan.slab_rows:,} rows, batches of {plan.batch_rows:,}",
        }
