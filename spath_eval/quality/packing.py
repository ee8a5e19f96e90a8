"""Which tokens are computed together, so that no token is computed twice that need not be.

Inputs that begin alike (answers to one question, questions behind the same few-shot examples) form a radix tree. A plan
cuts it into *trees* that are computed within one forward, each token attending to its ancestors, and into shared
*prefixes* that are computed once and whose keys and values are kept for all that begins with them. Small trees stand
side by side in one row. Where to cut is decided by an estimate of the work: tokens, plus attention over the row, plus
the overhead of a forward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

KEPT = 4
"""Token budgets up to which the rows of one forward may hold keys and values, unless a single row needs more."""

LONE = 8
"""Token budgets up to which a text that shares nothing is computed in one forward: alone, it needs no mask."""
WIDTHS = tuple(0.5 + step / 8 for step in range(13))
"""Widths of rows that are tried, in units of the usual one."""

Ints = NDArray[np.int64]
_Part = tuple[int, int, int]
"""How many tokens the texts `[start, end)` have together, with its start and end."""


@dataclass(frozen=True)
class Costs:
    """What work costs, in units of the work on one token outside attention."""

    budget: int
    """Tokens that one forward may hold."""
    row: int
    """Tokens up to which trees are usually put side by side in a row."""
    overhead: float
    """Cost of one more forward."""
    pairs: float
    """Pairs of a token and one that it attends to which cost as much as a token."""

    def tree(self, tokens: int, before: int) -> float:
        """Cost of `tokens` that attend to each other's row and to `before` cached ones."""
        return tokens * (1 + (max(min(tokens, self.budget), self.row) + before) / self.pairs)


@dataclass(frozen=True)
class Request:
    """What is to be scored: the likelihood of `targets` after the last `len(targets)` positions of `tokens`."""

    tokens: tuple[int, ...]
    """The model's input, without the last target."""
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """Tokens that are computed in one forward, a token standing behind its ancestors."""

    tokens: Ints
    """`[nodes]`."""
    positions: Ints
    """Positions in the text, `[nodes]`."""
    branches: tuple[tuple[int, int, int], ...]
    """For each input its new nodes `[start, end)`, and the node after which they go on (-1: after the prefix)."""
    nodes: Ints
    """The node after which each target is expected, `[targets]`."""
    targets: Ints
    """`[targets]`."""
    slots: Ints
    """Where each target's score goes, `[targets]`."""

    def __len__(self) -> int:
        return len(self.tokens)

    def ancestors(self) -> NDArray[np.bool_]:
        """Whether a node (row) attends to another one (column): itself and its ancestors; `[nodes, nodes]`."""
        attends = np.zeros((len(self), len(self)), dtype=np.bool_)
        for start, end, parent in self.branches:
            if parent >= 0:
                attends[start:end] = attends[parent]
            attends[start:end, start:end] = np.tri(end - start, dtype=np.bool_)
        return attends


@dataclass(frozen=True)
class Step:
    """One forward."""

    level: int
    """How many of the kept prefixes, outermost first, it goes on from; later ones are not needed any more."""
    rows: tuple[Tree, ...]
    keep: bool
    """Whether it is a prefix, whose keys and values are kept as the next level."""
    last: bool = False
    """Whether no later step goes on from the prefix of its level."""

    @property
    def plain(self) -> bool:
        """Whether each row is one text from its beginning on, as any causal model takes it."""
        branches = [branch for tree in self.rows for branch in tree.branches]
        return self.level == 0 and all(parent == start - 1 for start, _, parent in branches)

    @property
    def width(self) -> int:
        """Tokens of its longest row."""
        return max(map(len, self.rows))


@dataclass
class _Node:
    """A node of the radix tree: the inputs `[start, end)` that begin with the same `depth` tokens."""

    depth: int
    start: int
    end: int = 0
    below: int = 0
    """Tokens of the tree below `depth`."""
    children: list[_Node] = field(default_factory=list)


class Plan:
    """The forwards that score `requests`, each of which needs `len(targets)` slots, one behind the other."""

    def __init__(self, requests: Sequence[Request], costs: Costs) -> None:
        self.costs = costs
        self.offsets = np.cumsum([0, *(len(request.targets) for request in requests)])
        """The slots of request i are `offsets[i]:offsets[i + 1]`."""
        wanted: dict[tuple[int, ...], list[int]] = {}
        for number, request in enumerate(requests):
            wanted.setdefault(request.tokens, []).append(number)
        texts = sorted(wanted)
        self._texts = [np.array(text, dtype=np.int64) for text in texts]
        self._wanted = [
            [(len(text) - len(requests[n].targets), requests[n].targets, int(self.offsets[n])) for n in wanted[text]]
            for text in texts
        ]
        self._common = [0, *(_common(*pair) for pair in pairwise(self._texts))]
        steps = list(self._steps([_radix_tree(self._texts, self._common)], before=0, level=0)) if texts else []
        self.steps = _with_last(steps)

    @property
    def computed(self) -> int:
        """Tokens that are computed, padding not counted."""
        return sum(len(tree) for step in self.steps for tree in step.rows)

    def _steps(self, nodes: Sequence[_Node], before: int, level: int) -> Iterator[Step]:
        """The forwards for `nodes`, whose first `before` tokens are kept as the prefix of `level`."""
        whole: list[_Node] = []
        prefixes: list[tuple[_Node, int]] = []
        todo = list(nodes)
        while todo:
            node = todo.pop()
            upto = self._cut(node, before)
            if upto is None:
                whole.append(node)
            elif upto > before:
                prefixes.append((node, upto))
            else:
                todo += node.children
        for rows in self._rows(whole, before):
            yield Step(level, rows, keep=False)
        for node, upto in prefixes:
            yield Step(level, (self._tree(range(node.start, node.end), before, upto),), keep=True)
            yield from self._steps([node], upto, level + 1)

    def _cut(self, node: _Node, before: int) -> int | None:
        """Where to end the prefix to keep of `node`: none where it is one tree, `before` where its children are."""
        costs = self.costs
        tokens, common = node.below + node.depth - before, node.depth - before
        whole = costs.tree(tokens, before)
        if not node.children or not tokens:
            most = costs.budget if before else LONE * costs.budget
            return None if tokens <= most else before + costs.budget
        if len(node.children) == 1:
            return before
        sizes = [child.below + child.depth - before for child in node.children]
        apart = sum(
            costs.tree(size, before)
            if size <= costs.budget  # else it will have a prefix of its own, as long as this one
            else costs.tree(common, before) + costs.tree(size - common, node.depth)
            for size in sizes
        )
        kept = costs.overhead + costs.tree(common, before) + sum(costs.tree(s - common, node.depth) for s in sizes)
        if tokens <= costs.budget and whole <= min(apart, kept):
            return None
        return before + min(common, costs.budget) if common and kept < apart else before

    def _tree(self, numbers: Sequence[int], before: int, upto: int | None = None) -> Tree:
        """The tokens of the texts of these ascending numbers from position `before` on, up to position `upto`."""
        tokens: list[Ints] = []
        positions: list[Ints] = []
        branches: list[tuple[int, int, int]] = []
        scored: list[tuple[int, int, int]] = []
        path: Ints = np.empty(0, dtype=np.int64)
        count = 0
        for last, number in zip([None, *numbers], numbers, strict=False):
            text = self._texts[number][:upto]
            shared = 0
            if last is not None:
                common = self._common[number] if last == number - 1 else _common(self._texts[last], text)
                shared = max(0, min(common, len(text)) - before)
            new = text[before + shared :]
            path = path[:shared]
            if len(new):
                branches.append((count, count + len(new), int(path[-1]) if shared else -1))
                tokens.append(new)
                positions.append(np.arange(before + shared, len(text)))
                path = np.concatenate([path, np.arange(count, count + len(new))])
                count += len(new)
            for start, targets, slot in self._wanted[number]:
                for position in range(max(start, before), min(start + len(targets), len(text))):
                    scored.append((int(path[position - before]), targets[position - start], slot + position - start))
        scored.sort()
        columns = np.array(scored, dtype=np.int64).reshape(-1, 3)
        return Tree(
            np.concatenate(tokens or [path]),
            np.concatenate(positions or [path]),
            tuple(branches),
            columns[:, 0],
            columns[:, 1],
            columns[:, 2],
        )

    def _rows(self, nodes: Sequence[_Node], before: int) -> list[tuple[Tree, ...]]:
        """The nodes' texts in rows, several rows a forward, of the width at which padding and attention cost least.

        What the texts of a row have in common they share, although they need not be neighbours.
        """
        sizes = sorted(((node.below + node.depth - before, node.start, node.end) for node in nodes), reverse=True)
        ordered = [size for size in sizes if size[0]]
        packings = [self._packed(ordered, before, int(self.costs.row * scale)) for scale in WIDTHS]
        cheapest = min(packings, key=lambda forwards: sum(self._cost(rows, before) for rows in forwards))
        return [tuple(self._row(row, before) for row in rows) for rows in cheapest]

    def _row(self, parts: Sequence[_Part], before: int) -> Tree:
        return self._tree(sorted(number for _, start, end in parts for number in range(start, end)), before)

    def _cost(self, rows: Sequence[Sequence[_Part]], before: int) -> float:
        width = max(sum(size for size, _, _ in row) for row in rows)
        return len(rows) * width * (1 + (width + before) / self.costs.pairs) + self.costs.overhead

    def _packed(self, ordered: Sequence[_Part], before: int, row: int) -> list[list[list[_Part]]]:
        """Forwards with rows of about `row` tokens: the longest parts first, gaps filled up with the shortest."""
        waiting = deque(ordered)
        forwards: list[list[list[_Part]]] = []
        while waiting:
            width = max(waiting[0][0], min(row, self.costs.budget))
            height = max(1, min(self.costs.budget // width, KEPT * self.costs.budget // (before + width)))
            rows: list[list[_Part]] = []
            while waiting and len(rows) < height:
                filled: list[_Part] = []
                room = width
                while waiting and waiting[0][0] <= room:
                    room -= waiting[0][0]
                    filled.append(waiting.popleft())
                while waiting and waiting[-1][0] <= room:
                    room -= waiting[-1][0]
                    filled.append(waiting.pop())
                rows.append(filled)
            forwards.append(rows)
        return forwards


def _with_last(steps: Sequence[Step]) -> list[Step]:
    """The steps, marked where they are the last to go on from a prefix."""
    marked: list[Step] = []
    needed: set[int] = set()
    for step in reversed(steps):
        needed = {level for level in needed if level <= step.level}
        marked.append(replace(step, last=step.level not in needed))
        needed.add(step.level)
    return marked[::-1]


def _common(first: Ints, second: Ints) -> int:
    """How many tokens two texts have in common at their beginning."""
    shortest = min(len(first), len(second))
    differs = np.flatnonzero(first[:shortest] != second[:shortest])
    return int(differs[0]) if len(differs) else shortest


def _radix_tree(texts: Sequence[Ints], common: Sequence[int]) -> _Node:
    """The radix tree of sorted, distinct texts, `common[i]` being what text i has in common with the one before it.

    A text that is the beginning of others belongs to the first child of its node as well, which so scores it.
    """
    root = _Node(0, 0)
    path = [root]

    def close(until: int) -> None:
        while len(path) > 1 and path[-1].depth > until:
            node = path.pop()
            if path[-1].depth < until:  # it branches off amid the edge to `node`
                path[-1].children[-1] = fork = _Node(until, node.start, children=[node])
                path.append(fork)
            finish(node)

    def finish(node: _Node) -> None:
        node.end = end
        node.below = sum(child.below + child.depth - node.depth for child in node.children)

    for end, text in enumerate(texts):
        close(common[end])
        parent = path[-1]
        leaf = _Node(len(text), end if parent.children else parent.start)
        parent.children.append(leaf)
        path.append(leaf)
    end = len(texts)
    close(0)
    finish(root)
    return root
