"""Preprocessing against naive float64 twins: statistics, steps, the fitted chain, targets."""

import json
import pickle

import numpy as np
import pytest
from contracts import peak_bytes
from sklearn.preprocessing import StandardScaler

from ntkdask import arrays
from ntkdask.errors import DtypeError, InputError, JobError
from ntkdask.preprocessing import (
    ZCA,
    Center,
    FittedPreprocessor,
    Moments,
    SecondMoments,
    Standardize,
    UnitNorm,
    check_finite_rows,
    fit_in_memory,
    parse_steps,
    rows,
    targets,
)
from ntkdask.preprocessing.rows import row_blocks

RELATIVE = {"float32": 2e-6, "float64": 1e-12}
STEPS = [Center(), Center("channel"), Standardize(), Standardize("channel"), UnitNorm(), ZCA(), ZCA(variant="shankar")]


def images(n, seed=0, shape=(4, 3, 3), dtype="float64"):
    """Correlated positive rows, of different means and scales per channel."""
    rng = np.random.default_rng(seed)
    d = int(np.prod(shape))
    x = rng.standard_normal((n, d)) @ np.linalg.qr(rng.standard_normal((d, d)))[0] * np.geomspace(1, 0.05, d)
    return (x.reshape(n, *shape) * [1.0, 2.0, 5.0] + [3.0, 0.0, -7.0]).astype(dtype)


def naive(step, train, x):
    """The step fitted on train and applied to x, straight from its definition, float64."""
    train, x = train.astype("float64"), x.astype("float64")
    flat, flat_train = x.reshape(len(x), -1), train.reshape(len(train), -1)
    if isinstance(step, (Center, Standardize)):
        axes = tuple(range(train.ndim - 1)) if step.per == "channel" else 0
        std = train.std(axis=axes)
        scale = np.where(std == 0, 1, std) if isinstance(step, Standardize) else 1
        return (x - train.mean(axis=axes)) / scale
    if isinstance(step, UnitNorm):
        norms = np.linalg.norm(flat, axis=1, keepdims=True)
        return (flat / np.where(norms == 0, 1, norms)).reshape(x.shape)
    r_train, r = naive_row_part(flat_train), naive_row_part(flat)
    covariance = r_train.T @ r_train / len(train)
    values, vectors = np.linalg.eigh(covariance)
    epsilon = 0.1 * np.trace(covariance) / len(values) if step.variant == "han" else 1e-4
    return (r @ vectors @ np.diag(1 / np.sqrt(np.abs(values) + epsilon)) @ vectors.T).reshape(x.shape)


def naive_row_part(flat):
    flat = flat - flat.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    return flat / np.where(norms < 1e-8, 1, norms)


def assert_near(found, expected, tolerance):
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def assert_same_moments(a, b):
    assert a.n == b.n
    # 1e-13: reordered float64 sums of at most a few hundred terms, means relative to the spread.
    assert_near(a.m2, b.m2, 1e-13)
    np.testing.assert_allclose(a.mean, b.mean, atol=1e-13 * (1 + np.abs(b.mean).max()))


# Statistics


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_moments_match_numpy(n):
    x = images(n)
    moments = Moments.of(x)
    flat = x.reshape(n, -1)
    assert moments.n == n
    assert_same_moments(moments, Moments(n, flat.mean(axis=0), n * flat.var(axis=0)))


@pytest.mark.parametrize("cuts", [[1], [50], [99], [3, 4, 60], list(range(1, 100))])
def test_blockwise_and_merged_in_any_order_is_whole(cuts):
    x = images(100)
    blocks = np.split(x, cuts)
    order = np.random.default_rng(len(cuts)).permutation(len(blocks))
    for cls in (Moments, SecondMoments):
        walked, merged = cls.empty(36), cls.empty(36)
        for block in blocks:
            walked = walked.update(block)
        for i in order:
            merged = merged.merge(cls.of(blocks[i]))
        if cls is Moments:
            assert_same_moments(walked, cls.of(x))
            assert_same_moments(merged, cls.of(x))
        else:
            assert walked.n == merged.n == 100
            assert_near(walked.xtx, x.reshape(100, -1).T @ x.reshape(100, -1), 1e-13)
            assert_near(merged.xtx, walked.xtx, 1e-13)


def test_row_blocks_cover_every_row_once_and_results_do_not_depend_on_them(monkeypatch):
    whole, x = Moments.of(images(50)), images(50)
    monkeypatch.setattr(rows, "BLOCK_ELEMENTS", 36 * 7 + 5)
    assert [row for block in row_blocks(50, 36) for row in range(50)[block]] == list(range(50))
    assert max(block.stop - block.start for block in row_blocks(50, 36)) == 7
    assert list(row_blocks(3, 10_000)) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert list(row_blocks(0, 3)) == []
    assert_same_moments(Moments.of(x), whole)


def test_moments_survive_catastrophic_cancellation():
    x = np.random.default_rng(1).standard_normal((4000, 3)) + np.array([1e6, -1e6, 1e8])
    moments = Moments.empty(3)
    for block in np.array_split(x, 7):
        moments = moments.update(block)
    exact = x.astype(np.longdouble).var(axis=0)
    # E[x²] − mean² would be off by 1e-4 at mean 1e6 and worthless at 1e8.
    np.testing.assert_allclose(moments.m2 / 4000, exact.astype("float64"), rtol=1e-9)


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint8", "int64", "bool"])
def test_statistics_are_float64_for_any_dtype(dtype):
    x = np.random.default_rng(0).integers(0, 2, (30, 4)).astype(dtype)
    moments, second = Moments.of(x), SecondMoments.of(x)
    assert moments.mean.dtype == moments.m2.dtype == second.xtx.dtype == np.float64
    assert_same_moments(moments, Moments.of(x.astype("float64")))
    np.testing.assert_array_equal(second.xtx, x.astype("float64").T @ x.astype("float64"))


def test_second_moments_update_in_place_but_merge_does_not():
    x = images(20)
    a, b = SecondMoments.of(x[:5]), SecondMoments.of(x[5:])
    before, buffer = a.xtx.copy(), a.xtx
    merged = a.merge(b)
    np.testing.assert_array_equal(a.xtx, before)
    assert a.update(x[5:]) is a
    assert a.xtx is buffer
    assert_near(a.xtx, merged.xtx, 1e-13)


def test_statistics_of_other_widths_are_refused_and_pickle():
    with pytest.raises(InputError, match="4 features, the statistics 3"):
        Moments.empty(3).update(np.zeros((2, 4)))
    with pytest.raises(InputError, match="4 features, the statistics 3"):
        SecondMoments.empty(3).merge(SecondMoments.empty(4))
    x = images(5)
    assert_same_moments(pickle.loads(pickle.dumps(Moments.of(x))), Moments.of(x))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(SecondMoments.of(x))).xtx, SecondMoments.of(x).xtx)


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


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("source", ["uint8", "float32", "float64"])
@pytest.mark.parametrize(
    "names",
    [[], ["center"], ["standardize_channels"], ["unit_norm"], ["zca"], ["standardize", "unit_norm", "zca"]],
    ids=str,
)
@pytest.mark.parametrize("shape", [(4, 4, 3), (16, 16, 3)])
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


# Targets


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("labels_dtype", ["uint8", "int32", "int64", "uint64"])
def test_targets_are_zero_mean_one_hot_and_decode_back(dtype, labels_dtype):
    labels = np.random.default_rng(8).integers(0, 7, 50).astype(labels_dtype)
    encoded = targets.encode_targets(labels, 7, dtype)
    assert encoded.dtype == dtype
    assert_near(encoded, np.eye(7)[labels] - 1 / 7, RELATIVE[dtype])
    assert np.abs(encoded.sum(axis=1)).max() <= 7 * np.finfo(dtype).eps
    decoded = targets.decode(encoded)
    assert decoded.dtype == np.int64
    np.testing.assert_array_equal(decoded, labels)
    assert targets.encode_targets(labels[:0], 300).shape == (0, 300)


def test_labels_out_of_range_are_named():
    with pytest.raises(InputError, match=r"outside 0\.\.2 in rows 1, 3: found 3"):
        targets.encode_targets(np.array([0, 3, 2, -1]), 3)
    with pytest.raises(InputError, match=r"in rows 0, 1, 2, 3, 4 and 95 more"):
        targets.encode_targets(np.full(100, 200, dtype="uint8"), 10)
    for labels in (np.array([0.0, 1.0]), np.array([[0, 1]]), np.array(["cat", "dog"])):
        with pytest.raises(InputError, match="expected \\(n,\\) integers"):
            targets.encode_targets(labels, 3)
    with pytest.raises(InputError, match="at least 2"):
        targets.encode_targets(np.array([0]), 1)
    with pytest.raises(DtypeError, match="float16"):
        targets.encode_targets(np.array([0]), 2, "float16")
    with pytest.raises(InputError, match="n_classes"):
        targets.decode(np.zeros(3))


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


@pytest.mark.gpu
def test_gpu_targets_and_row_checks():
    labels = arrays.to_device(np.array([2, 0, 1], dtype="uint8"))
    encoded = targets.encode_targets(labels, 3)
    np.testing.assert_array_equal(arrays.to_host(targets.decode(encoded)), [2, 0, 1])
    with pytest.raises(InputError, match="row 0: found 2"):
        targets.encode_targets(labels, 2)
    with pytest.raises(InputError, match=r"row 11\."):
        check_finite_rows(arrays.to_device(np.array([[0.0], [np.nan]])), first_row=10)
