"""The guard that a script needs around what starts worker processes: each of them imports the script first.

Without it, the workers of a script would start clusters of their own. That is seen before anything starts, from the script's text.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import dask

from ntkdask.errors import UserError

GUARD = "In a script, call it below `if __name__ == '__main__':`, since worker processes import the script."


def require_guard() -> None:
    """UserError where this call would be repeated by every worker process that it starts; a worker process leaves in a sentence."""
    if dask.config.get("distributed.worker.multiprocessing-method", "spawn") == "fork":
        return
    for frame in _module_frames():
        name = frame.f_globals.get("__name__")
        if name == "__mp_main__":
            # an exception would print what multiprocessing was doing, once for every worker
            raise SystemExit(f"connect was called by a worker process that is importing this script. {GUARD}")
        if name == "__main__" and _is_unguarded(frame):
            script = Path(str(frame.f_globals["__file__"])).name
            raise UserError(
                f"connect was called from line {frame.f_lineno} of {script}, which worker processes run, too. {GUARD}"
            )


def _module_frames() -> Iterator[FrameType]:
    """The frames of modules that are being run or imported, from the innermost."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "<module>":
            yield frame
        frame = frame.f_back


def _is_unguarded(frame: FrameType) -> bool:
    """Whether worker processes import the script of the frame and come to its line, whatever they are: it stands below no `if`."""
    script, spec = frame.f_globals.get("__file__"), frame.f_globals.get("__spec__")
    if not script or frame.f_code.co_filename != script or (spec is not None and spec.name.endswith("__main__")):
        return False  # a notebook, standard input, `python -c`, `python -m package`: nothing is imported
    try:
        tree = ast.parse(Path(str(script)).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return False
    around = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt) and node.lineno <= frame.f_lineno <= (node.end_lineno or node.lineno)
    ]
    return bool(around) and not any(isinstance(node, (ast.If, ast.Match)) for node in around)
