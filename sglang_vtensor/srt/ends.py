"""Ends of nodes that have more than the memory of all tokens: a window, or a state. By when they were used last."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Any


class Ends:
    """Nodes whose ends have that (`nodes`), the one that was used last is the last."""

    def __init__(self) -> None:
        self.nodes: OrderedDict[int, Any] = OrderedDict()
        #: Of these, the ones that the batch which is being made begins with: they stay.
        self.reading: set[int] = set()

    def touch(self, node: Any) -> None:
        """The end of this node has it, and is used now."""
        node.end_time = time.monotonic()
        self.nodes[node.id] = node
        self.nodes.move_to_end(node.id)

    def oldest(self) -> Any:
        """The node whose end nobody used for the longest time, of those that may go; None: there is none."""
        return next((node for node in self.nodes.values() if node.id not in self.reading), None)
