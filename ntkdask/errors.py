"""What can go wrong. Every message says what was asked, what was found and what to do.

`UserError` and its children are mistakes that the user can mend (exit code 2 in the command line); every other
`NtkdaskError` is a failure of the machine or of a run (exit code 1). Nothing here depends on anything else.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NtkdaskError(Exception):
    """Base of every error this package raises on purpose; exit code 1."""

    exit_code = 1


class UserError(NtkdaskError, ValueError):
    """A request that cannot be met as it stands; exit code 2."""

    exit_code = 2


class InputError(UserError):
    """Arrays or parameters that a function cannot take: shapes, NaN rows, alpha <= 0."""


class ArgumentError(InputError, TypeError):
    """A keyword argument that an estimator does not have; the message has the nearest one."""


class DtypeError(UserError, TypeError):
    """A dtype that numerics do not take: they accept float32 and float64."""


class DataError(UserError):
    """A data file that is missing, truncated, of another format or unsafe."""


class MissingDependencyError(UserError, ImportError):
    """An optional library that is not installed; the message has the command that installs it."""


class JobError(UserError):
    """A job file with unknown keys, wrong types or values that contradict each other."""


class MemoryBudgetError(UserError):
    """A plan whose tasks do not fit the memory of a worker; the message has the numbers and what would fit."""


class FingerprintError(UserError):
    """A store that holds results of other parameters; the message names the keys that differ."""


class StoreError(NtkdaskError):
    """A store that cannot be opened, read or written."""


class DiskSpaceError(StoreError):
    """Not enough free disk space for what the plan writes."""


class DamagedTileError(StoreError):
    """A committed tile whose bytes do not match their checksum, or that is gone."""


class TileError(NtkdaskError):
    """A tile whose task failed; the message names the tile, the cause is chained."""


class ClusterError(NtkdaskError):
    """A scheduler that does not answer, workers without this package or of another version."""


def nearest(word: str, candidates: Iterable[str]) -> str:
    """The end of a message about an unknown word: the candidate that resembles it, else the list of candidates.

    >>> nearest("alpha", ["alphas", "solver"])
    "; did you mean 'alphas'?"
    """
    names = sorted(candidates)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are: {', '.join(names)}" if names else ""
