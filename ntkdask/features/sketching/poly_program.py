"""The order of work of a `PolySketch`: which vectors of its tree are formed, from which others, and where they are kept meanwhile.

The tree over leaves 0 … p−1 halves its leaves at every node. The value of a node depends only on its state, which is how many
of its leaves, from the left, are x. A state is the product of one state of the left child and one of the right; states of e₁
alone are constants. Pure integer planning; the numbers are in `poly_tables`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

LEAF, JOIN, JOIN_CONSTANT, OUT, OUT_CONSTANT, OUT_SINGLE = range(6)
"""Kinds of steps: sample a leaf; multiply two slots, or a slot and a constant, and sample; multiply into the output, or copy."""


@dataclass(frozen=True)
class Program:
    """The steps of a sketch of one degree, which every row goes through, whatever the width and dtype.

    An edge is a child that its parent transforms and samples.

    Parameters
    ----------
    steps : array (n_steps, 5), int64
        Kind, operand slot, other operand (slot or constant), edge, target (slot or position in the output).
    edges : tuple of (int, int)
        (first leaf, end) of the child of each edge.
    n_slots : int
        How many vectors are held at a time.
    """

    steps: np.ndarray
    edges: tuple[tuple[int, int], ...]
    n_slots: int


def split(first: int, end: int) -> int:
    """The first leaf of the right child of the node over leaves [first, end)."""
    return first + (end - first + 1) // 2


@functools.cache
def edges_of(degree: int) -> tuple[tuple[int, int], ...]:
    """(first leaf, end) of every node below the root, children before parents; at degree 1 that of the single leaf."""
    edges: list[tuple[int, int]] = []

    def visit(first: int, end: int) -> None:
        if end - first > 1:
            visit(first, split(first, end))
            visit(split(first, end), end)
        if end - first < degree or degree == 1:
            edges.append((first, end))

    visit(0, degree)
    return tuple(edges)


class _Planner:
    """Writes the steps of a `Program` and gives each vector a slot until its last use."""

    def __init__(self, degree: int) -> None:
        self.number = {edge: e for e, edge in enumerate(edges_of(degree))}
        self.steps: list[tuple[int, int, int, int, int]] = []
        self.free: list[int] = []
        self.n_slots = 0

    def slot(self) -> int:
        if not self.free:
            self.free.append(self.n_slots)
            self.n_slots += 1
        return self.free.pop()

    def samples(self, first: int, end: int, states: Iterable[int]) -> dict[int, int]:
        """Slots of the samples of the edge (first, end) when the first s of its leaves are x, for each s >= 1 of `states`."""
        wanted = sorted({s for s in states if s})
        edge, slots = self.number[first, end], {}
        if not wanted:
            return {}
        if end - first == 1:
            slots[1] = self.slot()
            self.steps.append((LEAF, 0, 0, edge, slots[1]))
            return slots
        for s, left, right, constant in self.pairs(first, end, wanted):
            slots[s] = self.slot()
            self.steps.append((JOIN if constant < 0 else JOIN_CONSTANT, left, max(right, constant), edge, slots[s]))
        return slots

    def pairs(self, first: int, end: int, wanted: list[int]) -> Iterable[tuple[int, int, int, int]]:
        """(s, left slot, right slot or −1, constant or −1) of a node; a slot is given back once the step that uses it is written."""
        middle = split(first, end)
        size = middle - first
        left = self.samples(first, middle, [min(s, size) for s in wanted])
        full_later = any(s > size for s in wanted)
        for s in [s for s in wanted if s <= size]:
            yield s, left[s], -1, self.number[middle, end]
            if s < size or not full_later:
                self.free.append(left[s])
        right = self.samples(middle, end, [s - size for s in wanted if s > size])
        for s in [s for s in wanted if s > size]:
            yield s, left[size], right[s - size], -1
            self.free.append(right[s - size])
        if full_later:
            self.free.append(left[size])


@functools.cache
def program(degree: int, degrees: tuple[int, ...]) -> Program:
    """The steps that give the powers `degrees` of 0 … degree, in this order; depth first, so that few vectors are held at a time."""
    planner = _Planner(degree)
    wanted = sorted({k for k in degrees if k})
    positions = {k: [i for i, asked in enumerate(degrees) if asked == k] for k in wanted}
    if degree == 1 and wanted:
        slot = planner.samples(0, 1, [1])[1]
        planner.steps += [(OUT_SINGLE, slot, 0, 0, position) for position in positions[1]]
    elif wanted:
        for k, left, right, constant in planner.pairs(0, degree, wanted):
            kind = OUT if constant < 0 else OUT_CONSTANT
            planner.steps += [(kind, left, max(right, constant), 0, position) for position in positions[k]]
    steps = np.array(planner.steps, np.int64).reshape(-1, 5)
    return Program(steps, edges_of(degree), planner.n_slots)
