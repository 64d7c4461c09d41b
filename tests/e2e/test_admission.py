"""Which batches prompts are computed in: how long they are, and when who waits begins."""

from __future__ import annotations

import pytest

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


def as_beside_a_gpu(scheduler):
    """The host computes a batch in the very call that launches it. Here that is told as a GPU has it in SGLang's
    overlapped loop: a batch is done between the launches of the next two. Notes who ran in which batch."""
    runtime = scheduler.token_to_kv_pool_allocator.runtime
    memory, launched = runtime.memory, []
    launch, complete, run_batch = memory.launch, memory.complete, scheduler.run_batch
    scheduler.batches = []

    def launches(**kwargs):
        launched.append(launch(**kwargs))
        return launched[-1]

    def completes(epoch):
        """Called behind a launch, and by who waits until nothing is in flight."""
        complete(epoch - 2 if launched and launched.pop() == epoch else epoch)

    def runs(batch, *args, **kwargs):
        scheduler.batches.append([req.rid for req in batch.reqs])
        return run_batch(batch, *args, **kwargs)

    memory.launch, memory.complete, scheduler.run_batch = launches, completes, runs
    runtime.poll = lambda: complete(memory.launched - 1)


def batches(scheduler):
    return scheduler.batches


@pytest.mark.parametrize(
    ("model", "sizes", "server_args"),
    [
        ("gemma3", {"long": (400, 300), "short": (700, 12)}, {"max_total_tokens": 1024, "disable_radix_cache": True}),
        ("qwen3_5_deep", {"long": (40, 260), "short": (40, 12)}, {"max_total_tokens": 2048}),
    ],
)
def test_who_waits_for_what_a_batch_in_flight_reads_begins_when_that_is_done(schedulers, model, sizes, server_args):
    """There is room for two. The third one waits for the second one's end; as that is seen, a batch in flight still
    reads its pages. It does not wait for the end of the first one too."""
    server_args |= {"max_running_requests": 8, "chunked_prefill_size": 64 if model == "gemma3" else 2048}
    ours = schedulers(model, kv_backend="vtensor", page_size=16, **server_args)
    prompt = Prompts(1)
    of = {"first": "long", "second": "short", "third": "short"}
    asked = [Request(name, prompt(sizes[size][0]), sizes[size][1], fixed=True) for name, size in of.items()]
    ours.run([[Do(as_beside_a_gpu)]])
    ours.run([[asked[0]], [], [asked[1]], [], [asked[2]]])
    ran = {name: [n for n, names in enumerate(ours.call(batches)) if name in names] for name in of}
    assert ran["third"][0] > ran["second"][-1], "there was room for all three"
    assert ran["third"][0] < ran["first"][-1] - 100, {name: (those[0], those[-1]) for name, those in ran.items()}
