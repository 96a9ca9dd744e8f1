"""Ridge regression on streamed features, alpha chosen on the training rows alone.

preprocessing  ← fitted on the training rows
G, B, s        ← gram sums of the training rows (of every fold, for k-fold and holdout)
alpha, weights ← one eigendecomposition for all alphas; GCV from it, leave-one-out by one more pass,
                 k-fold by subtracting each fold's own sums, holdout by one fold
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ntkdask.errors import InputError, nearest
from ntkdask.execution import map_tiles
from ntkdask.features.base import FeatureMap
from ntkdask.preprocessing import FittedPreprocessor
from ntkdask.rows import Rows
from ntkdask.solvers.gram import GramSums
from ntkdask.solvers.ridge import Centred, EighRidge, Ridge, Solution, held_out_squares, solve_cholesky
from ntkdask.solvers.tridiagonal import TridiagonalRidge
from ntkdask.states import load_state, save_state
from ntkdask.workflows.budget import RidgePlan
from ntkdask.workflows.choice import best_alpha, choose, score_path
from ntkdask.workflows.gram import SumsAddress, gram
from ntkdask.workflows.leave_one_out import leave_one_out, load_spectrum
from ntkdask.workflows.model import RidgeModel
from ntkdask.workflows.preprocess import fit_preprocessing
from ntkdask.workflows.progress import Listener, Record, Silent
from ntkdask.workflows.stream import FeatureStream, store_preprocessor

SELECTIONS = ("gcv", "loo", "kfold", "holdout")
SOLVERS = ("auto", "eigh", "tridiagonal", "cholesky")


@dataclass(frozen=True)
class RidgeOptions:
    """What to solve for: a grid of alphas > 0, how to choose among them, and with which factorisation."""

    alphas: tuple[float, ...] = (1.0,)
    fit_intercept: bool = True
    selection: str = "gcv"
    solver: str = "auto"

    def __post_init__(self) -> None:
        alphas = tuple(float(a) for a in np.atleast_1d(np.asarray(self.alphas, dtype=float)))
        object.__setattr__(self, "alphas", alphas)
        if not alphas or not all(a > 0 and np.isfinite(a) for a in alphas):
            raise InputError(f"alphas are {alphas}; expected at least one, all positive and finite.")
        for name, known in (("selection", SELECTIONS), ("solver", SOLVERS)):
            if getattr(self, name) not in known:
                raise InputError(f"unknown {name} {getattr(self, name)!r}{nearest(str(getattr(self, name)), known)}")
        if self.solver == "cholesky" and len(alphas) > 1 and self.selection in ("gcv", "loo"):
            raise InputError(
                f'solver="cholesky" has no spectrum, so it cannot choose among {len(alphas)} alphas by {self.selection}. '
                'Use solver="eigh" (or "auto"), selection="kfold" or "holdout", or one alpha.'
            )
        if self.solver == "tridiagonal" and self.leaves_one_out:
            raise InputError(
                'solver="tridiagonal" forms no eigenvectors, which leave-one-out needs. Use solver="eigh" or "auto".'
            )

    @property
    def uses_cholesky(self) -> bool:
        """One alpha needs no spectrum: Cholesky takes a twentieth of the time."""
        return self.solver == "cholesky" or (self.solver == "auto" and len(self.alphas) == 1)

    def n_groups(self, n_folds: int) -> int:
        """Into how many groups the rows are dealt for choosing alpha: 1 where there is nothing to choose or no need."""
        return 1 if len(self.alphas) == 1 else {"kfold": n_folds, "holdout": 2}.get(self.selection, 1)

    @property
    def leaves_one_out(self) -> bool:
        """Whether the streamed pass of leave-one-out is needed: there is something to choose."""
        return self.selection == "loo" and len(self.alphas) > 1


@dataclass(frozen=True)
class RidgeFit:
    """A fitted model, the path of scores over alphas (smaller is better; empty for one alpha), where the model lies, and what
    else the metrics of its fold should say."""

    model: Any
    path: list[dict[str, float]]
    score_name: str
    url: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def fit_ridge(
    rows: Rows, groups: Sequence[tuple[int, ...]], options: RidgeOptions, plan: RidgePlan, *, features: FeatureMap | None,
    steps: tuple[Any, ...] = (), n_classes: int | None = None, k: int = 1, url: Path | None = None, client: Any = None,
    listener: Listener | None = None, record: Record | None = None, name: str = "",
) -> RidgeFit:  # fmt: skip
    """Fit on the selected rows, which are the union of `groups` (parts of the rows): the folds, or one group of all.

    With k-fold every group is held out in turn, with holdout the last one; the chosen alpha is then fitted on all;
    preprocessing is fitted once, on all of them, as is usual. url:
    folder for partial sums, states and the model, needed with a client; a run there is resumed through `record`, whose
    stage names begin with `name`. k: number of target columns.
    """
    listener, record = listener or Silent(), record or Record()
    everything = rows.select(*sorted({p for g in groups for p in g})) if groups else rows  # type: ignore[attr-defined]
    states = None if url is None else url / "state"
    if url is None:
        fitted: FittedPreprocessor | str = fit_preprocessing(everything, steps, plan, listener=listener)
    else:
        fitted = record.once(f"{name}preprocess", lambda: store_preprocessor(
            states, fit_preprocessing(everything, steps, plan, states=states, client=client, listener=listener)))  # fmt: skip
    stream = FeatureStream(everything, fitted, features, n_classes, plan.batch_rows, plan.device)
    cut = list(groups) if options.selection in ("kfold", "holdout") and len(options.alphas) > 1 else [()]
    sums = [
        gram(
            stream.select(*group) if group else stream,
            k,
            plan,
            url=None if url is None else url / f"gram-{i}",
            client=client,
            listener=listener,
            fingerprint=dict(record.fingerprint),
            label="gram",
        )
        for i, group in enumerate(cut)
    ]
    if url is None:
        solution, path = solve(sums, options, stream, plan, listener=listener)
        return RidgeFit(_model(stream, solution), path, _score_name(options))
    result = record.once(f"{name}solve", lambda: _solve_on_cluster(sums, options, stream, plan, url, client, listener))
    return RidgeFit(RidgeModel.load(result["model"]), result["path"], _score_name(options), result["model"])


def solve(
    sums: Sequence[GramSums | SumsAddress], options: RidgeOptions, stream: FeatureStream, plan: RidgePlan,
    listener: Listener | None = None,
) -> tuple[Solution, list[dict[str, float]]]:  # fmt: skip
    """(solution at the chosen alpha, path of scores) from the sums of every group, in this process."""
    if options.uses_cholesky and len(options.alphas) == 1:
        return solve_cholesky(Centred.of(_total(sums), options.fit_intercept), options.alphas[0]), []
    if len(sums) > 1:
        return _solve_folds(sums, options)
    centred = Centred.of(_total(sums), options.fit_intercept)
    if options.leaves_one_out:
        spectral = EighRidge.factorise(centred)
        return choose(
            spectral, options.alphas, leave_one_out(stream, spectral, options.alphas, plan, None, listener or Silent())
        )
    ridge = _factorise(centred, options)
    if len(options.alphas) == 1:
        return ridge.solve(options.alphas[0]), []
    return choose(ridge, options.alphas, [ridge.gcv(a) for a in options.alphas])


def _factorise(centred: Centred, options: RidgeOptions) -> Ridge:
    """One factorisation for every alpha: tridiagonal where rows outnumber features, else the whole spectrum."""
    enough = centred.rows - centred.has_intercept > centred.gram.shape[0]
    if options.solver == "tridiagonal" or (options.solver == "auto" and enough):
        return TridiagonalRidge.factorise(centred)
    return EighRidge.factorise(centred)


def _solve_folds(
    sums: Sequence[GramSums | SumsAddress], options: RidgeOptions
) -> tuple[Solution, list[dict[str, float]]]:
    """k-fold or holdout: train on the total minus a fold's own sums, score on the fold's sums alone, no pass over rows."""
    held_out = range(len(sums)) if options.selection == "kfold" else [len(sums) - 1]
    scores = np.zeros((len(list(held_out)), len(options.alphas)))
    for row, fold in enumerate(held_out):
        own = _load(sums[fold])
        if own.rows == 0:
            raise InputError(f"fold {fold} has no rows. Use fewer folds, or more rows.")
        train = Centred.of(_total(sums).minus(own), options.fit_intercept)
        for column, solution in enumerate(_solutions(train, options)):
            scores[row, column] = held_out_squares(solution, own)
    path = score_path(options.alphas, scores.mean(axis=0).tolist())
    final = RidgeOptions((best_alpha(path),), options.fit_intercept, options.selection, options.solver)
    return next(iter(_solutions(Centred.of(_total(sums), options.fit_intercept), final))), path


def _solutions(centred: Centred, options: RidgeOptions) -> Any:
    """Solutions for every alpha, one at a time."""
    if not options.uses_cholesky:
        ridge = _factorise(centred, options)
        yield from (ridge.solve(alpha) for alpha in options.alphas)
        return
    for alpha in options.alphas:
        copy = (
            centred if len(options.alphas) == 1 else Centred(**{**vars(centred), "gram": centred.gram.copy(order="F")})
        )
        yield solve_cholesky(copy, alpha)


@dataclass(frozen=True, eq=False)
class _SolveTask:
    """Factorise where the sums are read, alone on its worker; store the model, return its url and the path."""

    sums: tuple[SumsAddress, ...]
    options: RidgeOptions
    stream: FeatureStream
    plan: RidgePlan
    states: str

    def __call__(self, tile: int) -> dict[str, Any]:
        if self.options.leaves_one_out:
            ridge = EighRidge.factorise(Centred.of(_total(self.sums), self.options.fit_intercept))
            return {"spectrum": save_state(self.states, *ridge.to_state())}
        solution, path = solve(self.sums, self.options, self.stream, self.plan)
        return {"model": _model(self.stream, solution).save(self.states), "path": path}


@dataclass(frozen=True, eq=False)
class _ChooseTask:
    """After the leave-one-out pass: choose alpha from its scores and store the model."""

    stream: FeatureStream
    spectrum: str
    alphas: tuple[float, ...]
    scores: list[float]
    states: str

    def __call__(self, tile: int) -> dict[str, Any]:
        solution, path = choose(load_spectrum(self.spectrum), self.alphas, self.scores)
        return {"model": _model(self.stream, solution).save(self.states), "path": path}


def _solve_on_cluster(
    sums: Any, options: RidgeOptions, stream: FeatureStream, plan: RidgePlan, url: Path, client: Any, listener: Listener
) -> dict[str, Any]:
    """The factorisation as one task with the whole host's threads; leave-one-out adds its streamed pass and a choice."""
    states = str(url / "state")

    def alone(task: Any) -> dict[str, Any]:
        results: list[dict[str, Any]] = []
        listener.stage("solve", 1)

        def receive(tile: Any, done: Any) -> None:
            results.append(done.value)
            listener.task("solve", done)

        map_tiles(task, [0], client, label="solve", receive=receive, threads=plan.solve_threads)
        return results[0]

    result = alone(_SolveTask(tuple(sums), options, stream, plan, states))
    if not options.leaves_one_out:
        return result
    spectrum = result["spectrum"]
    scores = leave_one_out(stream, spectrum, options.alphas, plan, client, listener)
    return alone(_ChooseTask(stream, spectrum, options.alphas, scores, states))


def _model(stream: FeatureStream, solution: Solution) -> RidgeModel:
    fitted = stream.preprocessor
    if isinstance(fitted, str):
        fitted = FittedPreprocessor.from_state(*load_state(fitted))
    return RidgeModel(fitted, stream.map, solution.weights, solution.intercept, solution.alpha, stream.n_classes)


def _load(sums: GramSums | SumsAddress) -> GramSums:
    return sums.load() if isinstance(sums, SumsAddress) else sums


def _total(sums: Sequence[GramSums | SumsAddress]) -> GramSums:
    """Sums of all the groups; a new object when there are several."""
    total = _load(sums[0])
    if len(sums) > 1:
        total = total.minus(GramSums.zeros(*total.cross.shape))
    for other in sums[1:]:
        total += _load(other)
    return total


def _score_name(options: RidgeOptions) -> str:
    return {"gcv": "GCV", "loo": "leave-one-out MSE", "kfold": "k-fold MSE", "holdout": "holdout MSE"}[
        options.selection
    ]
