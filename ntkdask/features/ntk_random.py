"""Random features of ReLU neural tangent and NNGP kernels: Zandieh et al. 2021, Algorithm 2.

For every fully connected ReLU network of MATH.md §1 (biases, weight variances, frozen layers, raw or normalised ReLU, scaled
inputs). Each hidden layer multiplies the tangent features ψ by step features φ̇ of the covariance, compressed by a TensorSRHT,
and puts the layer's ReLU features φ beside them. Everything is homogeneous, so rows need no normalisation: norms (and biases,
as a constant feature) are carried by φ. Works on row blocks that stay in cache (`ntk_layers`); called by workflows on tiles.
With `sampling="optimized"` the features of every layer are chosen by their alignment with the targets (`alignment`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np

from ntkdask.arrays import Array, flatten_rows, namespace, require_float
from ntkdask.cache import shared
from ntkdask.errors import InputError, nearest
from ntkdask.features.alignment import Alignment, Chosen, add_scores, scores_bytes
from ntkdask.features.arccosine import (
    Weights,
    drawing_bytes,
    product_bytes,
    relu_weights,
    require_sampling,
    step_weights,
    weights_bytes,
)
from ntkdask.features.base import require_components, row_blocks
from ntkdask.features.fitting import DataDependentMap, Learned, Sums, Training, TrainingBatch
from ntkdask.features.ntk_layers import (
    LayerWeights,
    ReluLayers,
    Widths,
    block_rows,
    readout_network,
    require_relu_network,
)
from ntkdask.kernels.neural import NNGP, NTK
from ntkdask.networks import Network
from ntkdask.registry import register

NAME = "NTKRandomFeatures"
SAMPLINGS = ("gaussian", "spherical", "gibbs", "structured", "optimized")
KERNELS = ("ntk", "nngp")


@register("feature map")
@dataclass(frozen=True)
class NTKRandomFeatures(DataDependentMap):
    """Features ψ with E⟨ψ(x), ψ(z)⟩ = Θ(x, z) at depth 1; above, random features of earlier layers leave a bias O(1/m).

    ψ ← φ ⊕ Q²(φ̇ ⊗ ψ), φ̇ = √(2/m₀)·step(W₀φ), φ = √(2/m₁)·relu(W₁φ); m₁ + m_s = n_components at every depth (a bias in
    the last layer takes one more, constant, component).

    Parameters
    ----------
    network : Network
        Fully connected, ReLU, ending in Dense.
    n_components : int
        Number of features.
    seed : int
        Seed of weights and sketches.
    n_step, n_relu : int, optional
        m₀ and m₁. None: the split measured best per second, see `default_widths`. With sampling="optimized" the largest numbers.
    sampling : {"gaussian", "spherical", "gibbs", "structured", "optimized"}
        The law of the ReLU weights. "spherical": the leverage-score sampling of Theorem 3 in exact form. "gibbs": the paper's
        sampler of it. "structured": ReLU and step weights by Walsh–Hadamard transforms, several times faster when rows have
        some hundred features or more (`sketching.structured`). "optimized": `fit` chooses, layer by layer and separately for φ̇
        and φ, the features that agree best with the targets, at most n_step and n_relu of them (Das & Maity 2025).
    kernel : {"ntk", "nngp"}
        The kernel that is approximated. The features of the NNGP are the last layer's φ; every layer has n_components of them.
    n_sweeps : int
        Sweeps of the Gibbs sampler.
    alignment : Alignment, optional
        How features are optimised; None: `Alignment` with its defaults. For sampling="optimized" alone.
    exact_norms : bool
        Whether φ(x) and Q²(φ̇ ⊗ ψ)(x) are scaled in every layer to the lengths that they have in the mean, so that ‖ψ(x)‖² =
        Θ(x, x) to rounding. Less error at the same width, and a bias O(1/n_components). Not with "optimized".

    Raises
    ------
    InputError
        For other networks, too few components and options that do not go together.

    Notes
    -----
    A map with sampling="optimized" has n_components features after `fit`, or only as many as were chosen where
    nothing is sketched (the NNGP). Its kernel depends on the targets and is not its `target`.

    References
    ----------
    Zandieh et al. 2021, Algorithm 2, eq. 11, 15; Das & Maity 2025.
    """

    needs_targets: ClassVar[bool] = True

    network: Network
    n_components: int
    seed: int = 0
    n_step: int | None = None
    n_relu: int | None = None
    sampling: str = "gaussian"
    kernel: str = "ntk"
    n_sweeps: int = 1
    alignment: Alignment | None = None
    exact_norms: bool = False

    def __post_init__(self) -> None:
        require_components(self.n_components)
        require_components(self.n_sweeps, "n_sweeps")
        require_sampling(self.sampling, SAMPLINGS)
        require_relu_network(self.network, NAME)
        if self.kernel not in KERNELS:
            raise InputError(f"{NAME}: unknown kernel {self.kernel!r}{nearest(str(self.kernel), KERNELS)}")
        if self.alignment is not None and (self.sampling != "optimized" or not isinstance(self.alignment, Alignment)):
            raise InputError(
                f"{NAME}: alignment is {self.alignment!r} with sampling={self.sampling!r}; give an Alignment, and only "
                'with sampling="optimized".'
            )
        if not isinstance(self.exact_norms, bool) or (self.exact_norms and self.sampling == "optimized"):
            raise InputError(
                f"{NAME}: exact_norms is {self.exact_norms!r} with sampling={self.sampling!r}; expected true or false, and false for "
                "optimised features, whose lengths follow from the targets."
            )
        _ = self.widths

    @property
    def target(self) -> NTK | NNGP:
        """The NTK, or the NNGP, of the network."""
        return NTK(self.network) if self.kernel == "ntk" else NNGP(self.network)

    @functools.cached_property
    def widths(self) -> Widths:
        """The numbers of step, ReLU and sketched features; for optimised features the largest numbers.

        Raises InputError where n_components does not leave room for them.
        """
        denses = self._layers.denses
        bias = int(denses[-1].bias_variance > 0)
        if not any(layer.trainable for layer in denses):
            raise InputError(f"{NAME}: no layer of the network is trainable, so its NTK is zero.")
        if not any(layer.trainable for layer in denses[:-1]):
            if self.kernel == "nngp" and (self.n_step is not None or self.n_relu is not None):
                raise InputError(f"{NAME}: n_step and n_relu are for the NTK; an NNGP has n_components ReLU features.")
            if self.n_components == bias:
                raise InputError(f"{NAME}: n_components={bias} leaves no feature beside the bias. Use at least 2.")
            return Widths(0, self.n_components - bias, 0)
        step, relu = default_widths(self.n_components)
        step = step if self.n_step is None else require_components(self.n_step, "n_step")
        relu = relu if self.n_relu is None else require_components(self.n_relu, "n_relu")
        sketch = self.n_components - relu - bias if denses[-1].trainable else self.n_components
        if sketch < 1 or relu < 1:
            raise InputError(
                f"{NAME}: n_components={self.n_components} leaves {sketch} sketched components beside "
                f"n_relu={relu} (and {bias} for the bias). Use n_components >= {relu + bias + 1} or a smaller n_relu."
            )
        return Widths(step, relu, sketch)

    @functools.cached_property
    def _layers(self) -> ReluLayers:
        network = self.network if self.kernel == "ntk" else readout_network(self.network)
        return ReluLayers(network, self.seed, self.exact_norms)

    def __call__(self, x: Array) -> Array:
        """Features of rows: (n, *s) → (n, n_components), of x's kind and dtype; InputError for a map that has yet to be fitted."""
        if self.sampling == "optimized":
            return super().__call__(x)
        x = flatten_rows(require_float(x))
        return self._blocks(x, self._drawn(x), [self.widths] * self._layers.depth)

    def _blocks(self, x: Array, weights: Sequence[LayerWeights], widths: Sequence[Widths]) -> Array:
        """Features of all the rows, block by block."""
        last, layer = self._layers.denses[-1], widths[-1]
        width = layer.sketch + (layer.relu + int(last.bias_variance > 0) if last.trainable else 0)
        out = namespace(x).empty((x.shape[0], width), x.dtype)
        for rows in row_blocks(x.shape[0], block_rows(widths, x.dtype.itemsize)):
            self._layers.block_into(x[rows], weights, out[rows])
        return out

    def _drawn(self, x: Array) -> list[LayerWeights]:
        """The weights of every hidden layer, held for a whole call.

        Drawing them again for each block could take longer than using them. The cache of the process keeps them between calls
        where it may.
        """
        shared.reserve(2 * self._weights_bytes(x.dtype.itemsize, x.shape[1]))
        w, layers, out = self.widths, self._layers, []
        for h in range(layers.depth):
            inputs = layers.n_inputs(h, x.shape[1], w.relu)
            relu = self._candidates(h, "relu", inputs, w.relu, x) if layers.needs_relu(h) else None
            step = self._candidates(h, "step", inputs, w.step, x) if layers.has_tangent(h) else None
            out.append(LayerWeights(relu, step, 2.0 / max(w.step, 1), w.sketch))
        return out

    def _candidates(self, h: int, kind: str, inputs: int, count: int, like: Array) -> Weights:
        """Weights (inputs, count) of hidden layer h: those of plain features, or candidates to choose from."""
        path = ("ntk", h, kind)
        if kind == "step":
            return step_weights(self.seed, path, inputs, count, like, self._law)
        return relu_weights(self.seed, path, inputs, count, self._law, like, self.n_sweeps)

    @property
    def _law(self) -> str:
        return self._alignment.sampling if self.sampling == "optimized" else self.sampling

    def workspace_bytes(self, n: int, itemsize: int, row_shape: tuple[int, ...] | None = None) -> int:
        """Peak bytes of a call: result, one block's temporaries and, when the shape of a row is given, every layer's weights."""
        d = math.prod(row_shape or (0,))
        block = self._layers.block_bytes([self.widths], d, n, itemsize)
        inputs = max(d, self.widths.relu if self._layers.depth > 1 else 0) + 1
        block += product_bytes(min(n, block_rows([self.widths], itemsize)), inputs, itemsize, self._law)
        weights = 0 if row_shape is None else self._weights_bytes(itemsize, d)
        return n * self.n_components * itemsize + block + weights

    def _weights_bytes(self, itemsize: int, d: int) -> int:
        """Bytes of all layers' weights, which are kept, and of the drawing of one layer's, which is not."""
        w, inputs = self.widths, [d + 1] + [self.widths.relu + 1] * (self._layers.depth - 1)
        return sum(weights_bytes(i, m, itemsize, self._law) for i in inputs for m in (w.relu, w.step)) + max(
            drawing_bytes(i, max(w.relu, w.step), self._law) for i in inputs
        )

    # --- optimised features: one pass for the mean of the targets, one for every hidden layer ------------------------

    @property
    def _alignment(self) -> Alignment:
        return self.alignment or Alignment()

    @property
    def n_passes(self) -> int:
        """0; for optimised features one pass for the mean of the targets and one for each hidden layer."""
        return 1 + self._layers.depth if self.sampling == "optimized" else 0

    def begin(self, index: int, learned: Learned, training: Training, like: Array | None = None) -> Sums:
        """Empty sums: in pass 0 for Σ w y and Σ w, in pass h + 1 for Φᵀ(Y − Ȳ) of the candidates of hidden layer h."""
        xp = np if like is None else namespace(like)
        if not index:
            return {"targets": xp.zeros(training.n_targets), "weight": xp.zeros(1)}
        shape = (self._alignment.n_candidates, training.n_targets)
        return {kind: xp.zeros(shape) for kind in self._kinds(index - 1)}

    def _kinds(self, h: int) -> list[str]:
        """The kinds of features that hidden layer h chooses."""
        needed = {"relu": self._layers.needs_relu(h), "step": self._layers.has_tangent(h)}
        return [kind for kind, is_needed in needed.items() if is_needed]

    def accumulate(self, index: int, learned: Learned, batch: TrainingBatch, sums: Sums) -> None:
        """Add a batch to the sums; candidate features exist one block at a time."""
        x, y = flatten_rows(batch.x), batch.y
        xp = namespace(x)
        weights = xp.ones(x.shape[0]) if batch.weights is None else batch.weights
        if not index:
            sums["targets"] += weights @ y
            sums["weight"] += weights.sum()
            return
        h, count = index - 1, self._alignment.n_candidates
        covariance = self._layers.covariance(h, x, self._learned_weights(learned, h, x))
        shared.reserve(4 * covariance.shape[1] * count * x.dtype.itemsize)
        centred = (y - xp.asarray(learned["mean"])) * weights[:, None]
        for kind in self._kinds(h):
            candidates = self._candidates(h, kind, covariance.shape[1], count, x)
            add_scores(covariance, candidates, centred, sums[kind], kind == "step")

    def finish(self, index: int, learned: Learned, sums: Sums, training: Training) -> Mapping[str, np.ndarray]:
        """In pass 0 the mean of the targets, then the weights of the chosen features of hidden layer h with their factors."""
        if not index:
            if not sums["weight"][0] > 0:
                raise InputError(f"{NAME}: the training rows have no weight: there is nothing to align with.")
            return {"mean": sums["targets"] / sums["weight"]}
        h, out, w = index - 1, {}, self.widths
        count, like = self._alignment.n_candidates, np.empty(0, training.dtype)
        before = learned[f"{h - 1}.relu"].shape[1] if h else 0
        inputs = self._layers.n_inputs(h, math.prod(training.row_shape), before)
        for kind in self._kinds(h):
            scores = np.einsum("ij,ij->i", sums[kind], sums[kind])
            most = min(count, w.relu if kind == "relu" else w.step)
            chosen: Chosen = self._alignment.choose(scores, most, self.seed, ("ntk", h, kind, "draws"))
            candidates = cast(
                Array, self._candidates(h, kind, inputs, count, like)
            )  # no law of Alignment's is structured
            weights = candidates[:, chosen.columns].astype(np.float64)
            if kind == "relu":
                out[f"{h}.relu"] = weights * (chosen.factors * math.sqrt(count))
            else:
                out[f"{h}.step"], out[f"{h}.factors"] = weights, chosen.factors
        return out

    def fit_bytes(self, n: int, itemsize: int, row_shape: tuple[int, ...], n_targets: int) -> int:
        """Peak bytes of `accumulate`: features of the covariance, one block of candidates, their sums, weights and drawing."""
        d, a, relu = math.prod(row_shape), self._alignment, self.widths.relu
        inputs = max(d, relu if self._layers.depth > 1 else 0) + 1
        weights = (
            2 * inputs * a.n_candidates * itemsize
            + drawing_bytes(inputs, a.n_candidates, a.sampling)
            + 2 * inputs * (self.widths.step + relu) * 8
        )
        rows = n * itemsize * 2 * inputs + 3 * 8 * n * n_targets
        return (
            weights
            + rows
            + self.sums_bytes(row_shape, n_targets)
            + scores_bytes(n, a.n_candidates, n_targets, itemsize)
        )

    def sums_bytes(self, row_shape: tuple[int, ...], n_targets: int) -> int:
        """Bytes of the sums: both kinds of candidates times the targets, in float64."""
        return 8 * 2 * self._alignment.n_candidates * n_targets

    def apply(self, x: Array, learned: Learned) -> Array:
        """Features of rows: (n, *s) → (n, learned_components(learned)).

        Raises InputError for rows of another width than the training rows had.
        """
        x = flatten_rows(require_float(x))
        expected = self._width_of(learned)
        if x.shape[1] != expected:
            raise InputError(f"{NAME} was fitted to rows of {expected} features; these have {x.shape[1]}.")
        return self._blocks(x, self._learned_weights(learned, self._layers.depth, x), self._learned_widths(learned))

    def _width_of(self, learned: Learned) -> int:
        first = learned["0.relu" if "0.relu" in learned else "0.step"]
        return first.shape[0] - int(self._layers.denses[0].bias_variance > 0)

    def _learned_weights(self, learned: Learned, count: int, like: Array) -> list[LayerWeights]:
        """The weights of the first `count` hidden layers."""
        out = []
        for h, widths in enumerate(self._learned_widths(learned)[:count]):
            relu, step, factors = (
                learned.on(name, like) if name in learned else None
                for name in (f"{h}.relu", f"{h}.step", f"{h}.factors")
            )
            out.append(LayerWeights(relu, step, 2.0, widths.sketch, factors))
        return out

    def _learned_widths(self, learned: Learned) -> list[Widths]:
        """The widths of every layer that has been learned: the sketch gets what the chosen ReLU features leave."""
        last, out = self._layers.denses[-1], []
        for h in range(self._layers.depth):
            step, relu = (learned[n].shape[1] if n in learned else 0 for n in (f"{h}.step", f"{h}.relu"))
            beside = relu + int(last.bias_variance > 0) if last.trainable else 0
            sketched = self.n_components - beside if self.widths.sketch else 0
            if step or relu:
                out.append(Widths(step, relu, sketched))
        return out

    def learned_components(self, learned: Learned) -> int:
        """n_components; where nothing is sketched, the number of chosen features of the last layer, and one for its bias."""
        if self.widths.sketch:
            return self.n_components
        return self._learned_widths(learned)[-1].relu + int(self._layers.denses[-1].bias_variance > 0)

    def learned_workspace_bytes(
        self, learned: Learned, n: int, itemsize: int, row_shape: tuple[int, ...] | None = None
    ) -> int:
        """Peak bytes of a call: result, one block's temporaries and the learned weights in the rows' dtype."""
        d = self._width_of(learned)
        block = self._layers.block_bytes(self._learned_widths(learned), d, n, itemsize)
        return n * self.learned_components(learned) * itemsize + block + learned.nbytes * itemsize // 8


def default_widths(n_components: int) -> tuple[int, int]:
    """(m₀, m₁) for n_components features: half are ReLU features, the other half is sketched from as many step features."""
    half = max(1, n_components // 2)
    return half, half
