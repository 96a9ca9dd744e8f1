"""Pickles of CIFAR batches from strangers: what is read in every protocol, and that no mutant harms the process."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from import_examples import cifar_python, python2_pickle, refused, write_folder

from ntkdask.datasets.cifar_python import _load

FUZZ = Path(__file__).parents[1] / "pickle_fuzz.py"
X = np.random.default_rng(0).integers(0, 256, (3, 3072)).astype(np.uint8)
LABELS = [4, 0, 9]


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("key", [b"data", "data"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol(protocol: int, key: bytes | str, order: str) -> None:
    """Also with keys of text: what `pickle.load(..., encoding="latin1")` gives and another program wrote anew."""
    table = {key: np.asarray(X, order=order), key[:0] + (b"labels" if key == b"data" else "labels"): LABELS}
    data, labels = _load("batch", pickle.dumps(table | {"names": ["é", None, True, 2**70]}, protocol=protocol))
    np.testing.assert_array_equal(data, X)
    assert labels.tolist() == LABELS


@pytest.mark.parametrize("protocol", [0, 2])
def test_python2(protocol: int) -> None:
    """Byte strings: quoted with escapes at protocol 0, as Python 2 wrote them, with their length at protocol 2."""
    content = python2_pickle(X, LABELS)
    if protocol == 0:
        quoted = "".join(f"\\x{byte:02x}" for byte in X.tobytes()).encode()
        array = b"cnumpy.core.multiarray\n_reconstruct\np1\n(cnumpy\nndarray\np2\n(I0\ntp3\nS'b'\np4\ntp5\nRp6\n"
        dtype = b"cnumpy\ndtype\np7\n(S'u1'\nI0\nI1\ntRp8\n(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"
        array += b"(I1\n(I3\nL3072L\nt" + dtype + b"I00\nS'" + quoted + b"'\ntb"
        content = b"(dp0\nS'data'\n" + array + b"sS'labels'\n(lp9\nI4\naI0\naI9\nas."
    data, labels = _load("batch", content)
    np.testing.assert_array_equal(data, X)
    assert labels.tolist() == LABELS


@pytest.mark.parametrize("shape", [(3, 3073), (3,), (-3, -3072), ("3", 3072), (True, 9216), 9216, (2**62, 2**62)])
def test_shapes_that_disagree_with_the_bytes(tmp_path: Path, shape: object) -> None:
    class Claimed:
        def __reduce__(self) -> tuple:
            function, arguments, state = X.__reduce__()
            return function, arguments, (state[0], shape, *state[2:])

    content = pickle.dumps({b"data": Claimed(), b"labels": LABELS}, protocol=2)
    refused(
        write_folder(tmp_path / "c", cifar_python() | {"data_batch_2": content}), tmp_path / "d", "data_batch_2 has no"
    )


def fuzz(seed: int, count: int) -> tuple[int, int]:
    """(how many were read, how many were refused); the process ends by itself, without a word on its error stream."""
    command = [sys.executable, str(FUZZ), str(seed), str(count)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    read, refusals = found.stdout.split()
    return int(read), int(refusals)


def test_hostile_pickles() -> None:
    """Forged pointers in an object dtype, a memo index of 2³¹, a key of tuples in tuples, millions of empty dicts; some mutants."""
    read, refusals = fuzz(1, 1500)
    assert read > 20
    assert refusals > 500


@pytest.mark.slow
@pytest.mark.parametrize("seed", [10, 11])
def test_many_mutants(seed: int) -> None:
    assert sum(fuzz(seed, 50_000)) > 50_000
