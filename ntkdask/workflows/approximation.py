"""How well a feature map approximates its kernel on a sample of rows of an array, a dask array or a dataset."""

from __future__ import annotations

from typing import Any

import numpy as np

from ntkdask import seeds
from ntkdask.arrays import is_dask
from ntkdask.datasets import Dataset
from ntkdask.errors import InputError
from ntkdask.features.base import FeatureMap, require_map
from ntkdask.features.quality import ApproximationError, map_error
from ntkdask.planning.tiles import Plan
from ntkdask.preprocessing import FittedPreprocessor
from ntkdask.workflows.sources import as_source, working_dtype


def approximation_error(
    map: FeatureMap, x: Any, *, lam: float | None = None, n_rows: int = 1000, seed: int = 0
) -> ApproximationError:
    """Errors of map(x)·map(x)ᵀ against the exact kernel `map.target`, on a sample of the rows.

    Parameters
    ----------
    map : FeatureMap
        Fitted, where it depends on data.
    x : array (n, *s), dask array, Dataset or its url
        NumPy or CuPy. All but float64 is cast to float32, uint8 images divided by 255, as `featurize` does.
    lam : float or None
        λ > 0 of eq. 13, on the unnormalised matrix. None: the mean of the kernel's diagonal.
    n_rows : int
        Rows that are compared at most. Of more, so many are sampled without replacement.
    seed : int
        Of the sample.

    Returns
    -------
    ApproximationError
        Relative Frobenius and spectral errors, and the constants of spectral approximation.

    Raises
    ------
    InputError
        For n_rows < 1, lam <= 0, no rows, and rows that the map or its kernel refuses.

    Notes
    -----
    This process holds n_rows·n_components and about 6·n_rows² numbers.

    References
    ----------
    Zandieh et al. 2021, eq. 13.

    Examples
    --------
    >>> from ntkdask.features import ArcCosineFeatures
    >>> error = approximation_error(ArcCosineFeatures(20_000), np.eye(4))
    >>> bool(error.frobenius < 0.05) and bool(error.smallest <= 1 <= error.largest)
    True
    """
    if isinstance(n_rows, bool) or not isinstance(n_rows, int) or n_rows < 1:
        raise InputError(f"n_rows is {n_rows!r}, expected an integer >= 1.")
    require_map(map, "approximation_error: map")
    source = as_source(x)
    rows = source.x if isinstance(source, Dataset) else source
    n = int(rows.shape[0])
    if n > n_rows:
        rows = rows[np.sort(seeds.permutation(seed, ("quality",), n)[:n_rows])]
    if is_dask(rows):
        rows = rows.compute()
    dtype = working_dtype(Plan(), rows)
    return map_error(map, FittedPreprocessor.for_rows(rows.shape[1:], rows.dtype, dtype)(rows), lam)
