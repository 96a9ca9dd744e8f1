"""The gradients of one parameter for all rows: formed already, or pairs of inputs and output gradients to form them from.

`Block.slice` and `Block.form_range` give a range of columns; what is formed at a time is bounded by `form_bytes`. Filled by
`gradients`, read by `tangent` and `slices`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from ntkdask.modules.jacobian.contributions import Contribution, Terms

Tensor = torch.Tensor

FORM_BYTES = 2**21
DEVICE_FORM_BYTES = 2**28
"""Most bytes of temporaries while gradients are formed, on a CPU and on a GPU; see `form_bytes`."""


@dataclass
class Pair:
    """What one use of a layer takes and gives for all rows: inputs a (rows, *), output gradients g (rows, Q, *), and their rule."""

    rule: Contribution
    a: Tensor
    g: Tensor


@dataclass
class Block:
    """The gradients (rows, Q, columns) of one parameter, formed or not.

    Parameters
    ----------
    name : str
        Dotted name of the parameter.
    columns : int
        Its number of scalars.
    granule : int
        Columns that are formed together.
    rows : int
        Number of examples.
    outputs : int
        Q, the number of cotangents.
    template : tensor
        Any tensor of the dtype and on the device of the gradients.
    formed : tensor (rows, Q, columns), optional
        The gradients; None where they are formed from pairs.
    pairs : list of Pair, optional
        A pair for each use of the parameter.
    """

    name: str
    columns: int
    granule: int
    rows: int
    outputs: int
    template: Tensor
    formed: Tensor | None = None
    pairs: list[Pair] = field(default_factory=list)

    def slice(self, start: int, stop: int) -> Tensor:
        """Columns `start` to `stop` in the order of `parameter.reshape(-1)`, (rows·Q, stop − start).

        Row i·Q + q is that of example i and cotangent q.
        """
        return self.form_range(start, stop).reshape(self.rows * self.outputs, stop - start)

    def form_range(self, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        """Columns `start` to `stop`, (rows, Q, stop − start), in the flat memory `buffer` where one is given.

        Whole granules are formed: a range that cuts one computes more than it returns.
        """
        if self.formed is not None:
            return self.formed[:, :, start:stop]
        first, last = start // self.granule, -(-stop // self.granule)
        shape = (self.rows, self.outputs, (last - first) * self.granule)
        out = self.template.new_empty(shape) if buffer is None else buffer[: math.prod(shape)].view(shape)
        for index, pair in enumerate(self.pairs):
            add_formed(pair.rule, pair.a, pair.g, first, last, out, overwrite=index == 0)
        low = start - first * self.granule
        return out[:, :, low : low + stop - start]


def form_bytes(device: torch.device) -> int:
    """Bytes of temporaries while gradients are formed: what fits the caches of a CPU, or what keeps a GPU busy."""
    return FORM_BYTES if device.type == "cpu" else DEVICE_FORM_BYTES


def add_formed(rule: Contribution, a: Tensor, g: Tensor, first: int, last: int, out: Tensor, overwrite: bool) -> None:
    """Add a range of a gradient to `out`, as many rows at a time as `form_bytes` allows.

    Parameters
    ----------
    rule : Contribution
        How the layer contributes.
    a : tensor (rows, *)
        Its inputs.
    g : tensor (rows, Q, *)
        Its output gradients.
    first : int
        First granule of the range.
    last : int
        The granule after its last.
    out : tensor (rows, Q, (last − first)·granule)
        The sum over uses.
    overwrite : bool
        Whether this is the first use: what `out` holds is replaced.
    """
    scratch = rule.scratch(tuple(a.shape[1:]), tuple(g.shape[2:]), g.shape[1])
    step = max(1, min(len(a), form_bytes(g.device) // max(1, scratch * g.element_size())))
    buffers = rule.buffers(a, step) if isinstance(rule, Terms) and overwrite else None
    for i in range(0, len(a), step):
        rows = slice(i, i + step)
        if overwrite and isinstance(rule, Terms):
            rule.write(a[rows], g[rows], first, last, out[rows], buffers)
        elif overwrite:
            out[rows] = rule.form(a[rows], g[rows], first, last)
        else:
            out[rows] += rule.form(a[rows], g[rows], first, last)
