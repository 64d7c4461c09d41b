"""What a server that runs short asks its neighbours for: as much as SGLang wants free before it admits what waits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_vtensor.srt.elastic import Demand, Elastic

PAGE_TOKENS, PAGE_BYTES = 16, 1 << 16


def req(prompt: int, said: int = 0, most: int = 100, *, ignore_eos: bool = False) -> SimpleNamespace:
    sampling = SimpleNamespace(max_new_tokens=most, ignore_eos=ignore_eos)
    return SimpleNamespace(origin_input_ids=[0] * prompt, output_ids=[0] * said, sampling_params=sampling)


def pages(demand: Demand) -> float:
    elastic = Elastic.__new__(Elastic)
    elastic.runtime = SimpleNamespace(
        page_tokens=PAGE_TOKENS,
        bytes_for=lambda tokens: -(-tokens // PAGE_TOKENS) * PAGE_BYTES,
        memory=SimpleNamespace(layout=SimpleNamespace(page_bytes=PAGE_BYTES)),
    )
    return elastic._demanded(demand) / PAGE_BYTES


@pytest.mark.parametrize(
    ("waiting", "running", "wanted"),
    [
        ([], [], 0),
        ([req(100, most=60)], [], 7 + 4),  # 101 tokens, and the whole of its answer
        ([], [req(50, said=200, most=1000, ignore_eos=True)], 50),  # it will say 800 tokens more
        ([], [req(50, said=200, most=1000)], 25),  # it may stop before: a half is kept free
        ([], [req(50, said=1000, most=1000)], 0),
        ([], [req(50, most=100_000, ignore_eos=True)], 256),  # SGLang looks 4,096 tokens ahead
        ([req(15, most=16)] * 40, [], 16 * (1 + 1)),  # the head of the queue
    ],
)
def test_room_for_answers_is_wanted_too(waiting, running, wanted):
    assert pages(Demand(waiting, running, new_token_ratio=0.5)) == wanted
