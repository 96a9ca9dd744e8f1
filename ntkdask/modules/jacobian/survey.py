"""What a dry run tells about a module, kept with the module for later calls, and what happens when rows behave otherwise.

A survey says which parameters are captured layer by layer and with what shapes, which go through `fallback`, and the bytes of a pass.
It is taken once (`dry_run`) for a module and a shape of rows. Rows that take another path through the module than those of the survey
raise PathError; the layers concerned are then excluded from capture, and the call is made again (`with_retries`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from ntkdask.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Site:
    """One use of one layer that adds to the gradient of a parameter.

    Parameters
    ----------
    layer : str
        Dotted name of the layer.
    parameter_name : str
        Name of the parameter in that layer: "weight" or "bias".
    call : int
        Number of the use among the calls of this layer, from 0.
    a_shape : tuple of int
        Shape of the input of a row.
    g_shape : tuple of int
        Shape of the output gradient of a row, for one cotangent.
    a_bytes : int
        Bytes of the input of a row.
    """

    layer: str
    parameter_name: str
    call: int
    a_shape: tuple[int, ...]
    g_shape: tuple[int, ...]
    a_bytes: int


@dataclass(frozen=True)
class Survey:
    """What a dry run tells about a module.

    Parameters
    ----------
    outputs : int
        O, the number of logits.
    columns : mapping of str to int
        {parameter: its number of scalars} of all parameters that are asked for.
    sites : mapping of str to tuple of Site
        {parameter: its uses} of the captured ones; no uses where the outputs do not depend on it.
    sweep_bytes : int
        Most bytes that one row takes in a forward and a backward pass.
    gradient_bytes : int
        Bytes of a row's output gradients of all layers, for one cotangent.
    calls : mapping of str to int, optional
        {layer that was watched: its calls in a forward pass}.
    """

    outputs: int
    columns: Mapping[str, int]
    sites: Mapping[str, tuple[Site, ...]]
    sweep_bytes: int
    gradient_bytes: int
    calls: Mapping[str, int] = field(default_factory=dict)

    @property
    def fallback(self) -> tuple[str, ...]:
        """The parameters that are not captured."""
        return tuple(name for name in self.columns if name not in self.sites)


class PathError(InputError):
    """Rows took another path through a module than the rows of its survey; `layers` were called otherwise."""

    def __init__(self, message: str, module: nn.Module, layers: Collection[str]) -> None:
        super().__init__(message)
        self.module, self.layers = module, frozenset(layers)


_surveys: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Survey]] = weakref.WeakKeyDictionary()
_excluded: weakref.WeakKeyDictionary[nn.Module, frozenset[str]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def survey_of(module: nn.Module, key: Hashable, make: Callable[[frozenset[str]], tuple[Survey, bool]]) -> Survey:
    """The survey that is kept for a module, else a new one; forgotten with the module, and when its layers change.

    Parameters
    ----------
    module : torch.nn.Module
        The user's module.
    key : hashable
        What else a survey depends on: the shape of rows, dtype, device.
    make : callable
        make(names of excluded layers) gives (a survey, whether it may be kept).
    """
    flags = tuple((name, type(part).__qualname__, part.training) for name, part in module.named_modules())
    frozen = tuple((name, tuple(p.shape), p.requires_grad) for name, p in module.named_parameters())
    key = (key, flags, frozen)
    with _lock:
        survey, excluded = _surveys.get(module, {}).get(key), _excluded.get(module, frozenset())
    if survey is None:
        survey, is_kept = make(excluded)
        if is_kept:
            with _lock:
                _surveys.setdefault(module, {})[key] = survey
    return survey


def exclude_layers(error: PathError, before: frozenset[str] = frozenset()) -> frozenset[str]:
    """Exclude the layers of a PathError from capture, from now on and for all callers; their parameters go to the fallback.

    `before` are the layers that this call has excluded already; returned are all of them now. InputError where the error names none
    beyond these. That other threads have excluded the same layers is no error.
    """
    if error.layers <= before:
        raise InputError(str(error)) from error
    with _lock:
        _excluded[error.module] = _excluded.get(error.module, frozenset()) | error.layers
        _surveys.pop(error.module, None)
    return before | error.layers


def with_retries(attempt: Callable[[], T]) -> T:
    """attempt(), and again with more layers excluded for as long as it raises PathError."""
    excluded: frozenset[str] = frozenset()
    while True:
        try:
            return attempt()
        except PathError as error:
            excluded = exclude_layers(error, excluded)
