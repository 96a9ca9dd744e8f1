"""Feature maps beside the exact kernels they approximate: accuracy, time and relative error on one split of CIFAR-10 or the digits.

    python -m benchmarks.feature_maps [--data data/cifar10.zarr] [--train 10000] [--test 2000] [--components 8192] [--depth 1]
                                      [--maps NTKRandomFeatures NTKSketch:degree=16 Nystrom:landmarks=leverage ...]
    python -m benchmarks.feature_maps --speed [--rows 2000] [--images 2] [--components 4096] [--convolutional-components 512]

Images: as `benchmarks.cifar_cntk` imports them, standardised per channel and flattened; without them scikit-learn's digits,
standardised. A map is a registered name and arguments, NAME:key=value,key=value; what it needs of network, kernel and gamma is
given: the fully connected ReLU network of --depth, its NTK, and 1/median squared distance. Ridge on one-hot targets with an
intercept, alpha by leave-one-out on the training rows, for features and exact kernels alike; relative error is that of 1 000
training rows.

--speed: rows and images a second of NTKRandomFeatures, NTKSketch and CNTKSketch against the same algorithms written out in NumPy and
SciPy (`_dense_maps`), float32, with the relative Frobenius error of both: on random rows of 784 numbers at depth 1, and at depth 3
on 32×32×3 images of the dataset, or white noise (error on 12×12 crops). "structured" is with exact norms. Wall clock, least of the
calls: the machine may be shared, so ratios matter more than rates.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.spatial.distance import pdist
from sklearn.datasets import load_digits

import ntkdask as nd
from benchmarks import _dense_maps
from benchmarks.cifar_cntk import ALPHAS, Split, balanced, read_split
from ntkdask import registry, threads
from ntkdask.errors import UserError
from ntkdask.features import CNTKSketch, NTKRandomFeatures, NTKSketch
from ntkdask.features.base import FeatureMap
from ntkdask.features.fitting import learns
from ntkdask.kernels import NTK, Kernel
from ntkdask.networks import convolutional, fully_connected
from ntkdask.solvers.dual import DualEigh

SEED = 0
DEFAULT_MAPS = (
    "NTKRandomFeatures",
    "NTKRandomFeatures:sampling=spherical",
    "NTKSketch",
    "HomogeneousSketch",
    "GradientFeatures",
    "FourierFeatures",
    "FourierFeatures:sampling=orthogonal",
    "Nystrom",
    "Nystrom:landmarks=leverage",
    "Nystrom:landmarks=kmeans++",
)
DIGITS_TEST = 500


def digits_split(n: int, n_test: int) -> Split:
    """The digits, standardised with the training rows' means and deviations; fewer rows than asked for where there are no more."""
    data = load_digits()
    order = balanced(data.target, min(n + min(n_test, DIGITS_TEST), 1740), np.random.default_rng(SEED))
    n = len(order) - min(n_test, DIGITS_TEST)
    x, labels = data.data[order].astype(np.float32), data.target[order]
    mean, deviation = x[:n].mean(axis=0), x[:n].std(axis=0)
    x = (x - mean) / np.where(deviation > 0, deviation, 1)
    return Split(x[:n], labels[:n], x[n:], labels[n:], 10)


def flat_split(url: str, n: int, n_test: int) -> tuple[str, Split]:
    """(what it is, rows of features): the images at `url`, or the digits."""
    try:
        split = read_split(url, n, n_test)
    except UserError as error:
        return f"digits ({error})", digits_split(n, n_test)
    x, x_test = (side.reshape(len(side), -1) for side in (split.x, split.x_test))
    return url, dataclasses.replace(split, x=x, x_test=x_test)


def built(text: str, given: dict[str, Any]) -> FeatureMap:
    """The map of NAME:key=value,…; values are JSON or strings. `given`: arguments for those fields that it has and the text omits.

    JobError for names and keys that are not known.
    """
    name, _, rest = text.partition(":")
    asked = {key: _value(value) for key, _, value in (part.partition("=") for part in rest.split(",") if part)}
    fields = {f.name: f for f in dataclasses.fields(registry.lookup(name, "feature map"))}
    # HomogeneousSketch calls a part of the network's kernels `kernel`, and has a default for it
    missing = {key for key, field in fields.items() if field.default is dataclasses.MISSING} | {"gamma"}
    filled = {key: value for key, value in given.items() if key in fields and key in missing}
    return registry.from_config({"type": name, **asked}, "feature map", **filled)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def dual_accuracy(kernel: np.ndarray, cross: np.ndarray, split: Split) -> tuple[float, float]:
    """(alpha of the least leave-one-out error, accuracy on the test rows)."""
    scale = float(np.mean(np.diag(kernel)))
    ridge = DualEigh.factorise(kernel, split.targets)
    alpha = scale * ALPHAS[int(np.argmin(ridge.leave_one_out_path(list(scale * ALPHAS))))]
    predicted = ridge.solve(alpha).predict(cross).argmax(axis=1)
    return alpha, float(np.mean(predicted == split.labels_test))


def primal_accuracy(phi: np.ndarray, phi_test: np.ndarray, split: Split) -> tuple[float, float]:
    """The same from features, in the primal where there are fewer of them than rows."""
    if phi.shape[1] >= len(phi):
        return dual_accuracy(phi @ phi.T, phi_test @ phi.T, split)
    scale = float((phi * phi).sum(axis=1).mean())
    model = nd.RidgeClassifier(alphas=tuple(scale * ALPHAS), selection="loo").fit(phi, split.labels)
    return float(model.alpha_), float(model.score(phi_test, split.labels_test))


def exact_line(kernel: Kernel, split: Split) -> str:
    """Accuracy and seconds of an exact kernel."""
    start = time.perf_counter()
    matrix, cross = kernel(split.x), kernel(split.x_test, split.x)
    seconds = time.perf_counter() - start
    alpha, accuracy = dual_accuracy(matrix, cross, split)
    return f"exact {type(kernel).__name__}: accuracy {accuracy:.2%}, alpha {alpha:.3g}, kernel {seconds:.1f} s"


def map_line(text: str, feature_map: FeatureMap, split: Split) -> str:
    """Accuracy, seconds and error of one map."""
    start = time.perf_counter()
    if learns(feature_map):
        feature_map = feature_map.fit(split.x, split.labels)  # type: ignore[attr-defined]
    fitted = time.perf_counter()
    phi, phi_test = feature_map(split.x), feature_map(split.x_test)
    seconds, fitting = time.perf_counter() - fitted, fitted - start
    alpha, accuracy = primal_accuracy(phi, phi_test, split)
    error = nd.approximation_error(feature_map, split.x)
    return (
        f"  {text:40s} m {phi.shape[1]:6d}  accuracy {accuracy:.2%}  alpha {alpha:.3g}  features {seconds:.2f} s"
        f"{f' + {fitting:.2f} s fit' if learns(feature_map) or fitting > 0.01 else ''}  "
        f"relative error {error.frobenius:.4f} (spectral {error.spectral:.4f}), ε of eq. 13 {error.epsilon:.3f}"
    )


def compare(a: argparse.Namespace) -> None:
    """Every map on the one split, beneath its exact kernel."""
    name, split = flat_split(a.data, a.train, a.test)
    distance = float(np.median(pdist(split.x[:1000], "sqeuclidean")))
    network = fully_connected(a.depth)
    given = {"network": network, "kernel": NTK(network), "gamma": 1 / distance, "n_components": a.components}
    print(
        f"{name}: {len(split.x)} training and {len(split.x_test)} test rows of {split.x.shape[1]}, {a.threads} threads, "
        f"load {os.getloadavg()}"
    )
    by_target: dict[Kernel, list[tuple[str, FeatureMap]]] = {}
    for text in a.maps:
        feature_map = built(text, given)
        by_target.setdefault(feature_map.target, []).append((text, feature_map))
    for target, maps in by_target.items():
        print(exact_line(target, split), flush=True)
        for text, feature_map in maps:
            try:
                line = map_line(text, feature_map, split)
            except (
                UserError
            ) as error:  # gradients of a width-1 network may have more parameters than components were asked for
                line = f"  {text:40s} refused: {error}"
            print(line, flush=True)


def seconds_of(call: Callable[[], object], budget: float) -> float:
    """The least of the calls that fit `budget` seconds, at least two after one that compiles and draws."""
    call()
    times: list[float] = []
    while len(times) < 2 or sum(times) < budget:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def relative_error(features: Callable[[int], np.ndarray], exact: np.ndarray) -> float:
    """Mean over three seeds of ‖ΦΦᵀ − K‖_F/‖K‖_F."""
    found = [(phi := features(seed).astype(np.float64)) @ phi.T for seed in range(3)]
    return float(np.mean([np.linalg.norm(k - exact) for k in found]) / np.linalg.norm(exact))


def speed_images(url: str, n: int) -> tuple[str, np.ndarray]:
    """(what they are, (n, 32, 32, 3) float32): training images at `url`, else white noise, on which any map looks different."""
    try:
        return url, read_split(url, max(n, 500), 10).x[:n]
    except UserError:
        return "white noise", np.random.default_rng(SEED).standard_normal((n, 32, 32, 3)).astype(np.float32)


def speed(a: argparse.Namespace) -> None:
    """Rates and errors of three maps and of the same algorithms written out."""
    m, c = a.components, a.convolutional_components
    rows = np.random.default_rng(SEED).standard_normal((a.rows, 784)).astype(np.float32)
    what, images = speed_images(a.data, max(a.images, 12))
    few, images, crops = rows[:500], images[: a.images], images[:12, 10:22, 10:22]
    shallow, deep = fully_connected(1), convolutional(3)
    dense = _dense_maps
    cases: list[tuple[str, FeatureMap, Callable[..., np.ndarray], np.ndarray, np.ndarray]] = [
        (
            "NTKRandomFeatures, depth 1",
            NTKRandomFeatures(shallow, m),
            lambda x, s: dense.random_features(x, m, 1, s),
            rows,
            few,
        ),
        (
            "NTKRandomFeatures, structured",
            NTKRandomFeatures(shallow, m, sampling="structured", exact_norms=True),
            lambda x, s: dense.random_features(x, m, 1, s),
            rows,
            few,
        ),
        (
            "NTKSketch, degree 8",
            NTKSketch(shallow, m, degree=8),
            lambda x, s: dense.polynomial_sketch(x, m, 1, 8, s),
            rows,
            few,
        ),
        (
            "CNTKSketch, depth 3",
            CNTKSketch(deep, c),
            lambda x, s: dense.convolutional_sketch(x, c, 3, 4, s),
            images,
            crops,
        ),
    ]
    print(
        f"{a.threads} threads, load {os.getloadavg()}, float32; images: {what}; error: relative Frobenius, mean of three seeds"
    )
    for name, feature_map, written_out, x, sample in cases:
        own = seconds_of(lambda f=feature_map, x=x: f(x), a.seconds)
        plain = seconds_of(lambda f=written_out, x=x: f(x, 0), a.seconds)
        exact = feature_map.target(sample.astype(np.float64))
        own_error = relative_error(lambda s, f=feature_map, x=sample: f.replace(seed=s)(x), exact)
        plain_error = relative_error(lambda s, f=written_out, x=sample: f(x, s), exact)
        print(
            f"{name:34s} m {feature_map.n_components:6d}: {len(x) / own:10.4g} a second, error {own_error:.4f}; "
            f"written out {len(x) / plain:10.4g} a second, error {plain_error:.4f}; {plain / own:.1f} times",
            flush=True,
        )


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/cifar10.zarr")
    parser.add_argument("--train", type=int, default=10_000)
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--components", type=int, default=8192)
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--maps", nargs="+", default=list(DEFAULT_MAPS), metavar="MAP")
    parser.add_argument("--threads", type=int, default=threads.current())
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--convolutional-components", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement with --speed")
    return parser.parse_args(arguments)


def main() -> None:
    """Compare or measure."""
    a = parsed()
    with threads.limited(a.threads):
        (speed if a.speed else compare)(a)


if __name__ == "__main__":
    main()
