"""Where the stages of a workflow run: folder, cluster, listener and record in one object.

A workflow makes its `Site` at its start, asks it once for resources, plans, and then runs its stages on it: one task (`alone`), many
(`map`), tiles of a store (`fill`, `commit`), a sum over tiles (`reduce`). A workflow passes the site on whole, not its members.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeVar

from ntkdask import threads as thread_pools
from ntkdask.errors import InputError, StoreError
from ntkdask.execution.map_reduce import map_tiles, reduce_tiles
from ntkdask.execution.progress import Listener, Record, Silent
from ntkdask.execution.tree import Node, tree_nodes
from ntkdask.execution.window import Done
from ntkdask.files import local_path
from ntkdask.planning.resources import Resources
from ntkdask.planning.tiles import Plan
from ntkdask.store import Receipt, TileStore

T = TypeVar("T")

MOST_SAMPLES = 16
"""The largest number of slots that measure at the same time."""


@dataclass(frozen=True)
class Site:
    """Where stages run, and who hears of them.

    Parameters
    ----------
    folder : Path or None
        Where results are kept. None: nothing is stored, everything happens in this process.
    client : distributed.Client or None
        Whose workers run the tasks. None: a loop in this process.
    listener : Listener
        Hears of stages and of every finished task.
    record : Record
        What earlier runs finished, and what this one does.
    name : str
        Prefix of the names of stages in the record.
    threads : int or None
        BLAS, OpenMP and Numba threads of each task. None: those that its process has.
    """

    folder: Path | None = None
    client: Any = None
    listener: Listener = field(default_factory=Silent)
    record: Record = field(default_factory=Record)
    name: str = ""
    threads: int | None = None

    @classmethod
    def at(
        cls,
        url: str | os.PathLike[str] | None,
        client: Any = None,
        listener: Listener | None = None,
        threads: int | None = None,
    ) -> Self:
        """The site of a workflow whose results go to `url`.

        Parameters
        ----------
        url : str, Path or None
            The folder. None: nothing is stored.
        client : distributed.Client or None
            Whose workers run the tasks.
        listener : Listener or None
            Hears of stages and tasks.
        threads : int or None
            Threads of each task. None: with a client what its process has, without one all of this process's.
        """
        folder = None if url is None else local_path(url)
        return cls(
            folder,
            client,
            listener or Silent(),
            threads=threads or (thread_pools.current() if client is None else None),
        )

    @property
    def home(self) -> Path:
        """The folder; InputError where there is none, as what workers compute must be stored."""
        if self.folder is None:
            raise InputError(
                "what workers compute goes through a folder that they share with this process: give a url."
            )
        return self.folder

    @property
    def states(self) -> Path:
        """The folder of states: arrays that tasks share."""
        return self.home / "state"

    @property
    def slots(self) -> int:
        """How many tasks run at once."""
        return 1 if self.client is None else max(1, sum(self.client.nthreads().values()))

    @property
    def n_workers(self) -> int:
        """How many processes run tasks, at least 1."""
        return 1 if self.client is None else max(1, len(self.client.nthreads()))

    def resources(self) -> Resources:
        """The resources of every task: the smallest worker's share now; without a client those of this process."""
        if self.client is None:
            return Resources.here()
        from ntkdask.execution.workers import resources

        return resources(self.client)

    def bounded(self, plan: Plan) -> Plan:
        """`plan` with what every worker has for a task as its memory_bytes, where it states none and there are workers."""
        if self.client is None or plan.memory_bytes is not None:
            return plan
        return replace(plan, memory_bytes=self.resources().memory_bytes)

    def within(self, name: str) -> Self:
        """The site of a part of the workflow: the folder `name` in this one, and `name/` before the names of its stages."""
        return replace(self, folder=None if self.folder is None else self.folder / name, name=f"{self.name}{name}/")

    def once(self, stage: str, make: Callable[[], T]) -> T:
        """The result of a stage, ready for JSON: an earlier run's, or else computed now by `make` and recorded."""
        return self.record.once(f"{self.name}{stage}", make)

    def alone(self, task: Callable[[Any], T], label: str, argument: Any = 0, threads: int | None = None) -> T:
        """Run task(argument) as the only task of stage `label` and return its value. threads: None for those of every task."""
        return self.map(task, [argument], label, threads=threads)[0]

    def map(
        self,
        task: Callable[[Any], T],
        tiles: Iterable[Any],
        label: str,
        *,
        earlier: int = 0,
        threads: int | None = None,
    ) -> list[T]:
        """Run the task for every tile and return the values, in the order of the tiles.

        Parameters
        ----------
        task : function of a tile
            See `map_tiles`.
        tiles : iterable
            What the task is called with.
        label : str
            The stage.
        earlier : int
            Tiles of the stage that are done already.
        threads : int or None
            Threads of each task. None: those of the site.
        """
        tiles, found = list(tiles), {}

        def receive(tile: Any, done: Done[T]) -> None:
            found[tile] = done.value

        self._run(task, tiles, label, receive, earlier, threads)
        return [found[tile] for tile in tiles]

    def each(
        self,
        task: Callable[[Any], T],
        tiles: Sequence[Any],
        label: str,
        receive: Callable[[Any, T], None],
        *,
        near: Callable[[Any], int] | None = None,
    ) -> None:
        """Hand what the task returns for every tile to receive(tile, value), in order of completion; none of it is kept.

        near: tiles of equal near(tile) go to the same worker while it has room; see `map_tiles`.
        """
        self._run(task, tiles, label, lambda tile, done: receive(tile, done.value), near=near)

    def fill(self, store: TileStore, task: Callable[[Any], Receipt], tiles: Sequence[Any], label: str) -> None:
        """Compute the pending tiles of `store`; the task commits a tile and returns its receipt."""
        pending, axes = set(store.pending()), len(store.grid)
        # tiles of rows have one index; the store is one tile wide along its other axes
        todo = [t for t in tiles if (*t.index, *[0] * (axes - len(t.index))) in pending]
        self.commit(lambda tile: [store], task, todo, label, earlier=len(tiles) - len(todo))

    def commit(
        self,
        stores: Callable[[Any], Sequence[TileStore]],
        task: Callable[[Any], Any],
        tiles: Sequence[Any],
        label: str,
        *,
        earlier: int = 0,
        needs: Callable[[Any], Iterable[Any]] | None = None,
    ) -> None:
        """Run tasks that commit tiles, and record the receipts that they return.

        Parameters
        ----------
        stores : function of a tile
            The store of each receipt that its task returns, in their order; surplus stores are ignored.
        task : function of a tile
            Commits and returns a Receipt or a sequence of them. Receipts of one task in one store share its seconds.
        tiles : sequence
            What the task is called with.
        label : str
            The stage.
        earlier : int
            Tiles of the stage that are done already.
        needs : function of a tile or None
            The tiles that must be committed before; see `map_tiles`.
        """

        def receive(tile: Any, done: Done[Any]) -> None:
            receipts = [done.value] if isinstance(done.value, Receipt) else list(done.value)
            pairs = list(zip(stores(tile), receipts, strict=False))
            for store, receipt in pairs:
                share = done.seconds / sum(other is store for other, _ in pairs)
                store.record(replace(receipt, seconds=share, peak_bytes=done.peak_bytes, worker=done.worker))

        self._run(task, tiles, label, receive, earlier, None, needs)

    def reduce(
        self,
        task: Callable[[Any], T],
        combine: Callable[[Node, T, T], T],
        tiles: Sequence[Any],
        label: str,
        *,
        sum_label: str | None = None,
    ) -> T:
        """The values of all tiles combined in a fixed binary tree; see `reduce_tiles`."""
        self.listener.stage(label, len(tree_nodes(len(tiles))))
        with self._watched():
            return reduce_tiles(
                task,
                combine,
                tiles,
                self.client,
                label=label,
                sum_label=sum_label,
                threads=self.threads,
                receive=lambda node, done: self.listener.task(label, done),
            )

    def on_slots(self, task: Callable[[int], T], slots: int) -> list[T]:
        """Run a measuring task here, or on `slots` slots of the cluster at the same time, MOST_SAMPLES at most; its values."""
        count = 1 if self.client is None else max(1, min(slots, MOST_SAMPLES))
        found: list[T] = []
        map_tiles(
            task,
            range(count),
            self.client,
            label="calibrate",
            threads=self.threads,
            receive=lambda tile, done: found.append(done.value),
        )
        return found

    def _run(
        self,
        task: Callable[[Any], Any],
        tiles: Sequence[Any],
        label: str,
        receive: Callable[[Any, Done], None],
        earlier: int = 0,
        threads: int | None = None,
        needs: Callable[[Any], Iterable[Any]] | None = None,
        near: Callable[[Any], int] | None = None,
    ) -> None:
        self.listener.stage(label, earlier + len(tiles), earlier)

        def heard(tile: Any, done: Done) -> None:
            receive(tile, done)
            self.listener.task(label, done)

        with self._watched():
            map_tiles(
                task,
                tiles,
                self.client,
                label=label,
                receive=heard,
                threads=threads or self.threads,
                needs=needs,
                near=near,
            )

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """StoreError where tasks fail because the folder of the results, or the record in it, was removed beside them."""
        # a folder alone says little: what is written next makes it anew
        names = [] if self.folder is None else [self.folder / name for name in ("zarr.json", "record.json")]
        present = [p for p in (*names, self.record.path) if p is not None and p.exists()]
        try:
            yield
        except Exception as error:
            gone = [p.parent for p in present if not p.exists()]
            if gone:
                raise StoreError(
                    f"{gone[0]} was removed or moved while its results were being written, and they went with it. Put it back, or run "
                    "again: what is missing is computed anew."
                ) from error
            raise
