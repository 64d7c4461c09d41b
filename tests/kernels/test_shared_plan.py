"""The planner of shared decode beside a model of it in plain Python: on random batches they say the same."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

from sglang_vtensor.kernels import configs, shared_plan
from sglang_vtensor.kernels.plan import Config
from sglang_vtensor.kernels.shared_decode import SharedDecoder
from sglang_vtensor.sharing import DEPTH, Sharing
from tests.kernels.planner_model import Piece, Planner, Unit, units_of
from tests.kernels.reference import DEVICE
from tests.kernels.test_shared_decode import PAGE, TEAM, UNIT, paths_of

#: Each is planned twice. Interpreted, a step takes a fifth of a second, which grows with the teams.
BATCHES = 100


class Planned:
    """What the planner wrote for a step, as its fields are meant."""

    def __init__(self, decoder: SharedDecoder) -> None:
        self.decoder = decoder
        self.units, self.teams = decoder.units.tolist(), decoder.work.tolist()
        self.members = decoder.members.tolist()
        self.run_tiles = int(decoder.line[shared_plan.LINE_RUN_TILES.value])

    def unit(self, number: int) -> Unit:
        low, high, first, count = (self.units[number][UNIT[name]] for name in ("LOW", "HIGH", "MEMBERS", "COUNT"))
        own = first >= DEPTH * self.decoder.rows
        return Unit(tuple(self.members[first : first + count]), low, high, not own)

    def length(self, number: int) -> int:
        return self.units[number][UNIT["TILES"]] + shared_plan.COST

    def work(self, team: int) -> Iterator[Piece]:
        """What a team does, and where `_pieces` leaves it: of a tile beside others, and then along the line."""
        at, end, number, beside, tile, start, stop, turn = (self.teams[team][TEAM[name]] for name in TEAM)
        if beside >= 0:
            yield Piece(team, self.unit(beside), tile, start, stop, False, team)
        while at < end:
            begin, length = self.units[number][UNIT["BEGIN"]], self.length(number)
            tile, start = divmod(at - begin, length)
            stop = min(length, start + end - at)
            before = self.units[number][UNIT["BEFORE"]] + tile
            own = before >= self.run_tiles
            place = before + turn + (-self.run_tiles if own else self.decoder.teams)
            yield Piece(team, self.unit(number), tile, start, stop, own, place)
            at += stop - start
            if at == begin + length * -(-self.units[number][UNIT["COUNT"]] // self.decoder.each):
                number += 1

    def places(self, row: int) -> list[tuple[bool, int, int]]:
        """Where `_together` reads, as of the model. Rows of own places hold one request's heads, the others a tile, for
        each KV head."""
        decoder, places = self.decoder, []
        for at in decoder.places[row, : int(decoder.parts[row])].tolist():
            own = at >= decoder.own_rows
            place, rest = divmod(
                at - own * decoder.own_rows, decoder.kv_heads * (decoder.own if own else decoder.config.block_m)
            )
            places.append((own, place, rest // decoder.group))
        return places


def check(
    decoder: SharedDecoder, sharing: Sharing, slots: list[int], contexts: list[int], every: int = 1
) -> list[Piece]:
    """Plan a step, and compare, of the rows every so many. Returns the model's pieces."""
    decoder.update(sharing.tables)
    decoder.plan(torch.tensor(slots, device=DEVICE), torch.tensor(contexts, dtype=torch.int32, device=DEVICE))
    tables = sharing.tables
    block_n, window = decoder.config.block_n, decoder.window
    units = units_of(tables.chains[slots], tables.lows, tables.highs, contexts, window, block_n)
    model = Planner(decoder.each, decoder.config.block_n, decoder.teams, shared_plan.COST, shared_plan.SHORTEST)
    pieces = model.plan(units)
    planned = Planned(decoder)
    for team in range(decoder.teams):
        assert list(planned.work(team)) == [piece for piece in pieces if piece.team == team], f"team {team}"
    for row, context in [*enumerate(contexts)][::every]:
        assert planned.places(row) == list(model.places(row, units, pieces)), f"row {row}"
        # Whatever the model says: every key of every request once, of a window all that it sees.
        keys = []
        for piece in pieces:
            if row in model.tiles(piece.unit)[piece.tile]:
                keys.extend(model.keys(piece))
        first = 0 if window is None else max(0, context - 1 - window)
        assert len(keys) == len(set(keys)), f"row {row}"
        assert {*range(first, context)} <= {*keys} <= {*range(context)}, f"row {row}"
    places = [(piece.own, piece.place) for piece in pieces if model.keys(piece)]
    assert len(places) == len(set(places)), "two partial results in one place"
    assert max((place for own, place in places if not own), default=0) < decoder.max_tiles + 2 * decoder.teams
    assert max((place for own, place in places if own), default=0) < decoder.rows + decoder.teams
    return pieces


def test_random_batches(monkeypatch):
    monkeypatch.setattr(configs, "multiprocessors", lambda device: 4)  # with few teams tiles are cut more often
    kinds = {"beside": 0, "cut": 0, "shared on the line": 0, "several tiles on the line": 0, "nothing of its own": 0}
    kinds["behind all windows"] = 0
    for seed in range(BATCHES):
        rng = random.Random(seed)
        most = rng.choice([3, 8, 16, 30])
        group, kv_heads = rng.choice([(1, 2), (4, 1), (4, 2), (7, 2), (8, 4), (16, 1)])
        decoder = SharedDecoder(
            max_requests=most,
            slots=most + 5,
            page_tokens=PAGE,
            max_tokens=100 * PAGE,
            q_heads=group * kv_heads,
            kv_heads=kv_heads,
            head_dim=64,
            device=DEVICE,
            config=Config(rng.choice([16, 16, 32]), rng.choice([16, PAGE]), 4, 1, False, rng.choice([1, 1, 1, 2])),
        )
        sharing = Sharing(slots=most + 5, requests=most, page_tokens=PAGE)
        paths = paths_of(rng, rng.randint(1, most), rng.choice([2, 6, 20]))
        if rng.random() < 0.4:  # several that share all, and so several tiles of rows
            paths = [paths[0] if rng.random() < 0.7 else path for path in paths]
        slots = rng.sample(range(1, most + 5), len(paths))
        contexts = [PAGE * len(path) + rng.choice([0, 1, 1, 2, PAGE, PAGE + 1, 300]) for path in paths]
        for slot, path, context in zip(slots, paths, contexts, strict=True):
            if context:
                sharing.join(slot, path)
        if not decoder.fits(sharing.tables):
            continue
        windowed = decoder.for_window(rng.choice([1, PAGE - 1, PAGE, 3 * PAGE + 1, 100 * PAGE]))
        for _ in range(2):  # the second step has less, in another order: nothing of the first one is left
            pieces = check(decoder, sharing, slots, contexts)
            windowed.update(sharing.tables)
            left_out = {piece.unit.rows for piece in pieces} - {
                piece.unit.rows for piece in check(windowed, sharing, slots, contexts)
            }
            kinds["behind all windows"] += bool(left_out)
            kinds["beside"] += any(not piece.own and piece.place < decoder.teams for piece in pieces)
            kinds["cut"] += any(piece.start for piece in pieces)
            on_line = [piece for piece in pieces if piece.unit.shared and piece.place >= decoder.teams]
            kinds["shared on the line"] += bool(on_line)
            kinds["several tiles on the line"] += any(piece.tile for piece in on_line)
            kinds["nothing of its own"] += len({piece.unit for piece in pieces if piece.own}) < len(slots)
            order = rng.sample(range(len(slots)), len(slots))
            gone, stay = order[: len(order) // 3], order[len(order) // 3 :]
            for i in gone:
                if slots[i] in sharing:
                    sharing.leave(slots[i])
            slots, contexts = [slots[i] for i in stay], [contexts[i] for i in stay]
    assert min(kinds.values()) >= 5, kinds


def test_more_than_a_thousand_requests(monkeypatch):
    """Samples of 70 prompts, 16 each; some have ended, and others are alone. Rows are looked at in several steps."""
    monkeypatch.setattr(configs, "multiprocessors", lambda device: 16)
    requests = 16 * 70 + 5
    decoder = SharedDecoder(
        max_requests=requests,
        slots=requests + 1,
        page_tokens=PAGE,
        max_tokens=64 * PAGE,
        q_heads=4,
        kv_heads=1,
        head_dim=64,
        device=DEVICE,
        config=Config(16, PAGE, 4, 1, False, 1),
    )
    assert decoder.rows == 2048
    rng = random.Random(0)
    sharing = Sharing(slots=requests + 1, requests=requests, page_tokens=PAGE)
    slots, contexts = rng.sample(range(1, requests + 1), requests), []
    for n, slot in enumerate(slots):
        prompt = n % 70
        path = [prompt * 100 + page for page in range(1, 3 + prompt % 9)] if n < 16 * 70 else []
        sharing.join(slot, path)
        contexts.append(PAGE * len(path) + rng.randint(1, 5 * PAGE))
    assert decoder.fits(sharing.tables)
    pieces = check(decoder, sharing, slots, contexts, every=97)
    assert sum(piece.unit.shared for piece in pieces) >= 70 * 4, "four tiles of rows each"
    stay = [n for n in range(requests) if n % 70 < 35 or n > 1000]
    for n in set(range(requests)).difference(stay):
        sharing.leave(slots[n])
    check(decoder, sharing, [slots[n] for n in stay], [contexts[n] for n in stay], every=53)
