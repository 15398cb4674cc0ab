"""How many threads a graph deserves on a CPU.

Threads that share a matrix product of some microseconds spend more time waiting for each other than they save, and where
another process holds one of the processors each of these waits takes milliseconds. So a small graph runs on one thread, and
its work is counted, not clocked: the same graph on the same machine always runs alike, to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

SMALL = 3e7
"""Floating-point operations in the matrix products of a graph below which one thread serves: about 0.3 ms of one."""


def operations(graph: fx.GraphModule) -> int:
    """Floating-point operations in the matrix products and convolutions of a graph that `make_fx` made."""
    return sum(_operations(graph, node) for node in graph.graph.nodes if node.op == "call_function")


def _operations(graph: fx.GraphModule, node: fx.Node) -> int:
    count = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if count is None:
        return 0

    def value(item: Any) -> Any:
        if not isinstance(item, fx.Node):
            return item
        return getattr(graph, str(item.target)) if item.op == "get_attr" else item.meta["val"]

    args, kwargs = tree_map(value, (node.args, node.kwargs))
    return int(count(*args, **kwargs, out_val=node.meta["val"]))


class one_thread:
    """A context with torch's operators on one thread if `active`; as before on leaving."""

    def __init__(self, *, active: bool) -> None:
        self._active = active

    def __enter__(self) -> None:
        self._before = torch.get_num_threads() if self._active else 1
        if self._before > 1:
            torch.set_num_threads(1)

    def __exit__(self, *error: object) -> None:
        if self._before > 1:
            torch.set_num_threads(self._before)
