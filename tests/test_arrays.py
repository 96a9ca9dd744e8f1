"""Arrays: namespaces, DLPack, dtypes; importing the package loads neither CuPy nor torch."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

from ntkdask import arrays
from ntkdask.errors import DtypeError, InputError


class Exported:
    """An array of another library: DLPack and nothing else."""

    def __init__(self, x):
        self._x = x

    def __dlpack__(self, **keywords):
        return self._x.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self._x.__dlpack_device__()


def test_numpy_is_the_namespace_of_host_arrays():
    x = np.zeros((2, 3))
    assert arrays.namespace(x) is np
    assert not arrays.is_device_array(x)
    assert arrays.to_host(x) is x
    assert arrays.to_device(x, device=False) is x


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8"])
def test_other_arrays_come_through_dlpack_without_a_copy(dtype):
    x = np.arange(6, dtype=dtype).reshape(2, 3)
    got = arrays.as_array(Exported(x))
    assert type(got) is np.ndarray
    assert got.dtype == dtype
    assert np.shares_memory(got, x)
    np.testing.assert_array_equal(got, x)


def test_lists_become_arrays_and_arrays_stay():
    x = np.zeros(3)
    assert arrays.as_array(x) is x
    assert arrays.as_array([[1, 2]]).shape == (1, 2)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_floats_pass(dtype):
    x = np.zeros((2, 3), dtype)
    assert arrays.require_float(x) is x
    assert arrays.require_float(Exported(x)).dtype == dtype


@pytest.mark.parametrize("dtype", ["float16", "int32", "uint8", "bool", "complex64", "longdouble", "O"])
def test_other_dtypes_do_not(dtype):
    x = np.zeros((2, 3), dtype)
    with pytest.raises(DtypeError, match=r"images has dtype .*images\.astype\('float32'\)") as caught:
        arrays.require_float(x, "images")
    assert isinstance(caught.value, TypeError)


def test_rows_and_their_flattening():
    x = np.zeros((2, 3, 4))
    flat = arrays.flatten_rows(x)
    assert flat.shape == (2, 12)
    assert flat.base is x
    assert arrays.flatten_rows(flat) is flat
    assert arrays.flatten_rows(x[:0]).shape == (0, 12)
    for bad in (np.zeros(3), np.zeros(())):
        with pytest.raises(InputError, match="one example per row"):
            arrays.flatten_rows(bad)


def test_host_cores_is_what_this_process_may_use():
    assert 1 <= arrays.host_cores() <= (os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        assert arrays.host_cores() <= len(os.sched_getaffinity(0))


def test_gpu_status_says_why_not(monkeypatch):
    usable, reason = arrays.gpu_status()
    assert usable == arrays.gpu_usable()
    assert reason
    assert (arrays.device_memory_bytes() > 0) == usable
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert arrays.gpu_status() == (False, "CuPy is not installed: pip install 'ntkdask[cuda13]' (or cuda12)")
    assert arrays.device_memory_bytes() == 0


@pytest.mark.parametrize(
    "code",
    [
        "import ntkdask",
        "import ntkdask as nd, numpy as np; nd.kernels.NTK(nd.fully_connected(1))(np.eye(3))",
        "import ntkdask as nd, numpy as np; nd.features.NTKRandomFeatures(nd.fully_connected(1), 8)(np.eye(3))",
    ],
)
def test_numerics_on_the_host_load_neither_cupy_nor_torch_nor_zarr(code):
    check = "; import sys; print([m for m in ('cupy', 'cupy_backends', 'torch', 'zarr', 'distributed') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code + check], capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_tensors_of_torch_are_read():
    """Those with gradients give their values, bfloat16 its own as float32; plain ones share their memory."""
    torch = pytest.importorskip("torch")
    values = np.array([[1.0, -2.5], [0.1, 3.0]], np.float32)
    plain = torch.tensor(values)
    assert np.shares_memory(arrays.as_array(plain), plain.numpy())
    with_gradient = torch.tensor(values, requires_grad=True)
    np.testing.assert_array_equal(arrays.as_array(with_gradient), values)
    assert with_gradient.requires_grad
    found = arrays.as_array(plain.to(torch.bfloat16))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, values, rtol=2**-8)


def test_tensors_without_plain_numbers_are_named():
    torch = pytest.importorskip("torch")
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(InputError, match=r"rows is a sparse tensor.*rows\.to_dense\(\)"):
        arrays.as_array(sparse, "rows")
    np.testing.assert_array_equal(arrays.as_array(sparse.to_dense(), "rows"), np.eye(3))  # the advice, followed
    with pytest.raises(InputError, match=r"rows is a Tensor of dtype torch\.float32"):
        arrays.as_array(torch.empty(2, device="meta"), "rows")
