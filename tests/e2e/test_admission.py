"""How long the batches are that prompts are computed in."""

from __future__ import annotations

from tests.e2e.compare import Prompts
from tests.harness import Do, Request


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


def note_unfilled(scheduler):
    """What is left in the pages that requests fill, as it is counted, and how many requests there are; now."""
    runtime = scheduler.token_to_kv_pool_allocator.runtime
    scheduler.unfilled = [*getattr(scheduler, "unfilled", []), (runtime.memory.unfilled_tokens, len(runtime.requests))]


def unfilled(scheduler):
    return scheduler.unfilled


def test_what_prompts_leave_free_is_counted_while_they_are_there(schedulers):
    """Prompts one after another, without a decode step between them, each with 15 tokens of room at its end. The
    reserve is less by what there is now, not by all that there ever was."""
    ours = schedulers("gqa", dtype="float32", kv_backend="vtensor", page_size=16, chunked_prefill_size=64)
    prompt = Prompts(21)
    script = [[Request(f"r{n}.", prompt(17 + 80 * (n % 2)), 1), Do(note_unfilled)] for n in range(24)]
    ours.run(script)
    seen = ours.call(unfilled)
    assert max(tokens for tokens, _ in seen) > 0
    assert all(tokens <= 15 * requests for tokens, requests in seen), seen
    ours.check()
