"""Random directions that are never formed: a product with them is a Walsh–Hadamard transform for each power of two of columns.

    x·W = [H G₁ u, …, H G_B u],   u = H D x/√p,   p = 2^⌈log₂ d⌉,   HHᵀ = p·I, x padded with zeros

D has random signs, and the diagonal of every G_b is standard normal or uniform on a sphere; so is every column of W then.
Features of one direction therefore keep their expectations exactly, whatever the rows. Columns of one block depend on each
other, which D evens out. A row takes O(d log d + m log d) operations where a matrix takes O(d·m). Called by `arccosine` and
`fourier` for their features. Source: Le, Sarlós & Smola 2013 (Fastfood), without their second permutation and scaling, which
fix lengths that are random here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ntkdask import seeds, threads
from ntkdask.arrays import Array, gpu_usable, is_device_array, namespace, to_device
from ntkdask.cache import shared
from ntkdask.compiled import compiled_as_written
from ntkdask.features.sketching.hadamard import load_signed, transform_row, walsh_hadamard
from ntkdask.features.sketching.operands import aligned, over_rows, padded_size, row_memory, unit_stride

PRODUCT, RELU, STEP = 0, 1, 2
"""What becomes of a product z: itself, max(z, 0), or 1 where it is positive and 0 elsewhere."""


@dataclass(frozen=True, eq=False)
class StructuredDirections:
    """Directions (d, m) as a product of transforms.

    Parameters
    ----------
    signs : array (d,)
        ±1, the diagonal of D.
    diagonals : array (B, p)
        The diagonals of the G_b over √p.
    m : int
        Number of directions.
    """

    signs: Array
    diagonals: Array
    m: int

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (d, m) of the matrix W."""
        return self.signs.shape[0], self.m

    @property
    def nbytes(self) -> int:
        """Bytes of signs and diagonals."""
        return int(self.signs.nbytes + self.diagonals.nbytes)

    def into(self, x: Array, out: Array, kind: int = PRODUCT) -> Array:
        """Write x·W, or its ReLU or step features, to `out`.

        x (n, d) and out (n, m), which may be a slice of columns, have the dtype of the diagonals.
        """
        x = unit_stride(x)
        if is_device_array(x):
            return self._device_into(x, out, kind)
        n, p = x.shape[0], self.diagonals.shape[1]
        rows, target = row_memory(x), (*row_memory(out), self.m)

        def work(start: int, stop: int) -> None:
            scratch = aligned(p, out.dtype), aligned(p, out.dtype)
            _rows_into(rows, self.signs, self.diagonals, target, start, stop, kind, scratch)

        over_rows(work, n, n * p * (1 + self.diagonals.shape[0]))
        return out

    def _device_into(self, x: Array, out: Array, kind: int) -> Array:
        xp, (blocks, p), d = namespace(x), self.diagonals.shape, x.shape[1]
        rotated = xp.zeros((x.shape[0], p), out.dtype)
        xp.multiply(x, self.signs, out=rotated[:, :d])
        walsh_hadamard(rotated, out=rotated)
        for block in range(blocks):
            columns = slice(block * p, min((block + 1) * p, self.m))
            product = rotated * self.diagonals[block]
            walsh_hadamard(product, out=product)
            out[:, columns] = product[:, : columns.stop - columns.start]
        if kind == RELU:
            xp.maximum(out, 0, out=out)
        elif kind == STEP:
            xp.greater(out, 0, out=out)
        return out


def structured_directions(
    seed: int, path: seeds.Path, d: int, m: int, like: Array, scale: float = 1.0, law: str = "spherical"
) -> StructuredDirections:
    """m directions for rows of d features, drawn once per process.

    Parameters
    ----------
    seed : int
        Seed of the random numbers.
    path : tuple
        Place of these directions in the map, which with the seed fixes the numbers.
    d : int
        Features of a row.
    m : int
        Number of directions.
    like : array
        The directions take its dtype and its device.
    scale : float
        Length or standard deviation, see `law`.
    law : {"spherical", "gaussian"}
        "spherical": directions of length scale·√p. "gaussian": entries N(0, scale²).

    Returns
    -------
    StructuredDirections
        The directions.
    """
    device, dtype = is_device_array(like), like.dtype.name
    key = ("structured", law, seed, path, d, m, scale, dtype, device and like.device.id)

    def make() -> StructuredDirections:
        p, place = padded_size(d), (*path, "diagonals")
        blocks = -(-m // p)
        if law == "spherical":
            drawn = seeds.sphere(seed, place, p, blocks, dtype, scale)
        else:
            drawn = seeds.normals(seed, place, p, blocks, dtype, scale / math.sqrt(p))
        signs = seeds.signs(seed, (*path, "rotation"), d, dtype)
        return StructuredDirections(to_device(signs, device), to_device(np.ascontiguousarray(drawn.T), device), m)

    return shared.get(key, make)


def structured_bytes(d: int, m: int, itemsize: int) -> int:
    """Bytes of the directions."""
    p = padded_size(d)
    return itemsize * (d + -(-m // p) * p)


def scratch_bytes(n: int, d: int, itemsize: int) -> int:
    """Bytes of the temporaries of a product with n rows.

    Two padded rows for each thread, or on a GPU two padded copies of all rows.
    """
    p = padded_size(d)
    return max(2 * threads.current() * (p * itemsize + 256), 2 * n * p * itemsize if gpu_usable() else 0)


@compiled_as_written
def _rows_into(rows, signs, diagonals, target, first, last, kind, buffers):
    """Rows: (memory, elements between rows). target: (memory, elements between rows, m). buffers: two padded rows."""
    x, stride = rows
    out, stride_out, columns = target
    rotated, scratch = buffers
    p = scratch.size
    for r in range(first, last):
        load_signed(x, r * stride, signs, scratch)
        transform_row(scratch, rotated, 0)
        for block in range(diagonals.shape[0]):
            diagonal = diagonals[block]
            for i in range(p):
                scratch[i] = diagonal[i] * rotated[i]
            start = block * p
            if start + p <= columns:
                transform_row(scratch, out, r * stride_out + start)
                continue
            transform_row(scratch, scratch, 0)
            tail = out[r * stride_out + start : r * stride_out + columns]
            for i in range(tail.size):
                tail[i] = scratch[i]
        row = out[r * stride_out : r * stride_out + columns]
        if kind == 1:
            for i in range(columns):
                # NaN stays NaN
                row[i] = 0 if row[i] <= 0 else row[i]
        elif kind == 2:
            for i in range(columns):
                row[i] = 1 if row[i] > 0 else 0
