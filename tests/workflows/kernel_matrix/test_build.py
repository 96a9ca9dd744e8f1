"""kernel_matrix: the kernel's own values, lazily or stored once; one triangle; inputs of any kind and bad ones."""

import dask.array as da
import numpy as np
import pytest
from matrix_examples import PAIR, TOLERANCE, close, given, images, kernel, rows

from ntkdask.arrays import device_memory_bytes
from ntkdask.datasets.rows import MemoryRows
from ntkdask.errors import DtypeError, InputError
from ntkdask.execution.site import Site
from ntkdask.kernels import NNGP, NTK
from ntkdask.networks import fully_connected
from ntkdask.planning.tiles import Plan
from ntkdask.preprocessing import FittedPreprocessor
from ntkdask.workflows.kernel_matrix.build import build_kernel_matrix, kernel_matrix, open_matrix
from ntkdask.workflows.kernel_matrix.plan import MatrixShape, plan_matrix
from ntkdask.workflows.stream import FeatureStream

# values


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("n", "tile"), [(1, None), (1, 4), (60, None), (20, 1), (60, 17), (60, 60), (60, 100)])
@pytest.mark.parametrize("store", [False, True])
def test_symmetric_values(tmp_path, dtype, n, tile, store):
    x = rows(n)
    found = kernel_matrix(kernel(), x, url=tmp_path / "k" if store else None, plan=Plan(tile, dtype=dtype))
    assert isinstance(found, da.Array)
    assert found.shape == (n, n)
    assert found.dtype == dtype
    values = found.compute()
    assert close(values, kernel()(x), dtype)
    assert (values == values.T).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("tiles", [(None, None), (7, 11), (1, 60), (100, 100)])
@pytest.mark.parametrize("store", [False, True])
def test_rectangular_values(tmp_path, dtype, tiles, store):
    x, y = rows(23, seed=1), rows(60)
    found = kernel_matrix(kernel(), x, y, url=tmp_path / "k" if store else None, plan=Plan(*tiles, dtype=dtype))
    assert found.shape == (23, 60)
    assert close(found.compute(), kernel()(x, y), dtype)


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_pair_takes_one_pass(tmp_path, monkeypatch, store, symmetric):
    x, y, calls = rows(), None if symmetric else rows(23, seed=1), []
    call = type(PAIR).__call__
    monkeypatch.setattr(type(PAIR), "__call__", lambda self, x, y=None: calls.append(1) or call(self, x, y))
    found = kernel_matrix(PAIR, x, y, url=tmp_path / "pair" if store else None, plan=Plan(20, 20))
    assert isinstance(found, tuple)
    values = da.compute(*found, scheduler="synchronous")
    assert len(calls) == 6
    for part, expected in zip(values, (NNGP(PAIR.network)(x, y), NTK(PAIR.network)(x, y)), strict=True):
        assert close(part, expected, "float64")
    if store:
        assert (open_matrix(tmp_path / "pair" / "nngp").compute() == values[0]).all()
        assert (open_matrix(tmp_path / "pair" / "ntk").compute() == values[1]).all()


def test_the_view_slices_like_an_array(tmp_path):
    x = rows()
    found, expected = kernel_matrix(kernel(), x, url=tmp_path / "k", plan=Plan(17)), kernel()(x)
    for key in (
        np.s_[3:40, ::3],
        np.s_[5],
        np.s_[:, 59],
        np.s_[-1, 0],
        np.s_[::-1, 10:12],
        np.s_[30:30],
        np.s_[[50, 1, 20]],
        np.s_[:, [3, 60 - 1, 3]],
    ):
        assert np.allclose(found[key].compute(), expected[key], rtol=0, atol=1e-12)
        assert found[key].compute().shape == expected[key].shape
    assert np.allclose(found[[50, 1]][:, [3, 40]].compute(), expected[[50, 1]][:, [3, 40]])
    assert np.allclose((found @ np.ones(60)).compute(), expected @ np.ones(60))


def test_one_triangle_is_computed_and_stored(tmp_path, monkeypatch):
    calls = []
    call = NTK.__call__
    monkeypatch.setattr(NTK, "__call__", lambda self, x, y=None: calls.append(y is None) or call(self, x, y))
    kernel_matrix(kernel(), rows(), url=tmp_path / "k", plan=Plan(20))
    assert (len(calls), sum(calls)) == (6, 3)
    chunks = [p for p in (tmp_path / "k" / "c").rglob("*") if p.is_file()]
    assert len(chunks) == 6
    calls.clear()
    lazy = kernel_matrix(kernel(), rows(), plan=Plan(20))
    assert calls == []
    lazy[:20, 40:].compute(scheduler="synchronous")
    assert calls == [False]
    lazy.compute(scheduler="synchronous")
    assert len(calls) == 7


@pytest.mark.parametrize("source", ["array", "dask", "dataset", "url"])
@pytest.mark.parametrize("store", [False, True])
def test_uint8_images_are_scaled(tmp_path, source, store):
    x = images()
    found = kernel_matrix(
        kernel(), given(tmp_path, x, source), x[:9], url=tmp_path / "k" if store else None, plan=Plan(20)
    )
    assert close(found.compute(), kernel()(x / 255, x[:9] / 255))
    if store:
        assert close(kernel_matrix(kernel(), given(tmp_path, x, source), plan=Plan(20)).compute(), kernel()(x / 255))


@pytest.mark.parametrize("dtype", ["float16", "int8", "int64", "bool"])
def test_other_numbers_are_cast(tmp_path, dtype):
    x = (4 * rows(12)).astype(dtype)
    expected = kernel()(x.astype("float64"))
    assert close(kernel_matrix(kernel(), x).compute(), expected)
    assert close(
        kernel_matrix(kernel(), x.tolist(), url=tmp_path / "k", plan=Plan(5, dtype="float32")).compute(), expected
    )


def test_rows_of_either_side_decide_the_dtype():
    assert kernel_matrix(kernel(), rows().astype("float32")).dtype == "float32"
    assert kernel_matrix(kernel(), rows().astype("float32"), rows()).dtype == "float64"
    assert kernel_matrix(kernel(), rows(), plan=Plan(dtype="float32")).dtype == "float32"


def test_selected_rows_of_streams(tmp_path):
    """Train × train and test × train of one dataset whose rows are dealt to parts, preprocessed on the way."""
    x = rows(50)
    parts = (np.arange(50) * 7 % 5).astype(np.int16)
    everything = MemoryRows(x, numbers=parts)
    train, test = everything.select(0, 1, 3), everything.select(2, 4)
    chain = FittedPreprocessor.for_rows((6,), "float64", "float64")
    streams = [FeatureStream(r, chain, None, None, batch_rows=7) for r in (train, test)]
    in_train = np.isin(parts, (0, 1, 3))
    n, m = int(in_train.sum()), int((~in_train).sum())
    for x_stream, y_stream, expected in (
        (streams[0], None, kernel()(x[in_train])),
        (streams[1], streams[0], kernel()(x[~in_train], x[in_train])),
    ):
        sizes = (n, None) if y_stream is None else (m, n)
        plan = plan_matrix(kernel(), MatrixShape(*sizes, (6,), 48, "float64"), tile_rows=8, tile_cols=8)
        (store,) = build_kernel_matrix(
            kernel(), x_stream, y_stream, plan, Site(tmp_path / f"{sizes}"), fingerprint={"kernel": "test"}
        )
        assert close(open_matrix(store.path).compute(), expected, "float64")
    with pytest.raises(InputError, match=r"the plan is for \(20, 30\) rows, \(30, None\) are selected"):
        build_kernel_matrix(kernel(), streams[0], None, plan, Site(tmp_path / "other"), fingerprint={})


# bad input


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": np.zeros(5)}, InputError, r"x has shape \(5,\); expected \(n, ...\)"),
        ({"x": np.zeros((0, 3))}, InputError, "at least one row"),
        ({"y": np.zeros((0, 6))}, InputError, "y has shape"),
        ({"y": rows(5, 7)}, InputError, r"rows of shape \(6,\) and y of \(7,\); they must agree"),
        ({"x": np.array([["a", "b"]])}, DtypeError, "rows are real numbers"),
        ({"x": rows().astype("complex128")}, DtypeError, "complex128"),
        ({"kernel": "ntk"}, InputError, "kernel is 'ntk'"),
        ({"kernel": lambda x, y=None: x}, InputError, "give one of ntkdask.kernels"),
        ({"kernel": fully_connected(1)}, InputError, "give one of ntkdask.kernels"),
        ({"plan": Plan(10, 20)}, InputError, "a symmetric matrix has square tiles"),
    ],
)
def test_bad_input(tmp_path, change, error, words, store):
    with pytest.raises(error, match=words):
        kernel_matrix(**{"kernel": kernel(), "x": rows(), **change}, url=tmp_path / "k" if store else None)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_number_of_rows_is_refused():
    x = da.from_array(rows(), chunks=(20, 6))
    with pytest.raises(InputError, match=r"Call x\.compute_chunk_sizes\(\)"):
        kernel_matrix(kernel(), x[x[:, 0] > 0])


@pytest.mark.parametrize("side", ["x", "y"])
@pytest.mark.parametrize("source", ["array", "dask", "lazy"])
def test_rows_with_nan_are_named(tmp_path, side, source):
    bad = rows()
    bad[[4, 33], 1] = [np.nan, np.inf]
    if source == "dask":
        bad = da.from_array(bad, chunks=(25, 6))
    pair = (bad, rows(50)) if side == "x" else (rows(50), bad)
    words = {
        "array": f"{side} has NaN or infinite values in rows 4, 33",
        # whichever block is prepared first
        "lazy": rf"{side} has NaN or infinite values in row (4|33)\b",
        "dask": "^rows 4, 33 of x hold NaN" if side == "x" else "^y as a dataset of its own: rows 4, 33",
    }
    with pytest.raises(InputError, match=words[source]):
        kernel_matrix(kernel(), *pair, url=None if source == "lazy" else tmp_path / "k", plan=Plan(20, 20)).compute()


def test_values_beyond_float32_are_named(tmp_path):
    x = rows()
    x[27, 0] = 1e200
    for name, pair in (("x", (x,)), ("y", (rows(), x))):
        with pytest.raises(InputError, match=f"{name} has .* in row 27"), np.errstate(over="ignore"):
            kernel_matrix(kernel(), *pair, url=tmp_path / name, plan=Plan(20, 20, dtype="float32"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_on_the_gpu(tmp_path, dtype):
    assert device_memory_bytes() > 0
    x = rows(500, 20)
    found = kernel_matrix(kernel(), x, url=tmp_path / "k", plan=Plan(128, dtype=dtype))
    assert np.abs(found.compute() - kernel()(x)).max() <= 10 * TOLERANCE[dtype] * np.abs(kernel()(x)).max()
