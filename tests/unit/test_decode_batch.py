"""What a decode step is told beside what its requests' frames say, over random histories."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from sglang_vtensor.srt.decode_batch import DecodeBatch
from sglang_vtensor.srt.runtime import RequestFrames

TOKENS = 8


class Server:
    """Requests whose frames change only where that is counted."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.changes, self.page_tokens, self.window = 0, TOKENS, None
        self.sglang = SimpleNamespace(slot=lambda req: req.slot)
        self.decode = DecodeBatch(self)
        self.batch, self.looked, self.steps = [], 0, 0

    def begin(self):
        length = self.rng.randrange(1, 40)
        frames = [self.rng.randrange(1, 1000) for _ in range(-(-length // TOKENS))]
        slot = self.rng.randrange(1000)
        self.batch.append(SimpleNamespace(slot=slot, length=length, record=RequestFrames(frames, 0, 0)))
        self.changes += 1

    def end(self):
        self.batch.pop(self.rng.randrange(len(self.batch)))
        self.changes += 1

    def moved(self):
        """The tree has an equal page, which takes the place of a request's own."""
        record = self.rng.choice(self.batch).record
        record.frames[self.rng.randrange(len(record.frames))] = self.rng.randrange(1, 1000)
        self.changes += 1

    def put_in_order(self):
        """As SGLang filters and merges batches: nobody counts that."""
        self.rng.shuffle(self.batch)

    def step(self):
        self.steps += 1
        full, before = self.decode.full(self.batch), self.changes
        lacking = [req for req in self.batch if req.length == len(req.record.frames) * TOKENS]
        if full is not None:
            assert full[1] == [req.length for req in lacking]
            assert all(record is req.record for record, req in zip(full[0], lacking, strict=True))
        for req in lacking:
            req.record.frames.append(self.rng.randrange(1, 1000))
        if lacking:
            self.changes += 1
            if self.rng.random() < 0.1:
                self.moved()
            if full is not None:
                self.decode.grown(before)
        assert self.decode.slots(self.batch) == [req.slot for req in self.batch]
        lengths = torch.tensor([req.length for req in self.batch])
        places = self.decode.next(self.batch, lengths)
        if places is None:
            self.looked += 1
            places = self.decode.look(self.batch, [req.record for req in self.batch], lengths)
        expected = [req.record.frames[req.length // TOKENS] * TOKENS + req.length % TOKENS for req in self.batch]
        assert places.tolist() == expected
        places += 7  # it is the caller's
        for req in self.batch:
            req.length += 1


@pytest.mark.parametrize("seed", range(200))
def test_random_histories(seed):
    server = Server(seed)
    for _ in range(60):
        if not server.batch or server.rng.random() < 0.1:
            server.begin()
        elif server.rng.random() < 0.05:
            server.end()
        elif server.rng.random() < 0.05:
            server.moved()
        elif server.rng.random() < 0.05:
            server.put_in_order()
        if server.batch:
            server.step()


def test_requests_that_grow_are_not_looked_at_again():
    server = Server(0)
    server.moved = lambda: None
    for _ in range(5):
        server.begin()
    for _ in range(10 * TOKENS):
        server.step()
    assert server.looked == 1


def test_a_step_that_was_left_out_is_noticed():
    """A request of the same batch that has another length than one more is looked at."""
    server = Server(1)
    server.begin()
    server.batch[0].record.frames, server.batch[0].length = [5], 1
    server.step()
    server.batch[0].length += 1
    assert server.decode.next(server.batch, torch.tensor([server.batch[0].length])) is None


def test_windows_move_with_each_token():
    server = Server(2)
    server.window = object()
    server.begin()
    for _ in range(20):
        server.step()
    assert server.looked == 20
