"""Where and how tasks run: maps and reductions over tiles, clusters and their workers, progress and records."""

from ntkdask.execution.map_reduce import Done, Node, map_tiles, reduce_tiles

__all__ = ["Done", "Node", "map_tiles", "reduce_tiles"]
