"""From Gram sums to a ridge model: alpha chosen by GCV, leave-one-out or folds, in this process or as tasks of a cluster.

One eigendecomposition serves all alphas. GCV follows from it; leave-one-out takes one more pass over the rows; folds take the sums of
their training rows and of their held-out rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ntkdask.arrays import to_host
from ntkdask.errors import InputError
from ntkdask.execution.site import Site
from ntkdask.planning.resources import RidgePlan
from ntkdask.preprocessing import FittedPreprocessor
from ntkdask.solvers.gram import NARROW, GramSums
from ntkdask.solvers.ridge import Centred, EighRidge, Ridge, Solution, held_out_squares, solve_cholesky, solve_one
from ntkdask.solvers.tridiagonal import TridiagonalRidge
from ntkdask.states import load_state, save_state
from ntkdask.workflows.model import RidgeModel
from ntkdask.workflows.ridge.gram import SumsAddress
from ntkdask.workflows.ridge.leave_one_out import leave_one_out, load_spectrum
from ntkdask.workflows.ridge.options import RidgeOptions
from ntkdask.workflows.selection import KeptScores, best_alpha, choose, columns_at, score_path
from ntkdask.workflows.stream import FeatureStream


class HeldOut(NamedTuple):
    """The sums of a fold's training rows and of its held-out rows."""

    train: GramSums | SumsAddress
    own: GramSums | SumsAddress


def solve(
    sums: Sequence[GramSums | SumsAddress],
    options: RidgeOptions,
    stream: FeatureStream,
    plan: RidgePlan,
    site: Site | None = None,
    folds: Sequence[HeldOut] = (),
) -> tuple[Solution, list[dict[str, float]]]:
    """Choose alpha and solve, in this process.

    Parameters
    ----------
    sums : sequence of GramSums or SumsAddress
        The Gram sums of every group of training rows; where there are several and no `folds`, the groups are the folds.
    options : RidgeOptions
        Alphas, how to choose among them, with which factorisation.
    stream : FeatureStream
        Features of the training rows, for the pass of leave-one-out.
    plan : RidgePlan
        Rows of a slab, threads.
    site : Site or None
        Where that pass runs. None: this process.
    folds : sequence of HeldOut
        The sums of every fold, where features were fitted for each fold. Empty: none were.

    Returns
    -------
    (Solution, list of dict)
        The solution at the chosen alpha, and the path of scores, empty for one alpha.
    """
    rounding = float(np.finfo("float64" if stream.n_components <= NARROW else plan.dtype).eps)
    if folds or len(sums) > 1:
        pairs = ((_load(f.train), _load(f.own)) for f in folds) if folds else _cut(sums, options)
        return _solve_folds(sums, options, pairs, rounding)
    centred = Centred.of(_total(sums), options.fit_intercept)
    if options.leaves_one_out:
        spectral, here = EighRidge.factorise(centred), site or Site(threads=plan.threads)
        return choose(spectral, options.alphas, leave_one_out(stream, spectral, options.alphas, plan.slab_rows, here))
    if len(options.alphas) == 1:
        return next(_solutions(centred, options, rounding)), []
    ridge = _factorise(centred, options)
    return choose(ridge, options.alphas, [ridge.gcv(a) for a in options.alphas])


ENOUGH_ROWS = 1.25
"""Rows for a feature from which "auto" takes the tridiagonal form: with fewer, residuals are a small part of the targets."""


def _factorise(centred: Centred, options: RidgeOptions) -> EighRidge | TridiagonalRidge:
    """One factorisation for all alphas: tridiagonal where rows outnumber features and its spectrum serves, else the whole spectrum."""
    m, rows = centred.gram.shape[0], centred.rows - centred.has_intercept
    if rows > m and (options.solver == "tridiagonal" or (options.solver == "auto" and rows >= ENOUGH_ROWS * m)):
        ridge = TridiagonalRidge.factorise(centred)
        return ridge if ridge.serves(min(options.alphas)) else ridge.spectral()
    return EighRidge.factorise(centred)


def solve_by_target(
    sums: GramSums, options: RidgeOptions, stream: FeatureStream, k: int
) -> tuple[Solution, list[dict[str, float]], KeptScores]:
    """Choose the alpha of every target, or one for all, in this process, and keep their scores and, for leave-one-out, errors."""
    centred, alphas = Centred.of(sums, options.fit_intercept), options.alphas
    if options.selection == "loo":
        spectral = EighRidge.factorise(centred)
        ridge: Ridge = spectral
        squares = np.zeros((stream.rows.n_total, k, len(alphas)))
        for batch in stream.batches(0, stream.rows.n_total):
            weights = None if batch.weights is None else to_host(batch.weights)
            errors = spectral.leave_one_out_errors(to_host(batch.phi), to_host(batch.y), weights, alphas)
            for i, error in enumerate(errors):
                squares[batch.numbers, :, i] = error**2 if weights is None else weights[:, None] * error**2
        kept = KeptScores.of_squares(squares, centred.weight)
    else:
        factorised = _factorise(centred, options)
        ridge = factorised
        kept = KeptScores(np.array([_gcv_by_target(factorised, a) for a in alphas]))
    dimensions = [ridge.effective_dimension(a) for a in alphas]
    path = score_path(alphas, kept.scores.mean(axis=1).tolist(), dimensions)
    return columns_at(ridge.solve, kept.best(alphas, options.by_target), "weights"), path, kept


def _gcv_by_target(ridge: EighRidge | TridiagonalRidge, alpha: float) -> list[float]:
    """The GCV score of every target alone; infinite where T + αI is not positive definite."""
    try:
        residual = ridge.residual_squares(alpha)
    except np.linalg.LinAlgError:
        return [float("inf")] * ridge.centred.squares.size
    return [ridge.centred.generalised_score(r, ridge.eigenvalues, alpha) for r in residual[:, None]]


def _cut(sums: Sequence[GramSums | SumsAddress], options: RidgeOptions) -> Iterator[tuple[GramSums, GramSums]]:
    """(training, held-out) sums of every fold. The former are the total minus the latter: no pass over rows."""
    for fold in options.held_out(len(sums)):
        own = _load(sums[fold])
        yield _total(sums).minus(own), own


def _solve_folds(
    sums: Sequence[GramSums | SumsAddress],
    options: RidgeOptions,
    folds: Iterable[tuple[GramSums, GramSums]],
    rounding: float,
) -> tuple[Solution, list[dict[str, float]]]:
    """k-fold or holdout: for every fold, fit on its training sums and score on its held-out sums. rounding: ε of the products."""
    scores = []
    for fold, (train, own) in enumerate(folds):
        if own.rows == 0:
            raise InputError(f"fold {fold} has no rows. Use fewer folds, or more rows.")
        centred = Centred.of(train, options.fit_intercept)
        found = _solutions(centred, options, rounding)
        scores.append([held_out_squares(solution, own, rounding) for solution in found])
    path = score_path(options.alphas, np.mean(scores, axis=0).tolist())
    final = RidgeOptions((best_alpha(path),), options.fit_intercept, options.selection, options.solver)
    return next(_solutions(Centred.of(_total(sums), options.fit_intercept), final, rounding)), path


def _solutions(centred: Centred, options: RidgeOptions, rounding: float) -> Iterator[Solution]:
    """Yield the solution of every alpha. rounding: ε of the products in the Gram matrix."""
    if options.solver == "auto" and len(options.alphas) == 1:
        yield solve_one(centred, options.alphas[0])
        return
    if options.solver != "cholesky":
        ridge = _factorise(centred, options)
        yield from (ridge.solve(alpha) for alpha in options.alphas)
        return
    for alpha in options.alphas:
        copy = centred if len(options.alphas) == 1 else replace(centred, gram=centred.gram.copy(order="F"))
        yield solve_cholesky(copy, alpha, rounding)


@dataclass(frozen=True, eq=False)
class _SolveTask:
    """Read the sums, factorise and store the model, alone on a worker; return its url and the path of scores."""

    sums: tuple[SumsAddress, ...]
    options: RidgeOptions
    stream: FeatureStream
    plan: RidgePlan
    states: str
    folds: tuple[HeldOut, ...]

    def __call__(self, tile: int) -> dict[str, Any]:
        if self.options.leaves_one_out:
            ridge = EighRidge.factorise(Centred.of(_total(self.sums), self.options.fit_intercept))
            return {"spectrum": save_state(self.states, *ridge.to_state())}
        solution, path = solve(self.sums, self.options, self.stream, self.plan, folds=self.folds)
        return {"model": ridge_model(self.stream, solution).save(self.states), "path": path}


@dataclass(frozen=True, eq=False)
class _ChooseTask:
    """Choose alpha from the scores of the leave-one-out pass, and store the model."""

    stream: FeatureStream
    spectrum: str
    alphas: tuple[float, ...]
    scores: list[float]
    states: str

    def __call__(self, tile: int) -> dict[str, Any]:
        solution, path = choose(load_spectrum(self.spectrum), self.alphas, self.scores)
        return {"model": ridge_model(self.stream, solution).save(self.states), "path": path}


def solve_on_cluster(
    sums: Sequence[SumsAddress],
    options: RidgeOptions,
    stream: FeatureStream,
    plan: RidgePlan,
    site: Site,
    folds: Sequence[HeldOut] = (),
) -> dict[str, Any]:
    """Choose alpha and solve as `solve` does, in tasks of the site's cluster.

    The factorisation is one task with the threads of its host; leave-one-out adds a streamed pass and a task that chooses.

    Parameters
    ----------
    sums : sequence of SumsAddress
        Where the Gram sums of every group of training rows are stored.
    options : RidgeOptions
        Alphas, how to choose among them, with which factorisation.
    stream : FeatureStream
        Features of the training rows, for the pass of leave-one-out and for the model.
    plan : RidgePlan
        Rows of a slab, threads.
    site : Site
        Where the tasks run; the model is stored in its states.
    folds : sequence of HeldOut
        The sums of every fold, where features were fitted for each fold. Empty: none were.

    Returns
    -------
    dict
        {"model": url, "path": rows of scores}.
    """
    states = str(site.states)
    task = _SolveTask(tuple(sums), options, stream, plan, states, tuple(folds))
    if not options.leaves_one_out:
        return site.alone(task, "solve", threads=plan.solve_threads)
    # a stage of its own: a pass over the rows that was cut off goes on with it
    spectrum = site.once("spectrum", lambda: site.alone(task, "solve", threads=plan.solve_threads)["spectrum"])
    scores = leave_one_out(stream, spectrum, options.alphas, plan.slab_rows, site)
    choice = _ChooseTask(stream, spectrum, options.alphas, scores, states)
    return site.alone(choice, "solve", threads=plan.solve_threads)


def ridge_model(stream: FeatureStream, solution: Solution) -> RidgeModel:
    """The model of a solution, with the preprocessing and the map of a stream."""
    fitted = stream.preprocessor
    if isinstance(fitted, str):
        fitted = FittedPreprocessor.from_state(*load_state(fitted))
    return RidgeModel(
        fitted,
        stream.loaded_map,
        solution.weights,
        solution.intercept,
        solution.alpha,
        stream.n_classes,
        solution.centre,
        solution.offset,
    )


def _load(sums: GramSums | SumsAddress) -> GramSums:
    return sums.load() if isinstance(sums, SumsAddress) else sums


def _total(sums: Sequence[GramSums | SumsAddress]) -> GramSums:
    """The sums of all groups; a new object when there are several."""
    total = _load(sums[0])
    if len(sums) > 1:
        total = total.minus(GramSums.zeros(*total.cross.shape))
    for other in sums[1:]:
        total += _load(other)
    return total
