"""The centre of Gram sums: near the mean of a seeded sample over all training rows, chosen before the first slab.

The sample is one row of every stretch of equal weight, at a random place in it, so that sorted data and data that begins with rows of
zeros are sampled as they are. MATH.md §6.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ntkdask import seeds
from ntkdask.arrays import to_host
from ntkdask.cache import shared
from ntkdask.datasets.rows import Rows
from ntkdask.execution.site import Site
from ntkdask.solvers.gram import Centre
from ntkdask.states import load_state, save_state
from ntkdask.workflows.stream import FeatureStream

SAMPLE_ROWS = 128
"""Rows of the sample: its mean is within a tenth of the deviation of the whole mean, where the sums lose no digit."""


@dataclass(frozen=True, eq=False)
class _CentreTask:
    """The centre of a stream's rows, or the url of its state."""

    stream: FeatureStream
    k: int
    states: str | None

    def __call__(self, tile: int) -> Centre | str:
        stream = self.stream
        numbers, counts = np.unique(sample_rows(stream.rows, SAMPLE_ROWS), return_counts=True)
        found = list(stream.finite_rows(numbers.tolist()))
        centre = Centre.zero(stream.n_components, self.k)
        if found:
            kept = np.concatenate([f.numbers for f in found])
            phi = np.concatenate([to_host(f.phi) for f in found])
            y = np.concatenate([to_host(f.y) for f in found])
            centre = Centre.of_sample(phi, y, counts[np.searchsorted(numbers, kept)].astype(np.float64))
        return centre if self.states is None else save_state(self.states, centre.to_state())


def find_centre(stream: FeatureStream, k: int, site: Site, name: str) -> Centre | str:
    """The centre for the sums of a stream's rows, k columns of targets; at a site with a folder the url of its state, found once."""
    if site.folder is None:
        return site.alone(_CentreTask(stream, k, None), "gram-centre")
    return site.once(name, lambda: site.alone(_CentreTask(stream, k, str(site.states)), "gram-centre"))


def load_centre(centre: Centre | str | None) -> Centre | None:
    """The centre itself, loaded once per process where it is given by its url."""
    if isinstance(centre, str):
        return shared.get(("centre", centre), lambda: Centre.from_state(load_state(centre)[0]))
    return centre


def sample_rows(rows: Rows, count: int) -> np.ndarray:
    """Up to `count` numbers of selected rows, ascending, in proportion to their weights: heavy rows repeat, weight 0 is left out."""
    numbers, weights = rows.part_numbers(), rows.row_weights()
    selected = None if numbers is None else np.flatnonzero(np.isin(numbers, rows.parts))
    if weights is not None:
        weights = np.asarray(weights, np.float64) if selected is None else np.asarray(weights, np.float64)[selected]
        positive = np.flatnonzero(weights > 0)
        selected, weights = positive if selected is None else selected[positive], weights[positive]
    n = rows.n_total if selected is None else selected.size
    if n == 0:
        return np.empty(0, np.int64)
    ends = None if weights is None else np.cumsum(weights)
    count = min(count, n) if ends is None else count
    places = (np.arange(count) + seeds.uniforms(0, ("gram", "centre"), count)) / count
    chosen = (places * n).astype(np.int64) if ends is None else np.searchsorted(ends, places * ends[-1], side="right")
    chosen = np.minimum(chosen, n - 1)
    return chosen if selected is None else selected[chosen]
