"""Where and how tasks run: maps and reductions over tiles, clusters and their workers, progress and records."""

from ntkdask.execution.map_reduce import map_tiles, reduce_tiles
from ntkdask.execution.tree import Node
from ntkdask.execution.window import Done

__all__ = ["Done", "Node", "map_tiles", "reduce_tiles"]
