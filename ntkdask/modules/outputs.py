"""What a network says itself: f(x), batch by batch, arrays in and out. The prior mean of linearised prediction, and its accuracy."""

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
    """Whether rows and modules are best moved to a GPU here: CuPy and torch both see one."""
    return gpu_usable() and torch.cuda.is_available()


def outputs(module: Any, x: Array, input_layout: str | None = "nchw", batch_rows: int = BATCH_ROWS) -> Array:
    """f(x) (n, O) of x's kind and dtype, computed in that dtype where x lies; the module itself is not touched.

    module: a torch.nn.Module in eval mode, or a description of one. x: (n, *s) float32 or float64, NumPy or CuPy; 4-d rows as
    `input_layout` says. Raises InputError for a module whose rows influence one another, or outputs that are not (n, O).
    """
    caller = "outputs"
    require_layout(input_layout)
    x = require_rows(require_float(x))
    module = require_module(build(module, caller), caller)
    twin = make_twin(module, dtype_of(x), device_of(x))
    found = []
    # a call without rows still says how many outputs there are
    for start in range(0, max(1, len(x)), batch_rows):
        rows = as_tensor(x[start : start + batch_rows], None, input_layout).clone()  # a module may write to its rows
        with torch.no_grad(), task_threads():
            y = twin(rows)
        found.append(as_array(require_output(y, len(rows), caller), x))
    return namespace(x).concatenate(found)
