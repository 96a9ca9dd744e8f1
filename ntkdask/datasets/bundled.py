"""The small datasets that ship with scikit-learn: `sklearn:digits`, iris, wine, breast_cancer, diabetes. No downloads.

Digits are rows of 64 grey values 0 to 16, in float32: preprocessing would take uint8 for images and divide them by 255.
"""

from __future__ import annotations

import hashlib

import numpy as np
import sklearn
import sklearn.datasets

from ntkdask.datasets.source import ALL, Batch, Request, Source
from ntkdask.errors import DataError, nearest

PREFIX = "sklearn:"
_LOADERS = {
    "digits": sklearn.datasets.load_digits,
    "iris": sklearn.datasets.load_iris,
    "wine": sklearn.datasets.load_wine,
    "breast_cancer": sklearn.datasets.load_breast_cancer,
    "diabetes": sklearn.datasets.load_diabetes,
}


def open_source(name: str, request: Request) -> Source:
    """The dataset called `sklearn:<name>`; DataError where there is none, which names the nearest."""
    short = name.removeprefix(PREFIX)
    if short not in _LOADERS:
        raise DataError(f"scikit-learn ships no {short!r}{nearest(short, _LOADERS)}")
    bunch = _LOADERS[short]()
    x = np.ascontiguousarray(bunch.data, np.float32 if short == "digits" else np.float64)
    names = None if short == "diabetes" else tuple(str(c) for c in bunch.target_names)
    targets = bunch.target.astype(np.float64 if names is None else np.int64)
    return Source(
        iter([Batch(ALL, x, targets)]),
        hashlib.sha256(x.tobytes() + targets.tobytes()).hexdigest(),
        kind="regression" if names is None else "classification",
        class_names=names,
        total=len(x),
        notes={"sklearn": sklearn.__version__},
    )
