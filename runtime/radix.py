"""Which slots hold which beginnings of prompts: a radix tree over their tokens.

A node's edge is a run of tokens; every slot whose tokens pass through the whole of it is listed there. Looking a prompt up
costs one walk along it, however many slots there are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from runtime.engine import Int64


@dataclass
class _Node:
    edge: Int64
    slots: set[int] = field(default_factory=set)
    children: dict[int, _Node] = field(default_factory=dict)
    """By their edges' first tokens."""


class Radix:
    """The tokens whose rows stand in each slot, found by their beginnings."""

    def __init__(self) -> None:
        self._root = _Node(np.zeros(0, np.int64))
        self._held: dict[int, Int64] = {}

    def longest(self, tokens: Int64) -> tuple[int, set[int]]:
        """How many leading `tokens` [any] the best slots hold, and these slots; (0, set()) where none holds the first."""
        node, length = self._root, 0
        while length < len(tokens) and (child := node.children.get(int(tokens[length]))) is not None:
            same = common(child.edge, tokens[length:])
            length += same
            node = child
            if same < len(child.edge):
                break
        return length, set(node.slots)

    def hold(self, slot: int, tokens: Int64) -> None:
        """From now on `slot` holds `tokens` [any], and no longer what it held before."""
        if slot in self._held:
            self._drop(slot, self._held.pop(slot))
        if len(tokens):
            self._held[slot] = tokens
            self._insert(slot, tokens)

    def _insert(self, slot: int, tokens: Int64) -> None:
        node, at = self._root, 0
        while at < len(tokens):
            child = node.children.get(int(tokens[at]))
            if child is None:
                node.children[int(tokens[at])] = _Node(tokens[at:], {slot})
                return
            same = common(child.edge, tokens[at:])
            if same < len(child.edge):
                child = _split(node, child, same)
            child.slots.add(slot)
            node, at = child, at + same

    def _drop(self, slot: int, tokens: Int64) -> None:
        node, at = self._root, 0
        while at < len(tokens):
            child = node.children[int(tokens[at])]
            child.slots.remove(slot)
            if not child.slots:  # nor does any slot reach what is below it
                del node.children[int(tokens[at])]
                return
            node, at = child, at + len(child.edge)


def _split(parent: _Node, node: _Node, length: int) -> _Node:
    """Cut `node`'s edge after `length` tokens; gives the new upper half, which stands in its place."""
    upper = _Node(node.edge[:length], set(node.slots), {int(node.edge[length]): node})
    parent.children[int(node.edge[0])] = upper
    node.edge = node.edge[length:]
    return upper


def common(left: Int64, right: Int64) -> int:
    """Leading tokens that two runs [any] share."""
    length = min(len(left), len(right))
    differing = np.flatnonzero(left[:length] != right[:length])
    return int(differing[0]) if len(differing) else length
