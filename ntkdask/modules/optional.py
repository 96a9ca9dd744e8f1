"""Whether PyTorch is there, asked where it is first needed: an extra of this package, not a dependency."""

from __future__ import annotations

import importlib

from ntkdask.errors import MissingDependencyError


def require_torch(caller: str) -> None:
    """MissingDependencyError where torch cannot be imported; its message names the `caller` and how to install torch."""
    try:
        importlib.import_module("torch")
    except ImportError as error:
        raise MissingDependencyError(
            f"{caller} needs PyTorch, which cannot be imported here ({error}). Install it: pip install 'ntkdask[torch]'."
        ) from error
