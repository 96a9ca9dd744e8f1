"""Machine code from the compiler and from the disk: the same bits."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import numpy as np
from ntkdask import kernels
from ntkdask.networks import fully_connected

x = np.random.default_rng(0).standard_normal((40, 6)) / 2
for rows in (x, x.astype("float32")):
    for bias in (0.0, 0.1):
        print(kernels.NTK(fully_connected(2, bias_variance=bias))(rows).tobytes().hex())
"""


@pytest.mark.slow
def test_code_that_was_just_compiled_gives_the_bits_of_code_from_the_disk(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    runs = [
        subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert any(tmp_path.rglob("*.nbc"))
    assert runs[0].stdout
    assert runs[0].stdout == runs[1].stdout
