"""What one use of a layer adds to the per-example gradient of one of its parameters, from the layer's input and output gradient.

For one row this is Σ_t g_t a_tᵀ (t: pixels, or positions in a sequence; MATH.md §5), a sum of g ∘ x̂, or rows of a table. Each class
here forms it for a batch of rows, all columns or a range of them: `form(a, g, first, last)` gives (rows, outputs,
(last − first)·granule) from the inputs a (rows, *input shape) and the output gradients g (rows, outputs, *output shape). `outputs` is
the number of cotangents; columns are in the order of `parameter.reshape(-1)`. Arrays in, arrays out, no autograd; called by `blocks`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

Tensor = torch.Tensor


class Contribution(Protocol):
    """The gradient of one parameter through one use of one layer."""

    @property
    def columns(self) -> int:
        """Scalars of the parameter."""

    @property
    def granule(self) -> int:
        """Columns that are formed together."""

    def form(self, a: Tensor, g: Tensor, first: int, last: int) -> Tensor:
        """Columns first·granule to last·granule of the gradient of each row, (rows, outputs, (last − first)·granule)."""

    def scratch(self, a_shape: tuple[int, ...], g_shape: tuple[int, ...], outputs: int) -> int:
        """Numbers that `form` holds for a row besides a, g and its result; the shapes are those of one row and one cotangent."""


@dataclass(frozen=True)
class Buffers:
    """Memory of `Terms.windows`: flat for the windows, and (rows, channels, *padded) with zeros at the edges for padded inputs."""

    windows: Tensor
    padded: Tensor | None


@dataclass(frozen=True)
class Terms:
    """Σ_t g_t a_tᵀ in groups: weights of Linear (t: positions) and of convolutions (t: output pixels).

    Parameters
    ----------
    columns : int
        Number of weights, groups·units·granule.
    granule : int
        Weights of one unit, an input each.
    groups : int
        Groups of a convolution; 1 for Linear.
    kernel : tuple of int, optional
        Sides of the filter; empty for Linear.
    stride : tuple of int, optional
        Stride along each axis.
    padding : tuple of int, optional
        Pixels before and after each axis, the last axis first, as `torch.nn.functional.pad` takes them.
    dilation : tuple of int, optional
        Dilation along each axis.
    padding_mode : str, optional
        Of `torch.nn.functional.pad`; "constant" pads with zeros.
    """

    columns: int
    granule: int
    groups: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding_mode: str = "constant"

    @property
    def units(self) -> int:
        """Units of one group."""
        return self.columns // self.granule // self.groups

    def windows(self, a: Tensor, first: int, last: int, buffers: Buffers | None = None) -> Tensor:
        """The inputs of the units of the groups `first` to `last`, term by term: (rows, last − first, granule, terms).

        They are written to `buffers`, as `self.buffers` gives them, where these are given.
        """
        if not self.kernel:
            return a.reshape(len(a), -1, a.shape[-1]).transpose(1, 2).unsqueeze(1)
        share = a.shape[1] // self.groups
        a = self._padded(a[:, first * share : last * share], buffers)
        sizes = [
            (length - d * (k - 1) - 1) // s + 1
            for length, k, s, d in zip(a.shape[2:], self.kernel, self.stride, self.dilation, strict=True)
        ]
        steps = a.stride()
        view = a.as_strided(
            (len(a), a.shape[1], *self.kernel, *sizes),
            (
                *steps[:2],
                *(t * d for t, d in zip(steps[2:], self.dilation, strict=True)),
                *(t * s for t, s in zip(steps[2:], self.stride, strict=True)),
            ),
            a.storage_offset(),
        )
        if buffers is not None:
            view = buffers.windows[: view.numel()].view(view.shape).copy_(view)
        return view.reshape(len(a), last - first, self.granule, math.prod(sizes))

    def _padded(self, a: Tensor, buffers: Buffers | None) -> Tensor:
        """The padded inputs (rows, channels, *padded): contiguous, or in a buffer whose edges are zero already."""
        if buffers is not None and buffers.padded is not None:
            out = buffers.padded[: len(a), : a.shape[1]]
            inner = [slice(None), slice(None)]
            for axis, length in enumerate(a.shape[2:]):
                before = self.padding[2 * (len(self.kernel) - 1 - axis)]
                inner.append(slice(before, before + length))
            out[tuple(inner)] = a
            return out
        if any(self.padding):
            a = F.pad(a, self.padding, mode=self.padding_mode)
        return a.contiguous()

    def buffers(self, a: Tensor, rows: int) -> Buffers | None:
        """Memory for the windows of one group for `rows` rows, used again for the next rows; None where windows are views of a.

        New memory for every few rows would cost as much as filling it.
        """
        if math.prod(self.kernel) == 1:
            return None
        pads = [self.padding[2 * i] + self.padding[2 * i + 1] for i in reversed(range(len(self.kernel)))]
        lengths = [length + pad for length, pad in zip(a.shape[2:], pads, strict=True)]
        terms = math.prod(
            (length - d * (k - 1) - 1) // s + 1
            for length, k, s, d in zip(lengths, self.kernel, self.stride, self.dilation, strict=True)
        )
        padded = None
        if self.padding_mode == "constant":
            padded = a.new_zeros(rows, a.shape[1] // self.groups, *lengths)
        return Buffers(a.new_empty(rows * self.granule * terms), padded)

    def terms(self, g_shape: tuple[int, ...]) -> int:
        """Number of terms, from the shape of a row's output gradient."""
        return math.prod(g_shape[1:] if self.kernel else g_shape[:-1])

    def cotangents(self, g: Tensor) -> Tensor:
        """The output gradients term by term, (rows, outputs, units of all groups, terms)."""
        if self.kernel:
            return g.reshape(*g.shape[:3], -1)
        return g.reshape(*g.shape[:2], -1, g.shape[-1]).transpose(2, 3)

    def form(self, a: Tensor, g: Tensor, first: int, last: int) -> Tensor:
        """See `Contribution.form`."""
        out = g.new_empty(*g.shape[:2], (last - first) * self.granule)
        self.write(a, g, first, last, out)
        return out

    def write(self, a: Tensor, g: Tensor, first: int, last: int, out: Tensor, buffers: Buffers | None = None) -> None:
        """As `form`, into given memory; one batched product for each group.

        Parameters
        ----------
        a : tensor (rows, *)
            Inputs.
        g : tensor (rows, outputs, *)
            Output gradients.
        first : int
            First granule.
        last : int
            The granule after the last.
        out : tensor (rows, outputs, (last − first)·granule)
            Where the gradient goes.
        buffers : Buffers, optional
            Memory for the windows.
        """
        g = self.cotangents(g)[:, :, first:last]
        rows, outputs, _, terms = g.shape
        if terms == 1:
            self._write_outer(a, g, first, last, out)
            return
        for group in range(first // self.units, -(-last // self.units)):
            low, high = max(first, group * self.units) - first, min(last, (group + 1) * self.units) - first
            inputs = self.windows(a, group, group + 1, buffers).squeeze(1).transpose(1, 2)
            left = g[:, :, low:high].reshape(rows, -1, terms)
            target = out[:, :, low * self.granule : high * self.granule]
            if outputs == 1:
                torch.bmm(left, inputs, out=target.view(rows, high - low, self.granule))
            else:
                target.copy_(torch.bmm(left, inputs).view(target.shape))

    def _write_outer(self, a: Tensor, g: Tensor, first: int, last: int, out: Tensor) -> None:
        """`write` where there is one term, g aᵀ."""
        inputs = self.windows(a, 0, self.groups).squeeze(-1)
        if self.groups > 1:
            inputs = inputs[:, torch.arange(first, last, device=g.device) // self.units]
        torch.mul(g, inputs.unsqueeze(1), out=out.view(*g.shape[:3], self.granule))

    def scratch(self, a_shape: tuple[int, ...], g_shape: tuple[int, ...], outputs: int) -> int:
        """See `Contribution.scratch`: padded inputs, the windows of a group (of each unit where there is one term), copies of g."""
        padded = 2 * (math.prod(a_shape) + sum(self.padding)) if self.kernel else 0
        windows = self.granule * self.terms(g_shape) if self.terms(g_shape) > 1 else 0
        spread = self.columns if self.groups > 1 and not windows else 0
        return padded + windows + spread + 2 * outputs * math.prod(g_shape)


@dataclass(frozen=True)
class Sums:
    """Σ g over positions and pixels: biases. `last`: the parameter has the shape of a row's last axes, else of its channels."""

    columns: int
    granule: int
    last: bool

    def form(self, a: Tensor, g: Tensor, first: int, last: int) -> Tensor:
        """See `Contribution.form`."""
        return _collapsed(g, self.columns, self.last)[..., first * self.granule : last * self.granule]

    def scratch(self, a_shape: tuple[int, ...], g_shape: tuple[int, ...], outputs: int) -> int:
        """See `Contribution.scratch`: a sum over strided axes may copy g."""
        return outputs * math.prod(g_shape)


def _collapsed(product: Tensor, columns: int, last: bool) -> Tensor:
    """`product` (rows, outputs, *shape) summed over a row's axes, all but the last or all but the first: (rows, outputs, columns)."""
    if last:
        return product.reshape(*product.shape[:2], -1, columns).sum(dim=2)
    if product.ndim > 3 and product.shape[2] == columns:
        return product.sum(dim=tuple(range(3, product.ndim)))
    return product.reshape(*product.shape[:2], columns, -1).sum(dim=3)


@dataclass(frozen=True)
class Scales:
    """Σ g ∘ x̂: the scales of a normalisation, where x̂ is its normalised input, or those of PReLU, where x̂ = min(x, 0)."""

    columns: int
    granule: int
    last: bool
    layer: nn.Module

    def form(self, a: Tensor, g: Tensor, first: int, last: int) -> Tensor:
        """See `Contribution.form`."""
        product = g * normalised(self.layer, a).unsqueeze(1)
        return _collapsed(product, self.columns, self.last)[..., first * self.granule : last * self.granule]

    def scratch(self, a_shape: tuple[int, ...], g_shape: tuple[int, ...], outputs: int) -> int:
        """See `Contribution.scratch`: x̂, a temporary of its computation, the product."""
        return 2 * math.prod(a_shape) + 2 * outputs * math.prod(g_shape)


def normalised(layer: nn.Module, a: Tensor) -> Tensor:
    """x̂, which the layer's scales multiply, in the shape of the input `a`."""
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return F.batch_norm(a, layer.running_mean, layer.running_var, eps=layer.eps)
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm):
        own = layer.training or not layer.track_running_stats
        return F.instance_norm(
            a, layer.running_mean, layer.running_var, use_input_stats=own, momentum=0.0, eps=layer.eps
        )
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(a, layer.normalized_shape, eps=layer.eps)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(a, layer.num_groups, eps=layer.eps)
    if isinstance(layer, nn.PReLU):
        return a.clamp(max=0)
    return F.rms_norm(a, layer.normalized_shape, eps=layer.eps)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Lookups:
    """Rows of an embedding's table: that of token v has the gradient Σ_{t: a_t = v} g_t.

    A granule is the row of one token; the token `skipped` (the padding) has no gradient.
    """

    columns: int
    granule: int
    skipped: int | None

    def form(self, a: Tensor, g: Tensor, first: int, last: int) -> Tensor:
        """See `Contribution.form`."""
        rows, outputs = g.shape[:2]
        tokens = a.reshape(rows, 1, -1).long()
        in_range = (tokens >= first) & (tokens < last)
        if self.skipped is not None:
            in_range &= tokens != self.skipped
        targets = torch.where(in_range, tokens - first, last - first)  # the last row collects tokens outside the range
        out = g.new_zeros(rows, outputs, last - first + 1, self.granule)
        index = targets.unsqueeze(-1).expand(rows, outputs, targets.shape[-1], self.granule)
        out.scatter_add_(2, index, g.reshape(rows, outputs, -1, self.granule))
        return out[:, :, :-1].reshape(rows, outputs, -1)

    def scratch(self, a_shape: tuple[int, ...], g_shape: tuple[int, ...], outputs: int) -> int:
        """See `Contribution.scratch`: three arrays of indices in 64 bits, and the row for tokens outside."""
        return 6 * math.prod(a_shape) + outputs * self.granule
