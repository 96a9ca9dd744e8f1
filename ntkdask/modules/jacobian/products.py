"""Sums of products of gradients into one kernel matrix, in place: K += L Rᵀ, or K += Σ_ts (A Bᵀ)∘(G Hᵀ) without forming L and R.

Of a symmetric matrix only a triangle is computed, in blocks of rows. With many rows on a CPU that is a call of SYRK in SciPy's
BLAS, on the memory of the tensors; with few rows it is not worth it, because the threads of that BLAS and of torch wait for each
other. Called by `tangent`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ntkdask import lapack

Tensor = torch.Tensor

TRIANGLE_ROWS = 2048
"""Rows of a block of a symmetric matrix on a GPU."""
SYRK_ROWS = 1024
SMALLEST_BLOCK = 128
"""On a CPU: least rows for SYRK; below that, least rows of a block."""
MIRROR_ROWS = 64
"""Rows of a block in which a triangle is copied to the other one."""


class Accumulator:
    """Adds products to a kernel matrix in place.

    Parameters
    ----------
    k : tensor (n, m)
        The matrix, zeros at first.
    symmetric : bool
        Whether only the upper triangle is computed, until `finish`.
    precision : str or None
        "tf32" or "bfloat16": the factors of products in float32 are rounded to it. Sums are in the dtype of `k`.
    """

    def __init__(self, k: Tensor, symmetric: bool, precision: str | None) -> None:
        self.k, self.symmetric, self.precision = k, symmetric, precision

    def add(self, left: Tensor, right: Tensor | None) -> None:
        """K += left rightᵀ, left (n, c) and right (m, c); right is None where K is symmetric: left itself."""
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
        # in Fortran order this memory is Kᵀ, whose lower triangle is the upper one of K
        lapack.syrk(1.0, left.contiguous().numpy().T, 1.0, self.k.numpy().T, trans=True)

    def _add_blocks(self, left: Tensor, right: Tensor, rows: int) -> None:
        """K += left rightᵀ; of a symmetric K the upper triangle, in blocks of `rows` rows."""
        step = rows if self.symmetric else len(left)
        for i in range(0, len(left), step):
            first = i if self.symmetric else 0
            self._addmm(self.k[i : i + step, first:], left[i : i + step], right[first:].T)

    def _addmm(self, out: Tensor, left: Tensor, right: Tensor) -> None:
        """out += left right, the factors rounded on a GPU as `precision` says."""
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
                # torch before 2.8: TF32 holds every bfloat16 number, so the products are the same
                left, right = left.bfloat16().to(out.dtype), right.bfloat16().to(out.dtype)
        with rounding(out.device, self.precision in ("tf32", "bfloat16")):
            torch.addmm(out, left, right, out=out)

    def add_terms(self, rows: slice, columns: slice, a: Tensor, b: Tensor, g: Tensor, h: Tensor, joined: bool) -> None:
        """K[I, J] += Σ_ts ⟨a_it, b_js⟩⟨g_it, h_js⟩ for a block of examples.

        Parameters
        ----------
        rows : slice
            The examples I of the block's rows.
        columns : slice
            The examples J of its columns.
        a : tensor (I, T, D)
            Inputs of I, term by term.
        b : tensor (J, T, D)
            Inputs of J.
        g : tensor (I, Q, T, U)
            Output gradients of I.
        h : tensor (J, Q, T, U)
            Output gradients of J.
        joined : bool
            Whether the sum is over Q as well; otherwise K has Q rows and columns for each example.
        """
        n, m, outputs, terms = len(a), len(b), g.shape[1], a.shape[1]
        input_products = self._product(a.reshape(n * terms, -1), b.reshape(m * terms, -1))
        if joined:
            g, h = (t.transpose(1, 2).reshape(len(t), 1, terms, -1) for t in (g, h))
            outputs = 1
        gradient_products = self._product(g.reshape(n * outputs * terms, -1), h.reshape(m * outputs * terms, -1))
        block = self.k[rows.start * outputs : rows.stop * outputs, columns.start * outputs : columns.stop * outputs]
        if terms == outputs == 1:
            block.addcmul_(input_products, gradient_products)
            return
        product = gradient_products.view(n, outputs, terms, m, outputs, terms)
        product *= input_products.view(n, 1, terms, m, 1, terms)
        block += product.sum(dim=(2, 5)).view(n * outputs, m * outputs)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """left rightᵀ in memory of its own."""
        out = left.new_zeros(len(left), len(right))
        Accumulator(out, False, self.precision).add(left, right)
        return out

    def finish(self) -> Tensor:
        """K with both triangles."""
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
    """A context in which a GPU's products and convolutions round their factors to TF32, or not at all; on a CPU it does nothing."""
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
