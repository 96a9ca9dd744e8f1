"""The only source of randomness: counter-based streams, one for each root seed, path and block of 256 columns.

A weight matrix is a function of its seed and path alone; the path names what is drawn: ("layer", 3, "weights"). Column j of
`normals(root, path, rows, columns)` comes from block j // 256, whose Philox4x64 counter starts at (0, 0, block, 0): any worker can
make any columns, in any order, on any tiling, and gets the same bits. Raw Philox output is stable across NumPy versions; NumPy's
distributions are not, so the conversions to floating point are ours (an inverse CDF on 53 bits). Draws are made on the host and
moved to the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from scipy.special import ndtri

COLUMN_BLOCK = 256
"""Columns per stream block; a constant of the format: changing it changes every result."""

Path = tuple[str | int, ...]


def _key(root: int, path: Path) -> np.ndarray:
    """The 128-bit Philox key of (root, path): BLAKE2b of their `repr`, in which different paths differ."""
    text = repr((int(root), *path)).encode()
    return np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), dtype=np.uint64)


def raw_bits(root: int, path: Path, count: int, block: int = 0) -> np.ndarray:
    """(count,) uint64, uniform: the first integers of a block of the stream (root, path)."""
    generator = np.random.Philox(key=_key(root, path), counter=np.array([0, 0, block, 0], dtype=np.uint64))
    return np.asarray(generator.random_raw(count))


def uniforms(root: int, path: Path, count: int, block: int = 0) -> np.ndarray:
    """(count,) float64 in the open interval (0, 1): (⌊bits/2¹¹⌋ + ½)·2⁻⁵³, never 0 or 1."""
    bits = raw_bits(root, path, count, block)
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def normals(root: int, path: Path, rows: int, columns: int, dtype: str = "float64", scale: float = 1.0) -> np.ndarray:
    """Independent normals of mean 0 and standard deviation `scale`.

    Parameters
    ----------
    root : int
        The seed.
    path : tuple of str and int
        What is drawn; another path gives an independent stream.
    rows : int
        Rows of the matrix. Another number of rows gives other numbers.
    columns : int
        Columns of the matrix. Column j does not depend on how many are asked for.
    dtype : str, optional
        "float32" or "float64"; float32 numbers are the float64 ones, rounded once.
    scale : float, optional
        The standard deviation.

    Returns
    -------
    array (rows, columns)
        C-contiguous, on the host. The inverse CDF is exact to rounding, and |z| <= 8.3.

    >>> a, b = normals(7, ("w",), 3, 300), normals(7, ("w",), 3, 600)
    >>> bool((a == b[:, :300]).all())
    True
    """
    out = np.empty((rows, columns), dtype=dtype)
    for start, block in _normal_blocks(root, path, rows, columns):
        out[:, start : start + len(block)] = (block * scale).T
    return out


def sphere(root: int, path: Path, rows: int, columns: int, dtype: str = "float64", scale: float = 1.0) -> np.ndarray:
    """Columns that are independent and uniform on a sphere: those of `normals`, normalised.

    Parameters
    ----------
    root : int
        The seed.
    path : tuple of str and int
        What is drawn; another path gives an independent stream.
    rows : int
        The dimension of the space.
    columns : int
        Number of points. Column j does not depend on how many are asked for.
    dtype : str, optional
        "float32" or "float64"; float32 numbers are the float64 ones, rounded once.
    scale : float, optional
        The radius of the sphere.

    Returns
    -------
    array (rows, columns)
        C-contiguous, on the host.
    """
    out = np.empty((rows, columns), dtype=dtype)
    for start, block in _normal_blocks(root, path, rows, columns):
        block *= (scale / np.sqrt(np.einsum("ij,ij->i", block, block)))[:, None]
        out[:, start : start + len(block)] = block.T
    return out


def _normal_blocks(root: int, path: Path, rows: int, columns: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first column, (width, rows) float64 standard normals) of each block, so that the float64 copy stays small."""
    for block, start in enumerate(range(0, columns, COLUMN_BLOCK)):
        width = min(COLUMN_BLOCK, columns - start)
        yield start, ndtri(uniforms(root, path, width * rows, block)).reshape(width, rows)


def signs(root: int, path: Path, count: int, dtype: str = "float64") -> np.ndarray:
    """(count,) independent ±1, each with probability ½."""
    words = raw_bits(root, path, -(-count // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")[:count]
    return (1 - 2 * bits.astype(np.int8)).astype(dtype)


def permutation(root: int, path: Path, count: int, block: int = 0) -> np.ndarray:
    """(count,) int64: a uniform permutation of 0 … count−1 (the order of `count` random 64-bit keys)."""
    return np.argsort(raw_bits(root, path, count, block), kind="stable")


def balanced_integers(root: int, path: Path, high: int, count: int) -> np.ndarray:
    """(count,) int64, each uniform on 0 … high−1; every value occurs ⌊count/high⌋ or ⌈count/high⌉ times.

    They are whole permutations, one after the other: the first `high` of them take each value once (sampling without
    replacement), and the first entries do not depend on `count`. Each entry has the law of an independent draw; the variance of
    a mean over them is never larger than that of independent ones.
    """
    blocks = -(-count // high)
    out = [permutation(root, path, high, block) for block in range(blocks)]
    return np.concatenate(out)[:count] if out else np.empty(0, np.int64)
