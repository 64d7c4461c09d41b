"""How long the batches are that prompts are computed in."""

from __future__ import annotations

from tests.e2e.compare import Prompts
from tests.harness import Request


def forwards(scheduler):
    return scheduler.forward_ct


def test_what_prompts_leave_free_in_their_last_pages_is_not_counted_as_work(schedulers):
    """Prompts of 17 tokens take two pages of 16 each. Counted so, two of them would fill a batch of 64 tokens."""
    ours = schedulers("gqa", dtype="float32", kv_backend="vtensor", page_size=16, chunked_prefill_size=64)
    prompt = Prompts(20)
    before = ours.call(forwards)
    answers = ours.generate(*[Request(f"r{n}.", prompt(17), 1) for n in range(8)])
    assert all(answer.finish == "FINISH_LENGTH" for answer in answers)
    # Three, and with SGLang's overlap a step whose result nobody wants; counted by pages it would be one more.
    assert ours.call(forwards) - before == 4
    ours.check()
