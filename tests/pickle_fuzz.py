"""Mutated pickles of CIFAR batches, read in a process of its own: `python pickle_fuzz.py SEED COUNT` (see test_inert_pickle).

Prints how many were read and how many were refused. Whatever else happens to the process is a failure: a crash, another error, memory.
"""

from __future__ import annotations

import pickle
import resource
import sys
from itertools import chain
from pathlib import Path

import numpy as np

from ntkdask.datasets import cifar_python
from ntkdask.errors import DataError

MEMORY_BYTES = 2**28
FORGED = b"".join(
    [
        b"\x80\x02}(U\x04data",
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R",
        # an object dtype whose flags are cleared: its pointers are then read from the file's bytes; flags restored: they are freed
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02O8K\x00K\x01\x87Rq\x01(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
        b"\x89U\x10AAAAAAAABBBBBBBBtb",
        b"U\x04moreh\x01(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tbu.",
    ]
)
LARGE_MEMO = b"\x80\x02}r\xff\xff\xff\x7f."
DEEP_KEY = b"\x80\x02})" + b"\x85" * 900_000 + b"Ns."
CRAFTED = (FORGED, LARGE_MEMO, DEEP_KEY, b"\x80\x02" + b"}" * 2**22 + b".")


def seeds() -> list[bytes]:
    """A batch of two images in every protocol, as Python 3 pickles it; its array in C and in Fortran order."""
    x, labels = np.arange(6144).astype(np.uint8).reshape(2, 3072), [3, 9]
    tables = [{b"data": rows, b"labels": labels, b"filenames": [b"a.png", "b"]} for rows in (x, np.asfortranarray(x))]
    return [FORGED, *(pickle.dumps(table, protocol=p) for table in tables for p in range(6))]


def mutate(content: bytes, draw: np.random.Generator, others: list[bytes]) -> bytes:
    """A copy with a few bytes changed, removed, inserted or taken from another pickle, mostly near its ends, where opcodes are."""
    out = bytearray(content)
    for _ in range(draw.integers(1, 5)):
        near = int(draw.integers(0, min(400, len(out)) + 1))
        at = near if draw.random() < 0.5 else len(out) - near
        kind = draw.integers(0, 5)
        if kind == 0 and at < len(out):
            out[at] = draw.integers(0, 256)
        elif kind == 1:
            del out[at : at + int(draw.integers(1, 40))]
        elif kind == 2:
            out[at:at] = draw.bytes(int(draw.integers(1, 9)))
        elif kind == 3:
            other = others[draw.integers(0, len(others))]
            start = int(draw.integers(0, len(other)))
            out[at:at] = other[start : start + int(draw.integers(1, 80))]
        else:
            out[at:at] = [b"\x85", b"R", b"b", b"s", b"t", b"r\xff\xff\xff\x7f", b"\x81", b"cnumpy\ndtype\n"][
                draw.integers(0, 8)
            ]
    return bytes(out)


def main(seed: int, count: int) -> None:
    """Read the crafted pickles and `count` mutants of a seed."""
    used = 4096 * int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    good, draw = seeds(), np.random.default_rng(seed)
    answers = {"read": 0, "refused": 0}
    for content in chain(CRAFTED, (mutate(good[i % len(good)], draw, good) for i in range(count))):
        try:
            data, labels = cifar_python._load("batch", content)
            assert data.dtype == np.uint8
            assert data.shape == (len(labels), 3072)
            answers["read"] += 1
        except DataError:
            answers["refused"] += 1
    print(*answers.values())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
