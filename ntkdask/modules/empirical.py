"""Empirical kernels on arrays: from a kernel's arguments and rows of NumPy or CuPy to matrices of the same kind.

Chooses dtype and device, checks that rows fit together, halves the budget when a GPU runs out of memory. The kernels of
`kernels.empirical` call this module, and import no torch themselves.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from ntkdask.arrays import Array, gpu_usable, is_device_array, require_float, require_rows, same_dtype
from ntkdask.errors import InputError, MemoryBudgetError
from ntkdask.modules.build import build
from ntkdask.modules.jacobian.blocks import DEVICE_FORM_BYTES
from ntkdask.modules.jacobian.gradients import ArrayRows, Gradients
from ntkdask.modules.jacobian.survey import Survey, with_retries
from ntkdask.modules.jacobian.tangent import Output, Tangent
from ntkdask.modules.tensors import as_array, device_of, dtype_of
from ntkdask.modules.torch_threads import task_threads

T = TypeVar("T")

OBJECT_BYTES = 2**13
"""Bytes of Python objects for each layer and parameter of a private copy."""
CALL_BYTES = 2**16
"""Bytes of other Python objects of a call: hooks, slices, the rows of a pass."""
LEAST_BYTES = 2**20
"""The budget is not halved below this."""


class MemoryWarning(RuntimeWarning):
    """A call ran out of the memory of a GPU, and goes on with a smaller budget."""


@dataclass(frozen=True)
class Request:
    """The arguments of an empirical kernel; its methods compute it for rows.

    Parameters
    ----------
    caller : str
        Name of the kernel, for messages.
    module : torch.nn.Module, or a description of one
        In eval mode, with outputs (n, O).
    kind : str or int
        "pseudo", "trace", "full", or the number of a logit; see `tangent.Output`.
    layout : str or None
        "nchw" or None, see `tensors.as_tensor`.
    parameters : tuple of str or None
        Patterns (fnmatch) on dotted names, None for all.
    precision : str or None
        None, "float64", "tf32" or "bfloat16".
    memory_bytes : int
        What a call may hold besides rows, matrix and module.
    """

    caller: str
    module: Any
    kind: str | int
    layout: str | None
    parameters: tuple[str, ...] | None
    precision: str | None
    memory_bytes: int

    def matrix(self, x: Array, y: Array | None) -> Array:
        """The kernel matrix (n, m), or (n, m, O, O) for "full", as an array of the kind and dtype of x."""
        x, y = self._rows(x, y)
        return with_retries(lambda: self._matrix(x, y))

    def _matrix(self, x: Array, y: Array | None) -> Array:
        call = self._call(x, y)
        n, m = len(x), len(x) if y is None else len(y)
        entry_rows = call.survey.outputs if self.kind == "full" else 1

        def fill(memory: int) -> torch.Tensor:
            # in torch's memory, which begins at a cache line: the order of MKL's sums, and so their bits, depends on the alignment
            k = torch.zeros(n * entry_rows, m * entry_rows, dtype=call.dtype, device=call.gradients.device)
            if not k.numel():
                return k
            return call.tangent(memory).matrix(k, call.survey, call.rows(x), None if y is None else call.rows(y))

        k = call.result(fill, x)
        return k.reshape(n, entry_rows, m, entry_rows).transpose(0, 2, 1, 3) if self.kind == "full" else k

    def diagonal(self, x: Array) -> Array:
        """The diagonal (n,) of the kernel matrix of x, or (n, O, O) for "full"."""
        x, _ = self._rows(x, None)
        return with_retries(lambda: self._diagonal(x))

    def _diagonal(self, x: Array) -> Array:
        call = self._call(x)
        entry_rows = call.survey.outputs if self.kind == "full" else 1

        def fill(memory: int) -> torch.Tensor:
            out = torch.zeros(len(x), entry_rows, entry_rows, dtype=torch.float64, device=call.gradients.device)
            return call.tangent(memory).diagonal(out, call.survey, call.rows(x)) if len(x) else out

        d = call.result(fill, x)
        return d if self.kind == "full" else d[:, 0, 0]

    def workspace_bytes(self, n: int, m: int, itemsize: int, row_shape: tuple[int, ...] | None) -> int:
        """Most bytes that a call on n and m rows holds besides its inputs and the module: matrix, kept pairs, a pass, products."""
        wide = 8 if self.precision == "float64" else itemsize
        if row_shape is None:
            return n * m * wide + self.memory_bytes
        call = self._planned(row_shape, itemsize)
        entry_rows = call.survey.outputs if self.kind == "full" else 1
        matrix = n * m * entry_rows**2 * (wide if wide == itemsize else wide + itemsize)
        peaks = [
            call.tangent(self.memory_bytes).budget(call.survey, *sides).peak_bytes for sides in ((n, m), (n, None))
        ]
        private = CALL_BYTES + sum(t.nbytes for t in call.gradients.twin.buffers())
        private += OBJECT_BYTES * sum(1 for _ in (*call.gradients.twin.modules(), *call.gradients.twin.parameters()))
        if gpu_usable():
            # rows may come on the GPU, where passes and temporaries are larger
            peaks.append(self.memory_bytes + DEVICE_FORM_BYTES)
        return matrix + max(peaks) + private

    def entry_size(self, row_shape: tuple[int, ...]) -> int:
        """Rows of the matrix for one row of data: O for "full", else 1."""
        return self._planned(row_shape, 4).survey.outputs if self.kind == "full" else 1

    def _planned(self, row_shape: tuple[int, ...], itemsize: int) -> _Call:
        """The call as it would be for rows of this shape and size, for plans."""
        # two rows of zeros and ones, which are valid as tokens, too
        values = np.arange(2 * math.prod(row_shape)) * 2654435761 >> 7 & 1
        return self._call(
            values.reshape(2, *row_shape).astype(np.float32 if itemsize == 4 else np.float64), purpose="plan"
        )

    def _rows(self, x: Array, y: Array | None) -> tuple[Array, Array | None]:
        x = require_rows(require_float(x))
        if y is None:
            return x, None
        y = require_rows(require_float(y, "y"), "y")
        if x.shape[1:] != y.shape[1:]:
            sizes = [math.prod(z.shape[1:]) for z in (x, y)]
            raise InputError(
                f"x has {sizes[0]} features a row and y has {sizes[1]}, in rows of shape {x.shape[1:]} and {y.shape[1:]}; they must "
                "agree."
            )
        if is_device_array(x) != is_device_array(y):
            raise InputError(
                "x and y lie on different devices, one NumPy and one CuPy. Move one of them: arrays.to_device."
            )
        return same_dtype(x, y)

    def _call(self, x: Array, y: Array | None = None, purpose: str = "call") -> _Call:
        module = build(self.module, self.caller)
        dtype = torch.float64 if self.precision == "float64" else dtype_of(x)
        samples = [z for z in (x, y) if z is not None and len(z)] or [np.ones((1, *x.shape[1:]), x.dtype)]
        with task_threads(), torch.inference_mode(False):  # what is made in inference mode never takes part in a graph
            gradients = Gradients(module, dtype, device_of(x), self.parameters, self.caller)
            key = (purpose, tuple(x.shape[1:]), self.layout)
            survey = gradients.survey(
                [ArrayRows(sample, dtype, gradients.device, self.layout) for sample in samples], key
            )
        if not isinstance(self.kind, str) and not 0 <= self.kind < survey.outputs:
            raise InputError(
                f"{self.caller}: output is {self.kind}, but the module has {survey.outputs} logits; give 0 to {survey.outputs - 1}."
            )
        return _Call(self, gradients, survey, dtype)


@dataclass(frozen=True)
class _Call:
    """A request for given rows: the gradients of the module, its survey, and the dtype of the computation."""

    request: Request
    gradients: Gradients
    survey: Survey
    dtype: torch.dtype

    def rows(self, x: Array) -> ArrayRows:
        return ArrayRows(x, self.dtype, self.gradients.device, self.request.layout)

    def tangent(self, memory: int) -> Tangent:
        return Tangent(self.gradients, Output(self.request.kind), memory, self.request.precision)

    def result(self, fill: Callable[[int], torch.Tensor], like: Array) -> Array:
        """The tensor that `fill` gives within the memory, as an array of the kind and dtype of `like`."""
        with task_threads(), torch.inference_mode(False):
            result = within_memory(fill, self.request.memory_bytes, self.request.caller)
        return as_array(result.to(dtype_of(like)), like)


def within_memory(call: Callable[[int], T], memory_bytes: int, caller: str) -> T:
    """call(memory_bytes), and again with half of it, from the start, for as long as a GPU runs out of memory.

    Each halving gives a MemoryWarning, in the name of the `caller`. MemoryBudgetError where 1 MiB is not enough.
    """
    while True:
        try:
            return call(memory_bytes)
        except torch.cuda.OutOfMemoryError as error:
            if memory_bytes // 2 < LEAST_BYTES:
                raise MemoryBudgetError(
                    f"{caller}: the GPU has no room for a pass of one row and the matrix ({error}). Use smaller tiles."
                ) from error
            message = str(error).splitlines()[0]
        memory_bytes //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(
            f"{caller}: out of memory on the GPU ({message}); going on with memory_bytes={memory_bytes}.",
            MemoryWarning,
            stacklevel=2,
        )


def require_module_like(module: Any, caller: str) -> None:
    """InputError where `module` is neither a module nor a description of one; nothing is built."""
    is_description = not isinstance(module, type) and callable(getattr(module, "build", None))
    if not is_description and not isinstance(module, nn.Module):
        build(module, caller)
