"""Files of weights of networks by description: copied beside the states that name them by their digests, and found there again.

A state holds no path of them, so that equal networks have an equal address, and a run may be moved. Called by `stream` and `model`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ntkdask import registry
from ntkdask.files import copy_file, local_path


def described_in(config: Any, root: Path | str) -> tuple[Any, dict[str, str]]:
    """(a configuration as states keep it, {digest: path relative to `root`} of its files of weights, which are copied there).

    Paths are no part of it, so that equal networks have an equal address wherever their weights come from.
    """
    places: dict[str, str] = {}
    for table in _weighted(config):
        path, digest = table.get("weights"), table["weights_digest"]
        if path is not None:
            places[digest] = f"{digest}{Path(path).suffix}"
            copy_file(path, local_path(root) / places[digest])
    return registry.identity(config), places


def located(config: Any, places: Mapping[str, str]) -> Any:
    """The configuration of a state with the paths of its files of weights, as `load_places` gives them."""
    config = copy.deepcopy(config)
    for table in _weighted(config):
        if table.get("weights") is None and table["weights_digest"] in places:
            table["weights"] = places[table["weights_digest"]]
    return config


def _weighted(config: Any) -> Iterator[dict[str, Any]]:
    """The tables of a configuration, at any depth, that name a file of weights by its digest."""
    if isinstance(config, dict):
        if config.get("weights_digest") is not None:
            yield config
        for value in config.values():
            yield from _weighted(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from _weighted(value)
