"""The fixed binary tree over n leaves in which reductions combine: it depends on n alone, so equal plans give equal bits."""

from __future__ import annotations

Node = tuple[int, int]


class Tree:
    """The fixed binary tree over n leaves; an odd last node of a level passes to the next level unchanged."""

    def __init__(self, n: int) -> None:
        self.widths = [n]
        while self.widths[-1] > 1:
            self.widths.append(-(-self.widths[-1] // 2))

    @property
    def root(self) -> Node:
        """The node that stands for all leaves."""
        return self._settle((len(self.widths) - 1, 0))

    def children(self, node: Node) -> tuple[Node, Node]:
        """The two nodes that are combined in an inner one."""
        level, index = node
        return self._settle((level - 1, 2 * index)), self._settle((level - 1, 2 * index + 1))

    def _settle(self, node: Node) -> Node:
        level, index = node
        while level > 0 and 2 * index + 1 >= self.widths[level - 1]:
            level, index = level - 1, 2 * index
        return level, index


def tree_nodes(n_leaves: int) -> list[Node]:
    """(level, index) of every value in the reduction of n_leaves tiles, leaves first, the root last."""
    tree = Tree(n_leaves)
    nodes = [(0, i) for i in range(n_leaves)]
    for level in range(1, len(tree.widths)):
        nodes += [(level, i) for i in range(tree.widths[level - 1] // 2)]
    return nodes


def tree_children(n_leaves: int, node: Node) -> tuple[Node, Node]:
    """The two nodes whose values are combined in the inner `node`."""
    return Tree(n_leaves).children(node)
