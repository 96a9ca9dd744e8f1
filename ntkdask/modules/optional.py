"""Whether PyTorch is there, asked where it is first needed: an extra of this package, not a dependency."""

from __future__ import annotations

import importlib

from ntkdask.errors import MissingDependencyError


def require_torch(caller: str) -> None:
    """Return where torch can be imported; MissingDependencyError that says what needs it, and how to get it, otherwise."""
    try:
        importlib.import_module("torch")
    except ImportError as error:
        raise MissingDependencyError(
            f"{caller} needs PyTorch, which cannot be imported here ({error}). Install it: pip install 'ntkdask[torch]'."
        ) from error
