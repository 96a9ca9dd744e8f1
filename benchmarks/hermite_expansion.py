"""Han et al. 2022, Figure 1: dual kernels by truncated Hermite expansion against Monte Carlo, relative Frobenius errors.

n = 1 000 rows of 256 entries of standard deviation 1/√256, degrees 1 to 20. Two expansions: `expanded` takes the Hermite coefficients
of σ(a·) at every row's own length a (what `HermiteSketch` does), `polynomial` those at length 1 and then Theorem 1's radial functions,
as the paper. `Monte Carlo` has as many samples as fit the processor time of the expansion of that degree, at least 16.

Run with `python -m benchmarks.hermite_expansion`; a few minutes for ten trials. Seconds are of one thread's processor time.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ntkdask import activations, threads
from ntkdask.activations import ActivationFunction
from ntkdask.activations.expansion import series
from ntkdask.activations.polynomial import hermite_weights
from ntkdask.features.sketching.radial_functions import radial_functions

NAMES = ("relu", "abs", "sin", "gaussian", "erf", "gelu")
SAMPLES = tuple(2**k for k in range(4, 14))


@dataclass(frozen=True)
class Curve:
    """Relative errors and seconds at each degree or number of samples."""

    errors: np.ndarray
    seconds: np.ndarray


def inputs(n: int, d: int, rng: np.random.Generator) -> np.ndarray:
    """(n, d) rows with lengths near 1."""
    return rng.standard_normal((n, d)) / math.sqrt(d)


def relative_error(found: np.ndarray, exact: np.ndarray) -> float:
    """‖found − exact‖_F/‖exact‖_F."""
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def exact_kernel(sigma: ActivationFunction, x: np.ndarray) -> np.ndarray:
    """K_σ (n, n) of the rows by the closed form."""
    a = np.linalg.norm(x, axis=1)
    return sigma.dual(a[:, None], a, (x / a[:, None]) @ (x / a[:, None]).T)


def theorem_1(sigma: ActivationFunction, a: np.ndarray, degree: int) -> np.ndarray:
    """(degree + 1, n): r_{σ̃,ℓ}(a) of the polynomial σ̃ that is the Hermite expansion of σ at length 1, cut after `degree`."""
    found = radial_functions(sigma, np.ones(1), degree)[:, 0]
    scaled = [value / math.sqrt(math.factorial(low)) for low, value in enumerate(found)]
    return np.stack(hermite_weights(np.polynomial.hermite_e.herme2poly(scaled), a))


Radial = Callable[[ActivationFunction, np.ndarray, int], np.ndarray]


def expansions(sigma: ActivationFunction, x: np.ndarray, exact: np.ndarray, degrees: int, radial: Radial) -> Curve:
    """K ≈ Σ_{ℓ<=q} r_ℓ(a)r_ℓ(b)c^ℓ for q = 1 … degrees."""
    errors, seconds = np.empty(degrees), np.empty(degrees)
    for degree in range(1, degrees + 1):
        start = time.thread_time()
        a = np.linalg.norm(x, axis=1)
        unit = x / a[:, None]
        r = radial(sigma, a, degree)
        found = series(r[:, :, None], r[:, None, :], unit @ unit.T)
        seconds[degree - 1] = time.thread_time() - start
        errors[degree - 1] = relative_error(found, exact)
    return Curve(errors, seconds)


def monte_carlo(sigma: ActivationFunction, x: np.ndarray, exact: np.ndarray, rng: np.random.Generator) -> Curve:
    """K ≈ (1/m)·Σ_i σ(⟨w_i, x⟩)σ(⟨w_i, y⟩) for m in `SAMPLES`."""
    errors, seconds = np.empty(len(SAMPLES)), np.empty(len(SAMPLES))
    for i, m in enumerate(SAMPLES):
        start = time.thread_time()
        features = sigma(x @ rng.standard_normal((x.shape[1], m)))
        found = features @ features.T / m
        seconds[i] = time.thread_time() - start
        errors[i] = relative_error(found, exact)
    return Curve(errors, seconds)


def table(sigma: ActivationFunction, n: int, d: int, degrees: int, trials: int, seed: int) -> list[str]:
    """The lines of one activation: averages over trials."""
    curves: dict[str, list[Curve]] = {"expanded": [], "polynomial": [], "sampled": []}
    for trial in range(trials):
        rng = np.random.default_rng((seed, trial))
        x = inputs(n, d, rng)
        exact = exact_kernel(sigma, x)
        curves["expanded"].append(expansions(sigma, x, exact, degrees, radial_functions))
        curves["polynomial"].append(expansions(sigma, x, exact, degrees, theorem_1))
        curves["sampled"].append(monte_carlo(sigma, x, exact, rng))
    mean = {
        name: Curve(np.mean([c.errors for c in found], axis=0), np.mean([c.seconds for c in found], axis=0))
        for name, found in curves.items()
    }
    lines = [f"{sigma.name:>10}  degree   expanded  polynomial  seconds  Monte Carlo (samples)"]
    for i in range(degrees):
        fits = np.nonzero(mean["sampled"].seconds <= mean["expanded"].seconds[i])[0]
        j = int(fits[-1]) if fits.size else 0
        lines.append(
            f"{'':>10}  {i + 1:6d}  {mean['expanded'].errors[i]:9.1e}  {mean['polynomial'].errors[i]:10.1e}  "
            f"{mean['expanded'].seconds[i]:7.3f}  {mean['sampled'].errors[j]:11.1e} ({SAMPLES[j]})"
        )
    most = mean["sampled"]
    lines.append(f"{'':>10}  Monte Carlo with {SAMPLES[-1]} samples: {most.errors[-1]:.1e} in {most.seconds[-1]:.3f} s")
    return lines


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--degrees", type=int, default=20)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--activations", nargs="+", default=list(NAMES))
    a = parser.parse_args()
    start = time.perf_counter()
    print(f"n = {a.rows}, d = {a.features}, {a.trials} trials, one thread, load {os.getloadavg()[0]:.1f}")
    with threads.limited(1):
        for name in a.activations:
            lines = table(activations.get(name), a.rows, a.features, a.degrees, a.trials, 0)
            print("\n".join(lines), flush=True)
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
