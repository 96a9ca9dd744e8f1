"""The stores of a kernel matrix: one, or one for every part of a kernel that gives several, in a folder of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ntkdask.errors import FingerprintError, StoreError
from ntkdask.planning.tiles import Plan
from ntkdask.store import TileStore
from ntkdask.workflows.kernel_matrix.plan import MatrixPlan


def create_stores(path: Path, plan: MatrixPlan, fingerprint: Mapping[str, Any]) -> tuple[TileStore, ...]:
    """The store of every part at `path`, opened or made; FingerprintError or StoreError where something else is there."""
    require_free(path, plan.parts)
    return tuple(
        TileStore.create(
            place,
            shape=(plan.n * plan.entry, (plan.m or plan.n) * plan.entry),
            tile_shape=(plan.tile_rows * plan.entry, plan.tile_cols * plan.entry),
            dtype=plan.dtype,
            # parts differ, and a factor of one is not a factor of the other
            fingerprint=dict(fingerprint) | ({"part": place.name} if plan.parts else {}),
            triangle="symmetric" if plan.m is None else None,
        )
        for place in _places(path, plan.parts)
    )


def require_free(path: Path, parts: tuple[str, ...]) -> None:
    """StoreError or FingerprintError when something else stands at `path`: making a store there would delete it.

    parts: names of the matrices of a kernel that gives several; empty for one.
    """
    if (path / "zarr.json").exists():
        if parts:
            raise FingerprintError(f"{path} holds one matrix, {' and '.join(parts)} were asked for. Use another url.")
        return
    if path.exists():
        names = sorted(p.name for p in path.iterdir()) if path.is_dir() else [path.name]
        others = [name for name in names if not (path / name / "zarr.json").exists()]
        if others or (names and not parts):
            holds = (
                f"holds the matrices {', '.join(names)}" if not others else f"is no kernel matrix (found {others[0]})"
            )
            raise StoreError(f"{path} {holds}. Choose another url.")


def with_stored_tiles(plan: Plan, path: Path, parts: tuple[str, ...], entry: int) -> Plan:
    """`plan` with the tile sizes of the matrix that is already at `path`, unless it states its own.

    A resumed run keeps the first one's tiles, whatever memory its workers have. entry: rows of the matrix for one row of data.
    """
    first = _places(path, parts)[0]
    if plan.tile_rows or plan.tile_cols or not (first / "zarr.json").exists():
        return plan
    rows, columns = TileStore.open(first).tile_shape
    return Plan(max(1, rows // entry), max(1, columns // entry), plan.memory_bytes, plan.dtype)


def _places(path: Path, parts: tuple[str, ...]) -> list[Path]:
    return [path / part for part in parts] or [path]
