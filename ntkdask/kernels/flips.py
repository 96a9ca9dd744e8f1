"""Kernels averaged over horizontal flips of both images, which is what training on every image and its mirror image amounts to.

Where the kernel does not change when both images are mirrored (`keeps_mirrors`), half of the flips cost nothing: flipping the second
argument alone gives the mean. Called like any kernel; job files nest the table of the kernel within.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ntkdask.arrays import Array, namespace, require_float
from ntkdask.errors import InputError
from ntkdask.kernels.arccosine import ArcCosine
from ntkdask.kernels.base import Kernel, KernelBase, completed, parts_of, require_kernel
from ntkdask.kernels.neural import NNGP, NTK
from ntkdask.kernels.polynomial import PolynomialKernel
from ntkdask.kernels.rbf import RBF
from ntkdask.networks import AvgPool, Conv, Layer, Residual
from ntkdask.networks.network import output_shape
from ntkdask.registry import register

_WIDTH_AXIS = 2  # of (n, H, W, C) and (n, H, W)
_MATRIX = 2  # axes of a matrix of numbers; a matrix of blocks has four


@register("kernel")
@dataclass(frozen=True)
class FlipAveraged(KernelBase):
    """k̄(x, y) = ¼·Σ k(gx, hy) over g, h ∈ {identity, flip}, where a flip exchanges left and right of an image.

    Parameters
    ----------
    kernel : Kernel
        k, a kernel that gives one matrix a call.

    Raises
    ------
    InputError
        For another kernel and, when called, for rows that are not images (H, W, C) or (H, W).

    Notes
    -----
    k̄ is positive semi-definite as k is: it is the kernel of the features ½·(φ(x) + φ(flip x)). Where k(flip x, flip y) = k(x, y)
    (`keeps_mirrors`), k̄(x, y) = ½·(k(x, y) + k(x, flip y)), which takes two evaluations of k; otherwise it takes four. With such a k,
    kernel ridge on n images with k̄ and α predicts what it predicts with k and 2α on those images and their n mirror images.

    References
    ----------
    Li et al. 2019 (Enhanced Convolutional Neural Tangent Kernels); Shankar et al. 2020.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[[[1.0], [0.0]]]])  # one image of 1×2 pixels
    >>> FlipAveraged(ArcCosine(1))(x), ArcCosine(1)(x)
    (array([[0.65915494]]), array([[1.]]))
    """

    kernel: Kernel

    def __post_init__(self) -> None:
        kernel = self.kernel
        parts = parts_of(require_kernel(kernel, "FlipAveraged"))
        if parts:
            raise InputError(
                f"FlipAveraged: {type(kernel).__name__} gives {' and '.join(parts)} in one call. Average NNGP(network) and "
                "NTK(network) one by one."
            )

    @property
    def is_slow(self) -> bool:
        """Whether the kernel within is."""
        return completed(self.kernel).is_slow

    @property
    def passes_over_rows(self) -> bool:
        """Whether the kernel within does."""
        return completed(self.kernel).passes_over_rows

    def entry_size(self, row_shape: tuple[int, ...]) -> int:
        """Rows of a matrix for one row of data: those of the kernel within."""
        return completed(self.kernel).entry_size(row_shape)

    def __call__(self, x: Array, y: Array | None = None) -> Array:
        """The matrix k̄(x_i, y_j).

        Parameters
        ----------
        x : array (n, H, W, C) or (n, H, W), float32 or float64
            Images.
        y : array (m, H, W, C) or (m, H, W), float32 or float64, optional
            Images; None for x, with a symmetric result.

        Returns
        -------
        array (n, m), or (n, m, O, O) where k gives blocks, of the images' kind and common dtype

        Raises
        ------
        InputError
            For rows that are not images; the kernel raises its own errors.
        """
        x, y = require_images(x), None if y is None else require_images(y, "y")
        mirrored = flip(x)
        if keeps_mirrors(self.kernel, x.shape[1:]):
            if y is None:
                return _mean(self.kernel(x), _symmetric(self.kernel(x, mirrored)))
            return _mean(self.kernel(x, y), self.kernel(mirrored, y))
        if y is None:
            return _mean(_mean(self.kernel(x), self.kernel(mirrored)), _symmetric(self.kernel(x, mirrored)))
        across = flip(y, "y")
        same = _mean(self.kernel(x, y), self.kernel(mirrored, across))
        return _mean(same, _mean(self.kernel(mirrored, y), self.kernel(x, across)))

    def diagonal(self, x: Array) -> Array:
        """k̄(x_i, x_i) of images: (n,), or (n, O, O) where k gives blocks; n evaluations of k on an image and its mirror image.

        Equal to the diagonal of a symmetric call to rounding. For an image that is its own mirror image k̄ is k.
        """
        x = require_images(x)
        mirrored = flip(x)
        xp, own = namespace(x), self.kernel.diagonal(x)
        other = own if keeps_mirrors(self.kernel, x.shape[1:]) else self.kernel.diagonal(mirrored)
        across = [_symmetric(self.kernel(x[i : i + 1], mirrored[i : i + 1]))[0] for i in range(x.shape[0])]
        met = xp.concatenate(across) if across else own
        unchanged = (x == mirrored).reshape(x.shape[0], math.prod(x.shape[1:])).all(axis=1)
        return _mean(_mean(own, other), xp.where(unchanged.reshape(-1, *[1] * (own.ndim - 1)), own, met))

    def workspace_bytes(self, n: int, m: int, itemsize: int, row_shape: tuple[int, ...] | None = None) -> int:
        """Bytes of the kernel's own workspace, of up to two means (n, m) and a transpose, and of both sides' mirrored rows."""
        rows = 0 if row_shape is None else (n + m) * math.prod(row_shape) * itemsize
        return self.kernel.workspace_bytes(n, m, itemsize, row_shape) + 3 * n * m * itemsize + rows


def flip(x: Array, name: str = "x") -> Array:
    """Images (n, H, W, C) or (n, H, W) with left and right exchanged, C-contiguous; InputError for other rows."""
    x = require_images(x, name)
    return namespace(x).ascontiguousarray(x[:, :, ::-1])


def require_images(x: Array, name: str = "x") -> Array:
    """x as an array of images (H, W, C) or (H, W); InputError for other rows, DtypeError unless they are float32 or float64."""
    x = require_float(x, name)
    if x.ndim not in (_WIDTH_AXIS + 1, _WIDTH_AXIS + 2):
        raise InputError(
            f"FlipAveraged: {name} has shape {x.shape}, but only images (n, H, W, C), channels last, have a left and a right. Give "
            "them in that shape, or the kernel without flips."
        )
    return x


def keeps_mirrors(kernel: Kernel, row_shape: tuple[int, ...]) -> bool:
    """Whether k(flip x, flip y) = k(x, y) for rows of this shape.

    It is so for RBF, ArcCosine, PolynomialKernel and networks of vectors, which do not see the order of pixels, and for networks of
    images whose filters stand as far from the left border as from the right. False for kernels of other kinds. InputError where the
    images do not fit the network.
    """
    if isinstance(kernel, (RBF, ArcCosine, PolynomialKernel)):
        return True
    if not isinstance(kernel, (NTK, NNGP)):
        return False
    network = kernel.network
    if not network.takes_images:
        return True
    shape = (row_shape[0], row_shape[1])
    network.image_shapes(shape)  # names the layer that does not fit
    return _keep(network.layers[: network.readout_position], shape)


def _keep(layers: Iterable[Layer], shape: tuple[int, int]) -> bool:
    """Whether the layers commute with mirroring images of (H, W)."""
    for layer in layers:
        if isinstance(layer, Conv) and not _centred(layer, shape):
            return False
        if isinstance(layer, Residual) and not (_keep(layer.branch, shape) and _keep(layer.shortcut, shape)):
            return False
        if isinstance(layer, (Conv, AvgPool, Residual)):
            shape = output_shape([layer], shape)
    return True


def _centred(conv: Conv, shape: tuple[int, int]) -> bool:
    """Whether the filters read the mirrored columns for the mirrored outputs.

    Output p reads columns sp − l … sp − l + q − 1; output W' − 1 − p must read W − 1 minus those. So 2l = s(W' − 1) + q − W, modulo W
    where the convolution is circular.
    """
    width, q, s = shape[1], conv.filter[1], conv.strides[1]
    off = 2 * conv.before(shape)[1] - s * (conv.output_shape(shape)[1] - 1) - q + width
    return off % width == 0 if conv.padding == "circular" else off == 0


def _mean(a: Array, b: Array) -> Array:
    """The mean of two matrices; exactly symmetric in them."""
    return (a + b) / 2


def _symmetric(k: Array) -> Array:
    """k(x_i, flip x_j) averaged with its transpose.

    Its two triangles differ by rounding, or, where k does not keep mirrors, are both part of the mean. The transpose of a matrix of
    blocks (n, n, O, O) is that of its blocks, too.
    """
    return (k + (k.T if k.ndim == _MATRIX else k.transpose(1, 0, 3, 2))) / 2
