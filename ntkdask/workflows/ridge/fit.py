"""Ridge regression on streamed features, alpha chosen on the training rows alone.

preprocessing  ← fitted on the training rows
features       ← fitted on the preprocessed training rows, where the map depends on data
G, B, s        ← gram sums of the training rows (of every fold, for k-fold and holdout)
alpha, weights ← one eigendecomposition for all alphas; GCV from it, leave-one-out by one more pass,
                 k-fold by subtracting each fold's own sums, holdout by one fold (solve_ridge.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ntkdask.datasets.rows import Rows
from ntkdask.execution.progress import Listener, Record, Silent
from ntkdask.features.base import FeatureMap
from ntkdask.features.fitting import uses_targets
from ntkdask.planning.resources import RidgePlan
from ntkdask.preprocessing import FittedPreprocessor
from ntkdask.workflows.model import RidgeFit, RidgeModel
from ntkdask.workflows.preprocess import fit_preprocessing
from ntkdask.workflows.ridge.fit_features import fit_features
from ntkdask.workflows.ridge.gram import gram
from ntkdask.workflows.ridge.options import SELECTIONS, RidgeOptions
from ntkdask.workflows.ridge.solve import HeldOut, ridge_model, solve, solve_on_cluster
from ntkdask.workflows.stream import FeatureStream, store_preprocessor

__all__ = ["SELECTIONS", "RidgeFit", "RidgeOptions", "fit_ridge"]


@dataclass(frozen=True)
class _Site:
    """Where a fit leaves what it computes, and what every one of its stages needs."""

    plan: RidgePlan
    k: int
    url: Path | None
    client: Any
    listener: Listener
    record: Record
    name: str

    def fit_features(self, stream: FeatureStream, features: FeatureMap | None, label: str = "") -> FeatureStream:
        """The stream of the features of a map, fitted first to the stream's rows where it depends on data."""
        fitted = fit_features(
            stream,
            features,
            self.plan,
            self.k,
            url=self.url,
            client=self.client,
            listener=self.listener,
            record=self.record,
            name=self.name + label,
        )
        return replace(stream, map=fitted)

    def gram(self, stream: FeatureStream, name: str) -> Any:
        """Gram sums of a stream, or their address in the store of that name."""
        return gram(
            stream,
            self.k,
            self.plan,
            url=None if self.url is None else self.url / name,
            client=self.client,
            listener=self.listener,
            fingerprint=dict(self.record.fingerprint),
        )


def fit_ridge(
    rows: Rows,
    groups: Sequence[tuple[int, ...]],
    options: RidgeOptions,
    plan: RidgePlan,
    *,
    features: FeatureMap | None,
    steps: tuple[Any, ...] = (),
    n_classes: int | None = None,
    k: int = 1,
    url: Path | None = None,
    client: Any = None,
    listener: Listener | None = None,
    record: Record | None = None,
    name: str = "",
) -> RidgeFit:
    """Fit on the selected rows, which are the union of `groups` (parts of the rows): the folds, or one group of all.

    With k-fold every group is held out in turn, with holdout the last one; the chosen alpha is then fitted on all;
    preprocessing is fitted once, on all of them, as is usual, and so are features that learn from rows alone. Features that learn
    from targets are fitted anew for every fold, without its held-out rows: scores of rows whose targets they have seen would be too
    good (those of GCV and leave-one-out are). url:
    folder for partial sums, states and the model, needed with a client; a run there is resumed through `record`, whose
    stage names begin with `name`. k: number of target columns.
    """
    site = _Site(plan, k, url, client, listener or Silent(), record or Record(), name)
    everything = rows.select(*sorted({p for g in groups for p in g})) if groups else rows  # type: ignore[attr-defined]
    raw = FeatureStream(
        everything, _preprocessor(site, everything, steps), None, n_classes, plan.batch_rows, plan.device
    )
    stream = site.fit_features(raw, features)
    cut, folds = list(groups) if options.cuts else [()], []
    if options.cuts and uses_targets(features):
        folds, cut = _refitted(site, raw, features, groups, options), [()]
    sums = [site.gram(stream.select(*group) if group else stream, f"gram-{i}") for i, group in enumerate(cut)]
    if url is None:
        solution, path = solve(sums, options, stream, plan, listener=site.listener, folds=folds)
        return RidgeFit(ridge_model(stream, solution), path, options.score_name)

    def solved() -> dict[str, Any]:
        return solve_on_cluster(sums, options, stream, plan, url, client, site.listener, folds)

    result = site.record.once(f"{name}solve", solved)
    return RidgeFit(RidgeModel.load(result["model"]), result["path"], options.score_name, result["model"])


def _preprocessor(site: _Site, rows: Rows, steps: tuple[Any, ...]) -> FittedPreprocessor | str:
    """The chain fitted to the rows, or the url of its state."""
    if site.url is None:
        return fit_preprocessing(rows, steps, site.plan, listener=site.listener)
    states = site.url / "state"

    def fitted() -> str:
        chain = fit_preprocessing(rows, steps, site.plan, states=states, client=site.client, listener=site.listener)
        return store_preprocessor(states, chain)

    return site.record.once(f"{site.name}preprocess", fitted)


def _refitted(
    site: _Site,
    raw: FeatureStream,
    features: FeatureMap | None,
    groups: Sequence[tuple[int, ...]],
    options: RidgeOptions,
) -> list[HeldOut]:
    """Sums of every fold's training rows and of its own, on features that were fitted to the former."""
    folds = []
    for fold in options.held_out(len(groups)):
        others = [part for i, group in enumerate(groups) if i != fold for part in group]
        stream = site.fit_features(raw.select(*others), features, f"held-{fold}-")
        train = site.gram(stream, f"gram-held-{fold}-train")
        folds.append(HeldOut(train, site.gram(stream.select(*groups[fold]), f"gram-held-{fold}-own")))
    return folds
