"""CNTKSketch: features of the neural tangent kernel of convolutional networks, linear in the number of pixels.

Zandieh et al. 2021, §4 and Theorem 4, for every convolutional `Network` of MATH.md §1: features φ_p of S and ψ_p of T for each
pixel, taken through the layers by `pixels.layers`, norms exact. The exact kernel pairs all pixels of two images; here each
image is seen alone. There are three ways to realise the dual activations (`method`), of which "random" is measured best. Called
by workflows on tiles.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from ntkdask.arrays import Array, is_device_array, namespace
from ntkdask.errors import InputError, nearest
from ntkdask.features.base import FeatureMapBase, require_components, row_blocks
from ntkdask.features.pixels.duals import METHODS, require_function
from ntkdask.features.pixels.layers import PixelLayers, Pixels
from ntkdask.features.pixels.plan import block_bytes, held_pixels, truncation_error
from ntkdask.features.pixels.sums import shift_units
from ntkdask.features.sketching.operands import padded_size
from ntkdask.features.sketching.sketches import SRHT
from ntkdask.kernels.image_rows import image_rows, image_shape
from ntkdask.kernels.neural import NTK
from ntkdask.kernels.planes import reference as planes
from ntkdask.kernels.scales import balanced, extreme_exponents, power, restored_features
from ntkdask.networks import Activation, Conv, Dense, Network
from ntkdask.networks.network import every_layer
from ntkdask.registry import register

HELD_BYTES, DEVICE_HELD_BYTES = 2**25, 2**32
"""Bytes of the features of all pixels of the images that go through the layers together; one image at least."""


@register("feature map")
@dataclass(frozen=True)
class CNTKSketch(FeatureMapBase):
    """Features ψ with ⟨ψ(x), ψ(z)⟩ ≈ Θ(x, z), the NTK of a convolutional network; images (n, H, W, C).

    Per pixel, an activation takes features φ of Λ and ψ of T to features of k(Λ) and of T·k'(Λ). A Conv sums both over the
    filter with random signs and shifts; poolings are exact means. Every layer of MATH.md §1 is accepted, with any padding,
    stride, bias, variance and `trainable`. A pixel has `width` features.

    Parameters
    ----------
    network : Network
        A network that takes images and has a trainable layer.
    n_components : int
        Number of features >= 1. One that is no power of two is sampled from the `width` features of the last layer.
    seed : int
        Seed of all random numbers.
    method : {"random", "mixed", "sketch"}
        How dual activations are realised. "random": σ(z) and σ'(z) at z = H G φ, which is exactly normal. "sketch", as in the
        paper: PolySketches of the Hermite series of k and k', and a TensorSRHT. "mixed": the series for k, σ'(z) for k'. A
        normalised Gaussian has no σ: "random" takes cosines and sines for it.
    degree : int
        Degree >= 1 at which the series are truncated; "random" has none.
    exact_norms : bool
        Whether the features of every pixel are scaled to their exact norms √S(p, p) and √T(p, p). This about halves the error
        where pixels are averaged. Layers after the readout keep estimated norms.

    Raises
    ------
    InputError
        For a network of vectors, for one without a trainable layer, and for an activation without the function or the series that
        `method` needs.

    Notes
    -----
    At depth 1 "random" without exact norms is unbiased. Exact norms and deeper layers leave a bias
    O(1/n_components); series also leave their `truncation_error`. Relative Frobenius error on 12×12 CIFAR-10 crops,
    standardised, depth 3, frozen ends, at 512, 1 024, 2 048 and 4 096 components: 0.08, 0.05, 0.04, 0.03. Squared error times
    time is 2 to 8 times that of "random" for "mixed", and 5 to 140 times for "sketch".

    References
    ----------
    Zandieh et al. 2021, §4, Theorem 4; Han et al. 2022, Algorithm 1; MATH.md §4.
    """

    network: Network
    n_components: int
    seed: int = 0
    method: str = "random"
    degree: int = 4
    exact_norms: bool = True

    def __post_init__(self) -> None:
        require_components(self.n_components)
        require_components(self.degree, "degree")
        if self.method not in METHODS:
            raise InputError(f"CNTKSketch: method is {self.method!r}{nearest(str(self.method), METHODS)}")
        if not isinstance(self.exact_norms, bool):
            raise InputError(f"CNTKSketch: exact_norms is {self.exact_norms!r}, expected true or false.")
        _require_network(self.network)
        if self.method != "sketch":
            for layer in every_layer(self.network.layers):
                if isinstance(layer, Activation):
                    require_function(layer.sigma)
        _ = self.truncation_error  # series that an activation does not have are refused here

    @property
    def target(self) -> NTK:
        """The NTK of the network."""
        return NTK(self.network)

    @functools.cached_property
    def truncation_error(self) -> float:
        """The largest error that the truncated series leave at any n_components, over Θ(x, x); 0 for "random".

        It is taken for two images whose pixels are all alike, as the maximum over their correlation.
        """
        return truncation_error(self.network, self.method, self.degree)

    @property
    def width(self) -> int:
        """Features of a pixel: a power of two >= n_components that has room for the shifts of the largest filter."""
        filters = [layer.filter for layer in every_layer(self.network.layers) if isinstance(layer, Conv)]
        return max(padded_size(self.n_components), shift_units(max((a * b for a, b in filters), default=1)))

    def __call__(self, x: Array) -> Array:
        """Features of images: (n, H, W, C) → (n, n_components), of x's kind and dtype.

        Raises InputError for rows that are not images, and for images that the network does not take.
        """
        x = image_rows(x, layout=self.network.layout)
        self.network.image_shapes((int(x.shape[1]), int(x.shape[2])))
        xp, p = namespace(x), power(self.network.layers)
        balanced_rows = balanced(x, p)
        out = xp.empty((x.shape[0], self.n_components), x.dtype)
        images = self._images(x.shape[1:], x.dtype.itemsize, is_device_array(x))
        for rows in row_blocks(x.shape[0], images):
            self._block_into(balanced_rows.rows[rows], out[rows])
        extreme = extreme_exponents(x) if p is None and x.dtype.itemsize < 8 else None
        if extreme is not None:
            # rows that cannot be scaled, and whose squares leave float32
            numbers = xp.flatnonzero(extreme)
            with np.errstate(over="ignore"):
                out[numbers] = self(x[numbers].astype(xp.float64)).astype(x.dtype)
        return restored_features(out, balanced_rows)

    def _block_into(self, x: Array, out: Array) -> None:
        """Take a block of images through the layers; `out` (b, n_components) receives the features."""
        xp, layers, readout = namespace(x), self.network.layers, self.network.readout_position
        n, h, w, channels = x.shape
        inputs = xp.ascontiguousarray(x).reshape(n * h * w, channels)
        if self.network.scale_inputs:
            inputs = inputs * x.dtype.type(channels**-0.5)
        nodes = iter(planes.tangent_maps(self.network, x)) if self.exact_norms else None
        on_images, on_vectors = (PixelLayers(self.width, self.method, self.degree, self.seed, k) for k in (nodes, None))
        start = Pixels(inputs, None, (h, w), raw=True)
        read = on_images.through(layers[: readout + 1], start, ("cntk",), layers[readout + 1 :])
        psi = on_vectors.through(layers[readout + 1 :], read, ("cntk", "tail")).psi
        if psi is None:
            out[...] = 0
        elif self.n_components == self.width:
            out[...] = psi
        else:
            SRHT(self.n_components, self.seed, ("cntk", "output"))(psi, out=out)

    def _images(self, row_shape: tuple[int, ...], itemsize: int, device: bool = False) -> int:
        """How many images a block has."""
        held = held_pixels(self.network, (int(row_shape[0]), int(row_shape[1]))) * self.width * itemsize
        return max(1, (DEVICE_HELD_BYTES if device else HELD_BYTES) // max(1, held))

    def workspace_bytes(self, n: int, itemsize: int, row_shape: tuple[int, ...] | None = None) -> int:
        """Peak bytes of a call: the result, one block of images at its widest layer, each thread's rows and the random vectors.

        Without the shape of a row it is the result alone. Raises InputError for rows that the network does not take.
        """
        result = n * self.n_components * itemsize
        if row_shape is None:
            return result
        shape = image_shape(row_shape, layout=self.network.layout)
        images = min(n, self._images(shape, itemsize))
        held = images * held_pixels(self.network, shape[:2]) * self.width * itemsize
        maps = 0
        if self.exact_norms:
            maps = 3 * images * planes.map_bytes(self.network, shape[:2])
            maps += planes.image_bytes(self.network, images, shape, True)
        pixels = shape[0] * shape[1]
        block = block_bytes(self.network, self.method, self.degree, self.width, images, pixels, itemsize)
        return result + held + maps + block


def _require_network(network: Network) -> None:
    """InputError unless the network takes images and has a trainable layer."""
    if not isinstance(network, Network):
        raise InputError(f"CNTKSketch: network is {network!r}; give a Network, for example convolutional(3).")
    if not network.takes_images:
        raise InputError(
            "CNTKSketch: the network takes vectors. Give one of images, such as convolutional(3), or use NTKSketch."
        )
    layers = [layer for layer in every_layer(network.layers) if isinstance(layer, (Conv, Dense))]
    if not any(layer.trainable for layer in layers):
        raise InputError("CNTKSketch: no layer of the network is trainable, so its NTK is zero.")
