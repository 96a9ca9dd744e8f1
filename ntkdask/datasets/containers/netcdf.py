"""NetCDF files, version 3 and 4, read by xarray: packed values are unpacked, missing ones are NaN and refused; by blocks of rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xarray

from ntkdask.datasets.containers.arrays import StoredArray, open_arrays
from ntkdask.datasets.source import Request, Source
from ntkdask.datasets.targets import EXACT
from ntkdask.errors import DataError


def open_source(path: Path, request: Request) -> Source:
    """The rows of the NetCDF file at `path`."""
    return open_arrays(path, request, lambda: _opened(path))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[dict[str, StoredArray]]:
    """The variables of the file by their names, without those that number an axis."""
    with open(path, "rb") as file:
        engine = "scipy" if file.read(3) == b"CDF" else "h5netcdf"
    try:
        dataset = xarray.open_dataset(path, engine=engine, decode_times=False, cache=False)
    except OSError:
        raise
    except Exception as error:  # a damaged header raises anything from ValueError to KeyError
        raise DataError(f"{path} is damaged, or no NetCDF file ({type(error).__name__}: {error}).") from error
    with dataset:
        yield {str(n): _array(path, v) for n, v in dataset.variables.items() if n not in dataset.sizes}


def _array(path: Path, variable: xarray.Variable) -> StoredArray:
    """One variable."""
    chunks = variable.encoding.get("chunksizes")
    return StoredArray(
        shape=variable.shape,
        itemsize=variable.dtype.itemsize,
        chunk_rows=chunks[0] if chunks else 1,
        read=lambda start, stop: _as_stored(path, variable, variable[start:stop].to_numpy()),
    )


def _as_stored(path: Path, variable: xarray.Variable, values: np.ndarray) -> np.ndarray:
    """Values as integers again where the file holds integers: xarray makes floats of them where some might be missing."""
    stored = np.dtype(variable.encoding.get("dtype", values.dtype))
    packed = any(key in variable.encoding for key in ("scale_factor", "add_offset"))
    if packed or stored.kind not in "iu" or values.dtype.kind != "f" or np.isnan(values).any():
        return values
    if values.size and np.abs(values).max() >= EXACT:
        raise DataError(
            f"{path} has integers of more than 53 bits with a _FillValue, which lose digits. Write them without one."
        )
    return values.astype(stored)
