"""Walks over row blocks, and what is done to one row at a time: the check for NaN, the normalisation.

Everything here reads each row without the others, so nothing is fitted. Sums run in float64 over blocks of about
`BLOCK_ELEMENTS` values: the temporaries stay small whatever the array, and fit a CPU's outer cache.
"""

from __future__ import annotations

from collections.abc import Iterator

from ntkdask.arrays import Array, flatten_rows, namespace, to_host
from ntkdask.errors import InputError

BLOCK_ELEMENTS = 2**19
"""Values of one block, at least one row: 4 MiB in float64."""

_NAMED_ROWS = 5


def row_blocks(n: int, d: int) -> Iterator[slice]:
    """Slices that cover 0..n once, each of about BLOCK_ELEMENTS / d rows; the last may be ragged.

    >>> [(rows.start, rows.stop) for rows in row_blocks(5, 2**18)]
    [(0, 2), (2, 4), (4, 5)]
    """
    size = max(1, BLOCK_ELEMENTS // max(1, d))
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def block_bytes(n: int, d: int) -> int:
    """Bytes of the largest float64 block of `row_blocks(n, d)`."""
    return 8 * d * min(n, max(1, BLOCK_ELEMENTS // max(1, d)))


def name_rows(rows: Array, first_row: int = 0) -> str:
    """`rows 3, 8, 11, 12, 20 and 4 more` from the indices (k,) of one block that starts at `first_row`."""
    named = ", ".join(str(first_row + int(row)) for row in to_host(rows[:_NAMED_ROWS]))
    more = f" and {rows.size - _NAMED_ROWS} more" if rows.size > _NAMED_ROWS else ""
    return f"{'row' if rows.size == 1 else 'rows'} {named}{more}"


def check_finite_rows(x: Array, first_row: int = 0, name: str = "x") -> None:
    """Raise InputError, naming the first rows, when x has a NaN or an infinity.

    Parameters
    ----------
    x : array (n, *s)
        Rows; integers and bool always pass.
    first_row : int
        The number of x's row 0 in the whole dataset.
    name : str
        What the message calls x.

    Raises
    ------
    InputError
        For rows that are not finite.
    """
    if x.dtype.kind != "f":
        return
    xp, flat = namespace(x), flatten_rows(x)
    finite = xp.ones(flat.shape[0], dtype=bool)
    for rows in row_blocks(flat.shape[0], flat.shape[1]):
        finite[rows] = xp.isfinite(flat[rows]).all(axis=1)
    wrong = xp.flatnonzero(~finite)
    if wrong.size:
        raise InputError(
            f"{name} has NaN or infinite values in {name_rows(wrong, first_row)}. Remove them or fill in the values."
        )


def flat_view(out: Array) -> Array:
    """`out`, (n, *s), as an (n, d) view to write through."""
    if not out.flags.c_contiguous:
        raise InputError(f"out, of shape {out.shape}, must be C-contiguous: results written to a copy would be lost.")
    return flatten_rows(out)


def normalize_rows(x: Array, *, center: bool, min_norm: float, out: Array | None = None) -> Array:
    """Each row divided by its Euclidean norm, after its own mean is subtracted when `center`.

    Computed in float64, block by block; squares of float64 values beyond 1e±154 leave its range.

    Parameters
    ----------
    x : array (n, *s), float32 or float64
        Rows.
    center : bool
        Whether each row's own mean is subtracted first.
    min_norm : float
        Rows of a norm up to this are divided by 1: zero rows (constant ones, when `center`) stay zero.
    out : array (n, *s), optional
        Receives the result; it may be x.

    Returns
    -------
    array (n, *s)
        Of x's dtype.
    """
    xp = namespace(x)
    out = xp.empty(x.shape, x.dtype) if out is None else out
    flat, flat_out = flatten_rows(x), flat_view(out)
    for rows in row_blocks(flat.shape[0], flat.shape[1]):
        block = flat[rows].astype("float64")
        if center:
            # The shift makes a constant row exactly zero; a mean alone leaves rounding, which the norm would blow up.
            block -= block[:, :1].copy()
            block -= block.mean(axis=1, keepdims=True)
        norms = xp.sqrt(xp.einsum("ij,ij->i", block, block))
        block /= xp.where(norms <= min_norm, 1.0, norms)[:, None]
        flat_out[rows] = block
    return out


def normalize_rows_bytes(n: int, d: int) -> int:
    """Peak bytes of `normalize_rows` beyond x and its result."""
    # Two blocks: on a GPU einsum may write its products before it sums them. 64 KiB: the ufuncs' buffers.
    rows = block_bytes(n, d) // max(1, 8 * d)
    return 2 * block_bytes(n, d) + 32 * rows + 2**16
