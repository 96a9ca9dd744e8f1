"""CNTKSketch: against a twin that loops over pixels with the same random numbers, the exact kernels, and its own statements."""

from dataclasses import dataclass

import numpy as np
import pytest
from contracts import peak_bytes
from kernels.test_convolutional import images, twin
from reference import filter_pixels
from scipy.linalg import hadamard

from ntkdask import activations, seeds, threads
from ntkdask.errors import InputError
from ntkdask.features import CNTKSketch
from ntkdask.features.pixels.sums import draw_shifts
from ntkdask.kernels import NTK
from ntkdask.kernels.planes import reference as planes
from ntkdask.networks import (
    Activation,
    AvgPool,
    Conv,
    Dense,
    Flatten,
    GlobalAvgPool,
    LayerNorm,
    Network,
    Residual,
    convolutional,
    fully_connected,
    myrtle,
)

RELU = Activation("relu")
ABRELU = Activation(activations.get("abrelu", A=0.3, B=1.2))
GAP = GlobalAvgPool()
FROZEN = convolutional(2, trainable_ends=False)
POOLED = Network((Conv(2), RELU, AvgPool((1, 2)), Conv((3, 1), trainable=False), ABRELU, Flatten(), Dense(0.8)))
BIASED = Network((Conv(3, "circular", 1, 1.3, 0.2), RELU, Conv(2, "valid", 1, 0.9, 0.1), RELU, GAP, Dense(1.1, 0.3)))


# --- the algorithm, pixel by pixel --------------------------------------------------------------------------------


def naive(feature_map, x):
    """Features (n, width) by loops over pixels in float64, for chains of Conv, rectifier, AvgPool, a readout and a Dense."""
    rows = [_naive_image(feature_map, image) for image in x]
    return np.array(rows)


def _naive_image(feature_map, image):
    width, seed, layers = feature_map.width, feature_map.seed, feature_map.network.layers
    pixels = [[pixel / np.sqrt(len(pixel)) ** feature_map.network.scale_inputs for pixel in row] for row in image]
    phi, psi = pixels, None
    maps = iter(planes.tangent_maps(feature_map.network, image[None]) if feature_map.exact_norms else [])
    raw, readout, norms = True, feature_map.network.readout_position, None
    for position, layer in enumerate(layers):
        path = ("cntk", position) if position <= readout else ("cntk", "tail", position - readout - 1)
        if isinstance(layer, (Conv, Dense)):
            place = path
            phi, psi = _naive_weights(layer, phi, psi, raw, width, seed, path)
            raw = False
        elif isinstance(layer, Activation):
            norms = [m[0] for m in next(maps)] if feature_map.exact_norms else None
            phi, psi = _naive_activation(layer, phi, psi, norms, width, seed, place)
        elif isinstance(layer, Flatten):
            phi, psi = ([[_flattened(f, width, seed, path)]] if f is not None else None for f in (phi, psi))
        else:
            window = layer.window if isinstance(layer, AvgPool) else (len(phi), len(phi[0]))
            phi, psi = (_means(f, *window) if f is not None else None for f in (phi, psi))
    return psi[0][0]


def signs(width, seed, *path):
    return seeds.signs(seed, path, width)


def _naive_weights(layer, phi, psi, raw, width, seed, path):
    conv = (
        layer
        if isinstance(layer, Conv)
        else Conv(1, "valid", 1, layer.weight_variance, layer.bias_variance, layer.trainable)
    )
    count = conv.filter[0] * conv.filter[1]
    near = [
        filter_pixels(n, q, s, conv.padding)
        for n, q, s in zip((len(phi), len(phi[0])), conv.filter, conv.strides, strict=True)
    ]
    shape = len(near[0][0]), len(near[1][0])
    scale = np.sqrt(conv.weight_variance / count)

    def at(features, a, y, x):
        i, j = near[0][a // conv.filter[1]][y], near[1][a % conv.filter[1]][x]
        inside = i < len(features) and j < len(features[0])
        return features[i][j] if inside else np.zeros_like(features[0][0])

    def rolled(features, name, y, x):
        shifts = draw_shifts(seed, (*path, name), count, width)
        return scale * sum(np.roll(at(features, a, y, x), -shifts[a]) for a in range(count))

    mus, chis = [], []
    for y in range(shape[0]):
        mus.append([])
        chis.append([])
        for x in range(shape[1]):
            if raw:
                patch = np.zeros(width)
                direct = np.concatenate(
                    [*(scale * at(phi, a, y, x) for a in range(count)), [np.sqrt(conv.bias_variance)]]
                )
                patch[: direct.size] = direct
                mu = hadamard(width) @ (signs(width, seed, *path, "inputs") * patch) / np.sqrt(width)
            else:
                mu = rolled(phi, "shifts", y, x)
                mu = mu + np.sqrt(conv.bias_variance / width) * signs(width, seed, *path, "bias")
            chi = np.zeros(width) if psi is None else rolled(psi, "tangent shifts", y, x)
            if conv.trainable:
                chi = chi + signs(width, seed, *path, "trained") * mu
            mus[-1].append(mu)
            chis[-1].append(chi)
    return mus, chis if conv.trainable or psi is not None else None


def _naive_activation(layer, mus, chis, norms, width, seed, path):
    low, high = layer.sigma.slopes
    normals = seeds.normals(seed, (*path, "normals"), 1, width)[0]
    transform = hadamard(width)
    new_phi, new_psi = [], [] if chis is not None else None
    for y, row in enumerate(mus):
        new_phi.append([])
        if chis is not None:
            new_psi.append([])
        for x, mu in enumerate(row):
            z = transform @ (normals * mu)
            slope = np.sqrt(layer.gain) * np.where(z > 0, high, np.where(z < 0, -low, (high - low) / 2))
            phi = signs(width, seed, *path, "signs") * slope * z / np.sqrt(width)
            if norms is not None:
                a = np.sqrt(norms[0][y, x])
                phi = _to_norm(phi, layer.gain * layer.sigma.dual(a, a, 1.0))
            new_phi[-1].append(phi)
            if chis is not None:
                psi = signs(width, seed, *path, "tangent signs") * slope * (transform @ chis[y][x]) / np.sqrt(width)
                if norms is not None:
                    psi = _to_norm(psi, norms[1][y, x] * layer.gain * layer.sigma.dual_derivative(a, a, 1.0))
                new_psi[-1].append(psi)
    return new_phi, new_psi


def _to_norm(vector, square):
    own = np.linalg.norm(vector)
    return vector * (np.sqrt(square) / own) if own > 0 else vector


def _means(features, a, b):
    f = np.array(features)
    h, w, width = f.shape
    return list(map(list, f.reshape(h // a, a, w // b, b, width).mean(axis=(1, 3))))


def _flattened(features, width, seed, path):
    vectors = [vector for row in features for vector in row]
    total = sum(vector * signs(width, seed, *path, "pixel", p) for p, vector in enumerate(vectors))
    return total / np.sqrt(len(vectors))


@pytest.mark.parametrize("exact_norms", [True, False])
@pytest.mark.parametrize(
    "network", [FROZEN, convolutional(2), POOLED, BIASED], ids=["frozen", "trained", "pooled", "biased"]
)
def test_the_twin_with_the_same_random_numbers(network, exact_norms):
    x = images(3, (3, 4, 2))
    x[1] = 0
    feature_map = CNTKSketch(network, 64, seed=5, exact_norms=exact_norms)
    assert feature_map.width == 64
    expected = naive(feature_map, x)
    np.testing.assert_allclose(feature_map(x), expected, rtol=0, atol=1e-11 * np.abs(expected).max())


# --- what it converges to -----------------------------------------------------------------------------------------


def error(feature_map, x, count=4):
    """Relative Frobenius error, root mean square over seeds."""
    exact = feature_map.target(x)
    found = []
    for seed in range(count):
        phi = feature_map.replace(seed=seed)(x)
        found.append(np.linalg.norm(phi @ phi.T - exact) / np.linalg.norm(exact))
    return np.sqrt(np.mean(np.square(found)))


def correlated_images(n, shape=(6, 6, 3), seed=0):
    """Images with one colour each besides noise, as photographs have: neighbouring pixels are much alike."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 1, 1, shape[2])) + 0.5 * rng.standard_normal((n, *shape))


NETWORKS = {
    "frozen ends": convolutional(3, trainable_ends=False),
    "trained": convolutional(2, weight_variance=1.3),
    "flatten": convolutional(2, readout="flatten"),
    "pooled": POOLED,
    "biased": BIASED,
    "valid abrelu": convolutional(2, (2, 3), "valid", activation=ABRELU.sigma),
    "normalised gaussian": convolutional(2, activation="normalized_gaussian"),
    "not normalised": convolutional(2, activation="gelu", normalize=False, scale_inputs=True),
    "erf": convolutional(2, activation="erf"),
    "step": convolutional(1, activation="step"),
    "strided": Network((Conv(3, stride=2), RELU, Conv(2, stride=(1, 2)), RELU, GAP, Dense())),
    "residual": Network(
        (Conv(3), Residual((RELU, Conv(3)), (Conv(1),)), Residual((RELU, Conv(3))), RELU, GAP, Dense())
    ),
    "residual inputs": Network((Residual((Conv(3),), (Conv(1),)), RELU, GAP, Dense())),
    "normed": Network((Conv(3), LayerNorm(), RELU, Conv(3, trainable=False), Conv(1), RELU, Flatten(), Dense())),
    "pooled inputs": Network((AvgPool(2), Conv(2), AvgPool((3, 1)), RELU, GAP, Dense())),
    "tail": Network((Conv(3), RELU, GAP, Dense(), RELU, Dense(), LayerNorm(), RELU, Dense(trainable=False))),
    "linear": convolutional(0),
    "linear flatten": convolutional(0, readout="flatten"),
}
SERIES = ["trained", "normalised gaussian", "not normalised", "biased", "residual", "tail"]


@pytest.mark.parametrize(
    ("name", "method"),
    [(n, "random") for n in NETWORKS]
    + [
        pytest.param(n, m, marks=() if i % 2 else pytest.mark.slow)
        for i, n in enumerate(SERIES)
        for m in ("mixed", "sketch")
    ],
)
def test_the_error_falls(name, method):
    feature_map, x = CNTKSketch(NETWORKS[name], 64, method=method), correlated_images(6)
    small, large = error(feature_map, x, 6), error(feature_map.replace(n_components=1024), x)
    floor = feature_map.truncation_error
    assert large <= 0.2 + floor
    assert large <= 0.6 * small + floor + 1e-12  # 1/√16 = 0.25


def test_networks_whose_tangent_vanishes():
    network = Network((Conv(3), Activation("step"), GAP, Dense(trainable=False)))
    x = images(3)
    assert (CNTKSketch(network, 8)(x) == 0).all()
    assert (NTK(network)(x) == 0).all()


@pytest.mark.parametrize("method", ["random", "mixed"])
def test_myrtle(method):
    x = correlated_images(4, (8, 8, 3))
    assert error(CNTKSketch(myrtle(5), 512, method=method), x, 3) < 0.2


@pytest.mark.parametrize(
    "network", [convolutional(1), convolutional(1, 2, "valid", "flatten", bias_variance=0.2)], ids=["gap", "flatten"]
)
def test_depth_one_is_unbiased_without_exact_norms(network):
    x, count = correlated_images(3, (3, 4, 2)), 600
    exact = twin(network, x)[1]
    feature_map = CNTKSketch(network, 64, exact_norms=False)
    products = np.array([(phi := feature_map.replace(seed=seed)(x)) @ phi.T for seed in range(count)])
    spread = products.std(axis=0, ddof=1) / np.sqrt(count)
    assert (np.abs(products.mean(axis=0) - exact) <= 4 * spread).all()
    assert (4 * spread.diagonal() <= 0.1 * exact.diagonal()).all()  # the test has power


@pytest.mark.parametrize("method", ["mixed", "sketch"])
def test_depth_one_is_unbiased_for_the_truncated_kernel(method):
    """The series of relu to degree 2, whose last term takes the rest: k = 1/π + c/2 + (½ − 1/π)c², k' = ½ + c/2."""
    x, count = correlated_images(3, (3, 4, 2)), 600
    feature_map = CNTKSketch(convolutional(1, readout="flatten"), 64, method=method, degree=2, exact_norms=False)

    def box(s):
        return sum(s[i : i + 3, j : j + 4] for i in range(3) for j in range(3)) / 9

    exact = np.zeros((3, 3))
    for i, j in np.ndindex(3, 3):
        s, own, other = (box(np.pad((a * b).sum(axis=2), 1)) for a, b in ((x[i], x[j]), (x[i], x[i]), (x[j], x[j])))
        c = s / np.sqrt(own * other)
        slope = (1 - np.arccos(np.clip(c, -1, 1)) / np.pi) if method == "mixed" else (1 + c) / 2
        k = np.sqrt(own * other) * (1 / np.pi + c / 2 + (0.5 - 1 / np.pi) * c * c)
        exact[i, j] = (s * slope + k).mean()
    products = np.array([(phi := feature_map.replace(seed=seed)(x)) @ phi.T for seed in range(count)])
    spread = products.std(axis=0, ddof=1) / np.sqrt(count)
    assert (np.abs(products.mean(axis=0) - exact) <= 4 * spread).all()
    assert (4 * spread.diagonal() <= 0.1 * exact.diagonal()).all()
    assert np.abs(exact - feature_map.target(x)).max() <= 1.5 * feature_map.truncation_error * exact.max()


def test_exact_norms_are_exact():
    """With one pixel at the end and nothing added after it, the kernel's diagonal is that pixel's norm."""
    network = Network((Conv(3), RELU, Conv((4, 5), "valid"), ABRELU, Flatten(), Dense(0.7, trainable=False)))
    x = images(5, (4, 5, 2))
    feature_map = CNTKSketch(network, 32)
    phi = feature_map.replace(n_components=feature_map.width)(x)
    np.testing.assert_allclose((phi**2).sum(axis=1), NTK(network).diagonal(x), rtol=1e-12)


def test_exact_norms_halve_the_error():
    x = correlated_images(6)
    feature_map = CNTKSketch(convolutional(3, trainable_ends=False), 256)
    assert error(feature_map, x, 8) < 0.7 * error(feature_map.replace(exact_norms=False), x, 8)


def test_truncation_error():
    network = convolutional(2)
    assert CNTKSketch(network, 8).truncation_error == 0
    for method in ("mixed", "sketch"):
        errors = [CNTKSketch(network, 8, method=method, degree=degree).truncation_error for degree in (1, 2, 4, 8)]
        assert sorted(errors, reverse=True) == errors
        assert errors[0] > 2 * errors[-1] > 0
    # κ₀ is what a series is bad at
    assert (
        CNTKSketch(network, 8, method="mixed").truncation_error
        < 0.3 * CNTKSketch(network, 8, method="sketch").truncation_error
    )


@pytest.mark.parametrize("name", ["trained", "pooled", "residual", "flatten", "normed", "erf"])
def test_workspace_is_declared(name):
    """Images large enough that one of them is a block."""
    feature_map, x = CNTKSketch(NETWORKS[name], 500), images(3, (24, 24, 2), dtype="float32")
    planned = feature_map.workspace_bytes(len(x), 4, x.shape[1:])
    peak = peak_bytes(lambda: feature_map(x), planned)
    assert peak <= planned
    assert planned <= 4 * peak


@pytest.mark.parametrize("exact_norms", [True, False])
def test_the_steps_of_a_device_are_those_of_the_loops(exact_norms, monkeypatch):
    x = images(3, (4, 4, 2))
    x[1] = 0
    feature_map = CNTKSketch(POOLED, 64, exact_norms=exact_norms)
    expected = feature_map(x)
    monkeypatch.setattr("ntkdask.features.pixels.duals.is_device_array", lambda a: True)
    np.testing.assert_allclose(feature_map(x), expected, rtol=0, atol=1e-13 * np.abs(expected).max())


# --- inputs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["random", "sketch"])
def test_batches_and_threads_change_no_bit(method, monkeypatch):
    x = images(9, (5, 4, 3), dtype="float32")
    feature_map = CNTKSketch(BIASED, 128, method=method)
    whole = feature_map(x)
    with threads.limited(1):
        np.testing.assert_array_equal(feature_map(x), whole)
    monkeypatch.setattr("ntkdask.features.cntk_sketch.HELD_BYTES", 1)
    monkeypatch.setattr("ntkdask.features.pixels.layers.BLOCK_BYTES", 128 * 4 * 7)
    monkeypatch.setattr("ntkdask.features.pixels.layers.THREAD_ELEMENTS", 1)
    np.testing.assert_array_equal(feature_map(x), whole)


def test_zero_and_constant_images():
    x = images(4)
    x[0], x[1], x[2] = 0, 1, 0
    x[2, 3, 3] = 2  # one pixel: most patches are empty
    for network in (convolutional(2), BIASED, convolutional(1, activation="normalized_gaussian")):
        for method in ("random", "mixed", "sketch"):
            feature_map = CNTKSketch(network, 512, method=method)
            phi = feature_map(x)
            assert np.isfinite(phi).all()
            exact = feature_map.target(x)
            close = np.abs(phi @ phi.T - exact) <= 0.35 * np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
            assert close.all()
    assert (CNTKSketch(convolutional(2), 64)(x)[0] == 0).all()


def test_scaled_inputs():
    x = images(3)
    plain, scaled = (CNTKSketch(convolutional(2, scale_inputs=scale), 64) for scale in (False, True))
    np.testing.assert_allclose(scaled(x), plain(x / np.sqrt(3)), rtol=0, atol=1e-12)


def test_many_channels_are_sketched():
    """Patches of 9·40 channels do not fit 64 features."""
    feature_map, x = CNTKSketch(convolutional(1), 64), correlated_images(4, (3, 3, 40))
    assert error(feature_map.replace(n_components=1024), x) < 0.15
    assert np.isfinite(feature_map(x)).all()


def test_large_filters_widen_the_pixels():
    network = convolutional(1, 9)
    feature_map = CNTKSketch(network, 16)
    assert feature_map.width == 512
    assert feature_map(images(2)).shape == (2, 16)


def test_images_that_are_not_square_and_do_not_fit():
    assert CNTKSketch(myrtle(5), 16)(images(2, (4, 8, 1))).shape == (2, 16)
    with pytest.raises(InputError, match=r"windows of 2×2 do not divide images of 3×4"):
        CNTKSketch(myrtle(5), 16)(images(2, (3, 4, 1)))
    with pytest.raises(InputError, match="filter of 3×3 with padding 'valid' does not fit"):
        CNTKSketch(convolutional(1, padding="valid"), 16)(images(2, (2, 4, 1)))


# --- bad input ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unknown(activations.ActivationFunction):
    """An activation of a user's own, whose derivative nobody has written down."""

    def __call__(self, t):
        return t


KINKED = convolutional(1, activation=activations.from_function(lambda t: abs(t - 1), tolerance=1e-2), normalize=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": fully_connected(1)}, "takes vectors.*NTKSketch"),
        ({"network": "relu"}, "give a Network"),
        ({"network": Network((Conv(trainable=False), RELU, GAP, Dense(trainable=False)))}, "no layer .* trainable"),
        ({"method": "sketches"}, "did you mean 'sketch'"),
        ({"method": "random", "degree": 0}, "degree is 0"),
        ({"n_components": 0}, "n_components is 0"),
        ({"exact_norms": 1}, "exact_norms is 1"),
        ({"network": KINKED, "method": "sketch"}, "kink"),
        ({"network": convolutional(1, activation=Unknown(), normalize=False)}, "derivative of .* is not known"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        CNTKSketch(**{"network": convolutional(1), "n_components": 8, **arguments})


@pytest.mark.parametrize("shape", [(4, 4), (0, 4, 3), (3, 32, 32)])
def test_rows_that_are_no_images_are_refused(shape):
    with pytest.raises(InputError, match="takes images"):
        CNTKSketch(convolutional(1), 8)(np.ones((2, *shape)))
    with pytest.raises(InputError, match="takes images"):
        CNTKSketch(convolutional(1), 8).workspace_bytes(2, 4, shape)
