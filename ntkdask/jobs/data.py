"""Open the datasets that the [data] of a job names, and check them against each other."""

from __future__ import annotations

from typing import Any

from ntkdask.datasets import Dataset, open_parts
from ntkdask.datasets.dataset import require_labels
from ntkdask.errors import InputError, JobError


def open_job_data(url: str | None, train: str | None, test: str | None, split: Any) -> tuple[Dataset, Dataset | None]:
    """Open the datasets of a job.

    Parameters
    ----------
    url : str or None
        A dataset with parts train and test, or one without parts that is split. None: `train` and `test` are given.
    train, test : str or None
        Urls of datasets without parts.
    split : object or None
        How `url` is split. None: it has parts.

    Returns
    -------
    (Dataset, Dataset or None)
        Training and test rows; one dataset, of all rows, and None where it is split.

    Raises
    ------
    JobError
        For parts that are missing, or that are there where one dataset is needed.
    InputError
        For datasets that disagree in row shape, kind, classes or targets, or that have no targets.
    """
    if url is not None:
        parts = open_parts(url)
        if split is not None:
            if "all" not in parts:
                raise JobError(
                    f"{url} has parts {', '.join(parts)} and the job has a split: use one of them as url, or remove the split."
                )
            return require_labels(parts["all"]), None
        if not {"train", "test"} <= set(parts):
            raise JobError(
                f"{url} has no train and test parts: add split = {{ test = 0.2 }} or {{ folds = 5 }} to [data]."
            )
        return _compatible(parts["train"], parts["test"])
    return _compatible(_only(train), _only(test))


def _only(url: str | None) -> Dataset:
    parts = open_parts(str(url))
    if "all" not in parts:
        raise JobError(f"{url} has parts {', '.join(parts)}: name one of them, as in {url}/train.")
    return parts["all"]


def _compatible(train: Dataset, test: Dataset) -> tuple[Dataset, Dataset]:
    for name in ("row_shape", "kind", "class_names", "target_shape"):
        a, b = getattr(train, name), getattr(test, name)
        if a != b:
            raise InputError(
                f"train and test disagree: {name} is {a} in {train.url} and {b} in {test.url}. Import both the same way."
            )
    return require_labels(train), require_labels(test)
