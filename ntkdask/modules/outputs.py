"""The outputs f(x) of a network, batch by batch, arrays in and out: the prior mean of linearised prediction."""

from __future__ import annotations

from typing import Any

import torch

from ntkdask.arrays import Array, gpu_usable, namespace, require_float, require_rows
from ntkdask.modules.build import build
from ntkdask.modules.jacobian.capture import require_output
from ntkdask.modules.jacobian.twins import make_twin, require_module
from ntkdask.modules.tensors import as_array, as_tensor, device_of, dtype_of, require_layout
from ntkdask.modules.torch_threads import task_threads

BATCH_ROWS = 256


def on_gpu() -> bool:
    """Whether CuPy and torch both see a GPU, so that rows and modules can be moved there."""
    return gpu_usable() and torch.cuda.is_available()


def outputs(module: Any, x: Array, input_layout: str | None = "nchw", batch_rows: int = BATCH_ROWS) -> Array:
    """The outputs f(x), computed in the dtype of x on its device; the module itself is not changed.

    Parameters
    ----------
    module : torch.nn.Module, or a description of one
        In eval mode.
    x : NumPy or CuPy array (n, *s), float32 or float64
        Rows.
    input_layout : str or None, optional
        "nchw": 4-d rows (n, H, W, C) reach the module as (n, C, H, W); None: as they are.
    batch_rows : int, optional
        Rows of a forward pass.

    Returns
    -------
    array (n, O)
        Of the kind and dtype of x.

    Raises
    ------
    InputError
        Where rows influence one another, or outputs are not (n, O).
    """
    caller = "outputs"
    require_layout(input_layout)
    x = require_rows(require_float(x))
    module = require_module(build(module, caller), caller)
    twin = make_twin(module, dtype_of(x), device_of(x))
    batches = []
    # no rows: one call tells the number of outputs
    for start in range(0, max(1, len(x)), batch_rows):
        rows = as_tensor(x[start : start + batch_rows], None, input_layout).clone()  # a module may write to its rows
        with torch.no_grad(), task_threads():
            y = twin(rows)
        batches.append(as_array(require_output(y, len(rows), caller), x))
    return namespace(x).concatenate(batches)
