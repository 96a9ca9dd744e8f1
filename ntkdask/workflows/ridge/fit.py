"""Ridge regression on streamed features, alpha chosen on the training rows alone.

preprocessing  ← fitted on the training rows
features       ← fitted on the preprocessed training rows, where the map depends on data
c              ← near the mean of a sample of the features (ridge/centre.py)
G, B, s        ← gram sums of the training rows about c (of every fold, for k-fold and holdout)
alpha, weights ← one eigendecomposition for all alphas; GCV from it, leave-one-out by one more pass,
                 k-fold by subtracting each fold's own sums, holdout by one fold (ridge/solve.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from ntkdask.datasets.rows import Rows, rows_of_groups
from ntkdask.execution.site import Site
from ntkdask.features.base import FeatureMap
from ntkdask.features.fitting import uses_targets
from ntkdask.planning.resources import RidgePlan
from ntkdask.preprocessing import FittedPreprocessor, Step
from ntkdask.solvers.gram import Centre, GramSums
from ntkdask.workflows.model import RidgeFit, RidgeModel
from ntkdask.workflows.preprocess import fit_preprocessing
from ntkdask.workflows.ridge.centre import find_centre
from ntkdask.workflows.ridge.fit_features import fit_features
from ntkdask.workflows.ridge.gram import SumsAddress, gram
from ntkdask.workflows.ridge.options import RidgeOptions
from ntkdask.workflows.ridge.solve import HeldOut, ridge_model, solve, solve_by_target, solve_on_cluster
from ntkdask.workflows.ship import shipped
from ntkdask.workflows.stream import FeatureStream, store_preprocessor


def fit_ridge(
    rows: Rows,
    groups: Sequence[tuple[int, ...]],
    options: RidgeOptions,
    plan: RidgePlan,
    *,
    features: FeatureMap | None,
    steps: tuple[Step, ...] = (),
    n_classes: int | None = None,
    k: int = 1,
    site: Site | None = None,
) -> RidgeFit:
    """Fit ridge regression to the selected rows.

    With k-fold every group is held out in turn, with holdout the last one; the model is then fitted to all rows with the chosen alpha.
    Preprocessing is fitted once, to all rows, as is usual, and so are features that learn from rows alone. Features that learn from
    targets are fitted anew for every fold, without its held-out rows: the scores of rows whose targets they have seen are too good, as
    those of GCV and leave-one-out are.

    Parameters
    ----------
    rows : Rows
        Training rows, targets, weights and part numbers.
    groups : sequence of tuples of int
        Parts of the rows: the folds that choose alpha, or one group of all. Empty: every row, one group.
    options : RidgeOptions
        Alphas, how to choose among them, with which factorisation.
    plan : RidgePlan
        Sizes and threads, which decide the bits.
    features : FeatureMap or None
        The feature map. None: ridge on the rows themselves.
    steps : tuple of Step
        Preprocessing.
    n_classes : int or None
        Labels 0 … n_classes − 1 become zero-mean one-hot targets; None: targets are numbers.
    k : int
        Columns of the targets.
    site : Site or None
        Where the stages run; a run in its folder is resumed. None: this process's memory.

    Returns
    -------
    RidgeFit
        The model at the chosen alpha and the path of scores.
    """
    site = site or Site(threads=plan.threads)
    if site.folder is not None:
        features = shipped(features, site.states, site.client)
    everything = rows_of_groups(rows, groups)
    raw = FeatureStream(
        everything, _preprocessor(site, everything, steps, plan), None, n_classes, plan.batch_rows, plan.device
    )
    fit = _Fit(site, plan, k, features)
    stream = fit.mapped(raw)
    cut, folds = list(groups) if options.cuts else [()], []
    if options.cuts and uses_targets(features):
        folds, cut = fit.refitted(raw, groups, options), [()]
    centre = find_centre(stream, k, site, "centre")
    sums = [fit.sums(stream.select(*group) if group else stream, centre, f"gram-{i}") for i, group in enumerate(cut)]
    if options.by_target or options.keep_errors:
        solution, path, kept = solve_by_target(cast(GramSums, sums[0]), options, stream, k)
        return RidgeFit(ridge_model(stream, solution), path, options.score_name, kept=kept)
    if site.folder is None:
        solution, path = solve(sums, options, stream, plan, site, folds)
        return RidgeFit(ridge_model(stream, solution), path, options.score_name)
    addresses = cast("list[SumsAddress]", sums)
    result = site.once("solve", lambda: solve_on_cluster(addresses, options, stream, plan, site, folds))
    return RidgeFit(RidgeModel.load(result["model"]), result["path"], options.score_name, result["model"])


def _preprocessor(site: Site, rows: Rows, steps: tuple[Step, ...], plan: RidgePlan) -> FittedPreprocessor | str:
    """The chain fitted to the rows, or the url of its state."""
    if site.folder is None:
        return fit_preprocessing(rows, steps, plan, site)
    return site.once("preprocess", lambda: store_preprocessor(site.states, fit_preprocessing(rows, steps, plan, site)))


@dataclass(frozen=True)
class _Fit:
    """The passes over the rows of one fit."""

    site: Site
    plan: RidgePlan
    k: int
    features: FeatureMap | None

    def mapped(self, stream: FeatureStream, label: str = "") -> FeatureStream:
        """The stream of the map's features; a map that depends on data is first fitted to the stream's rows."""
        return replace(stream, map=fit_features(stream, self.features, self.plan, self.k, self.site, label=label))

    def sums(self, stream: FeatureStream, centre: Centre | str, name: str) -> GramSums | SumsAddress:
        """Gram sums of a stream about a centre, or their address in the store of that name."""
        return gram(stream, self.k, self.plan.slab_rows, self.site, centre=centre, name=name)

    def refitted(self, raw: FeatureStream, groups: Sequence[tuple[int, ...]], options: RidgeOptions) -> list[HeldOut]:
        """For every fold, the sums of its training rows and of its held-out rows, on features fitted to its training rows."""
        folds = []
        for fold in options.held_out(len(groups)):
            others = [part for i, group in enumerate(groups) if i != fold for part in group]
            stream = self.mapped(raw.select(*others), f"held-{fold}-")
            centre = find_centre(stream, self.k, self.site, f"centre-held-{fold}")
            train = self.sums(stream, centre, f"gram-held-{fold}-train")
            folds.append(HeldOut(train, self.sums(stream.select(*groups[fold]), centre, f"gram-held-{fold}-own")))
        return folds
