"""Targets as they are stored: class labels as integers 0..C-1, numbers as float64.

Labels are encoded while they stream, before all classes have been seen: codes are provisional, in the order of appearance.
`LabelEncoder.finish` gives the sorted class names and the table from provisional codes to labels. The parts of a dataset share one
encoder, so that train and test agree. Called by the writer.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

from ntkdask.errors import InputError

MAX_GUESSED_CLASSES = 1000
EXACT = 2**53
"""From here on, a float64 stands for more than one integer."""


class LabelEncoder:
    """Maps labels (integers, strings or bool) to codes.

    Parameters
    ----------
    class_names : sequence of str, optional
        The classes in order; labels are checked against them. None: the labels that are seen, sorted.
    explicit : bool, optional
        Whether the caller asked for classification, with any number of classes. Otherwise more than 1000 distinct labels are
        refused: most likely they are numbers, or names of rows.
    """

    def __init__(self, class_names: Sequence[str] | None = None, *, explicit: bool = False) -> None:
        self.class_names = None if class_names is None else tuple(_composed(str(c)) for c in class_names)
        self._unlimited = explicit or class_names is not None
        self._codes: dict[int | str, int] = {}
        if self.class_names is not None and len(set(self.class_names)) < len(self.class_names):
            raise InputError(f"class_names {list(self.class_names)} name a class twice. Give every class its own name.")

    def encode(self, labels: np.ndarray, first_row: int = 0) -> np.ndarray:
        """The codes (n,) int64 of `labels` (n,), whose first row has the number `first_row` in messages.

        InputError for a label outside 0..C-1 or not among the class names, and for text beside integers.
        """
        if labels.dtype.kind == "b":
            labels = labels.astype(np.int64)
        elif labels.dtype.kind not in "iu":
            labels = _text(labels)
        distinct, inverse = np.unique(labels, return_inverse=True)
        values = distinct.tolist()
        if self.class_names is None:
            table = [self._provisional(v) for v in values]
        elif labels.dtype.kind in "iu":
            self._require_range(labels, first_row)
            table = values
        else:
            table = [self._named(v, labels, first_row) for v in values]
        return np.asarray(table, np.int64)[inverse.reshape(-1)]

    def finish(self) -> tuple[tuple[str, ...], np.ndarray]:
        """(class names in order, table); `table[code]` is the final label. Integers are sorted as numbers, text as text."""
        if self.class_names is not None:
            return self.class_names, np.arange(len(self.class_names))
        ordered = sorted(self._codes, key=lambda v: (isinstance(v, str), v))
        table = np.empty(len(ordered), np.int64)
        table[[self._codes[v] for v in ordered]] = np.arange(len(ordered))
        return tuple(str(v) for v in ordered), table

    def _provisional(self, value: int | str) -> int:
        """The code of a label where no class names were given: a new one for a new label."""
        value = value if isinstance(value, int) else _composed(value)
        if value not in self._codes:
            first = next(iter(self._codes), value)
            if isinstance(first, str) != isinstance(value, str):
                raise InputError(
                    f"targets mix text and integers ({first!r}, {value!r}). Make them all text or all integers."
                )
            if len(self._codes) == MAX_GUESSED_CLASSES and not self._unlimited:
                raise InputError(
                    f"targets hold more than {MAX_GUESSED_CLASSES} distinct labels. If they are numbers to predict, "
                    "pass kind='regression'; if they are that many classes, kind='classification'."
                )
            self._codes[value] = len(self._codes)
        return self._codes[value]

    def _named(self, value: str, labels: np.ndarray, first_row: int) -> int:
        """The place of a label among the class names; InputError where it is none of them."""
        names = self.class_names or ()
        if _composed(value) not in names:
            row = first_row + int(np.flatnonzero(labels == value)[0])
            raise InputError(f"row {row} has the label {value!r}, which is not among class_names {list(names)}.")
        return names.index(_composed(value))

    def _require_range(self, labels: np.ndarray, first_row: int) -> None:
        """InputError for an integer label outside 0..C-1."""
        classes = len(self.class_names or ())
        bad = np.flatnonzero((labels < 0) | (labels >= classes))
        if bad.size:
            raise InputError(
                f"row {first_row + int(bad[0])} has the label {int(labels[bad[0]])}, but {classes} classes have "
                f"labels 0 to {classes - 1}. The file may be damaged, or class_names too short."
            )


def _composed(name: str) -> str:
    """A name with its accents composed (NFC): a Mac writes é in two characters, others in one, and both are one class."""
    return unicodedata.normalize("NFC", name)


def _text(labels: np.ndarray) -> np.ndarray:
    """Labels as text; bytes are read as UTF-8."""
    if labels.dtype.kind != "S":
        # by way of objects: NumPy does not cast text of any length to text of one length
        return labels.astype(object).astype(str) if labels.dtype.kind == "T" else labels.astype(str)
    try:
        return np.char.decode(labels, "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"targets are bytes that are no UTF-8 text ({error}). Give text or integers.") from error


def kind_of(targets: np.ndarray | None) -> str:
    """The kind of a dataset with targets of this dtype: regression for floats, "unlabelled" for none, else classification."""
    if targets is None:
        return "unlabelled"
    return "regression" if targets.dtype.kind == "f" else "classification"


def convert_targets(targets: np.ndarray, kind: str, labels: LabelEncoder, first_row: int = 0) -> np.ndarray:
    """Targets (n,) or (n, k) as they are stored: float64 for regression, codes (n,) int64 for classification.

    Whole numbers in floats are labels. InputError for other dtypes or shapes; messages count rows from `first_row`.
    """
    if targets.dtype.kind not in "biufUS" and not all(isinstance(t, str) for t in targets.reshape(-1)):
        raise InputError(f"targets have dtype {targets.dtype}. Give integers, text or floats.")
    if targets.ndim not in (1, 2):
        raise InputError(f"targets have shape {targets.shape}; expected (n,) or (n, k). Reshape them.")
    if kind == "regression":
        if targets.dtype.kind not in "biuf":
            raise InputError("kind='regression', but targets are text. Give numbers, or kind='classification'.")
        return targets.astype(np.float64)
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    if targets.ndim != 1:
        raise InputError(
            f"targets have shape {targets.shape}, but classification takes one label per row. "
            "Give targets.argmax(axis=1) for one-hot rows, or kind='regression'."
        )
    if targets.dtype.kind == "f":
        bad = np.flatnonzero((targets != np.rint(targets)) | ~np.isfinite(targets))
        if bad.size:
            raise InputError(
                f"row {first_row + int(bad[0])} has the target {targets[bad[0]]}, which is no class label. "
                "Give integers or text, or kind='regression'."
            )
        large = np.flatnonzero(np.abs(targets) >= EXACT)
        if large.size:
            raise InputError(
                f"row {first_row + int(large[0])} has the label {targets[large[0]]}, a float that stands for more than one integer. "
                "Give the labels as integers or text, or kind='regression'."
            )
        targets = targets.astype(np.int64)
    return labels.encode(targets, first_row)
