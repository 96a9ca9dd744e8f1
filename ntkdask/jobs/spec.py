"""Job files: TOML → validated, frozen dataclasses. Data only: nothing in a job file is executed or imported.

An unknown key is an error that names the nearest known one; the error for a value of the wrong type says in which table it is. `type`
is the public name of a class in the registry, and the other keys are the arguments of its constructor.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from dask.utils import parse_bytes

from ntkdask import activations, networks, registry
from ntkdask.errors import JobError, UserError, nearest
from ntkdask.features.base import FeatureMap
from ntkdask.files import home_expanded
from ntkdask.jobs.data import open_job_data
from ntkdask.jobs.sections import SHARED_TABLES, JobSpec, SolverSpec
from ntkdask.jobs.tables import MAX_DEPTH, read_tables, require_name, require_path, require_plain, validated
from ntkdask.jobs.training import SplitRule, TrainingJob
from ntkdask.kernels import Kernel
from ntkdask.modules import descriptions  # noqa: F401 (networks of PyTorch by name; imports no torch)
from ntkdask.networks import Network
from ntkdask.planning.tiles import Plan
from ntkdask.preprocessing import Step, parse_steps
from ntkdask.workflows.kernel_ridge.options import KernelRidgeOptions
from ntkdask.workflows.kernel_ridge.recipe import KernelRidgeRecipe
from ntkdask.workflows.ridge.options import RidgeOptions
from ntkdask.workflows.ridge.recipe import RidgeRecipe
from ntkdask.workflows.selection import SELECTIONS, stored_options

MAX_ALPHAS = 10_000
MAX_NETWORK_DEPTH = 10_000
PRESETS: dict[str, Callable[..., Network]] = {
    "fully_connected": networks.fully_connected,
    "convolutional": networks.convolutional,
    "myrtle": networks.myrtle,
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A checked job: its tables, preprocessing, and the recipe that is fitted."""

    spec: JobSpec
    steps: tuple[Step, ...]
    recipe: RidgeRecipe | KernelRidgeRecipe

    @property
    def features(self) -> FeatureMap | None:
        """The map of ridge on features; None for a kernel, and for ridge on the rows themselves."""
        return self.recipe.features if isinstance(self.recipe, RidgeRecipe) else None

    @property
    def kernel(self) -> Kernel | None:
        """The kernel of kernel ridge."""
        return self.recipe.kernel if isinstance(self.recipe, KernelRidgeRecipe) else None

    @property
    def options(self) -> RidgeOptions | KernelRidgeOptions:
        """Alphas, how to choose among them, how to solve."""
        return self.recipe.options

    def to_config(self) -> dict[str, Any]:
        """The job as the tables of its file with every default written out; the report shows them."""
        spec, features, kernel = self.spec, registry.to_config(self.features), registry.to_config(self.kernel)
        network = next((_innermost(table).pop("network", None) for table in (features, kernel) if table), None)
        data = {**registry.to_config(spec.data), "preprocess": registry.to_config(self.steps)}
        solver = {
            **registry.to_config(stored_options(self.options)),
            "folds": spec.solver.folds,
            "holdout": spec.solver.holdout,
        }
        config = {
            "name": spec.name,
            "data": data,
            "network": network,
            "features": features,
            "kernel": kernel,
            "solver": solver,
        }
        return {key: value for key, value in config.items() if value is not None} | {
            "run": registry.to_config(spec.run)
        }


def load_job(path: str | Path, settings: Sequence[str] = ()) -> Job:
    """Read, validate and build a job; JobError names the problems and their keys. settings: `section.key=value`, values in TOML."""
    path = home_expanded(path)
    table = read_tables(path, "job")
    for setting in settings:
        _override(table, setting)
    require_plain(table)
    try:
        return build_job(_located(table, path.parent))
    except UserError as error:
        raise type(error)(f"{path}: {error}") from error


def _located(value: Any, folder: Path) -> Any:
    """The tables with absolute paths of weights, which a job file gives relative to its own folder.

    JobError for a file that does not exist. The file is not read.
    """
    if isinstance(value, list):
        return [_located(v, folder) for v in value]
    if not isinstance(value, Mapping):
        return value
    table = {key: _located(v, folder) for key, v in value.items()}
    weights = table.get("weights")
    if table.get("type") in registry.names("module") and isinstance(weights, str):
        require_path(f"weights of {table['type']}", weights)
        table["weights"] = str((folder / home_expanded(weights)).resolve())
        if not Path(table["weights"]).is_file():
            raise JobError(
                f"weights of {table['type']}: there is no file {table['weights']}. Its path is relative to the job file."
            )
    return table


def build_job(table: Mapping[str, Any]) -> Job:
    """The job of a file's tables."""
    spec = validated(JobSpec, table, {**SHARED_TABLES, ("solver",): SolverSpec})
    _check(spec)
    steps = parse_steps(spec.data.preprocess)
    if spec.kernel is None:
        return Job(spec, steps, RidgeRecipe(_features(spec), _options(spec.solver)))
    if spec.features is not None:
        raise JobError("[features] and [kernel] are both there, but a job fits one of them. Remove the other.")
    recipe = KernelRidgeRecipe(_object(spec, spec.kernel, "kernel"), _kernel_options(spec.solver))
    return Job(spec, steps, recipe)


def _check(spec: JobSpec) -> None:
    data, split = spec.data, spec.data.split
    require_name(spec.name)
    urls = {f"data.{key}": getattr(data, key) for key in ("url", "train", "test")} | {"run.folder": spec.run.folder}
    for key, url in urls.items():
        require_path(key, url)
    if (data.url is None) == (data.train is None):
        raise JobError("[data] needs either url, or train and test.")
    if data.train is not None and (data.test is None or split is not None):
        raise JobError("[data] train needs test beside it, and no split.")
    if split is not None and (split.folds is None) == (split.test is None):
        raise JobError("data.split needs either folds or test, as in split = { test = 0.2 }.")
    if split is not None and split.folds is not None and not 2 <= split.folds <= 100:
        raise JobError(f"data.split.folds is {split.folds}, expected 2 to 100.")
    if split is not None and split.folds is not None and (data.train_rows or data.test_rows):
        raise JobError(
            "data.train_rows and data.test_rows are for one test part: with data.split.folds, leave them out."
        )
    for key, share in (("data.split.test", split.test if split else None), ("solver.holdout", spec.solver.holdout)):
        if share is not None and not 0 < share < 1:
            raise JobError(f"{key} is {share}, expected a fraction between 0 and 1.")
    if not 2 <= spec.solver.folds <= 100:
        raise JobError(f"solver.folds is {spec.solver.folds}, expected 2 to 100.")
    if spec.run.dtype not in ("float32", "float64"):
        raise JobError(f"run.dtype is {spec.run.dtype!r}{nearest(spec.run.dtype, ('float32', 'float64'))}")
    counts = {f"run.{key}": getattr(spec.run, key) for key in ("n_workers", "slab_rows", "tile_rows")}
    counts |= {f"data.{key}": getattr(data, key) for key in ("train_rows", "test_rows")}
    for key, count in counts.items():
        if count is not None and count < 1:
            raise JobError(f"{key} is {count}, expected at least 1.")
    memory_bytes(spec.run.worker_memory)


def memory_bytes(text: str | None) -> int | None:
    """Bytes of "2 GiB", "4GB", "1e9"; None stays None."""
    if text is None:
        return None
    try:
        size = int(parse_bytes(text))
    except (ValueError, OverflowError) as error:
        raise JobError(f'run.worker_memory is {text!r}: write it as "2 GiB".') from error
    if size < 2**20:
        raise JobError(f'run.worker_memory is {text!r}, less than a MiB: write the unit, as in "2 GiB".')
    return size


def build_network(table: Mapping[str, Any]) -> Network:
    """A network from { preset = "fully_connected", depth = 1, ... } or { layers = [{ type = "Dense" }, ...] }."""
    arguments = dict(table)
    if "layers" in arguments:
        return registry.from_config({"type": "Network", **arguments}, "network")
    preset = arguments.pop("preset", None)
    if preset not in PRESETS:
        raise JobError(f"unknown network preset {preset!r}{nearest(str(preset), PRESETS)}")
    known = PRESETS[preset].__annotations__.keys() - {"return"}
    for key in arguments:
        if key not in known:
            raise JobError(f"unknown key {key!r} for preset {preset}{nearest(key, known)}")
        registry.require_kind(f"network.{key}", PRESETS[preset].__annotations__[key], arguments[key])
    depth = arguments.get("depth")
    if isinstance(depth, int) and depth > MAX_NETWORK_DEPTH:
        raise JobError(f"network.depth is {depth}, expected at most {MAX_NETWORK_DEPTH:,}.")
    if isinstance(arguments.get("activation"), Mapping):
        arguments["activation"] = _activation(arguments["activation"])
    try:
        return PRESETS[preset](**arguments)
    except (TypeError, OverflowError) as error:
        raise JobError(f"network preset {preset}: {error}") from error


def _activation(table: Mapping[str, Any]) -> Any:
    """An activation from { name = "leaky_relu", slope = 0.1 }, or with `type` as a resolved job spells it."""
    if "type" in table:
        return registry.from_config(table, "activation")
    parameters = dict(table)
    name = parameters.pop("name", None)
    if name is None:
        raise JobError(f'activation is {dict(table)!r}: write a name, or {{ name = "leaky_relu", slope = 0.1 }}.')
    return activations.get(name, **parameters)


def _features(spec: JobSpec) -> FeatureMap | None:
    if spec.features is not None:
        return _object(spec, spec.features, "feature map")
    if spec.network is not None:
        raise JobError(
            "[network] needs [features] or [kernel]: they say whether its kernel is approximated or computed."
        )
    return None


def _object(spec: JobSpec, table: Mapping[str, Any], kind: str) -> Any:
    """The feature map or kernel of a table; it gets the job's network and seed where it takes them."""
    cls = registry.lookup(str(table.get("type")), kind)
    fields = {f.name for f in dataclasses.fields(cls)}
    given: dict[str, Any] = {"seed": spec.run.seed} if "seed" in fields and "seed" not in table else {}
    for part in ("kernel", "module"):
        if isinstance(table.get(part), Mapping) and part in fields:
            rest = {key: value for key, value in table.items() if key != part}
            return registry.from_config(rest, kind, **{part: _object(spec, table[part], part)}, **given)
    if "network" in fields and "network" not in table:
        if spec.network is None:
            raise JobError(f"{cls.__name__} needs a [network] section.")
        given["network"] = build_network(spec.network)
    elif spec.network is not None and "network" not in fields:
        raise JobError(f"{cls.__name__} takes no network: drop the [network] section.")
    return registry.from_config(table, kind, **given)


def _innermost(table: dict[str, Any]) -> dict[str, Any]:
    """The table that holds the network: the table itself, or that of the innermost kernel in it."""
    inner = table.get("kernel")
    return _innermost(inner) if isinstance(inner, dict) else table


def _options(solver: SolverSpec) -> RidgeOptions:
    for key in ("tolerance", "max_iterations"):
        if getattr(solver, key) is not None:
            raise JobError(
                f"solver.{key} is for conjugate gradients on a [kernel]; ridge on features does not iterate."
            )
    selection = solver.selection or "gcv"
    if selection not in SELECTIONS:
        raise JobError(f"solver.selection is {selection!r}{nearest(selection, SELECTIONS)}")
    return RidgeOptions(_alphas(solver), solver.fit_intercept, selection, solver.solver)


def _kernel_options(solver: SolverSpec) -> KernelRidgeOptions:
    given = {k: v for k in ("tolerance", "max_iterations") if (v := getattr(solver, k)) is not None}
    return KernelRidgeOptions(_alphas(solver), solver.fit_intercept, solver.selection or "auto", solver.solver, **given)


def _alphas(solver: SolverSpec) -> tuple[float, ...]:
    alphas = solver.alphas
    if isinstance(alphas, dict):
        bounds = alphas.get("logspace")
        if set(alphas) != {"logspace"} or not isinstance(bounds, (list, tuple)) or len(bounds) != 3:
            raise JobError(f"solver.alphas is {alphas!r}: write a list, or {{ logspace = [-6, 3, 19] }}.")
        low, high, count = bounds
        numbers = not any(isinstance(v, bool) for v in bounds) and isinstance(count, int)
        exponents = all(isinstance(e, (int, float)) and -300 <= e <= 300 for e in (low, high))
        if not numbers or not exponents or not 1 <= count <= MAX_ALPHAS:
            raise JobError(
                f"solver.alphas.logspace is {bounds!r:.200}: [from exponent, to exponent, how many >= 1], exponents from -300 to "
                f"300 and at most {MAX_ALPHAS:,} alphas."
            )
        alphas = tuple(float(a) for a in np.logspace(low, high, count))
    values = tuple(np.atleast_1d(alphas).tolist())
    if len(values) > MAX_ALPHAS:
        raise JobError(f"solver.alphas has {len(values):,} values, expected at most {MAX_ALPHAS:,}.")
    return values


def _override(table: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise JobError(f"--set {setting!r}: write it as section.key=value.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string: --set features.sampling=spherical
    except RecursionError as error:
        raise JobError(f"--set {setting:.60} ... nests lists more than {MAX_DEPTH} deep.") from error
    except ValueError as error:  # an integer of thousands of digits
        raise JobError(f"--set {setting:.60} ...: {error}.") from error
    *sections, last = key.strip().split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise JobError(f"--set {setting!r}: {section} is not a section.")
    table[last] = value


def to_training_job(job: Job) -> TrainingJob:
    """The training job, with its datasets opened and checked against each other."""
    spec = job.spec
    train, test = open_job_data(spec.data.url, spec.data.train, spec.data.test, spec.data.split)
    split = spec.data.split
    rule = None if split is None else SplitRule(split.folds, split.test, split.shuffle)
    common: Any = {
        "inner_folds": spec.solver.folds,
        "holdout": spec.solver.holdout,
        "seed": spec.run.seed,
        "train_rows": spec.data.train_rows,
        "test_rows": spec.data.test_rows,
        "plan": Plan(spec.run.slab_rows, spec.run.tile_rows, dtype=spec.run.dtype),
    }
    return TrainingJob(spec.name, train, test, rule, job.steps, job.recipe, **common)
