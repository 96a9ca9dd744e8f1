"""What the estimators share: parameters of frozen parts, the folder of a fit, checked inputs, folds.

Nothing is computed here: `inputs.py` checks the inputs and puts them where tasks read them; `workflows/` computes. Without a client
and a url everything happens in this process's memory and nothing is written.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import tempfile
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.utils.validation import check_is_fitted

from ntkdask import threads
from ntkdask.arrays import device_memory_bytes, is_dask, is_device_array, to_host
from ntkdask.datasets import Dataset
from ntkdask.datasets.dataset import require_labels
from ntkdask.datasets.rows import DatasetRows, MemoryRows, Rows
from ntkdask.errors import ArgumentError, InputError, nearest
from ntkdask.estimators.choice import Choice, choose
from ntkdask.estimators.inputs import as_input, check_targets, check_weights, check_x, locate, numerics_dtype, to_memory
from ntkdask.estimators.source import Source, fingerprint
from ntkdask.execution.progress import Record
from ntkdask.execution.site import Site
from ntkdask.execution.workers import resources
from ntkdask.files import exclusive, local_path, require_disk, sweep
from ntkdask.planning.resources import Resources, RidgePlan, require_memory
from ntkdask.workflows.model import RidgeFit
from ntkdask.workflows.predict import predict
from ntkdask.workflows.recipe import FitRequest, Recipe
from ntkdask.workflows.ship import restored


class WithParts(BaseEstimator):
    """An estimator with frozen parts, such as feature maps and kernels: set_params(part__name=...) replaces the part."""

    _parts: tuple[str, ...] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Name the nearest parameter for an unknown keyword; `__init__` could only say that it is unexpected."""
        _require_known(cls, kwargs)
        return super().__new__(cls)

    def set_params(self, **params: Any) -> Self:
        """Set parameters of the estimator and of its parts.

        Parameters
        ----------
        **params : dict
            By name. `features__n_components=512` replaces the features by ones with that number of components.

        Returns
        -------
        self
            The estimator itself.

        Raises
        ------
        InputError
            For a parameter that the part does not have.
        """
        nested: dict[str, dict[str, Any]] = defaultdict(dict)
        own = {}
        for name, value in params.items():
            part, _, inner = name.partition("__")
            if inner and part in self._parts:
                nested[part][inner] = value
            else:
                own[name] = value
        _require_known(type(self), {name.partition("__")[0]: value for name, value in own.items()})
        super().set_params(**own)
        for part, changes in nested.items():
            held = getattr(self, part)
            if not dataclasses.is_dataclass(held) or isinstance(held, type):
                raise InputError(
                    f"{type(self).__name__}: {part} is {held!r}, which has no parameter {next(iter(changes))!r}."
                )
            changed = held.replace(**changes) if hasattr(held, "replace") else _replaced(held, changes)
            setattr(self, part, changed)
        return self

    def __sklearn_clone__(self) -> Self:
        # a connection cannot be copied: clones share the client
        shared = ("client", *self._parts)
        params = self.get_params(deep=False)
        new = type(self)(**{k: v if k in shared else clone(v, safe=False) for k, v in params.items()})
        for name in ("_metadata_request", "_sklearn_output_config"):
            if name in vars(self):
                setattr(new, name, clone(vars(self)[name], safe=False))
        return new

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        if "client" in state:
            state["client"] = None
        return state


def _require_known(estimator: type[WithParts], given: Iterable[str]) -> None:
    """ArgumentError for the first name that is no parameter of the estimator, with the nearest one."""
    known = estimator._get_param_names()
    for name in given:
        if name not in known:
            raise ArgumentError(f"Invalid parameter {name!r} for {estimator.__name__}{nearest(name, known)}")


def _replaced(part: Any, changes: dict[str, Any]) -> Any:
    """A part with other parameters; InputError with the nearest known name for an unknown one."""
    known = [f.name for f in dataclasses.fields(part) if f.init]
    unknown = [name for name in changes if name not in known]
    if unknown:
        raise InputError(f"{type(part).__name__} has no parameter {unknown[0]!r}{nearest(unknown[0], known)}")
    return replace(part, **changes)


class RidgeBase(WithParts):
    """What ridge on features and ridge on kernels share; a subclass says which recipe is fitted and plans predictions."""

    client: Any
    url: Any
    model_: Any
    _column_of_targets = False

    @abstractmethod
    def _takes_images(self, fitted: bool) -> bool:
        """Whether rows may have more than one axis; fitted: for the fitted model, else for the next fit."""

    def _takes_sparse(self, fitted: bool) -> bool:
        """Whether rows may be a SciPy sparse matrix; fitted: for the fitted model, else for the next fit."""
        return False

    def _checked(self, x: Any, fitted: bool) -> Any:
        """Rows as `check_x` gives them, compared with those of the fit, or for the next fit."""
        return check_x(
            self, x, reset=not fitted, allow_images=self._takes_images(fitted), allow_sparse=self._takes_sparse(fitted)
        )

    @abstractmethod
    def _recipe(self, source: Source, dtype: str) -> Recipe[Any]:
        """The recipe that is fitted, made from the estimator's parameters."""

    @abstractmethod
    def _predict_plan(self, rows: Rows, x: Any) -> RidgePlan:
        """Sizes for predicting `rows`, which hold the checked x."""

    def _fitted(self, fit: RidgeFit, plan: Any) -> RidgeFit:
        """Called with a finished fit: a subclass sets attributes and warns; returns the fit to keep."""
        return fit

    def _fit_rows(self, source: Source, n_classes: int | None, k: int) -> RidgeFit:
        """Fit to located rows, k columns of targets; the caller holds the lock of the source's folder."""
        dtype, folder = numerics_dtype(source.x), source.folder
        recipe = self._recipe(source, dtype)
        inner_folds = source.choice.inner_folds
        request = replace(FitRequest.of_rows(source.rows, k, dtype), inner_folds=inner_folds)
        # in memory nothing is recorded, and a map or a kernel need not be describable
        record = Record.open(folder, {} if folder is None else fingerprint(recipe, source, n_classes, dtype))
        site, found = Site(folder, self.client, record=record), found_resources(self.client, source.x)
        if folder is None:
            plan = recipe.plan(request, found, stored=False)
        else:

            def planned() -> dict[str, Any]:
                first = recipe.plan(request, recipe.measured(request, found, site))
                costs = recipe.costs(request, first)
                require_memory(costs, found)  # before it is recorded: what the error advises is another fit
                require_disk(folder, costs.disk_bytes, "the fit", "or choose another url")
                return first.to_json()

            plan = recipe.stored_plan(site.once("plan", planned))
            require_memory(recipe.costs(request, plan), found)
        rows, groups = source.dealt(recipe.selection(plan), recipe.n_groups(plan, inner_folds), record)
        return self._fitted(recipe.fit(rows, groups, plan, site, n_classes=n_classes, n_targets=k), plan)

    def _located(self, x: Any, targets: Any, weights: Any, folder: Path | None) -> tuple[Rows, str]:
        """Checked training data where tasks can read it, and its digest; see `locate`."""
        return locate(x, targets, weights, folder=folder, client=self.client)

    def _chosen(self, x: Any, y: Any, weights: Any) -> Choice:
        """How alpha is chosen for checked x and the user's y and weights; None: those of the dataset x."""
        self._require_kept()
        return choose(self, x, y, weights)

    def _fit(
        self,
        x: Any,
        targets: Any,
        weights: Any,
        n_classes: int | None,
        k: int,
        *,
        choice: Choice,
        class_weights: tuple[float, ...] = (),
    ) -> Self:
        """Fit to checked data.

        Parameters
        ----------
        x : array, dask array or Dataset, (n, ...)
            Checked rows.
        targets : array or None
            Checked targets or numbers of classes. None: those of the dataset x.
        weights : array (n,) or None
            Weights of the rows. None: 1, or those of the dataset x.
        n_classes : int or None
            Classes of labels; None for regression.
        k : int
            Columns of the targets.
        choice : Choice
            The alphas, and how one is chosen.
        class_weights : tuple of float
            For a dataset, a weight for each class. Empty: none.
        """
        with _folder(self.client, self.url) as folder, contextlib.ExitStack() as held:
            if folder is not None:
                held.enter_context(exclusive(folder))
                sweep(folder)
            rows, digest = self._located(x, targets, weights, folder)
            if class_weights:
                assert isinstance(rows, DatasetRows)
                rows, digest = replace(rows, class_weights=class_weights), f"{digest} {class_weights}"
            fit = self._fit_rows(Source(x, targets, rows, digest, folder, self.client, held, choice), n_classes, k)
            if self.url is None:
                # the temporary folder is deleted, and with it the weights that the model holds by address
                fit = replace(fit, model=restored(fit.model, getattr(self, self._parts[0])))
        self.model_, self.alpha_, self.alpha_path_ = fit.model, fit.model.alpha, choice.path or fit.path
        self._keep(fit, choice)
        return self

    def _keep(self, fit: RidgeFit, choice: Choice) -> None:
        """Set what is kept of choosing alpha: the best score and, where they were asked for, errors."""
        for name in ("best_score_", "cv_results_"):
            self.__dict__.pop(name, None)
        if fit.kept is not None and self.alpha_per_target:
            best = -fit.kept.scores.min(axis=0)
            self.best_score_ = best if best.size > 1 else float(best[0])
        elif self.alpha_path_ and (choice.path or len(self.alpha_path_) > 1):
            self.best_score_ = -min(row["score"] for row in self.alpha_path_ if row["alpha"] == self.alpha_)
        if fit.kept is not None and fit.kept.squares is not None:
            squares = fit.kept.squares
            self.cv_results_ = squares if self._column_of_targets else squares[:, 0]

    def _require_kept(self) -> None:
        """InputError where scores of every target, or errors, are asked for and the fit does not keep them."""
        name = type(self).__name__
        asked = [n for n in ("alpha_per_target", "store_cv_results") if getattr(self, n)]
        if asked and (self.client is not None or self.url is not None):
            raise InputError(f"{name}: {asked[0]} keeps errors in this process's memory: leave client and url out.")
        if asked and (self.cv is not None or self.scoring is not None):
            raise InputError(
                f"{name}: {asked[0]} takes the errors of generalised cross-validation or leave-one-out: leave cv and scoring out."
            )

    def _from_scores(self, X: Any, finish: Callable[[np.ndarray], np.ndarray]) -> Any:
        """`finish` of the outputs (n, k) of the model; a lazy dask array for a dask array, whatever the lengths of its blocks."""
        check_is_fitted(self)
        if not is_dask(X):
            return finish(self._scores(X))
        x = self._checked(X, fitted=True)
        like = finish(np.zeros((1, self.model_.intercept.size)))[:0]
        # blocks are computed wherever dask runs them, one apart from another
        here = copy.copy(self)
        here.client = None

        def block(rows: Any) -> np.ndarray:
            return finish(here._scores_of_block(rows)) if len(rows) else like

        return x.rechunk({axis: -1 for axis in range(1, x.ndim)}).map_blocks(
            block,
            dtype=like.dtype,
            chunks=(x.chunks[0], *((side,) for side in like.shape[1:])),
            drop_axis=list(range(1, x.ndim)),
            new_axis=list(range(1, like.ndim)),
            meta=like,
        )

    def _scores_of_block(self, rows: Any) -> np.ndarray:
        """(n, k) outputs of rows in memory, with the threads that there are."""
        located = MemoryRows(to_host(rows))
        stream = self.model_.stream(located, self._predict_plan(located, rows).batch_rows)
        batches = stream.batches(0, len(rows), with_targets=False)
        return np.concatenate([to_host(self.model_.scores(batch.phi)) for batch in batches])

    def _scores(self, X: Any) -> np.ndarray:
        """(n, k) float64 outputs of the model."""
        x = self._checked(as_input(X), fitted=True)
        client = self.client
        with _folder(client, self.url) if client is not None else contextlib.nullcontext() as folder:
            rows, _ = locate(x, folder=folder, client=client)
            model = self.model_ if folder is None else self.model_.save(folder / "state", client)
            plan = self._predict_plan(rows, x)
            scores = predict(model, rows, plan, self.model_.intercept.size, Site(client=client, threads=plan.threads))
        return np.asarray(scores)

    def _truth(self, X: Any, y: Any, sample_weight: Any) -> tuple[Any, Any]:
        """Return y and sample_weight in memory; those of the dataset X when y is None."""
        x = as_input(X)
        if y is None and isinstance(x, Dataset):
            require_kind(self, x)
            return x.targets(0, x.n), x.weights(0, x.n) if sample_weight is None else to_memory(
                sample_weight, "sample_weight"
            )
        return to_memory(y, "y"), to_memory(sample_weight, "sample_weight")

    def _opened(self, X: Any, y: Any, sample_weight: Any, *, classes: bool) -> tuple[Any, Any, np.ndarray | None]:
        """(x, targets, weights), checked; targets and weights are None for a dataset, which brings its own."""
        x = as_input(X)
        if isinstance(x, Dataset) and y is None:
            require_kind(self, x)
            x = self._checked(x, fitted=False)
            if sample_weight is not None:
                raise InputError(
                    "a dataset brings its own weights: leave sample_weight out (write_dataset takes weights)."
                )
            return x, None, None
        if isinstance(x, Dataset):
            raise InputError(f"dataset {x.url} brings its own targets: leave y out, or give arrays (dataset.x, y).")
        targets = check_targets(self, y, classes=classes)
        x = self._checked(x, fitted=False)
        return x, targets, check_weights(sample_weight, len(targets))


@contextlib.contextmanager
def _folder(client: Any, url: Any) -> Iterator[Path | None]:
    """The folder of a fit: that of `url`; with a client alone a temporary one, deleted at the end; else None."""
    if url is not None:
        yield local_path(url)
    elif client is not None:
        with tempfile.TemporaryDirectory(prefix="ntkdask-") as folder:
            yield Path(folder)
    else:
        yield None


def found_resources(client: Any, x: Any) -> Resources:
    """The resources that a plan may use.

    Those of the client's cluster. Without a client those of this process: the threads that BLAS has now (joblib lowers them), and the
    GPU when x is there.
    """
    if client is not None:
        return resources(client)
    n_threads = threads.ambient()
    device_bytes = device_memory_bytes() if is_device_array(x) else 0
    return replace(Resources.here(), threads=n_threads, solve_threads=n_threads, device_bytes=device_bytes)


def require_kind(estimator: Any, dataset: Dataset) -> None:
    """Raise InputError unless the dataset is for the estimator's task, classification or regression."""
    require_labels(dataset)
    wanted = "classification" if isinstance(estimator, ClassifierMixin) else "regression"
    if dataset.kind != wanted:
        ours, theirs = ("Classifier", "Regressor") if wanted == "classification" else ("Regressor", "Classifier")
        other = type(estimator).__name__.replace(ours, theirs)
        raise InputError(
            f"dataset {dataset.url} is for {dataset.kind}, {type(estimator).__name__} is for {wanted}: use {other}."
        )
