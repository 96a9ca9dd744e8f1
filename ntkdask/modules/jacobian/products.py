"""Sums of products of gradients into one kernel matrix, in place: K += L Rᵀ, and K += Σ_ts (A Bᵀ)∘(G Hᵀ) where L is never formed.

A symmetric matrix is a triangle of row blocks, or of many rows on a CPU one of SYRK, of SciPy's BLAS on the tensors' own memory: its
threads and torch's keep each other waiting, which few rows do not pay for. Called by `tangent`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from scipy.linalg import blas

Tensor = torch.Tensor

TRIANGLE_ROWS = 2048
"""Rows of a block of a symmetric matrix on a GPU."""
SYRK_ROWS = 1024
SMALLEST_BLOCK = 128
"""Rows from which SYRK serves on a CPU; rows of a block at least below."""
MIRROR_ROWS = 64
"""Rows of a block in which a symmetric matrix is made whole."""


class Accumulator:
    """K (n, m), zero at first; with `symmetric` the upper triangle alone until `finish`.

    precision: "tf32" and "bfloat16" say what the products' factors are rounded to; sums are in K's dtype, float32 then.
    """

    def __init__(self, k: Tensor, symmetric: bool, precision: str | None) -> None:
        self.k, self.symmetric, self.precision = k, symmetric, precision

    def add(self, left: Tensor, right: Tensor | None) -> None:
        """K += left rightᵀ; left (n, c), right (m, c), None where K is symmetric."""
        if not left.shape[1] or not self.k.numel():
            return
        right = left if right is None else right
        if self.k.is_cuda:
            self._add_blocks(left, right, TRIANGLE_ROWS)
            return
        if self.precision == "bfloat16":
            left, right = (t.bfloat16().to(self.k.dtype) for t in (left, right))
        if not self.symmetric or len(left) < SYRK_ROWS:
            self._add_blocks(left, right, max(SMALLEST_BLOCK, -(-len(left) // 4)))
            return
        # C order is Fortran order transposed: K's upper triangle is Kᵀ's lower one
        syrk = blas.ssyrk if self.k.dtype == torch.float32 else blas.dsyrk
        syrk(1.0, left.contiguous().numpy().T, beta=1.0, c=self.k.numpy().T, trans=1, lower=1, overwrite_c=1)

    def _add_blocks(self, left: Tensor, right: Tensor, rows: int) -> None:
        step = rows if self.symmetric else len(left)
        for i in range(0, len(left), step):
            first = i if self.symmetric else 0
            self._addmm(self.k[i : i + step, first:], left[i : i + step], right[first:].T)

    def _addmm(self, out: Tensor, left: Tensor, right: Tensor) -> None:
        if not out.is_cuda:
            torch.addmm(out, left, right, out=out)
            return
        if self.precision == "bfloat16":
            try:
                torch.addmm(out, left.bfloat16(), right.bfloat16(), out_dtype=out.dtype, out=out)
                return
            except (TypeError, RuntimeError) as error:
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                # libraries before 2.8: TF32 holds every bfloat16 number, so its products are the same
                left, right = left.bfloat16().to(out.dtype), right.bfloat16().to(out.dtype)
        with rounding(out.device, self.precision in ("tf32", "bfloat16")):
            torch.addmm(out, left, right, out=out)

    def add_terms(self, rows: slice, columns: slice, a: Tensor, b: Tensor, g: Tensor, h: Tensor, joined: bool) -> None:
        """K[I, J] += Σ_ts ⟨a_it, b_js⟩⟨g_it, h_js⟩ for rows I and columns J of examples.

        a (I, T, D), b (J, T, D): inputs; g (I, Q, T, U), h (J, Q, T, U): output gradients. joined: Σ over Q too, as if Q were more
        units; else K has Q rows and columns for each example.
        """
        n, m, outputs, terms = len(a), len(b), g.shape[1], a.shape[1]
        seen = self._product(a.reshape(n * terms, -1), b.reshape(m * terms, -1))
        if joined:
            g, h = (t.transpose(1, 2).reshape(len(t), 1, terms, -1) for t in (g, h))
            outputs = 1
        of_outputs = self._product(g.reshape(n * outputs * terms, -1), h.reshape(m * outputs * terms, -1))
        into = self.k[rows.start * outputs : rows.stop * outputs, columns.start * outputs : columns.stop * outputs]
        if terms == outputs == 1:
            into.addcmul_(seen, of_outputs)
            return
        product = of_outputs.view(n, outputs, terms, m, outputs, terms)
        product *= seen.view(n, 1, terms, m, 1, terms)
        into += product.sum(dim=(2, 5)).view(n * outputs, m * outputs)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        out = left.new_zeros(len(left), len(right))
        Accumulator(out, False, self.precision).add(left, right)
        return out

    def finish(self) -> Tensor:
        """K, whole."""
        if self.symmetric:
            n = len(self.k)
            for i in range(0, n, MIRROR_ROWS):
                stop = min(i + MIRROR_ROWS, n)
                self.k[stop:, i:stop] = self.k[i:stop, stop:].T
                block = self.k[i:stop, i:stop]
                lower = block.T.tril(-1)
                block.triu_()
                block += lower
        return self.k


@contextmanager
def rounding(device: torch.device, tf32: bool) -> Iterator[None]:
    """Products and convolutions on a GPU in TF32 or in strict float32, as `tf32` says, until the context ends; nothing on a CPU."""
    if device.type != "cuda":
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = tf32
    try:
        with cudnn.flags(
            enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=tf32
        ):
            yield
    finally:
        matmul.allow_tf32 = before
