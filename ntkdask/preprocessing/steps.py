"""The preprocessing steps: what each has to know of the training rows, and what it does to any row.

A step is a frozen description; what it learned is its state, a dictionary of arrays that the job stores with the model.
A step never sees a dataset: the caller sums `per_row(x)` over training rows and hands the sums to `fit`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import numpy as np

from ntkdask import registry
from ntkdask.arrays import Array, flatten_rows, is_device_array, namespace, require_float, to_device, to_host
from ntkdask.errors import InputError, JobError, nearest
from ntkdask.preprocessing.rows import flat_view, normalize_rows, normalize_rows_bytes
from ntkdask.preprocessing.statistics import Moments, SecondMoments

KIND = "preprocessing step"

State: TypeAlias = dict[str, Array]
"""What a step learnt: arrays by name, float64 unless the step says otherwise."""

Statistics: TypeAlias = Moments | SecondMoments
Needs: TypeAlias = Literal["nothing", "moments", "covariance"]

# Elementwise ufuncs that mix float32 and float64 convert through buffers of 8192 items per operand.
_UFUNC_BYTES = 2**18


class Step(Protocol):
    """A preprocessing step; a registered frozen dataclass."""

    needs: ClassVar[Needs]

    def per_row(self, x: Array) -> Array:
        """The part that needs one row at a time, before statistics are taken; x itself when there is none."""
        ...

    def fit(self, statistics: Statistics | None, row_shape: tuple[int, ...]) -> State:
        """The state, from statistics of `per_row` of the training rows, whose shape is row_shape."""
        ...

    def apply(self, x: Array, state: State, out: Array | None = None) -> Array:
        """The step's result for rows x, (n, *row_shape), in x's dtype; or written to `out`, which may be x."""
        ...

    def prepare(self, state: State, dtype: str, device: bool) -> State:
        """The state as `apply` would convert it at every call: on the GPU when `device`, matrices rounded to dtype."""
        ...

    def workspace_bytes(self, n: int, row_shape: tuple[int, ...], itemsize: int) -> int:
        """Peak bytes of `apply` beyond x and its result."""
        ...


@dataclass(frozen=True)
class _MomentStep:
    per: Literal["feature", "channel"] = "feature"

    needs: ClassVar[Needs] = "moments"

    def __post_init__(self) -> None:
        if self.per not in ("feature", "channel"):
            advice = nearest(str(self.per), ("feature", "channel"))
            raise InputError(f"{type(self).__name__}(per={self.per!r}) is neither 'feature' nor 'channel'{advice}")

    def per_row(self, x: Array) -> Array:
        return x

    def prepare(self, state: State, dtype: str, device: bool) -> State:
        """The state on the GPU when `device`; it stays float64, which `apply` computes in."""
        return _moved(state, device)

    def _moments(self, statistics: Statistics | None, row_shape: tuple[int, ...]) -> tuple[Moments, tuple[int, ...]]:
        if not isinstance(statistics, Moments) or statistics.n == 0:
            raise _wrong_statistics(self, "Moments", statistics)
        if self.per == "channel":
            return statistics.over_channels(row_shape[-1]), (row_shape[-1],)
        return statistics, row_shape

    def workspace_bytes(self, n: int, row_shape: tuple[int, ...], itemsize: int) -> int:
        """Peak bytes of `apply` beyond x and its result: the state on the device, buffers of the conversions."""
        return 2 * 8 * int(np.prod(row_shape)) + _UFUNC_BYTES


@registry.register(KIND)
@dataclass(frozen=True)
class Center(_MomentStep):
    """x − mean, with the training rows' mean of each feature, or of each channel (the last axis; images are NHWC).

    State: `mean`, float64, row_shape or (channels,). The difference is taken in float64 and rounded once.

    Parameters
    ----------
    per : {"feature", "channel"}
        Whether a mean is of one feature over the rows, or of one channel over rows and all axes but the last.
    """

    def fit(self, statistics: Statistics | None, row_shape: tuple[int, ...]) -> State:
        """`mean` from Moments."""
        moments, shape = self._moments(statistics, row_shape)
        return {"mean": moments.mean.reshape(shape)}

    def apply(self, x: Array, state: State, out: Array | None = None) -> Array:
        """x − mean."""
        return _subtract(x, state["mean"], out)


@registry.register(KIND)
@dataclass(frozen=True)
class Standardize(_MomentStep):
    """(x − mean) / std, with the training rows' mean and population std (ddof = 0) of each feature or channel.

    State: `mean` and `scale`, float64, row_shape or (channels,); `constant`, int64 scalar: how many of them did not
    vary over the training rows. Those have std 0 and are divided by 1: training rows become exactly 0 there.

    Parameters
    ----------
    per : {"feature", "channel"}
        Whether statistics are of one feature over the rows, or of one channel over rows and all axes but the last.
    """

    def fit(self, statistics: Statistics | None, row_shape: tuple[int, ...]) -> State:
        """`mean`, `scale` and `constant` from Moments."""
        moments, shape = self._moments(statistics, row_shape)
        std = np.sqrt(moments.m2 / moments.n)
        scale = np.where(std == 0, 1.0, std)
        return {
            "mean": moments.mean.reshape(shape),
            "scale": scale.reshape(shape),
            "constant": np.array(np.count_nonzero(std == 0), dtype=np.int64),
        }

    def apply(self, x: Array, state: State, out: Array | None = None) -> Array:
        """(x − mean) / scale."""
        out = _subtract(x, state["mean"], out)
        return namespace(out).divide(out, _beside(out, state["scale"]), out=out, casting="same_kind")


@registry.register(KIND)
@dataclass(frozen=True)
class UnitNorm:
    """x / ‖x‖₂, the Euclidean norm over all of a row; a zero row stays zero. No state."""

    needs: ClassVar[Needs] = "nothing"

    def per_row(self, x: Array) -> Array:
        """x itself."""
        return x

    def fit(self, statistics: Statistics | None, row_shape: tuple[int, ...]) -> State:
        """Nothing to learn."""
        return {}

    def apply(self, x: Array, state: State, out: Array | None = None) -> Array:
        """x / ‖x‖₂."""
        return normalize_rows(require_float(x), center=False, min_norm=0.0, out=out)

    def prepare(self, state: State, dtype: str, device: bool) -> State:
        """Nothing to prepare."""
        return state

    def workspace_bytes(self, n: int, row_shape: tuple[int, ...], itemsize: int) -> int:
        """Peak bytes of `apply` beyond x and its result."""
        return normalize_rows_bytes(n, int(np.prod(row_shape)))


_ZCA_REGULARIZATION = {"han": 0.1, "shankar": 1e-4}


@registry.register(KIND)
@dataclass(frozen=True)
class ZCA:
    """Regularised ZCA whitening of flattened rows: r(x) W with W = V (E + ε)^(−1/2) Vᵀ.

    r(x): the row minus its own mean, divided by its norm (norms up to 1e-8 count as 1). C = Σ r rᵀ / n = V E Vᵀ over
    the training rows, not centred by the features' means. The transformed training rows have C' = V E/(E + ε) Vᵀ.
    State: `whitening` W, (d, d) float64; `epsilon` ε, float64 scalar.

    Parameters
    ----------
    regularization : float, optional
        Positive; None: the default of the variant.
    variant : {"han", "shankar"}
        "shankar": ε = regularization, default 1e-4. "han": ε = regularization · tr(C) / d, default 0.1; tr(C) = 1 when no row
        is constant.

    Raises
    ------
    InputError
        For another variant, and a regularization that is not positive.

    Notes
    -----
    With n < d ZCA leaves d − n directions unscaled, in which no training row has a component; test rows are
    multiplied by ε^(−1/2) there. Differences of "han" from the script below: that standardises channels before r where it
    applies W, yet fits W on raw images; ["standardize_channels", "zca"] standardises in both places.

    References
    ----------
    To the best of our knowledge: "shankar" is Shankar et al. 2020, `preprocess` in utils.py of
    modestyachts/neural_kernels_code; its default and its CIFAR-100 path use ε = 1e-4, its config.py has 1e-5. "han" is Han et
    al. 2022, who cite Shankar et al. and Nguyen et al. 2021 without a formula; `get_preprocess_op` in a public CIFAR-10 script
    of that method has zca_reg=0.1, relative.
    """

    regularization: float | None = None
    variant: Literal["han", "shankar"] = "han"

    needs: ClassVar[Needs] = "covariance"

    def __post_init__(self) -> None:
        if self.variant not in _ZCA_REGULARIZATION:
            raise InputError(f"unknown ZCA variant {self.variant!r}{nearest(str(self.variant), _ZCA_REGULARIZATION)}")
        value = self.regularization
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value < np.inf):
            default = _ZCA_REGULARIZATION[self.variant]
            raise InputError(
                f"ZCA(regularization={value!r}) must be a positive number: covariances of images are nearly singular. "
                f"Leave it out for {default}, the default of variant {self.variant!r}."
            )

    def per_row(self, x: Array) -> Array:
        """r(x), (n, *s)."""
        return normalize_rows(require_float(x), center=True, min_norm=1e-8)

    def fit(self, statistics: Statistics | None, row_shape: tuple[int, ...]) -> State:
        """`whitening` and `epsilon` from SecondMoments; eigh runs on the device of xtx, in up to about 48 d² bytes."""
        if not isinstance(statistics, SecondMoments) or statistics.n == 0:
            raise _wrong_statistics(self, "SecondMoments", statistics)
        xp = namespace(statistics.xtx)
        covariance = statistics.xtx / statistics.n
        epsilon = self._epsilon(float(xp.trace(covariance)), covariance.shape[0])
        eigenvalues, vectors = xp.linalg.eigh(covariance)
        # Rounding may leave eigenvalues of a singular C at -1e-17; fourth roots on both sides make W exactly symmetric.
        vectors *= (xp.maximum(eigenvalues, 0.0) + epsilon) ** -0.25
        return {"whitening": to_host(vectors @ vectors.T), "epsilon": np.array(epsilon)}

    def _epsilon(self, trace: float, d: int) -> float:
        if trace == 0.0:
            raise InputError("ZCA found every training row constant: nothing is left to whiten. Leave the step out.")
        value = _ZCA_REGULARIZATION[self.variant] if self.regularization is None else self.regularization
        return value * trace / d if self.variant == "han" else float(value)

    def apply(self, x: Array, state: State, out: Array | None = None) -> Array:
        """r(x) W, the product in x's dtype."""
        rows = flatten_rows(self.per_row(x))
        whitening = to_device(state["whitening"].astype(rows.dtype, copy=False), is_device_array(rows))
        out = namespace(rows).empty(x.shape, rows.dtype) if out is None else out
        namespace(rows).matmul(rows, whitening, out=flat_view(out))
        return out

    def prepare(self, state: State, dtype: str, device: bool) -> State:
        """W rounded to dtype, in which `apply` multiplies, and on the GPU when `device`."""
        return _moved({**state, "whitening": state["whitening"].astype(dtype, copy=False)}, device)

    def workspace_bytes(self, n: int, row_shape: tuple[int, ...], itemsize: int) -> int:
        """Peak bytes of `apply` beyond x and its result: the normalised rows and W in x's dtype."""
        d = int(np.prod(row_shape))
        return n * d * itemsize + max(normalize_rows_bytes(n, d), d * d * itemsize + 2**16)


def _wrong_statistics(step: object, expected: str, statistics: Statistics | None) -> InputError:
    given = "none" if statistics is None else f"{type(statistics).__name__} of {statistics.n} rows"
    return InputError(
        f"{type(step).__name__} is fitted from the {expected} of at least one training row, found {given}"
    )


def _beside(x: Array, state: Array) -> Array:
    return to_device(state, is_device_array(x))


def _moved(state: State, device: bool) -> State:
    return {name: to_device(array, device and array.ndim > 0) for name, array in state.items()}


def _subtract(x: Array, mean: Array, out: Array | None) -> Array:
    xp = namespace(x)
    out = xp.empty(require_float(x).shape, x.dtype) if out is None else out
    # mean is float64, so the ufunc computes in float64 and rounds into out: data of mean 1e6 keep their digits.
    return xp.subtract(x, _beside(x, mean), out=out, casting="same_kind")


_NAMED: dict[str, Step] = {
    "center": Center(),
    "center_channels": Center(per="channel"),
    "standardize": Standardize(),
    "standardize_channels": Standardize(per="channel"),
    "unit_norm": UnitNorm(),
    "zca": ZCA(),
    "zca_shankar": ZCA(variant="shankar"),
}


def parse_steps(names: Sequence[str | Mapping[str, Any] | Step]) -> tuple[Step, ...]:
    """The steps of a job file's `preprocess` list.

    Parameters
    ----------
    names : sequence of str, table or Step
        Names, tables of a class and its arguments, and steps, which pass through. Names: center, center_channels, standardize,
        standardize_channels, unit_norm, zca, zca_shankar.

    Returns
    -------
    tuple of Step
        The steps.

    Raises
    ------
    JobError
        For an unknown name, type or key, with the nearest known one.
    InputError
        For a value that a step refuses.

    >>> parse_steps(["standardize", {"type": "ZCA", "regularization": 0.5}])
    (Standardize(per='feature'), ZCA(regularization=0.5, variant='han'))
    """
    if isinstance(names, (str, Mapping)) or not isinstance(names, Sequence):
        raise JobError(f'preprocess must be a list such as ["standardize"], found {names!r}')
    return tuple(_parse_step(name) for name in names)


def _parse_step(name: Any) -> Step:
    if isinstance(name, Mapping):
        return registry.from_config(name, KIND)
    if isinstance(name, str):
        if name not in _NAMED:
            raise JobError(f"unknown {KIND} {name!r}{nearest(name, _NAMED)}")
        return _NAMED[name]
    if dataclasses.is_dataclass(name) and type(name).__name__ in registry.names(KIND):
        return name  # type: ignore[return-value]
    raise JobError(f"a {KIND} is a name or a table with a `type` key, found {name!r}")
