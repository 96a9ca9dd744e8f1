"""The fixed tree of a reduction: its shape, its nodes, and equal bits on any workers."""

import sys
import time

import cloudpickle
import numpy as np
import pytest
from task_examples import brackets, name

from ntkdask.execution.map_reduce import reduce_tiles
from ntkdask.execution.tree import tree_children, tree_nodes

# workers cannot import this module
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(params=["loop", "cluster"])
def client(request):
    """None for the plain loop, or a client of two workers."""
    return None if request.param == "loop" else request.getfixturevalue("two_workers")


TREES = {
    1: "a",
    2: "(ab)",
    3: "((ab)c)",
    4: "((ab)(cd))",
    5: "(((ab)(cd))e)",
    6: "(((ab)(cd))(ef))",
    7: "(((ab)(cd))((ef)g))",
}


@pytest.mark.parametrize("n", TREES)
def test_the_tree_is_fixed(client, n):
    assert reduce_tiles(name, brackets, range(n), client, label="name") == TREES[n]


def test_sums_are_equal_bits_on_any_workers(one_worker, two_workers):
    """float32 sums whose value depends on the order, finishing in another order each time."""

    def task(tile: int) -> np.float32:
        time.sleep(0.002 * (tile * 7 % 5))
        return np.float32(1.0) / np.float32(tile + 1) ** 3

    clients = (None, two_workers, two_workers, one_worker)
    results = {reduce_tiles(task, _add, range(23), client, label="sum").tobytes() for client in clients}
    assert len(results) == 1
    values = [task(i) for i in range(23)]
    assert results != {sum(values, np.float32(0)).tobytes()}, "the order does not matter here: a weak test"


def _add(node, left, right):
    return left + right


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13, 64, 100])
def test_nodes_of_the_tree(n):
    nodes = tree_nodes(n)
    assert len(nodes) == len(set(nodes)) == 2 * n - 1
    below = {node: {node} for node in nodes[:n]}
    for node in nodes[n:]:
        left, right = tree_children(n, node)
        below[node] = below[left] | below[right]  # children come before their parents
        assert not below[left] & below[right]
        assert max(below[left]) < min(below[right])
    assert below[nodes[-1]] == set(nodes[:n])
