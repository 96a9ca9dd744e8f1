"""Fitted chains of steps: what a call takes and gives, memory, states and job files."""

import json
import pickle

import numpy as np
import pytest
from contracts import peak_bytes
from preprocessing_examples import RELATIVE, STEPS, assert_near, images, naive
from sweeps import sweep

from ntkdask import arrays
from ntkdask.errors import DtypeError, InputError, JobError
from ntkdask.preprocessing import (
    ZCA,
    Center,
    FittedPreprocessor,
    Moments,
    Standardize,
    UnitNorm,
    check_finite_rows,
    fit_in_memory,
    parse_steps,
)

# What a call takes and gives


def test_uint8_images_are_scaled_and_uint8_tables_are_not():
    raw = np.random.default_rng(5).integers(0, 256, (12, 4, 4, 3), dtype="uint8")
    for dtype in ("float32", "float64"):
        assert_near(fit_in_memory([], raw, dtype)(raw), raw / 255.0, RELATIVE[dtype])
        expected = naive(Standardize(), raw / 255.0, raw / 255.0)
        assert_near(fit_in_memory(["standardize"], raw, dtype)(raw), expected, 4 * RELATIVE[dtype])
    table = raw.reshape(12, -1)
    np.testing.assert_array_equal(fit_in_memory([], table)(table), table.astype("float32"))
    np.testing.assert_array_equal(fit_in_memory([], raw, image_scale=False)(raw), raw.astype("float32"))
    with pytest.raises(InputError, match="made for uint8 images"):
        fit_in_memory([], raw)(raw / 255.0)


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "int64", "float16", "float32", "float64", ">f4", ">f8"])
@pytest.mark.parametrize("names", [[], ["standardize"], ["unit_norm"], ["zca"]], ids=str)
def test_any_real_dtype_is_cast(dtype, names):
    x = np.random.default_rng(6).integers(0, 2, (9, 4)).astype(dtype)
    out = fit_in_memory(names, x)(x)
    assert out.dtype == np.float32
    expected = fit_in_memory(names, x.astype("float64"), "float64")(x.astype("float64"))
    assert_near(out, expected, 1e-5)


@pytest.mark.parametrize("layout", ["fortran", "strided", "reversed", "read-only"])
@pytest.mark.parametrize("step", STEPS, ids=str)
def test_memory_layout_does_not_matter_and_the_input_is_never_changed(step, layout):
    x = images(20)
    given = {
        "fortran": np.asfortranarray(x),
        "strided": np.repeat(x, 2, axis=0)[::2],
        "reversed": x[::-1].copy()[::-1],
        "read-only": x.copy(),
    }[layout]
    given.flags.writeable = False
    fitted = fit_in_memory([step], given, "float64")
    assert_near(fitted(given), fit_in_memory([step], x, "float64")(x), 1e-12)
    assert_near(step.apply(given, fitted.states[0]), fitted(x), 1e-12)
    np.testing.assert_array_equal(given, x)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("step", STEPS, ids=str)
def test_apply_writes_in_place_when_asked(step, dtype):
    x = images(20, dtype=dtype)
    state = fit_in_memory([step], x, dtype).states[0]
    expected, work = step.apply(x, state), x.copy()
    assert expected.dtype == dtype
    assert step.apply(work, state, out=work) is work
    np.testing.assert_array_equal(work, expected)


def test_a_strided_out_is_refused_rather_than_lost():
    with pytest.raises(InputError, match="C-contiguous"):
        UnitNorm().apply(np.ones((2, 3)), {}, out=np.empty((3, 2)).T)


def test_a_call_without_rows_or_without_steps():
    fitted = fit_in_memory(["standardize", "zca"], images(9).reshape(9, -1), "float64")
    assert fitted(np.empty((0, 36))).shape == (0, 36)
    x = np.ones((2, 3), "float32")
    assert FittedPreprocessor((3,))(x) is x


def test_rows_of_another_shape_or_kind_are_refused():
    fitted = FittedPreprocessor((3,))
    with pytest.raises(InputError, match=r"shape \(4,\), but the preprocessing is for rows of \(3,\)"):
        fitted(np.zeros((2, 4)))
    with pytest.raises(InputError, match="one example per row"):
        fitted(np.zeros(3))
    with pytest.raises(DtypeError, match="complex128"):
        fitted(np.zeros((2, 3), dtype=complex))
    with pytest.raises(DtypeError, match="float16"):
        FittedPreprocessor((3,), "float16")


@pytest.mark.parametrize(
    ("dtype", "shape", "source", "names"),
    sweep(
        ["float32", "float64"],
        [(4, 4, 3), (16, 16, 3)],
        ["uint8", "float32", "float64"],
        [[], ["center"], ["standardize_channels"], ["unit_norm"], ["zca"], ["standardize", "unit_norm", "zca"]],
        fast=lambda dtype, shape, source, names: dtype + 2 * shape == (source + names) % 4,
    ),
    ids=str,
)
def test_measured_memory_stays_within_what_is_declared(names, source, dtype, shape):
    n = 700
    raw = np.random.default_rng(0).integers(0, 255, (n, *shape)).astype(source)
    fitted = fit_in_memory(names, raw[: max(60, n // 10)], dtype)
    declared = fitted.workspace_bytes(n, shape, np.dtype(dtype).itemsize)
    used = peak_bytes(lambda: fitted(raw), declared)
    assert used <= declared
    # A plan that declares far too much refuses jobs that fit; small blocks and buffers are the slack.
    assert declared <= 1.3 * used + raw.size * np.dtype(dtype).itemsize + 2**18


@pytest.mark.parametrize("step", [Standardize(), Standardize("channel"), ZCA()], ids=str)
@pytest.mark.parametrize("shape", [(6,), (16, 16, 3)])
def test_measured_memory_of_a_fit_stays_within_what_is_declared(step, shape):
    raw = np.random.default_rng(0).integers(0, 255, (1500, *shape), dtype="uint8")
    fitted = FittedPreprocessor(shape, "float32", len(shape) == 3).extend(UnitNorm())
    declared = fitted.accumulate_bytes(step, 1500)
    assert peak_bytes(lambda: fitted.accumulate(step, raw), declared) <= declared
    assert fitted.accumulate(UnitNorm(), raw) is None
    assert fitted.accumulate_bytes(UnitNorm(), 1500) == 0


# State, job files, errors


def test_state_round_trip_gives_the_same_bits():
    raw = np.random.default_rng(7).integers(0, 256, (30, 4, 4, 3), dtype="uint8")
    fitted = fit_in_memory(["center_channels", "unit_norm", "standardize", "zca_shankar"], raw)
    stored, attributes = fitted.to_state()
    assert set(stored) == {"0.mean", "2.mean", "2.scale", "2.constant", "3.whitening", "3.epsilon"}
    again = FittedPreprocessor.from_state(stored, json.loads(json.dumps(attributes)))
    assert again.steps == fitted.steps
    np.testing.assert_array_equal(again(raw), fitted(raw))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted))(raw), fitted(raw))


def test_a_prepared_chain_gives_the_same_bits():
    x = images(30)
    fitted = fit_in_memory(["standardize", "zca"], x)
    prepared = fitted.prepared()
    assert prepared.states[1]["whitening"].dtype == np.float32
    assert fitted.states[1]["whitening"].dtype == np.float64
    np.testing.assert_array_equal(prepared(x), fitted(x))


def test_job_file_spellings():
    names = ["center", "center_channels", "standardize", "standardize_channels", "unit_norm", "zca", "zca_shankar"]
    expected = [
        Center(),
        Center("channel"),
        Standardize(),
        Standardize("channel"),
        UnitNorm(),
        ZCA(),
        ZCA(None, "shankar"),
    ]
    assert parse_steps(names) == tuple(expected)
    assert parse_steps([{"type": "ZCA", "regularization": 0.1}, {"type": "UnitNorm"}]) == (ZCA(0.1), UnitNorm())
    assert parse_steps((Center(),)) == (Center(),)
    assert parse_steps([]) == ()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["standardise"], "did you mean 'standardize'"),
        ([{"type": "ZAC"}], "did you mean 'ZCA'"),
        ([{"type": "ZCA", "regularisation": 1.0}], "did you mean 'regularization'"),
        ([{"regularization": 1.0}], "`type` key"),
        ("zca", "must be a list"),
        ([3], "name or a table"),
    ],
)
def test_unknown_spellings_name_the_nearest(names, message):
    with pytest.raises(JobError, match=message):
        parse_steps(names)


@pytest.mark.parametrize("value", [0, 0.0, -1e-3, float("nan"), float("inf"), "0.1", True])
@pytest.mark.parametrize("variant", ["han", "shankar"])
def test_zca_refuses_a_regularization_that_is_not_positive(value, variant):
    with pytest.raises(InputError, match="must be a positive number"):
        ZCA(value, variant)


def test_steps_refuse_unknown_words_and_wrong_statistics():
    with pytest.raises(InputError, match="did you mean 'channel'"):
        Standardize("channels")
    with pytest.raises(InputError, match="did you mean 'shankar'"):
        ZCA(variant="shanker")
    with pytest.raises(InputError, match="at least one training row"):
        Center().fit(Moments.empty(3), (3,))
    with pytest.raises(InputError, match="Moments"):
        Standardize().fit(None, (3,))
    with pytest.raises(InputError, match="SecondMoments"):
        ZCA().fit(Moments.of(np.ones((2, 3))), (3,))
    with pytest.raises(InputError, match="every training row constant"):
        fit_in_memory(["zca"], np.ones((4, 3)))


def test_rows_that_are_not_finite_are_named():
    x = images(20, dtype="float32")
    check_finite_rows(x)
    check_finite_rows(np.ones((3, 2), dtype="uint8"))
    x[4, 1, 1, 1], x[7, 0, 0, 0] = np.nan, np.inf
    with pytest.raises(InputError, match=r"NaN or infinite values in rows 1004, 1007\."):
        check_finite_rows(x, first_row=1000)
    x[10:] = -np.inf
    with pytest.raises(InputError, match=r"inputs has .* rows 4, 7, 10, 11, 12 and 7 more"):
        check_finite_rows(x, name="inputs")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("source", ["uint8", "float32", "float64"])
@pytest.mark.parametrize("step", STEPS, ids=str)
def test_gpu_fits_and_applies_as_the_cpu(step, source, dtype):
    raw = (images(90) * 10 + 100).astype(source)
    device = arrays.to_device(raw)
    host_fit, device_fit = fit_in_memory([step], raw, dtype), fit_in_memory([step], device, dtype)
    for fitted in (host_fit, device_fit, device_fit.prepared(device=True)):
        out = fitted(device)
        assert arrays.is_device_array(out)
        assert out.dtype == dtype
        assert_near(arrays.to_host(out), host_fit(raw), 100 * RELATIVE[dtype])
    assert all(isinstance(a, np.ndarray) for a in device_fit.to_state()[0].values())
    np.testing.assert_array_equal(arrays.to_host(device), raw)
