"""NetCDF files, version 3 and 4, read by xarray: packed values are unpacked, missing ones are NaN and refused; by blocks of rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import xarray

from ntkdask.datasets.containers.arrays import StoredArray, open_arrays
from ntkdask.datasets.source import Request, Source
from ntkdask.errors import DataError


def open_source(path: Path, request: Request) -> Source:
    """The rows of the NetCDF file at `path`."""
    return open_arrays(path, request, lambda: _opened(path))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[dict[str, StoredArray]]:
    """The variables of the file by their names, without the coordinates."""
    with open(path, "rb") as file:
        engine = "scipy" if file.read(3) == b"CDF" else "h5netcdf"
    try:
        dataset = xarray.open_dataset(path, engine=engine, decode_times=False, cache=False)
    except OSError:
        raise
    except Exception as error:  # a damaged header raises anything from ValueError to KeyError
        raise DataError(f"{path} is damaged, or no NetCDF file ({type(error).__name__}: {error}).") from error
    with dataset:
        yield {str(name): _array(variable) for name, variable in dataset.data_vars.items()}


def _array(variable: xarray.DataArray) -> StoredArray:
    """One variable."""
    chunks = variable.encoding.get("chunksizes")
    return StoredArray(
        shape=variable.shape,
        itemsize=variable.dtype.itemsize,
        chunk_rows=chunks[0] if chunks else 1,
        read=lambda start, stop: variable[start:stop].to_numpy(),
    )
