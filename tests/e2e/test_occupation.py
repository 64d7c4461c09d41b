"""SGLang's release and resume of memory by tags, in its scheduler: what is refused, what waits, and what comes back.

torch_memory_saver needs a GPU: `Saver` stands in for it (`tests/gpu/test_occupation.py` has the real one).
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.e2e.compare import TIE, Prompts, assert_same
from tests.e2e.shortage import leave_pages
from tests.harness import Do, Request

KV, WEIGHTS, GRAPH = "kv_cache", "weights", "cuda_graph"
OURS = {"kv_backend": "vtensor", "page_size": 16, "max_total_tokens": 1024, "max_running_requests": 8}
NEW = 12


class Saver:
    """What is paused loses what it had. Weights have a copy, as with --enable-weights-cpu-backup."""

    enabled = True

    def __init__(self, scheduler: Any) -> None:
        self.model = scheduler.tp_worker.model_runner.model
        self.table = scheduler.req_to_token_pool.req_to_token
        self.paused: list[str] = []

    def pause(self, tag: str) -> None:
        assert tag not in self.paused, "torch_memory_saver would end the process"
        self.paused.append(tag)
        if tag == WEIGHTS:
            self.copies = [tensor.data.clone() for tensor in self.model.parameters()]
            for tensor in self.model.parameters():
                tensor.data.fill_(float("nan"))
        if tag == KV:
            self.table.fill_(1 << 28)

    def resume(self, tag: str) -> None:
        self.paused.remove(tag)
        if tag == WEIGHTS:
            for tensor, copy in zip(self.model.parameters(), self.copies, strict=True):
                tensor.data.copy_(copy)


def use_saver(scheduler):
    updater = scheduler.weight_updater
    scheduler.no_saver, updater.memory_saver_adapter = updater.memory_saver_adapter, Saver(scheduler)


def use_none(scheduler):
    scheduler.weight_updater.memory_saver_adapter = scheduler.no_saver


@pytest.fixture
def ours(schedulers):
    scheduler = schedulers(**OURS)
    yield scheduler
    assert scheduler.stats()["sleeping"] == 0, "the test left memory released"
    scheduler.check()


@pytest.fixture
def saved(ours):
    ours.call(use_saver)
    yield ours
    ours.call(use_none)


# What a client sends, between two turns.


def ask(scheduler, what, tags):
    from sglang.srt.managers import io_struct

    os.environ["SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY"] = "0"  # see tests/e2e/shortage.py
    kind = {"release": io_struct.ReleaseMemoryOccupationReqInput, "resume": io_struct.ResumeMemoryOccupationReqInput}
    return getattr(scheduler.weight_updater, f"{what}_memory_occupation")(kind[what](tags=tags))


def done(what, *tags):
    return Do(_done, (what, list(tags)))


def _done(scheduler, what, tags):
    assert ask(scheduler, what, tags) is not None
    assert scheduler.vtensor_elastic.refusal is None, scheduler.vtensor_elastic.refusal


def refused(what, *tags, why):
    return Do(_refused, (what, list(tags), why))


def _refused(scheduler, what, tags, why):
    before = set(scheduler.weight_updater.offload_tags)
    assert ask(scheduler, what, tags) is not None, "an answer"
    assert why in scheduler.vtensor_elastic.refusal, scheduler.vtensor_elastic.refusal
    assert scheduler.weight_updater.offload_tags == before


def state(**wanted):
    return Do(_state, (wanted,))


def _state(scheduler, wanted):
    stats = scheduler.token_to_kv_pool_allocator.runtime.stats()
    assert {name: stats[name] for name in wanted} == wanted


def same(expected, got):
    for theirs, mine in zip(expected, got, strict=True):
        assert mine.finish == "FINISH_LENGTH"
        assert_same(theirs, mine, tie=TIE["float32"])


FREE = state(pages_backed=1, pages_owned=0, tree_tokens=0, requests=0, sleeping=1)


# The tests.


@pytest.mark.parametrize("order", [(WEIGHTS, GRAPH, KV), (GRAPH, KV, WEIGHTS)])
def test_all_that_was_released_comes_back(saved, order):
    """Whoever arrives waits until the last tag is there again, whatever the order."""
    requests = [Request(f"r{n}", Prompts(n)(60), NEW) for n in range(4)]
    expected = saved.generate(*requests)
    script = [[done("release")], [FREE, *requests], [], []]
    there = {"pages_backed": 1}
    for tag in order:
        script += [[state(pages_owned=0, requests=0, **there)], [done("resume", tag)]]
        there = {} if tag == KV else there  # the worker may make pages ahead, which nobody has yet
    got = saved.run([*script, [Do(table_is_clean)]])
    same(expected, [got[request.rid] for request in requests])


def table_is_clean(scheduler):
    table = scheduler.req_to_token_pool.req_to_token
    assert int(table[0].abs().max()) == 0, "padded requests would read slots without memory"


def test_weights_alone_leave_the_cache(saved):
    request = Request("r", Prompts(5)(70), NEW)
    (expected,) = saved.generate(request)
    got = saved.run([[done("release", WEIGHTS)], [request], [], [state(requests=0)], [done("resume", WEIGHTS)]])["r"]
    same([expected], [got])
    assert got.cached >= 64


def test_without_a_saver_weights_stay_and_requests_run(ours):
    request = Request("r", Prompts(6)(40), NEW)
    answers = ours.run([[done("release", WEIGHTS)], [state(sleeping=0), request], *[[]] * 30, [done("resume")]])
    assert answers["r"].finish == "FINISH_LENGTH"


def test_what_is_refused_changes_nothing(ours):
    request = Request("r", Prompts(7)(40), NEW)
    (expected,) = ours.generate(request)
    script = [
        [refused("resume", why="released is nothing: resume what is released")],
        [refused("resume", KV, why="of kv_cache, released is nothing")],
        [refused("release", "kv", why="tags 'kv' are unknown: give of kv_cache, weights, cuda_graph")],
        [request],
        [],
        [refused("release", why="1 requests have not ended")],
        *[[]] * NEW,
        [],
        [done("release", KV, KV), done("release", KV), FREE],
        [refused("resume", WEIGHTS, why="of weights, released is kv_cache")],
        [refused("resume", KV, WEIGHTS, why="of kv_cache, weights, released is kv_cache")],
        [FREE, done("resume", KV, KV)],
    ]
    same([expected], [ours.run(script)["r"]])


def test_who_cannot_be_told_gets_sglangs_end(ours):
    """SGLang loads no plugin in HTTP workers: there the scheduler ends, as SGLang's own does, and does not say yes."""
    ours.run([[Do(tells, (False,))], [Do(raises)], [Do(tells, (True,))]])


def tells(scheduler, value):
    scheduler.vtensor_elastic.tells_refusals = value


def raises(scheduler):
    with pytest.raises(RuntimeError, match=r"^resume_memory_occupation is refused: released is nothing"):
        ask(scheduler, "resume", [])


@pytest.mark.parametrize("overlap", [True, False])
def test_a_release_waits_for_the_last_batch(schedulers, overlap):
    """A client knows that its request ended before the scheduler has let go of its last batch: with overlap one batch
    more is in flight, which was launched ahead."""
    ours = schedulers(**OURS, **({} if overlap else {"disable_overlap_schedule": True}))
    request = Request("r", Prompts(8)(40), NEW)
    (expected,) = ours.generate(request)
    stop = next(token for n, token in enumerate(expected.tokens) if n > 3 and token not in expected.tokens[:n])
    assert ours.flush()
    script = [[request], [Do(stop_at, (stop,))], *[[Do(release_once_ended)]] * (NEW + 6)]
    script += [[FREE, Do(not_refused), done("resume")]]
    assert ours.run(script)["r"].tokens[-1] == stop
    ours.call(was_answered_late)


def stop_at(scheduler, token):
    scheduler.finished_requests["r"].sampling_params.stop_token_ids = {token}
    scheduler.ipc_channels.send_to_tokenizer.late = []


def release_once_ended(scheduler):
    sender = scheduler.ipc_channels.send_to_tokenizer
    if scheduler.finished_requests["r"].finished() and "send_output" not in vars(sender):
        sender.send_output = lambda output, _=None: sender.late.append(output)
        assert not scheduler.is_fully_idle()
        assert ask(scheduler, "release", [KV]) is None
        _refused(scheduler, "release", [KV], "another release waits")


def not_refused(scheduler):
    assert scheduler.vtensor_elastic.refusal is None, "the release that waited would be told of another's refusal"


def was_answered_late(scheduler):
    sender = scheduler.ipc_channels.send_to_tokenizer
    answers = [type(output).__name__ for output in sender.late]
    del sender.send_output, sender.late
    assert answers.count("ReleaseMemoryOccupationReqOutput") == 1, answers


def test_who_was_retracted_waits_for_the_memory_too(ours):
    """Pause with mode retract, release, and go on before the resume."""
    requests = [Request(f"r{n}", Prompts(20 + n)(50), 2 * NEW) for n in range(4)]
    expected = ours.generate(*requests)
    script = [
        requests,
        *[[]] * 5,
        [Do(pause)],
        [done("release", KV), FREE],
        [Do(go_on)],
        *[[]] * 5,
        [FREE, Do(waiting, (4,))],
        [done("resume", KV)],
    ]
    got = ours.run(script)
    same(expected, [got[request.rid] for request in requests])


def test_who_paused_in_place_is_told_to_go_on_first(ours):
    """SGLang's pause with mode abort would wait there for requests that do not go on."""
    request = Request("r", Prompts(26)(50), NEW)
    (expected,) = ours.generate(request)
    why = "runs nothing: call POST /continue_generation, and then POST /pause_generation (mode abort, or retract)"
    script = [[request], *[[]] * 4, [Do(pause, ("in_place",))], [refused("release", KV, why=why)], [Do(go_on)]]
    same([expected], [ours.run(script)["r"]])


def pause(scheduler, mode="retract"):
    scheduler.pause_generation(SimpleNamespace(mode=mode))


def go_on(scheduler):
    scheduler.continue_generation(SimpleNamespace(torch_empty_cache=False))


def waiting(scheduler, count):
    assert len(scheduler.waiting_queue) == count


def test_a_resume_without_room_for_the_weights_is_refused_and_may_be_asked_again(saved):
    request = Request("r", Prompts(9)(40), NEW)
    (expected,) = saved.generate(request)
    script = [
        [done("release")],
        [Do(free, (1000,)), request],
        [refused("resume", why="the weights need ")],
        [refused("resume", WEIGHTS, why="has 1000 free: free the device of every rank, and resume again")],
        [FREE, done("resume", KV), state(requests=0), Do(waiting, (1,))],
        [Do(free, (None,))],
        [done("resume")],
    ]
    same([expected], [saved.run(script)["r"]])


def free(scheduler, nbytes):
    """The device has so many bytes free, as another process has taken the others; None: as it is."""
    vmm = scheduler.token_to_kv_pool_allocator.runtime.memory.vmm
    vmm.__dict__.pop("memory", None)
    if nbytes is not None:
        vmm.memory = lambda: (nbytes, 1 << 40)


def test_a_driver_that_refuses_pages_behind_a_resume_makes_requests_wait(ours):
    requests = [Request(f"r{n}", Prompts(30 + n)(60), NEW) for n in range(3)]
    expected = ours.generate(*requests)
    script = [
        [done("release", KV)],
        [Do(leave_pages, (1,)), done("resume", KV), *requests],
        *[[]] * 5,
        [state(pages_backed=1, requests=0, sleeping=0), Do(waiting, (3,))],
        [Do(leave_pages, (None,))],
    ]
    got = ours.run(script)
    same(expected, [got[request.rid] for request in requests])


def test_nan_weights_would_be_seen(saved):
    """That the stand-in takes the weights: otherwise the tests above could not fail."""
    saved.run([[done("release", WEIGHTS)], [Do(weights_are_gone)], [done("resume")]])


def weights_are_gone(scheduler):
    assert all(torch.isnan(tensor).all() for tensor in scheduler.tp_worker.model_runner.model.parameters())
