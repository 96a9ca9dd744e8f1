"""The random numbers of a `PolySketch` for rows of one width, and what its tree makes of e₁ alone.

Drawn by `poly_sketch`; read by its loops (`poly_loops`) and by its steps on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ntkdask.arrays import Array
from ntkdask.features.sketching.hadamard import walsh_hadamard
from ntkdask.features.sketching.poly_program import edges_of, split


@dataclass(frozen=True)
class Tables:
    """The random numbers of a sketch for rows of one width, dtype and device; w = `PolySketch.width`.

    Parameters
    ----------
    leaf_signs : array (p, d)
        Signs of each leaf's columns.
    buckets : array (p, d), int32
        Buckets of each leaf's columns with leaves="count", else (p, 0).
    node_signs : array (n_edges, w)
        Signs of each node, with the factor 1/√w.
    rows : array (n_edges, w), uint32
        Entries that each edge samples.
    constants : array (n_edges, w)
        An edge's samples of e₁ alone, times the signs of the edge above.
    e1 : array (m,)
        The sketch of e₁^{⊗p}.
    """

    leaf_signs: Array
    buckets: Array
    node_signs: Array
    rows: Array
    constants: Array
    e1: Array

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.nbytes for a in vars(self).values())


def samples_of_e1(
    degree: int, leaves: np.ndarray, node_signs: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(constants, root) in float64: every edge's samples of e₁ alone times the signs above it, and the root's product.

    leaves: (p, size), the transformed leaves of e₁, or (p, 1) where all their entries are equal.
    """
    edges = edges_of(degree)
    number = {edge: e for e, edge in enumerate(edges)}
    samples = np.empty(rows.shape)
    for e, (first, end) in enumerate(edges):
        if end - first == 1:
            samples[e] = leaves[first, rows[e] % leaves.shape[1]]
        else:
            left, right = number[first, split(first, end)], number[split(first, end), end]
            samples[e] = walsh_hadamard((node_signs[e] * samples[left] * samples[right])[None])[0, rows[e]]
    constants = samples.copy()
    for e, (first, end) in enumerate(edges):
        if end - first > 1:
            for child in ((first, split(first, end)), (split(first, end), end)):
                constants[number[child]] = samples[number[child]] * node_signs[e]
    if degree == 1:
        return constants, samples[0]
    return constants, samples[number[0, split(0, degree)]] * samples[number[split(0, degree), degree]]
