"""What `SharedDecoder.plan` is to do, in plain Python: one unit, one tile and one share after another.

Written from what `kernels/shared_decode.py` says, and not as the kernels count, which find out everything at once.
Lengths are in tiles of keys; a tile of rows is longer than its keys by its cost, which comes first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Unit:
    """Tokens `low` to `high`, and the rows of the batch that read them; `shared`, or what one row has for itself."""

    rows: tuple[int, ...]
    low: int
    high: int
    shared: bool


@dataclass(frozen=True)
class Piece:
    """What a team does of a tile of rows without a break: from `start` to `stop` of its length.

    Its partial result is in place `place` of those of shared runs (`own` False) or of those of single requests.
    """

    team: int
    unit: Unit
    tile: int
    start: int
    stop: int
    own: bool
    place: int


@dataclass(frozen=True)
class Planner:
    """`each` requests fill a tile of rows, `block_n` keys a tile of keys, and `teams` divide the work."""

    each: int
    block_n: int
    teams: int
    cost: int
    shortest: int

    def tiles(self, unit: Unit) -> list[tuple[int, ...]]:
        """The rows of each tile."""
        return [unit.rows[at : at + self.each] for at in range(0, len(unit.rows), self.each)]

    def length(self, unit: Unit) -> int:
        return self.cost + -(-(unit.high - unit.low) // self.block_n)

    def keys(self, piece: Piece) -> range:
        """Positions of the keys of a piece. There are none in one that ends with the cost of its tile."""
        low, high = (piece.unit.low + max(0, at - self.cost) * self.block_n for at in (piece.start, piece.stop))
        return range(low, min(high, piece.unit.high))

    def share(self, units: list[Unit]) -> int:
        """What no team does more of: an equal part of everything, but not less than the shortest."""
        everything = sum(len(self.tiles(unit)) * self.length(unit) for unit in units)
        return max(self.shortest, -(-everything // self.teams))

    def plan(self, units: list[Unit]) -> list[Piece]:
        """Who does what, each team's pieces in the order of its work. `units`: shared ones by number, then own ones."""
        share = self.share(units)
        left = [share] * self.teams
        pieces: list[Piece] = []

        # Units of several tiles go first, as long as there are teams: a team for each share of each tile, and the teams
        # of one share are neighbours. The partial result is in the place of the team.
        line, teams = [], iter(range(self.teams))
        room = self.teams
        for unit in units:
            length, tiles = self.length(unit), len(self.tiles(unit))
            shares = range(0, length, share)
            if tiles > 1:
                room -= len(shares) * tiles
            if tiles == 1 or room < 0:
                line.append(unit)
                continue
            for start in shares:
                stop = min(start + share, length)
                for tile in range(tiles):
                    team = next(teams)
                    pieces.append(Piece(team, unit, tile, start, stop, False, team))
                    left[team] -= stop - start

        # All others stand in a line, and each team that has time left takes what comes next. A tile and a team only go
        # forward, one of them from each piece to the next, so that the sum of their numbers is a place of its own.
        takers = [team for team in range(self.teams) if left[team]]
        taker = number = 0
        shared_tiles = sum(len(self.tiles(unit)) for unit in line if unit.shared)
        for unit in line:
            for tile in range(len(self.tiles(unit))):
                start = 0
                while start < self.length(unit):
                    if not left[takers[taker]]:
                        taker += 1
                    team = takers[taker]
                    stop = min(self.length(unit), start + left[team])
                    place = number + taker + (self.teams if unit.shared else -shared_tiles)
                    pieces.append(Piece(team, unit, tile, start, stop, not unit.shared, place))
                    left[team] -= stop - start
                    start = stop
                number += 1
        return pieces

    def places(self, row: int, units: list[Unit], pieces: list[Piece]) -> Iterator[tuple[bool, int, int]]:
        """The partial results of a row along its context: whether in an own place, the place, and which request of the
        tile it is."""
        for unit in sorted((unit for unit in units if row in unit.rows), key=lambda unit: unit.low):
            tile, among = divmod(unit.rows.index(row), self.each)
            for piece in pieces:
                if piece.unit == unit and piece.tile == tile and self.keys(piece):
                    yield piece.own, piece.place, among


def units_of(
    chains: np.ndarray,
    lows: np.ndarray,
    highs: np.ndarray,
    contexts: list[int],
    window: int | None = None,
    block_n: int = 1,
) -> list[Unit]:
    """The units of a batch with tokens to read: those of `chains`, `(rows, levels)` of unit numbers and -1, by number;
    then what each row has for itself, which is what its last unit leaves of its context. With a window, a unit begins
    with the first tile that one of its rows sees."""
    shared = []
    for number in sorted({int(number) for number in chains.flat if number >= 0}):
        rows = tuple(row for row in range(len(chains)) if number in chains[row])
        shared.append(Unit(rows, int(lows[number]), int(highs[number]), True))
    own = []
    for row, context in enumerate(contexts):
        low = max([0, *(unit.high for unit in shared if row in unit.rows)])
        if low < context:
            own.append(Unit((row,), low, context, False))
    if window is None:
        return shared + own
    seen = []
    for unit in shared + own:
        first = min(max(0, contexts[row] - 1 - window) // block_n * block_n for row in unit.rows)
        if first < unit.high:
            seen.append(replace(unit, low=max(unit.low, first)))
    return seen
