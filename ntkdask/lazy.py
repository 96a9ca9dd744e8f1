"""Public names that are imported when they are first asked for (PEP 562), so that `import ntkdask` loads little."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(
    package: str,
    homes: Mapping[str, Sequence[str]],
    submodules: Sequence[str] = (),
    before: Callable[[str, str], None] | None = None,
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The functions `__getattr__` and `__dir__` of a package whose public names are imported at their first use.

    Parameters
    ----------
    package : str
        Its dotted name.
    homes : mapping
        {submodule: the public names that it defines}.
    submodules : sequence of str
        Submodules that are public names themselves.
    before : callable, optional
        before(name, submodule) is called before an import, and may raise what a user should read instead of an ImportError.

    Returns
    -------
    tuple of two callables
        `__getattr__`, which raises AttributeError for a name that is not listed, and `__dir__`, which lists the public names alone.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name in submodules:
            return importlib.import_module(f"{package}.{name}")
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if before is not None:
            before(name, home_of[name])
        return getattr(importlib.import_module(f"{package}.{home_of[name]}"), name)

    def names() -> list[str]:
        return sorted({*home_of, *submodules})

    return get, names
