"""Public names that are imported when they are first asked for (PEP 562): `import ntkdask` starts nothing and loads little."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(
    package: str,
    homes: Mapping[str, Sequence[str]],
    submodules: Sequence[str] = (),
    before: Callable[[str, str], None] | None = None,
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """(__getattr__, __dir__) of a package whose names live in `homes`: {submodule: names in it}, and whose `submodules` are names too.

    before(name, home) is called first, and may raise. AttributeError for any other name.
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
        return sorted({*vars(sys.modules[package]), *home_of, *submodules})

    return get, names
