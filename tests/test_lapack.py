"""LAPACK's routines through pointers: naive twins in float64, memory, refusals, and that another thread runs meanwhile."""

import ctypes

import numpy as np
import pytest
from beats import assert_beats

from ntkdask import lapack

TOLERANCE = {"float32": 2e-4, "float64": 1e-11}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE))
BOTH = pytest.mark.parametrize("lower", [True, False], ids=["lower", "upper"])


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def matrix(rng, rows, columns, dtype="float64"):
    return np.asfortranarray(rng.standard_normal((rows, columns)), dtype)


def definite(rng, n, dtype="float64"):
    x = rng.standard_normal((n, 2 * n))
    return np.asfortranarray(x @ x.T / n + 0.1 * np.eye(n), dtype)


def triangle(a, lower):
    return np.tril(a) if lower else np.triu(a)


def only(a, lower):
    """`a` with NaN in its other triangle, which no routine may read."""
    return np.asfortranarray(np.where(triangle(np.ones(a.shape), lower) > 0, a, np.nan).astype(a.dtype))


def tridiagonal(d, e):
    return np.diag(d) + np.diag(e, 1) + np.diag(e, -1)


def close(found, expected, dtype):
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=TOLERANCE[dtype] * max(1.0, np.abs(expected).max(initial=0))
    )


# --- products and substitution --------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("trans", [False, True])
def test_gemm_adds_a_product(rng, dtype, trans):
    a, b, c = matrix(rng, *((5, 4) if trans else (4, 5)), dtype), matrix(rng, 5, 3, dtype), matrix(rng, 4, 3, dtype)
    left = a.astype(float).T if trans else a.astype(float)
    expected = c.astype(float) - 2 * left @ b.astype(float)
    # operands in any memory
    lapack.gemm(-2, np.ascontiguousarray(a), b[::1], c, trans_a=trans)
    close(c, expected, dtype)


@DTYPES
@BOTH
@pytest.mark.parametrize("trans", [False, True])
def test_syrk_adds_a_square_to_one_triangle(rng, dtype, lower, trans):
    a, c = matrix(rng, 6, 4, dtype), only(definite(rng, 4 if trans else 6, dtype), lower)
    full = a.astype(float).T @ a if trans else a.astype(float) @ a.T
    expected = triangle(3 * full, lower) + 0.5 * triangle(np.nan_to_num(c), lower)
    lapack.syrk(3, a, 0.5, c, lower=lower, trans=trans)
    close(triangle(np.nan_to_num(c), lower), expected, dtype)
    assert np.isnan(c).sum() == len(c) * (len(c) - 1) // 2


@DTYPES
def test_symv_reads_the_lower_triangle(rng, dtype):
    a, x = definite(rng, 6, dtype), rng.standard_normal(6)
    close(lapack.symv(only(a, True), x), a.astype(float) @ x, dtype)


@DTYPES
@BOTH
@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
def test_trsm_is_a_solve_with_a_triangle(rng, dtype, lower, trans, right):
    a, b = definite(rng, 5, dtype), matrix(rng, *((3, 5) if right else (5, 3)), dtype)
    full = triangle(a.astype(float), lower)
    inverse = np.linalg.inv(full.T if trans else full)
    expected = b.astype(float) @ inverse if right else inverse @ b.astype(float)
    lapack.trsm(only(a, lower), b, right=right, lower=lower, trans=trans)
    close(b, expected, dtype)


# --- Cholesky -------------------------------------------------------------------------------------------------------


@DTYPES
@BOTH
def test_potrf_potrs_potri(rng, dtype, lower):
    a, b = definite(rng, 7, dtype), matrix(rng, 7, 2, dtype)
    factor, kept = only(a, lower), b.copy()
    assert lapack.potrf(factor, lower=lower) == 0
    assert np.isnan(factor).sum() == 21
    half = triangle(np.nan_to_num(factor).astype(float), lower)
    close(half @ half.T if lower else half.T @ half, a.astype(float), dtype)
    close(lapack.potrs(factor, b, lower=lower), np.linalg.solve(a.astype(float), b), dtype)
    assert np.array_equal(b, kept)
    lapack.potri(factor, lower=lower)
    close(triangle(np.nan_to_num(factor), lower), triangle(np.linalg.inv(a.astype(float)), lower), dtype)


def test_potrf_counts_to_the_pivot_that_failed(rng):
    a = definite(rng, 6)
    a[3, 3] = -1.0
    assert lapack.potrf(a) == 4


@DTYPES
def test_cholesky_solve_keeps_its_arguments(rng, dtype):
    a, b = np.ascontiguousarray(definite(rng, 5, dtype)), np.ascontiguousarray(matrix(rng, 5, 2, dtype))
    before = a.copy()
    close(lapack.cholesky_solve(a, b), np.linalg.solve(a.astype(float), b), dtype)
    assert np.array_equal(a, before)
    with pytest.raises(np.linalg.LinAlgError, match="leading minor of order 1"):
        lapack.cholesky_solve(-a, b)


@DTYPES
def test_pstrf_stops_at_the_rank(rng, dtype):
    x = rng.standard_normal((8, 3))
    a = np.asfortranarray(x @ x.T, dtype)
    factor = a.copy(order="F")
    order, rank = lapack.pstrf(factor, 1e-4)
    assert rank == 3
    assert sorted(order) == list(range(8))
    half = np.tril(factor)[:, :rank].astype(float)
    close(half @ half.T, a[np.ix_(order, order)].astype(float), dtype)


# --- eigenvalues ----------------------------------------------------------------------------------------------------


@DTYPES
@BOTH
@pytest.mark.parametrize("driver", ["evd", "evr"])
def test_eigh(rng, dtype, lower, driver):
    a = definite(rng, 9, dtype)
    given = only(a, lower)
    values, vectors = lapack.eigh(given, lower=lower, driver=driver)
    close(values, np.linalg.eigvalsh(a.astype(float)), dtype)
    close(vectors.astype(float) * values @ vectors.T, a.astype(float), dtype)
    close(vectors.astype(float).T @ vectors, np.eye(9), dtype)
    assert np.shares_memory(vectors, given) == (driver == "evd")


@DTYPES
@BOTH
def test_eigvalsh_of_one_matrix_and_of_two(rng, dtype, lower):
    a, b = definite(rng, 6, dtype), definite(rng, 6, dtype)
    close(lapack.eigvalsh(only(a, lower), lower=lower), np.linalg.eigvalsh(a.astype(float)), dtype)
    expected = np.sort(np.linalg.eigvals(np.linalg.solve(b.astype(float), a.astype(float))).real)
    found = lapack.eigvalsh(only(a, lower), only(b, lower), lower=lower)
    np.testing.assert_allclose(found, expected, rtol=20 * TOLERANCE[dtype])
    with pytest.raises(np.linalg.LinAlgError, match="sygvd"):
        lapack.eigvalsh(a.copy(order="F"), np.asfortranarray(-b), lower=lower)


@DTYPES
@pytest.mark.parametrize("n", [1, 2, 40])
def test_sytrd_and_ormqr_are_a_similarity(rng, dtype, n):
    a = definite(rng, n, dtype)
    reduced = only(a, True)
    diagonal, off_diagonal, tau = lapack.sytrd(reduced)
    q = np.eye(n, dtype=dtype)
    if n > 1:
        rest = np.eye(n - 1, dtype=dtype, order="F")
        lapack.ormqr(reduced[1:, :-1], tau, rest, trans=False)
        q[1:, 1:] = rest
        lapack.ormqr(reduced[1:, :-1], tau, rest, trans=True)
        close(rest, np.eye(n - 1), dtype)
    t = tridiagonal(diagonal, off_diagonal).astype(float)
    close(q.astype(float) @ t @ q.T, a.astype(float), dtype)


@DTYPES
@pytest.mark.parametrize("n", [1, 2, 12])
def test_tridiagonal_matrices(rng, dtype, n):
    d, e = (3 + rng.random(n)).astype(dtype), rng.random(n - 1).astype(dtype)
    kept, b, full = (d.copy(), e.copy()), rng.standard_normal((n, 2)).astype(dtype), tridiagonal(d, e).astype(float)
    close(lapack.sterf(d, e), np.linalg.eigvalsh(full), dtype)
    values, vectors = lapack.stemr(d, e)
    close(vectors.astype(float) * values @ vectors.T, full, dtype)
    close(lapack.ptsv(d, e, b), np.linalg.solve(full, b), dtype)
    assert np.array_equal(d, kept[0])
    assert np.array_equal(e, kept[1])
    with pytest.raises(np.linalg.LinAlgError, match="leading minor of order 1"):
        lapack.ptsv(-d, e, b)


def test_empty_matrices():
    nothing = np.empty((0, 0), order="F")
    assert lapack.potrf(nothing) == 0
    assert lapack.eigvalsh(nothing).shape == (0,)
    assert [a.shape for a in lapack.eigh(nothing)] == [(0,), (0, 0)]
    c = np.ones((2, 2), order="F")
    lapack.syrk(1.0, np.empty((2, 0)), 1.0, c)
    assert np.array_equal(c, np.ones((2, 2)))


# --- what would write beyond an array is refused --------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        np.eye(3)[:, :2],
        np.arange(12.0).reshape(3, 4)[:, :3],
        np.eye(3, dtype=">f8"),
        np.eye(3, dtype=np.int64),
        np.eye(6, order="F")[::2, ::2],
        np.broadcast_to(1.0, (3, 3)),
        np.ones(3),
    ],
    ids=["not square", "row-major", "byte order", "integers", "strides", "read-only", "one axis"],
)
def test_memory_that_a_routine_does_not_expect_is_refused(wrong):
    for routine in (lapack.potrf, lapack.eigh, lapack.eigvalsh, lapack.sytrd, lapack.potri):
        with pytest.raises(ValueError, match=r"found|do not fit"):
            routine(wrong)


def test_shapes_that_do_not_fit_are_refused(rng):
    a, b = definite(rng, 4), matrix(rng, 3, 2)
    calls = (
        lambda: lapack.gemm(1.0, a, b, np.zeros((4, 2), order="F")),
        lambda: lapack.syrk(1.0, b, 0.0, np.zeros((2, 2), order="F")),
        lambda: lapack.trsm(a, b),
        lambda: lapack.symv(a, np.ones(3)),
        lambda: lapack.trsm(a, b, right=True),
        lambda: lapack.potrs(a, b),
        lambda: lapack.eigvalsh(a, definite(rng, 3)),
        lambda: lapack.eigvalsh(a, definite(rng, 4, "float32")),
        lambda: lapack.ormqr(a, np.ones(3), np.zeros((4, 1), order="F"), trans=True),
        lambda: lapack.ptsv(np.ones(3), np.ones(3), b),
        lambda: lapack.ptsv(np.ones(4), np.ones(3), b),
        lambda: lapack.sterf(np.ones(3), np.ones(1)),
    )
    for call in calls:
        with pytest.raises(ValueError, match="do not fit"):
            call()


def test_every_routine_has_the_arguments_that_it_is_called_with(monkeypatch, rng):
    """A missing argument would be an address from nowhere: counted against the signature that SciPy publishes."""
    calls, routine = {}, lapack._routine

    def counted(library, name, count):
        calls[name] = (count, library.__pyx_capi__[name])
        return routine(library, name, count)

    monkeypatch.setattr(lapack, "_routine", counted)
    a, d = definite(rng, 3), np.ones(3)
    lapack.gemm(1.0, a, a, a.copy(order="F"))
    lapack.syrk(1.0, a, 1.0, a.copy(order="F"))
    lapack.trsm(a, a.copy(order="F"))
    lapack.symv(a, d)
    lapack.cholesky_solve(a, a)
    lapack.potri(a.copy(order="F"))
    lapack.pstrf(a.copy(order="F"), 0.0)
    for driver in ("evd", "evr"):
        lapack.eigh(a.copy(order="F"), driver=driver)
    lapack.eigvalsh(a.copy(order="F"), a.copy(order="F"))
    reduced = a.copy(order="F")
    lapack.ormqr(reduced[1:, :-1], lapack.sytrd(reduced)[2], np.eye(2, order="F"), trans=True)
    lapack.sterf(d, d[1:])
    lapack.stemr(d, d[1:])
    lapack.ptsv(2 * d, 0.1 * d[1:], a)
    assert len(calls) == 16
    assert {n: c for n, (c, _) in calls.items()} == {n: str(s).count(",") + 1 for n, (_, s) in calls.items()}


@pytest.mark.parametrize("kind", [ctypes.c_int32, ctypes.c_int64])
def test_the_width_of_integers_is_asked_of_the_library(monkeypatch, kind):
    """`ilaver` writes the three numbers of LAPACK's version, here one with integers of each width."""

    def ilaver(*addresses):
        for address, number in zip(addresses, (3, 12, 0), strict=True):
            ctypes.cast(address, ctypes.POINTER(kind))[0] = number

    monkeypatch.setattr(lapack, "_routine", lambda library, name, count: ilaver if name == "ilaver" else None)
    assert lapack._integer.__wrapped__() is kind


# --- another thread meanwhile ---------------------------------------------------------------------------------------


def prepared(name):
    """A function of n that gives a call of one routine on (n, n) matrices, with everything made before."""

    def prepare(n):
        rng = np.random.default_rng(n)
        a = np.asfortranarray(rng.standard_normal((n, n)))
        if name in ("gemm", "syrk"):
            c, routine = np.zeros((n, n), order="F"), getattr(lapack, name)
            return (lambda: routine(1.0, a, a, c)) if name == "gemm" else lambda: routine(1.0, a, 0.0, c)
        definite = np.asfortranarray(a @ a.T + n * np.eye(n))
        if name == "ormqr":
            q, tau = np.linalg.qr(a, mode="raw")
            return lambda: lapack.ormqr(q.T, tau, a, trans=True)
        if name == "sterf":
            return lambda: lapack.sterf(np.arange(8.0 * n), np.ones(8 * n - 1))
        if name == "stemr":
            return lambda: lapack.stemr(np.arange(1.0 * n), np.ones(n - 1))
        second = {"trsm": a, "eigvalsh of two": definite.copy(order="F")}
        rest = (second[name],) if name in second else (0.0,) if name == "pstrf" else ()
        options = {"driver": name.split()[1]} if name.startswith("eigh ") else {}
        routine = getattr(lapack, name.split()[0])
        return lambda: routine(definite, *rest, **options)

    return prepare


ROUTINES = ["gemm", "syrk", "trsm", "potrf", "potri", "pstrf", "eigh evd", "eigh evr", "eigvalsh", "eigvalsh of two"]


@pytest.mark.parametrize("name", [*ROUTINES, "sytrd", "ormqr", "sterf", "stemr"])
def test_another_thread_runs_during(name):
    assert_beats(prepared(name), (300, 600, 1200, 2400), pace=0.0002)
