"""Files of sweeps over pseudo- and empirical NTKs: a TOML file becomes a `PntkSweep` and its data, as strictly as job files are read.

    name = "cifar10-pseudo-ntk"
    [data]                       # as in a job: url, or train and test; train_rows, test_rows at random by the seed; preprocess
    [[networks]]
    name = "FCN"
    widths = [64, 128]
    module = { type = "FiniteNetwork", network = { preset = "fully_connected", depth = 3 } }
    [sweep]                      # seeds, kernels, alpha
    [protocol]                   # of training; without it, initial weights alone
    [run]                        # seed, dtype, folder, worker_memory, tile_rows

Each of `widths` sets a module's `width` (or `widening`), unless one of its keys is { times_width = 16 }: then that key is 16 times the
width. Its n_outputs, row_shape and channels are those of the data. Called by the command line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic.dataclasses import dataclass

from ntkdask import registry, seeds
from ntkdask.datasets import Dataset
from ntkdask.errors import JobError, UserError
from ntkdask.files import home_expanded
from ntkdask.jobs.data import open_job_data
from ntkdask.jobs.sections import SHARED_TABLES, DataSpec, RunSpec
from ntkdask.jobs.spec import build_network, memory_bytes
from ntkdask.jobs.tables import STRICT, Int, Number, read_tables, require_name, require_path, validated
from ntkdask.modules import descriptions, protocol  # noqa: F401 (registers both; imports no torch)
from ntkdask.planning.tiles import Plan
from ntkdask.preprocessing import fit_in_memory, parse_steps
from ntkdask.workflows.empirical.sweep_cells import KERNELS, PntkSweep, SweepData


@dataclass(frozen=True, config=STRICT)
class NetworkSpec:
    """A network of the sweep, at several widths.

    Parameters
    ----------
    name : str
        Unique in the file.
    widths : tuple of int
        The widths of the network.
    module : dict
        Table of a registered description of a module, without its width.
    """

    name: str
    widths: tuple[Int, ...]
    module: dict[str, Any]


@dataclass(frozen=True, config=STRICT)
class KernelsSpec:
    """The table [sweep].

    Parameters
    ----------
    seeds : tuple of int
        Of networks and training.
    kernels : tuple of str
        As in `PntkSweep`.
    alpha : float
        As in `PntkSweep`.
    """

    seeds: tuple[Int, ...] = (0, 1, 2)
    kernels: tuple[str, ...] = KERNELS
    alpha: Number = 0.0


@dataclass(frozen=True, config=STRICT)
class SweepSpec:
    """A whole sweep file.

    Parameters
    ----------
    name : str
        Name of the sweep and of its folder.
    data : DataSpec
        Datasets and preprocessing; a sweep takes no split.
    networks : tuple of NetworkSpec
        The networks and their widths.
    sweep : KernelsSpec
        Seeds, kernels, alpha.
    protocol : dict or None
        Arguments of a `TrainingProtocol`. None: initial weights alone.
    run : RunSpec
        Seed, dtype, folder, memory, tiles.
    """

    name: str
    data: DataSpec
    networks: tuple[NetworkSpec, ...]
    sweep: KernelsSpec = dataclasses.field(default_factory=KernelsSpec)
    protocol: dict[str, Any] | None = None
    run: RunSpec = dataclasses.field(default_factory=RunSpec)

    @property
    def folder(self) -> Path:
        """The folder of cells, trainings, table and figures."""
        return home_expanded(self.run.folder or Path("runs") / self.name)

    @property
    def plan(self) -> Plan:
        """Requested tiles and memory."""
        return Plan(self.run.tile_rows, self.run.tile_rows, memory_bytes(self.run.worker_memory))


def load_sweep(path: str | Path) -> tuple[SweepSpec, PntkSweep, SweepData]:
    """Read and build a sweep; JobError names the problems and their keys, DataError those of the data."""
    path = home_expanded(path)
    table = read_tables(path, "sweep")
    try:
        spec = _validated(table)
        data = _data(spec)
        return spec, _sweep(spec, data), data
    except UserError as error:
        raise type(error)(f"{path}: {error}") from error


def _validated(table: Mapping[str, Any]) -> SweepSpec:
    spec = validated(SweepSpec, table, {**SHARED_TABLES, ("networks",): NetworkSpec, ("sweep",): KernelsSpec})
    require_name(spec.name)
    data = spec.data
    for key, url in {"url": data.url, "train": data.train, "test": data.test, "run.folder": spec.run.folder}.items():
        require_path(key if "." in key else f"data.{key}", url)
    if (
        data.split is not None
        or (data.url is None) == (data.train is None)
        or (data.train is None) != (data.test is None)
    ):
        raise JobError(
            "[data] of a sweep needs url, a dataset with parts train and test, or both train and test, and no split."
        )
    memory_bytes(spec.run.worker_memory)
    repeated = [n.name for n in spec.networks if sum(n.name == other.name for other in spec.networks) > 1]
    if repeated:
        raise JobError(f"networks: two are named {repeated[0]!r}. Give each a different name.")
    return spec


def _data(spec: SweepSpec) -> SweepData:
    """The chosen rows, with preprocessing that is fitted to the training rows."""
    train, test = open_job_data(spec.data.url, spec.data.train, spec.data.test, None)
    if test is None or train.kind != "classification":
        raise JobError(f"[data] of a sweep must be for classification; {train.url} is for {train.kind}.")
    parse_steps(spec.data.preprocess)
    x, labels = _chosen(train, spec.data.train_rows, spec.run.seed, "train")
    x_test, labels_test = _chosen(test, spec.data.test_rows, spec.run.seed, "test")
    fitted = fit_in_memory(spec.data.preprocess, x, spec.run.dtype)
    return SweepData(fitted(x), labels, fitted(x_test), labels_test, len(train.class_names or ()))


def _chosen(data: Dataset, count: int | None, seed: int, part: str) -> tuple[np.ndarray, np.ndarray]:
    """(rows, labels) of `count` rows at random, in the order of the dataset; all for None."""
    if count is not None and not 1 <= count <= data.n:
        raise JobError(f"data.{part}_rows is {count}, expected 1 to {data.n}, the rows of {data.url}.")
    rows = np.sort(seeds.permutation(seed, ("sweep", part), data.n)[: count or data.n])
    return data.x[rows].compute(), data.targets(0, data.n)[rows]


def _sweep(spec: SweepSpec, data: SweepData) -> PntkSweep:
    training = None
    if spec.protocol is not None:
        training = registry.from_config({"type": "TrainingProtocol", **spec.protocol}, "protocol")
    networks = {n.name: {width: _description(n, width, data) for width in n.widths} for n in spec.networks}
    return PntkSweep(networks, spec.sweep.seeds, training, spec.sweep.kernels, spec.sweep.alpha, spec.run.dtype)


def _description(network: NetworkSpec, width: int, data: SweepData) -> Any:
    """The module's description at one width."""
    table = dict(network.module)
    where = f"networks.{network.name}.module"
    cls = registry.lookup(str(table.get("type")), "module")
    known = {f.name for f in dataclasses.fields(cls)}
    if isinstance(table.get("network"), Mapping) and "type" not in table["network"]:
        table["network"] = registry.to_config(build_network(table["network"]))
    for key in ("seed", "weights", "weights_digest"):
        if key in table:
            raise JobError(f"{where} has {key!r}: a sweep sets seeds and weights itself. Remove it.")
    grows = {key for key, value in table.items() if isinstance(value, Mapping) and "times_width" in value}
    for key in grows:
        times = table[key]["times_width"]
        if set(table[key]) != {"times_width"} or isinstance(times, bool) or not isinstance(times, int) or times < 1:
            raise JobError(f"{where}.{key} is {table[key]!r}: write {{ times_width = 16 }}, an integer >= 1.")
        table[key] = times * width
    if not grows & {"width", "widening"}:
        own = "widening" if "widening" in known else "width"
        if own in table:
            raise JobError(f"{where}.{own} is set by `widths`: remove it, or write {{ times_width = 16 }}.")
        table[own] = width
    given = {"n_outputs": data.n_classes, "row_shape": data.x.shape[1:], "channels": data.x.shape[-1]}
    return registry.from_config(table, "module", **{k: v for k, v in given.items() if k in known and k not in table})
