"""Random vectors of signs and normals, drawn once per process, dtype and device. Called by the maps of pixels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ntkdask import seeds
from ntkdask.arrays import Array, is_device_array, to_device
from ntkdask.cache import shared


def random_signs(seed: int, path: seeds.Path, width: int, like: Array) -> Array:
    """Independent ±1, (width,), in like's dtype and on its device."""
    return _cached("signs", seed, path, width, like, lambda: seeds.signs(seed, path, width, like.dtype.name))


def random_normals(seed: int, path: seeds.Path, width: int, like: Array) -> Array:
    """Standard normals, (width,), in like's dtype and on its device."""
    return _cached("normals", seed, path, width, like, lambda: seeds.normals(seed, path, 1, width, like.dtype.name)[0])


def _cached(law: str, seed: int, path: seeds.Path, width: int, like: Array, draw: Callable[[], np.ndarray]) -> Array:
    device = is_device_array(like)
    key = ("vector", law, seed, path, width, like.dtype.char, device and like.device.id)
    return shared.get(key, lambda: to_device(draw(), device))
