"""Tasks and combinations whose calls can be told apart."""

import os
import sys
import time
from pathlib import Path

import cloudpickle

from ntkdask.planning.tiles import Tile

# workers cannot import this module
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def square(tile: Tile) -> int:
    return tile.start**2


def name(tile: int) -> str:
    return chr(ord("a") + tile)


def brackets(node, left: str, right: str) -> str:
    return f"({left}{right})"


def mark(folder: Path, text: str) -> int:
    """Note that a task ran; how often it has."""
    count = len(list(folder.glob(f"{text}.*")))
    (folder / f"{text}.{os.getpid()}.{time.time_ns()}").touch()
    return count + 1


def wait_for(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("nothing happened in time")
        time.sleep(0.01)
