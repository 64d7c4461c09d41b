"""A model of which some layers see a window, through SGLang's pool: such layers are on a side of their own, which has
memory for the last tokens of each context only. Not offered to users yet, so it is made here of a model that is served.
"""

from __future__ import annotations

from tests.e2e.compare import TIE, Prompts, assert_same
from tests.harness import Do, Request

PAGE, WINDOW = 16, 40
ARGS = {"kv_backend": "vtensor", "page_size": PAGE, "disable_radix_cache": True, "max_total_tokens": 4096}
#: In the environment of a scheduler: layers 1 and 3 see a window, and are on a side of their own, or are not.
ONE_SIDE, TWO_SIDES = ({"VTENSOR_TEST_WINDOW": str(WINDOW), "VTENSOR_TEST_SIDES": n} for n in "12")


def test_a_side_of_windows_has_memory_for_the_windows_only(schedulers):
    one, two = (schedulers(environment=environment, **ARGS) for environment in (ONE_SIDE, TWO_SIDES))
    plain = schedulers(**ARGS)
    prompt = Prompts(60)
    requests = [Request(f"r{n}", prompt(20 + 37 * n), 60) for n in range(8)]
    expected = one.generate(*requests)
    script = [[Do(watch_sides), *requests]]
    got = two.run(script)
    for request, theirs in zip(requests, expected, strict=True):
        assert_same(theirs, got[request.rid], tie=TIE["float32"], what=request.rid)
    assert any(a.tokens != b.tokens for a, b in zip(expected, plain.generate(*requests), strict=True)), (
        "a window matters"
    )
    most_full, most_windows, beyond = two.call(watched)
    # A window of 40 tokens lies in four pages of 16 at most, and there is one for the token that comes.
    assert most_windows <= len(requests) * 5 < most_full
    assert beyond == 0, "pages behind a window that had memory before a batch"
    two.check()
    assert two.stats()["pages_owned"] == 0


def watch_sides(scheduler):
    runtime, launch = scheduler.token_to_kv_pool_allocator.runtime, scheduler.run_batch
    scheduler.most_used, scheduler.unwatched = [0, 0, 0], launch

    def watching(batch, *args, **kwargs):
        if not batch.forward_mode.is_decode():
            return launch(batch, *args, **kwargs)  # it writes all of its tokens, on both sides
        full, windows = (backing.used for backing in runtime.memory.backings)
        beyond = sum(
            runtime.memory.backings[1].uses(frame)
            for record in runtime.requests.values()
            for frame in record.frames[: record.behind]
        )
        scheduler.most_used = [max(pair) for pair in zip(scheduler.most_used, (full, windows, beyond), strict=True)]
        return launch(batch, *args, **kwargs)

    scheduler.run_batch = watching


def watched(scheduler):
    scheduler.run_batch = scheduler.unwatched
    return scheduler.most_used
