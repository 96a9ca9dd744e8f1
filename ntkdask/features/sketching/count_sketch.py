"""CountSketch of vectors and TensorSketch of their tensor powers: linear sketches whose cost follows the non-zeros of a row.

Building blocks of feature maps, like `sketches.SRHT`: drawn from (seed, path), a row's sketch does not depend on the rows beside it.
Rows are dense (NumPy or CuPy) or SciPy CSR matrices on the host; equal rows give equal sketches either way.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import scipy.fft

from ntkdask import seeds, threads
from ntkdask.arrays import (
    Array,
    cuda_module,
    flatten_rows,
    is_device_array,
    is_sparse,
    namespace,
    require_float,
    to_device,
)
from ntkdask.cache import shared
from ntkdask.compiled import compiled_as_written
from ntkdask.errors import InputError
from ntkdask.features.base import require_components, row_blocks
from ntkdask.features.sketching.operands import checked_out, over_rows, row_memory, unit_stride
from ntkdask.features.sketching.sparse_rows import SparseRows, sparse_rows

CUDA_THREADS = 256

BLOCK_BYTES = 2**21
"""Bytes of the spectra of one block of rows of a TensorSketch: they stay in cache."""


@dataclass(frozen=True)
class Buckets:
    """The bucket of each of d columns, and its sign: (d,) int32 and (d,) ±1."""

    bucket: np.ndarray
    sign: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.bucket.nbytes + self.sign.nbytes


@dataclass(frozen=True)
class CountSketch:
    """Sketch of vectors: (S x)_b = Σ_{i: h(i) = b} s(i)·x_i, with h uniform on m = n_components buckets and s random signs.

    E⟨S x, S y⟩ = ⟨x, y⟩; for unit vectors the variance is at most (1 + α²)/m, α = ⟨x, y⟩. One addition per non-zero.
    Source: Charikar, Chen & Farach-Colton 2002; Weinberger et al. 2009, Lemma 2.
    """

    n_components: int
    seed: int
    path: seeds.Path = ()

    def __post_init__(self) -> None:
        require_components(self.n_components)

    def __call__(self, x: Any, *, out: Array | None = None, scale: float = 1.0) -> Array:
        """The sketch of rows: (n, *s) → (n, n_components) of x's dtype, times `scale`.

        x: NumPy, CuPy or SciPy sparse, float32 or float64. out: written and returned when given; a slice of columns of a
        C-ordered array will do. Raises InputError for rows without columns.
        """
        rows = _rows(x)
        shape = (rows.shape[0], self.n_components)
        out = checked_out(out, rows.data if isinstance(rows, SparseRows) else rows, shape)
        if is_device_array(rows):
            return self._on_device(rows, out, scale)
        buckets = self.buckets(rows.shape[1], rows.dtype)
        count_into(rows, buckets, out, out.dtype.type(scale))
        return out

    def buckets(self, d: int, dtype: np.dtype) -> Buckets:
        """Buckets and signs of d columns, drawn once per process; the first columns do not depend on d."""

        def draw() -> Buckets:
            bits = seeds.raw_bits(self.seed, (*self.path, "buckets"), d)
            sign = 1 - 2 * (bits & np.uint64(1)).astype(np.int8)
            return Buckets(((bits >> np.uint64(1)) % np.uint64(self.n_components)).astype(np.int32), sign.astype(dtype))

        return shared.get(("count-sketch", self, d, dtype.name), draw)

    def workspace_bytes(self, n: int, d: int, itemsize: int) -> int:
        """Peak bytes of a call on (n, d) rows of unit stride, output and buckets included."""
        return n * self.n_components * itemsize + d * (4 + itemsize + 24) + 8 * 1024

    def _on_device(self, x: Array, out: Array, scale: float) -> Array:
        """One kernel over columns sorted by bucket; its sums have a fixed order."""
        d, dtype = x.shape[1], x.dtype

        def sort() -> tuple[Array, Array, Array]:
            buckets = self.buckets(d, dtype)
            columns = np.argsort(buckets.bucket, kind="stable").astype(np.int32)
            starts = np.searchsorted(buckets.bucket[columns], np.arange(self.n_components + 1)).astype(np.int32)
            return to_device(columns), to_device(buckets.sign[columns]), to_device(starts)

        columns, signs, starts = shared.get(("count-sketch", self, d, dtype.name, x.device.id), sort)
        if out.size:
            strides = [np.int64(a.strides[0] // a.itemsize if a.shape[0] > 1 else a.shape[1]) for a in (x, out)]
            kernel = cuda_module(cuda_source()).get_function(f"count_rows_{dtype.name}")
            kernel(
                (x.shape[0],),
                (CUDA_THREADS,),
                (
                    x,
                    strides[0],
                    columns,
                    signs,
                    starts,
                    np.int32(self.n_components),
                    dtype.type(scale),
                    out,
                    strides[1],
                ),
            )
        return out


@dataclass(frozen=True)
class TensorSketch:
    """Sketch of x^{⊗p}, p = degree: the circular convolution of p independent CountSketches, by real FFTs.

    E⟨S x, S y⟩ = ⟨x, y⟩^p. For unit vectors at p = 2 the variance is about ((1+α²)² + 2α⁴)/m; in the worst case it grows as
    3^p, so `PolySketch` is better from about degree 4 on. Source: Pham & Pagh 2013; MATH.md §4.
    """

    degree: int
    n_components: int
    seed: int
    path: seeds.Path = ()

    def __post_init__(self) -> None:
        require_components(self.degree, "degree")
        require_components(self.n_components)

    def __call__(self, x: Any, *, out: Array | None = None, scale: float = 1.0) -> Array:
        """The sketch of rows: (n, *s) → (n, n_components) of x's dtype, times `scale`.

        x: NumPy, CuPy or SciPy sparse, float32 or float64. out: written and returned when given.
        """
        rows = _rows(x)
        m, like = self.n_components, rows.data if isinstance(rows, SparseRows) else rows
        out = checked_out(out, like, (rows.shape[0], m))
        for block in row_blocks(rows.shape[0], self._block_rows(like.itemsize)):
            part = rows.rows(block.start, block.stop) if isinstance(rows, SparseRows) else rows[block]
            product = None
            for factor in self._factors():
                spectrum = _rfft(factor(part))
                product = spectrum if product is None else namespace(spectrum).multiply(product, spectrum, out=product)
            out[block] = _irfft(product, m) * like.dtype.type(scale)
        return out

    def workspace_bytes(self, n: int, d: int, itemsize: int) -> int:
        """Peak bytes of a call on (n, d) rows, output and buckets included."""
        m, rows = self.n_components, min(n, self._block_rows(itemsize))
        return n * m * itemsize + 6 * rows * (m + 2) * itemsize + self.degree * d * (4 + itemsize) + 24 * d + 32 * 1024

    def _factors(self) -> list[CountSketch]:
        return [CountSketch(self.n_components, self.seed, (*self.path, "factor", i)) for i in range(self.degree)]

    def _block_rows(self, itemsize: int) -> int:
        return max(16, BLOCK_BYTES // (self.n_components * itemsize))


def _rows(x: Any) -> Any:
    """x as `SparseRows`, or as an array (n, d) of unit stride along d; InputError without columns."""
    if isinstance(x, SparseRows):
        return x
    rows = sparse_rows(x) if is_sparse(x) else unit_stride(flatten_rows(require_float(x)))
    if not rows.shape[1]:
        raise InputError(f"x has shape {rows.shape}; a sketch needs at least one column.")
    return rows


def _rfft(x: Array) -> Array:
    return namespace(x).fft.rfft(x) if is_device_array(x) else scipy.fft.rfft(x, workers=threads.current())


def _irfft(x: Array, length: int) -> Array:
    if is_device_array(x):
        return namespace(x).fft.irfft(x, length)
    return scipy.fft.irfft(x, length, workers=threads.current(), overwrite_x=True)


def count_into(rows: Any, buckets: Buckets, out: np.ndarray, scale: np.floating) -> None:
    """Write scale·CountSketch of the rows, (n, d) dense or `SparseRows`, to `out` on the CPU."""
    n, m = out.shape
    columns = buckets.bucket, buckets.sign
    target = (*row_memory(out), m)
    if isinstance(rows, SparseRows):
        matrix = rows.data, rows.columns, rows.starts

        def work(start: int, stop: int) -> None:
            _count_sparse(matrix, columns, target, start, stop, scale)

        over_rows(work, n, n * m + rows.data.size)
        return
    memory, stride = row_memory(rows)

    def dense_work(start: int, stop: int) -> None:
        _count_dense(memory, stride, columns, target, start, stop, scale)

    over_rows(dense_work, n, n * (m + rows.shape[1]))


@compiled_as_written
def _count_dense(x, stride, columns, target, first, last, scale):
    """Columns: (bucket, sign). target: (memory of the result, elements between its rows, m)."""
    bucket, sign = columns
    out, stride_out, m = target
    for r in range(first, last):
        row = out[r * stride_out : r * stride_out + m]
        source = x[r * stride : r * stride + bucket.size]
        for b in range(m):
            row[b] = 0
        for i in range(bucket.size):
            row[bucket[i]] += sign[i] * source[i]
        if scale != 1:
            for b in range(m):
                row[b] *= scale


@compiled_as_written
def _count_sparse(matrix, columns, target, first, last, scale):
    """Matrix: (values, columns, starts) of CSR rows; the rest as in `_count_dense`."""
    data, indices, starts = matrix
    bucket, sign = columns
    out, stride_out, m = target
    for r in range(first, last):
        row = out[r * stride_out : r * stride_out + m]
        for b in range(m):
            row[b] = 0
        for k in range(starts[r], starts[r + 1]):
            i = indices[k]
            row[bucket[i]] += sign[i] * data[k]
        if scale != 1:
            for b in range(m):
                row[b] *= scale


# --- GPU --------------------------------------------------


def cuda_source() -> str:
    """The CUDA C++ of this module; it includes nothing."""
    return resources.files("ntkdask.features.sketching").joinpath("count_sketch.cu").read_text()
