"""How long the batches are that prompts are computed in."""

from __future__ import annotations

from tests.e2e.compare import Prompts
from tests.harness import Request


def count_extends(scheduler):
    """From now on, on `scheduler.extends`."""
    launch, scheduler.extends = scheduler.run_batch, 0

    def run_batch(batch, *args, **kwargs):
        scheduler.extends += batch.forward_mode.is_extend()
        return launch(batch, *args, **kwargs)

    scheduler.run_batch = run_batch


def extends(scheduler):
    return scheduler.extends


def test_what_prompts_leave_free_in_their_last_pages_is_not_counted_as_work(schedulers):
    """Prompts of 17 tokens take two pages of 16 each. Counted so, two of them would fill a batch of 64 tokens."""
    ours = schedulers("gqa", dtype="float32", kv_backend="vtensor", page_size=16, chunked_prefill_size=64)
    prompt = Prompts(20)
    ours.call(count_extends)
    answers = ours.generate(*[Request(f"r{n}.", prompt(17), 1) for n in range(8)])
    assert all(answer.finish == "FINISH_LENGTH" for answer in answers)
    assert ours.call(extends) == 3
    ours.check()
