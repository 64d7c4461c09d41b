"""Which requests of a batch share which runs of pages, kept up as they join and leave.

A page has one place in one path of the prefix tree, so two requests that have the same page at one position have the
same pages before it too. That makes what requests share a trie over page numbers, and where two part a bisection:

    run 4 9 ---- run 2 7 3 ---- request a, request b        4 9      is shared by three
          \\---- request c                                   2 7 3    by two of them

A run of two or more requests is a unit. The tables, int32 in one array, tell a kernel (`kernels.shared_decode`) what
each unit is, and which units each request slot begins with. Joining and leaving changes what is on the path of the
request; only where a run is divided, or grows together again, are its other requests told too.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, KeysView, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

#: Units on the path of a request. What is shared behind them is read for each request alone.
DEPTH = 8


@dataclass(slots=True, eq=False)
class _Run:
    """Pages `low` to `high` of everybody below. `pages` are those of one of them, from the first one on."""

    low: int
    high: int
    pages: Sequence[int]
    parent: _Run | None
    count: int = 0
    children: dict[int, _Run] = field(default_factory=dict)
    #: Requests that share nothing behind this run.
    ends: dict[int, None] = field(default_factory=dict)
    unit: int = -1


class Tables:
    """What the kernel reads, as views of one int32 array:

    `chains`: `(slots, DEPTH)`, the units that the context of each request slot begins with; -1 behind the last. `lows`,
    `highs`, `counts`: `(requests,)`, of each unit the tokens it stands for, and how many requests share it (0: there is
    none of this number).
    """

    def __init__(self, slots: int, requests: int, array: Any = None) -> None:
        """`array`: `size` numbers, of numpy or torch, wherever they are."""
        self.array: Any = np.zeros(self.size(slots, requests), dtype=np.int32) if array is None else array
        of_units: Any = self.array[: 3 * requests].reshape(3, requests)
        self.lows, self.highs, self.counts = of_units
        self.chains = self.array[3 * requests :].reshape(slots, DEPTH)
        self.chains[:] = -1

    @staticmethod
    def size(slots: int, requests: int) -> int:
        return slots * DEPTH + 3 * requests


class Sharing:
    """The runs of the requests that have joined, up to `requests`, for request slots below `slots`.

    `shared_tokens` counts the tokens of all units, `saved_tokens` what their requests would read beyond that if each
    read its own; `changes` grows with every change of the tables.
    """

    def __init__(self, *, slots: int, requests: int, page_tokens: int) -> None:
        self.requests = requests
        self.page_tokens = page_tokens
        self.tables = Tables(slots, requests)
        self.changes = 0
        self.shared_tokens = 0
        self.saved_tokens = 0
        self._root = _Run(0, 0, (), None)
        self._end_of: dict[int, _Run] = {}
        self._units = list(range(requests))  # a heap: there are always fewer units than requests

    def __contains__(self, slot: int) -> bool:
        return slot in self._end_of

    def __len__(self) -> int:
        return len(self._end_of)

    def slots(self) -> KeysView[int]:
        """Who has joined."""
        return self._end_of.keys()

    def join(self, slot: int, pages: Sequence[int]) -> None:
        """A request joins. `pages` are the pages that others may read too, and that do not change any more. The pages
        behind them are its own."""
        if slot in self._end_of or len(self._end_of) == self.requests:
            raise ValueError(f"slot {slot}, of {set(self.slots())}: one that has not joined wanted, of {self.requests}")
        self.changes += 1
        run, at = self._root, 0
        while at < len(pages) and (child := run.children.get(pages[at])) is not None:
            common = _common(child, pages)
            if common < child.high:
                child = self._divide(child, common)
            run, at = child, common
        if at < len(pages):
            leaf = _Run(at, len(pages), pages, run)
            run.children[pages[at]] = leaf
            run = leaf
        run.ends[slot] = None
        self._end_of[slot] = run
        for passed in _up(run):
            passed.count += 1
            self._tell(passed)
            if passed.count == 2:  # who was alone here begins with this unit too
                self._chain(next(member for member in _members(passed) if member != slot))
        self._chain(slot)

    def leave(self, slot: int) -> None:
        run = self._end_of.pop(slot)
        del run.ends[slot]
        self.changes += 1
        self.tables.chains[slot] = -1
        for passed in list(_up(run)):
            passed.count -= 1
            self._tell(passed)
            parent = passed.parent
            assert parent is not None
            if not passed.count:
                del parent.children[passed.pages[passed.low]]
            elif not passed.ends and len(passed.children) == 1:
                self._grow_together(passed)
            elif passed.count == 1:
                self._chain(next(_members(passed)))

    def clear(self) -> None:
        for slot in list(self._end_of):
            self.leave(slot)

    def _divide(self, run: _Run, at: int) -> _Run:
        """Divide a run at page `at`. Returns the first part, which is new; the rest stays where its requests end."""
        parent = run.parent
        assert parent is not None
        upper = _Run(run.low, at, run.pages, parent, run.count, {run.pages[at]: run})
        parent.children[run.pages[run.low]] = upper
        self._untell(run)
        run.low, run.parent = at, upper
        self._retell(upper)
        return upper

    def _grow_together(self, run: _Run) -> None:
        """A run whose requests all go on with the same one is one with it."""
        (child,) = run.children.values()
        parent = run.parent
        assert parent is not None
        self._untell(run)
        self._untell(child)
        child.low, child.parent = run.low, parent
        parent.children[child.pages[child.low]] = child
        self._retell(child)

    # The tables.

    def _tell(self, run: _Run) -> None:
        """The count of a run has changed."""
        shared = run.count > 1 and (run.unit >= 0 or self._level(run) < DEPTH)
        if not shared:
            self._untell(run)
            return
        tables, tokens = self.tables, (run.high - run.low) * self.page_tokens
        unit = run.unit
        if unit < 0:
            unit = run.unit = heapq.heappop(self._units)
            tables.lows[unit], tables.highs[unit] = run.low * self.page_tokens, run.high * self.page_tokens
            self.shared_tokens += tokens
        self.saved_tokens += (run.count - max(1, int(tables.counts[unit]))) * tokens
        tables.counts[unit] = run.count

    def _untell(self, run: _Run) -> None:
        if run.unit < 0:
            return
        tables, tokens = self.tables, (run.high - run.low) * self.page_tokens
        self.shared_tokens -= tokens
        self.saved_tokens -= (int(tables.counts[run.unit]) - 1) * tokens
        tables.counts[run.unit] = 0
        heapq.heappush(self._units, run.unit)
        run.unit = -1

    def _retell(self, run: _Run) -> None:
        """Units and chains of a run and of everything below: it was divided, or has grown together."""
        below = [run]
        for each in below:
            below.extend(each.children.values())
        for each in below:
            if self._level(each) >= DEPTH:
                self._untell(each)
            elif each.count > 1 and each.unit < 0:
                self._tell(each)
        for member in _members(run):
            self._chain(member)

    def _chain(self, slot: int) -> None:
        units = [run.unit for run in _up(self._end_of[slot]) if run.unit >= 0][::-1]
        chain = self.tables.chains[slot]
        chain[: len(units)] = units
        chain[len(units) :] = -1

    def _level(self, run: _Run) -> int:
        return sum(1 for _ in _up(run)) - 1

    def check_integrity(self) -> None:
        """The tables and the trie tell the same, and nothing is left of who has gone."""
        tables, tokens = self.tables, self.page_tokens
        runs = [self._root]
        for run in runs:
            runs.extend(run.children.values())
        shared = saved = 0
        for run in runs[1:]:
            assert run.count == sum(1 for _ in _members(run)) > 0
            assert run.ends or len(run.children) > 1, "two runs that are one"
            assert (run.unit >= 0) == (run.count > 1 and self._level(run) < DEPTH)
            assert all(child.low == run.high and child.parent is run for child in run.children.values())
            if run.unit >= 0:
                of = (tables.lows, tables.highs, tables.counts)
                assert [int(x[run.unit]) for x in of] == [run.low * tokens, run.high * tokens, run.count]
                shared += (run.high - run.low) * tokens
                saved += (run.high - run.low) * tokens * (run.count - 1)
        assert (shared, saved) == (self.shared_tokens, self.saved_tokens)
        units = [run.unit for run in runs if run.unit >= 0]
        assert len(set(units)) == len(units) == np.count_nonzero(tables.counts)
        assert sorted(units + self._units) == list(range(self.requests))
        for slot in range(len(tables.chains)):
            path = [run.unit for run in _up(self._end_of[slot])][::-1] if slot in self._end_of else []
            assert tables.chains[slot].tolist() == ([u for u in path if u >= 0] + [-1] * DEPTH)[:DEPTH], slot


def _up(run: _Run) -> Iterator[_Run]:
    """A run and those before it on the path, without the root."""
    while run.parent is not None:
        yield run
        run = run.parent


def _members(run: _Run) -> Iterator[int]:
    stack = [run]
    while stack:
        run = stack.pop()
        yield from run.ends
        stack.extend(run.children.values())


def _common(run: _Run, pages: Sequence[int]) -> int:
    """Up to which page those of a run and these are the same, from the run's first one on, which is."""
    low, high = run.low + 1, min(run.high, len(pages))
    while low < high:
        middle = (low + high + 1) // 2
        if run.pages[middle - 1] == pages[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
