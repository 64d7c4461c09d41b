"""What a server that runs short asks its neighbours for: as much as SGLang wants free before it admits what waits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_vtensor.srt.elastic import Demand, Elastic

PAGE_TOKENS, PAGE_BYTES = 16, 1 << 16


def req(prompt: int, said: int = 0, most: int = 100, *, ignore_eos: bool = False, over: bool = False):
    sampling = SimpleNamespace(max_new_tokens=most, ignore_eos=ignore_eos)
    tokens = {"origin_input_ids": [0] * prompt, "output_ids": [0] * said, "allocated": prompt + said}
    return SimpleNamespace(sampling_params=sampling, finished=lambda: over, **({} if over else tokens))


def chunked(prompt: int, done: int):
    begun = req(prompt, most=16)
    begun.allocated = done
    return begun


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS)


def pages(demand: Demand) -> float:
    elastic = Elastic.__new__(Elastic)
    elastic.runtime = SimpleNamespace(
        sglang=SimpleNamespace(allocated=lambda req: req.allocated),
        bytes_for=lambda tokens: pages_for(tokens) * PAGE_BYTES,
        memory=SimpleNamespace(layout=SimpleNamespace(page_bytes=PAGE_BYTES, pages_for=pages_for)),
    )
    return elastic._demanded(demand) / PAGE_BYTES


HEAD = req(15, most=16)


@pytest.mark.parametrize(
    ("waiting", "running", "wanted"),
    [
        ([], [], 0),
        ([], [req(50, said=200, most=1000, ignore_eos=True)], 0),  # nothing waits for what may never be needed
        ([HEAD], [], 1 + 1 + 1),  # its 15 tokens with one more, the whole of its answer, and a page
        ([HEAD], [req(50, said=200, most=1000, ignore_eos=True)], 3 + 50),  # which will say 800 tokens more
        ([HEAD], [req(50, said=200, most=1000)], 3 + 25),  # it may stop before: a half is kept free
        ([HEAD], [req(50, said=1000, most=1000)], 3),
        ([HEAD], [req(50, most=100_000, ignore_eos=True)], 3 + 256),  # SGLang looks 4,096 tokens ahead
        ([HEAD], [chunked(1000, 200)], 3 + 50 + 1),
        ([HEAD], [req(50, said=20, over=True)], 3),  # it holds nothing, and is not asked
        ([HEAD] * 40, [], 16 * 3),  # the head of the queue
    ],
)
def test_room_for_answers_is_wanted_too(waiting, running, wanted):
    assert pages(Demand(waiting, running, new_token_ratio=0.5)) == wanted
