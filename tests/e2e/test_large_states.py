"""States that take as much memory as many pages, as those of real models do."""

from __future__ import annotations

import pytest

from tests import versions
from tests.e2e.compare import TIE, Prompts, answers_of_both, assert_same
from tests.harness import Request

pytestmark = pytest.mark.parametrize("model", [f"{name}_deep" for name in versions.WITH_STATES])


def test_they_are_large(schedulers, model):
    ours = schedulers(model, kv_backend="vtensor", page_size=16)
    ours.generate(Request("one", Prompts(0)(80), 4))
    stats = ours.stats()
    assert stats["states_owned_bytes"] >= 10 * stats["page_bytes"] * stats["states_owned"]


@pytest.mark.parametrize("tokens", [1024, 2048, 4096])
def test_requests_go_on_from_states_that_leave_no_room(schedulers, model, tokens):
    """Six at once, each behind a state of its own, where memory has room for the requests, or for these states. They
    wait for one another, or begin anew; none waits for ever."""
    reference = schedulers(model)
    ours = schedulers(model, kv_backend="vtensor", page_size=16, max_total_tokens=tokens)
    prompt = Prompts(1)
    chats = [prompt(70) for _ in range(6)]
    for n, chat in enumerate(chats):
        answers_of_both(reference, ours, [Request(f"a{n}", chat, 2)])
    requests = [Request(f"b{n}", chat + prompt(6), 3) for n, chat in enumerate(chats)]
    expected, got = answers_of_both(reference, ours, requests)
    for request, theirs, mine in zip(requests, expected, got, strict=True):
        assert_same(theirs, mine, tie=TIE["float32"], what=request.rid)
    assert ours.flush()
    assert ours.stats()["states_owned"] == 0


@pytest.mark.parametrize(("chunk", "said", "answered"), [(64, 640, 100), (128, 640, 200)])
def test_cached_states_go_before_anyone_is_retracted(schedulers, model, chunk, said, answered):
    """Those that the chunks of its own prompt left are all that can be given up for a request."""
    limits = {"max_total_tokens": 2048, "chunked_prefill_size": chunk}
    ours = schedulers(model, kv_backend="vtensor", page_size=16, **limits)
    (answer,) = ours.generate(Request("alone", Prompts(2)(said), answered))
    assert (len(answer.tokens), answer.retractions) == (answered, 0)


def test_a_limit_counts_the_padding_of_states(schedulers, model):
    ours = schedulers(model, kv_backend="vtensor", page_size=16, max_total_tokens=4096)
    prompt = Prompts(3)
    ours.generate(*[Request(f"r{n}", prompt(70), 2) for n in range(6)])
    stats = ours.stats()
    assert stats["backed_bytes"] <= stats["limit_bytes"] == stats["capacity_bytes"]
