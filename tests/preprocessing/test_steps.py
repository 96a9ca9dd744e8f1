"""Steps of preprocessing against naive float64 twins, alone and in chains."""

import numpy as np
import pytest
from preprocessing_examples import RELATIVE, STEPS, assert_near, images, naive, naive_row_part
from sklearn.preprocessing import StandardScaler

from ntkdask.preprocessing import ZCA, FittedPreprocessor, Moments, Standardize, UnitNorm, fit_in_memory, parse_steps

# Steps and chains


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [1, 2, 90])
@pytest.mark.parametrize("step", STEPS, ids=str)
def test_each_step_matches_its_naive_twin(step, n, dtype):
    train, x = images(n, dtype=dtype), images(8, seed=1, dtype=dtype)
    fitted = fit_in_memory([step], train, dtype)
    out = fitted(x)
    assert out.dtype == dtype
    assert out.shape == x.shape
    # W scales unseen directions by up to ε^(−1/2) = 100: that much more rounding in float32.
    tolerance = RELATIVE[dtype] * (100 if isinstance(step, ZCA) else 10)
    assert_near(out, naive(step, train, x), tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_chain_fits_each_step_on_the_output_of_the_earlier_ones(dtype):
    train, x = images(90, dtype=dtype), images(8, seed=1, dtype=dtype)
    steps = parse_steps(["standardize_channels", "unit_norm", "center", "zca"])
    expected_train, expected = train, x
    for step in steps:
        expected_train, expected = naive(step, expected_train, expected_train), naive(step, expected_train, expected)
    assert_near(fit_in_memory(steps, train, dtype)(x), expected, 200 * RELATIVE[dtype])


@pytest.mark.parametrize("size", [1, 13, 90])
def test_streamed_fit_over_ragged_slabs_equals_fit_in_memory(size):
    x = images(90)
    steps = (Standardize("channel"), UnitNorm(), ZCA())
    fitted = FittedPreprocessor(x.shape[1:], "float64")
    for step in steps:
        total = None
        for start in range(0, 90, size):
            part = fitted.accumulate(step, x[start : start + size])
            total = part if total is None else total.merge(part)
        fitted = fitted.extend(step, total)
    whole = fit_in_memory(steps, x, "float64")
    assert_near(fitted(x), whole(x), 1e-11)
    blocks = [whole(block) for block in np.array_split(x, [min(size, 30), 50 + size // 3])]
    assert_near(np.concatenate(blocks), whole(x), 1e-13)


def test_standardize_is_sklearn_on_variances_like_protein():
    rng = np.random.default_rng(2)
    variances = np.array([4e-3, 1.0, 50.0, 1e4, 3e6, 2e8, 9e9, 3e11])
    x = rng.standard_normal((500, 8)) * np.sqrt(variances) + 10 * rng.standard_normal(8) * np.sqrt(variances)
    expected = StandardScaler().fit_transform(x)
    assert_near(fit_in_memory(["standardize"], x, "float64")(x), expected, 1e-12)
    out = fit_in_memory(["standardize"], x, "float32")(x)
    assert out.dtype == np.float32
    assert_near(out, expected, 1e-6)


def test_float64_rows_and_wide_integers_are_centred_before_they_are_rounded():
    times = 1_700_000_000 + np.random.default_rng(3).integers(-100, 100, (300, 1))
    for raw in (times, times.astype("float64"), times.astype("int32")):
        fitted = fit_in_memory(["standardize"], raw, "float32")
        # Rounded to float32 first, these times are multiples of 128: two or three values are left.
        assert_near(fitted(raw), StandardScaler().fit_transform(times.astype("float64")), 1e-6)


def test_float32_rows_of_mean_1e6_keep_the_digits_they_have():
    x = (np.random.default_rng(4).standard_normal((1000, 5)) + 1e6).astype("float32")
    expected = StandardScaler().fit_transform(x.astype("float64"))
    assert_near(fit_in_memory(["standardize"], x)(x), expected, 1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, -3e7, 1e-30])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_constant_features_become_exactly_zero_and_are_counted(value, dtype):
    x = images(333, dtype=dtype)[:, 0, :, :]
    x[:, 1, 2] = value
    x[:, 2, 0] = 0.3
    fitted = FittedPreprocessor(x.shape[1:], dtype)
    total = Moments.empty(9)
    for block in np.array_split(x, 10):
        total = total.merge(fitted.accumulate(Standardize(), block))
    fitted = fitted.extend(Standardize(), total)
    assert int(fitted.states[0]["constant"]) == 2
    out = fitted(x)
    assert not out[:, 1, 2].any()
    assert not out[:, 2, 0].any()
    assert np.isfinite(out).all()


def test_a_constant_channel_is_counted_once():
    x = images(20)
    x[..., 1] = 0.1
    fitted = fit_in_memory(["standardize_channels"], x, "float64")
    assert int(fitted.states[0]["constant"]) == 1
    assert fitted.states[0]["mean"].shape == (3,)
    assert not fitted(x)[..., 1].any()


def test_one_training_row_standardizes_to_zero():
    fitted = fit_in_memory(["standardize"], images(1), "float64")
    assert int(fitted.states[0]["constant"]) == 36
    assert not fitted(images(1)).any()


def test_zero_and_constant_rows_stay_zero():
    x = images(20)
    x[3], x[5] = 0.0, 1e10 + 0.1
    unit = fit_in_memory(["unit_norm"], x, "float64")(x)
    assert not unit[3].any()
    np.testing.assert_allclose(np.linalg.norm(np.delete(unit, 3, 0).reshape(19, -1), axis=1), 1.0, rtol=1e-14)
    white = fit_in_memory(["zca"], x, "float64")(x)
    assert not white[[3, 5]].any()
    assert np.isfinite(white).all()


def test_unit_norm_of_float32_neither_overflows_nor_vanishes():
    x = np.array([[3e38, 3e38], [1e-38, 0.0], [1e30, 1e-30]], dtype="float32")
    np.testing.assert_allclose(fit_in_memory(["unit_norm"], x)(x), [[0.5**0.5] * 2, [1, 0], [1, 0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("step", "epsilon"),
    [
        (ZCA(), lambda c: 0.1 * np.trace(c) / len(c)),
        (ZCA(0.7), lambda c: 0.7 * np.trace(c) / len(c)),
        (ZCA(variant="shankar"), lambda c: 1e-4),
        (ZCA(0.02, "shankar"), lambda c: 0.02),
    ],
    ids=lambda value: str(value).split(" at 0x")[0],
)
def test_zca_leaves_the_spectrum_e_over_e_plus_epsilon(step, epsilon):
    x = images(400)
    r = naive_row_part(x.reshape(400, -1))
    covariance = r.T @ r / 400
    fitted = fit_in_memory([step], x, "float64")
    assert float(fitted.states[0]["epsilon"]) == pytest.approx(epsilon(covariance), rel=1e-12)
    out = fitted(x).reshape(400, -1)
    values = np.linalg.eigvalsh(covariance)
    expected = values / (values + epsilon(covariance))
    np.testing.assert_allclose(np.linalg.eigvalsh(out.T @ out / 400), np.sort(expected), atol=1e-12)
    whitening = fitted.states[0]["whitening"]
    np.testing.assert_array_equal(whitening, whitening.T)


def test_zca_does_not_depend_on_the_scale_and_offset_of_a_row():
    x = images(50)
    moved = x * np.geomspace(0.01, 100, 50)[:, None, None, None] + np.arange(50)[:, None, None, None]
    assert_near(fit_in_memory(["zca"], moved, "float64")(moved), fit_in_memory(["zca"], x, "float64")(x), 1e-10)
