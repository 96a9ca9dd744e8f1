"""What the benchmark of feature maps reads, builds and compares with."""

import numpy as np
import pytest

from benchmarks import _dense_maps, feature_maps
from ntkdask.errors import InputError, JobError
from ntkdask.features import FourierFeatures, HomogeneousSketch, NTKRandomFeatures, Nystrom
from ntkdask.kernels import NTK
from ntkdask.networks import convolutional, fully_connected

GIVEN = {"network": fully_connected(2), "kernel": NTK(fully_connected(2)), "gamma": 0.25, "n_components": 64}


def rows(n, *shape, seed=0):
    return np.random.default_rng(seed).standard_normal((n, *shape)).astype("float32")


def mean_error(features, exact, count):
    """‖mean of ΦΦᵀ over seeds − K‖_F/‖K‖_F."""
    total = sum((phi := features(seed).astype("float64")) @ phi.T for seed in range(count)) / count
    return np.linalg.norm(total - exact) / np.linalg.norm(exact)


CASES = {
    "random features": (lambda x, m, s: _dense_maps.random_features(x, m, 1, s), fully_connected(1), rows(8, 6), 0.0),
    "polynomial": (lambda x, m, s: _dense_maps.polynomial_sketch(x, m, 2, 16, s), fully_connected(2), rows(8, 6), 0.02),
    "convolutional": (
        lambda x, m, s: _dense_maps.convolutional_sketch(x, m, 2, 8, s),
        convolutional(2),
        rows(4, 3, 4, 2),
        0.03,
    ),
}


@pytest.mark.parametrize(("features", "network", "x", "bias"), CASES.values(), ids=CASES)
def test_what_is_written_out_approximates_the_kernel(features, network, x, bias):
    """Up to the bias of the polynomials, the errors of m components and of their mean over 16 draws are 1/√m and a quarter of that."""
    exact = NTK(network)(x.astype("float64"))
    assert features(x, 64, 0).shape == (len(x), 64)
    assert features(x, 64, 0).dtype == "float32"
    single = np.mean([mean_error(lambda s, k=k: features(x, 256, k), exact, 1) for k in range(16)])
    mean = mean_error(lambda s: features(x, 256, s), exact, 16)
    assert mean < 0.5 * single + bias
    assert mean_error(lambda s: features(x, 4096, s), exact, 4) < 0.5 * single + bias
    assert single < 0.5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("NTKRandomFeatures", NTKRandomFeatures(fully_connected(2), 64)),
        (
            "NTKRandomFeatures:sampling=spherical,seed=3",
            NTKRandomFeatures(fully_connected(2), 64, 3, sampling="spherical"),
        ),
        ("FourierFeatures:n_components=10", FourierFeatures(10, 0.25)),
        ("Nystrom:landmarks=kmeans++", Nystrom(NTK(fully_connected(2)), 64, landmarks="kmeans++")),
        ("HomogeneousSketch:degree=4,kernel=nngp", HomogeneousSketch(fully_connected(2), 64, degree=4, kernel="nngp")),
    ],
)
def test_maps_by_name(text, expected):
    assert feature_maps.built(text, GIVEN) == expected


def test_unknown_maps_and_arguments():
    with pytest.raises(JobError, match="unknown feature map 'Nystroem'; did you mean 'Nystrom'"):
        feature_maps.built("Nystroem", GIVEN)
    with pytest.raises(JobError, match="unknown key 'landmark' for Nystrom; did you mean 'landmarks'"):
        feature_maps.built("Nystrom:landmark=uniform", GIVEN)
    with pytest.raises(InputError, match="unknown sampling 'cubic'"):
        feature_maps.built("FourierFeatures:sampling=cubic", GIVEN)


def test_digits_are_split_and_standardised():
    split = feature_maps.digits_split(300, 100)
    assert split.x.shape == (300, 64)
    assert split.x_test.shape == (100, 64)
    assert split.x.dtype == "float32"
    np.testing.assert_allclose(split.x.mean(axis=0), 0, atol=1e-5)
    assert (np.bincount(split.labels) == 30).all()
    assert len(feature_maps.digits_split(10_000, 2000).x) == 1740 - feature_maps.DIGITS_TEST


@pytest.mark.parametrize("components", [50, 400])
def test_primal_and_dual_ridge_agree(components):
    split = feature_maps.digits_split(200, 100)
    phi, phi_test = (FourierFeatures(components, 0.01)(side).astype("float64") for side in (split.x, split.x_test))
    alpha, accuracy = feature_maps.primal_accuracy(phi, phi_test, split)
    assert (alpha, accuracy) == pytest.approx(feature_maps.dual_accuracy(phi @ phi.T, phi_test @ phi.T, split))


def test_the_comparison_prints_a_line_for_each_map(tmp_path, capsys):
    names = ["NTKRandomFeatures", "Nystrom:landmarks=leverage", "FourierFeatures"]
    a = feature_maps.parsed(
        ["--data", str(tmp_path / "none"), "--train", "150", "--test", "60", "--components", "100", "--maps", *names]
    )
    feature_maps.compare(a)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("digits (there is no dataset")
    assert [line.split(":")[0] for line in lines[1:] if not line.startswith(" ")] == ["exact NTK", "exact RBF"]
    assert [line.split()[0] for line in lines if line.startswith(" ")] == names
    accuracies = [float(line.split("accuracy ")[1].split("%")[0]) for line in lines[1:]]
    assert min(accuracies) > 60  # ten classes


@pytest.mark.slow
def test_speed_prints_rates_and_errors(tmp_path, capsys):
    a = feature_maps.parsed(
        [
            "--speed",
            "--data",
            str(tmp_path / "none"),
            "--rows",
            "50",
            "--images",
            "1",
            "--components",
            "128",
            "--convolutional-components",
            "32",
            "--seconds",
            "0",
        ]
    )
    feature_maps.speed(a)
    lines = capsys.readouterr().out.splitlines()
    assert "white noise" in lines[0]
    names = [line.split("  ")[0] for line in lines[1:]]
    assert names == [
        "NTKRandomFeatures, depth 1",
        "NTKRandomFeatures, structured",
        "NTKSketch, degree 8",
        "CNTKSketch, depth 3",
    ]
    errors = [float(part.split(";")[0]) for line in lines[1:] for part in line.split("error ")[1:]]
    assert len(errors) == 8
    assert max(errors) < 1
