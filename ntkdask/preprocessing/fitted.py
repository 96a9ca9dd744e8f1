"""The chain of fitted steps: casts raw rows and applies the steps in order; stored with the model it belongs to.

Fitting is a fold over the steps, each on the output of the earlier ones:

    fitted = FittedPreprocessor(row_shape, dtype, image_scale)
    for step in steps:
        statistics = fitted.accumulate(step, raw)          # over slabs of training rows, merged
        fitted = fitted.extend(step, statistics)

`fit_in_memory` is that loop over one array; the execution layer runs the same two calls over a store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ntkdask import registry
from ntkdask.arrays import FLOAT_DTYPES, Array, as_array, is_device_array, is_sparse, namespace, require_rows, to_host
from ntkdask.errors import DtypeError, InputError
from ntkdask.preprocessing.statistics import Moments, SecondMoments
from ntkdask.preprocessing.steps import KIND, State, Statistics, Step, parse_steps


@dataclass(frozen=True, eq=False)
class FittedPreprocessor:
    """The chain of fitted steps: raw rows (n, *row_shape) of any real dtype → preprocessed rows of `dtype`, of the same shape.

    A leading Center or Standardize reads float64 and wide integers before they are rounded to dtype, so that a feature
    such as a time stamp, 1.7e9 ± 1e3, survives float32. Not for values beyond float32's range: check the result.

    Parameters
    ----------
    row_shape : tuple of int
        Shape of one row.
    dtype : {"float32", "float64"}
        Dtype of the result.
    image_scale : bool
        Whether rows are uint8 images, which are divided by 255 first.
    steps : tuple of Step
        The steps fitted so far; without any, a call casts.
    states : tuple of State
        What each of the steps learned.

    Raises
    ------
    DtypeError
        For another dtype.
    InputError
        For unequal numbers of steps and states.
    """

    row_shape: tuple[int, ...]
    dtype: str = "float32"
    image_scale: bool = False
    steps: tuple[Step, ...] = ()
    states: tuple[State, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in FLOAT_DTYPES:
            raise DtypeError(f"preprocessing to dtype {self.dtype!r}: use 'float32' or 'float64'")
        if len(self.steps) != len(self.states):
            raise InputError(f"{len(self.steps)} preprocessing steps with {len(self.states)} states: each step has one")
        object.__setattr__(self, "row_shape", tuple(int(size) for size in self.row_shape))

    @classmethod
    def for_rows(cls, row_shape: tuple[int, ...], stored_dtype: Any, dtype: str) -> FittedPreprocessor:
        """The empty chain for rows as they are stored: uint8 images (rows with two or more axes) are divided by 255."""
        return cls(tuple(row_shape), dtype, np.dtype(stored_dtype) == np.uint8 and len(row_shape) > 1)

    def __call__(self, raw: Array) -> Array:
        """The preprocessed rows: a new array, or `raw` itself when there is nothing to do. `raw` is never changed."""
        if is_sparse(raw):
            return self._sparse(raw)
        raw = self._require_raw(raw)
        x, out = raw, None
        if not self._ready(raw, self.steps[0] if self.steps else None):
            x = out = self._cast(raw)
        for step, state in zip(self.steps, self.states, strict=True):
            out = namespace(raw).empty(raw.shape, self.dtype) if out is None else out
            x = step.apply(x, state, out=out)
        return x

    def accumulate(self, step: Step, raw: Array, total: Statistics | None = None) -> Statistics | None:
        """Add to `total` what `step`, the next one, has to know of these raw training rows; None when it needs nothing.

        Blocks bound the memory: see `accumulate_bytes`. A SecondMoments total is added to in place. Sums are held where raw
        is (covariance) or on the host (moments).
        """
        raw = self._require_raw(raw)
        if step.needs == "nothing":
            return None
        if total is None:
            moments = step.needs == "moments"
            total = Moments.empty(self._width) if moments else SecondMoments.empty(self._width, is_device_array(raw))
        size = total.rows_per_update(self._width)
        for start in range(0, raw.shape[0], size):
            block = raw[start : start + size]
            # The first step's statistics come from what its apply will read.
            x = block if not self.steps and self._ready(block, step) else self(block)
            total = total.update(step.per_row(x))
        return total

    def accumulate_bytes(self, step: Step, n: int) -> int:
        """Peak bytes of `accumulate` on n raw rows, the total included."""
        if step.needs == "nothing":
            return 0
        cls = Moments if step.needs == "moments" else SecondMoments
        rows = min(n, cls.rows_per_update(self._width))
        itemsize = np.dtype(self.dtype).itemsize
        per_row = rows * self._width * itemsize + step.workspace_bytes(rows, self.row_shape, itemsize)
        return self.workspace_bytes(rows, self.row_shape, itemsize) + per_row + cls.workspace_bytes(rows, self._width)

    def extend(self, step: Step, statistics: Statistics | None = None) -> FittedPreprocessor:
        """The chain followed by `step`, fitted from what `accumulate` gathered over all training rows."""
        state = step.fit(statistics, self.row_shape)
        return replace(self, steps=(*self.steps, step), states=(*self.states, state))

    def prepared(self, device: bool = False) -> FittedPreprocessor:
        """The same chain for many calls: states are rounded and moved once, not at each call. Not for storage."""
        pairs = zip(self.steps, self.states, strict=True)
        return replace(self, states=tuple(step.prepare(state, self.dtype, device) for step, state in pairs))

    def workspace_bytes(self, n: int, row_shape: tuple[int, ...], itemsize: int) -> int:
        """Peak bytes of a call on n rows beyond raw, the result included. itemsize: bytes of one value of dtype."""
        result = n * int(np.prod(row_shape)) * itemsize
        # Casts convert through ufunc buffers even without a step.
        return result + max([2**18, *(step.workspace_bytes(n, row_shape, itemsize) for step in self.steps)])

    def to_state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """What is stored: arrays with keys `<step>.<name>`, such as "0.mean", and attributes that JSON can hold."""
        arrays = {f"{i}.{name}": to_host(a) for i, state in enumerate(self.states) for name, a in state.items()}
        attributes = {
            "row_shape": list(self.row_shape),
            "dtype": self.dtype,
            "image_scale": self.image_scale,
            "steps": [registry.to_config(step) for step in self.steps],
        }
        return arrays, attributes

    @classmethod
    def from_state(cls, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> FittedPreprocessor:
        """The chain that `to_state` described."""
        steps = tuple(registry.from_config(config, KIND) for config in attributes["steps"])
        states: list[State] = [{} for _ in steps]
        for key, array in arrays.items():
            index, _, name = key.partition(".")
            states[int(index)][name] = np.asarray(array)
        return cls(tuple(attributes["row_shape"]), attributes["dtype"], attributes["image_scale"], steps, tuple(states))

    @property
    def _width(self) -> int:
        return int(np.prod(self.row_shape))

    def _require_raw(self, raw: Array) -> Array:
        raw = require_rows(as_array(raw))
        if raw.shape[1:] != self.row_shape:
            raise InputError(f"rows have shape {raw.shape[1:]}, but the preprocessing is for rows of {self.row_shape}.")
        if raw.dtype.kind not in "buif":
            raise DtypeError(f"rows have dtype {raw.dtype}; preprocessing takes real numbers, integers and bool.")
        if self.image_scale and raw.dtype != np.uint8:
            raise InputError(
                f"rows have dtype {raw.dtype}, but the preprocessing was made for uint8 images and divides by 255. "
                "Pass the images as uint8."
            )
        return raw

    def _sparse(self, raw: Any) -> Any:
        """Sparse rows, cast; InputError where a step would have to change their zeros."""
        if self.steps:
            raise InputError(
                f"sparse rows are not preprocessed by {self.steps[0]}. Use dense rows, or no preprocessing."
            )
        if raw.shape[1:] != self.row_shape:
            raise InputError(f"rows have shape {raw.shape[1:]}, but the preprocessing is for rows of {self.row_shape}.")
        return raw if raw.dtype == self.dtype else raw.astype(self.dtype)

    def _ready(self, raw: Array, first: Step | None) -> bool:
        """Whether `first` may read raw as it is: already of dtype, or centred in float64 before it is rounded."""
        if raw.dtype == self.dtype:
            # A copy in _cast costs no more than what flattening strided rows would copy.
            return bool(raw.flags.c_contiguous)
        return first is not None and first.needs == "moments" and not np.can_cast(raw.dtype, self.dtype)

    def _cast(self, raw: Array) -> Array:
        xp = namespace(raw)
        out = xp.empty(raw.shape, self.dtype)
        if self.image_scale:
            return xp.divide(raw, 255, out=out, casting="same_kind")
        out[...] = raw
        return out


def fit_in_memory(
    steps: Sequence[str | Mapping[str, Any] | Step], x: Array, dtype: str = "float32", image_scale: bool | None = None
) -> FittedPreprocessor:
    """Fit a chain of steps on all rows of an array in memory.

    Parameters
    ----------
    steps : sequence of str, table or Step
        As `parse_steps` takes them.
    x : array (n, *s), NumPy or CuPy, any real dtype
        Training rows.
    dtype : {"float32", "float64"}
        Dtype of the preprocessed rows.
    image_scale : bool, optional
        Whether uint8 rows are divided by 255; None: when x is uint8 with rows of two or more axes, as images are.

    Returns
    -------
    FittedPreprocessor
        The fitted chain, which is called on raw rows.

    >>> x = np.array([[1.0, 5.0], [3.0, 5.0]])
    >>> fit_in_memory(["standardize"], x)(x)
    array([[-1.,  0.],
           [ 1.,  0.]], dtype=float32)
    """
    x = require_rows(as_array(x))
    scale = x.dtype == np.uint8 and x.ndim > 2 if image_scale is None else image_scale
    fitted = FittedPreprocessor(x.shape[1:], dtype, scale)
    for step in parse_steps(steps):
        fitted = fitted.extend(step, fitted.accumulate(step, x))
    return fitted
