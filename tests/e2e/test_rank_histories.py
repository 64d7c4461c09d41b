"""Two ranks with one history and different devices stay alike, step for step (invariant 8).

Each rank is a real scheduler in a process of its own. What arrives is the same for both; what their drivers give, and
what their workers have in hand, is not. They vote as SGLang's tensor-parallel ranks do, by an all-reduce of gloo.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests import versions
from tests.e2e.compare import Prompts
from tests.e2e.shortage import leave_pages, refuse_at_random, worker_holds
from tests.e2e.test_elastic import SLEEP, WAKE, limit
from tests.effort import share_of
from tests.harness import Abort, Do, Request, Scheduler

PAGES = 40
SERVER = {
    "kv_backend": "vtensor",
    "page_size": 16,
    "dtype": "float32",
    "max_total_tokens": 16 * PAGES,
    "max_running_requests": 6,
    "chunked_prefill_size": 64,
}


def join(scheduler: Any, number: int, store: str) -> None:
    """Make the scheduler one of two ranks, and have it note each vote, and how things stand before each batch."""
    import torch.distributed as dist

    from sglang_vtensor import worker
    from sglang_vtensor.srt import matching

    runtime = scheduler.token_to_kv_pool_allocator.runtime
    # Ranks that part are told apart by a vote that the other one never casts.
    runtime.use_group(dist.ProcessGroupGloo(dist.FileStore(store, 2), number, 2, timedelta(seconds=60)))
    assert runtime.several_ranks
    # Ranks of one model add up their logits, so they have the same ones. These have a model each, and its last bits
    # depend on how many runs a context has, which differs: what the first one samples is what both say.
    sampled = dist.ProcessGroupGloo(dist.FileStore(f"{store}.sampled", 2), number, 2, timedelta(seconds=60))
    runner = scheduler.tp_worker.model_runner
    sample = runner.sample

    def sample_alike(*args: Any, **kwargs: Any) -> torch.Tensor:
        tokens = sample(*args, **kwargs)
        sampled.broadcast(tokens, 0).wait()
        return tokens

    runner.sample = sample_alike
    matching.AWAITED_TOKENS = 16  # contexts are short here
    worker.PATIENCE_SECONDS = 0.02  # what `worker_holds` does not let go of is soon done without
    scheduler.noted = []
    agree, launch = runtime.agree, scheduler.run_batch

    def vote(done: bool) -> bool:
        result = agree(done)
        scheduler.noted.append(("vote", result))  # what one of them holds for the moment it gives back, if not all do
        return result

    def run_batch(batch: Any, *args: Any, **kwargs: Any) -> Any:
        slot = runtime.sglang.slot
        rows = [(req.rid, slot(req), int(n)) for req, n in zip(batch.reqs, batch.seq_lens_cpu, strict=True)]
        scheduler.noted.append((batch.forward_mode.name, rows, state(scheduler)))
        return launch(batch, *args, **kwargs)

    runtime.agree, scheduler.run_batch = vote, run_batch


def state(scheduler: Any) -> tuple[Any, ...]:
    """All that ranks must have in common: the tree with its locks and tails, records, queue, sums."""
    runtime, tree = scheduler.token_to_kv_pool_allocator.runtime, scheduler.tree_cache
    nodes = []
    stack = [(tree.root_node, ())]
    while stack:
        node, before = stack.pop()
        path = (*before, tuple(node.key.token_ids))
        tails = [
            (runtime.sglang.namespace(key), tuple(key.token_ids), tail.frame is not None) for key, tail in node.tails
        ]
        nodes.append((hash(path), node.lock_ref, len(node.frames), tails, node.state is not None))
        stack += [(child, path) for child in node.children.values()]
    records = {slot: (len(record.frames), record.protected) for slot, record in runtime.requests.items()}
    memory = runtime.memory
    sums = (memory.allowance, memory.owned, len(memory.tails), tree.evictable_size(), tree.protected_size())
    return sorted(nodes), records, [req.rid for req in scheduler.waiting_queue], sums


def noted(scheduler: Any) -> list[Any]:
    """What was noted since the last call."""
    notes, scheduler.noted = scheduler.noted, []
    return notes


class Ranks:
    """Two of them; started anew after a failure, as one that has lost the other waits for it in vain."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model, self._folder, self._starts = model, folder, 0
        self.both: list[Scheduler] = []

    def start(self) -> None:
        self.close()
        self._starts += 1
        store = str(self._folder / f"store{self._starts}")
        self.both = [Scheduler(self._model, wait=False, **SERVER) for _ in range(2)]
        at_once(self.both, lambda rank, _: rank.stats())  # both are there: who joins waits ten seconds for the other
        at_once(self.both, lambda rank, number: rank.call(join, number, store))

    def close(self) -> None:
        for rank in self.both:
            rank.close()
        self.both = []


@pytest.fixture(scope="module", params=["gqa", *versions.WINDOWED, *versions.WITH_STATES])
def ranks(request, models, tmp_path_factory):
    ranks = Ranks(models[request.param], tmp_path_factory.mktemp("ranks"))
    ranks.start()
    yield ranks
    ranks.close()


def at_once(ranks, do) -> list[Any]:
    """`do(rank, number)` for both, in threads; what each returned."""
    results: list[Any] = [None, None]
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            results[number] = do(ranks[number], number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


#: What befalls one rank alone: its driver has room for so many pages, or refuses now and then, or its worker has
#: something in hand and does not let go.
FAULTS = st.one_of(
    st.builds(lambda pages: Do(leave_pages, (pages,)), st.integers(8, PAGES + 1)),
    st.just(Do(leave_pages, (None,))),
    st.builds(lambda seed: Do(refuse_at_random, (0.3, seed)), st.integers(0, 99)),
    st.just(Do(refuse_at_random, (0.0, 0))),
    st.builds(lambda pages: Do(worker_holds, (pages,)), st.integers(0, 6)),
)
#: What both are told.
ORDERS = st.one_of(st.builds(limit, st.integers(6, PAGES)), st.just(SLEEP), st.just(WAKE))
END = [Do(leave_pages, (None,)), Do(refuse_at_random, (0.0, 0)), Do(worker_holds, (0,)), WAKE, limit(PAGES)]


@settings(max_examples=share_of(60), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 1 << 30),
    arrivals=st.lists(
        st.tuples(
            st.integers(0, 5),  # how it begins
            st.integers(1, 100),  # tokens said
            st.integers(1, 24),  # tokens answered
            st.integers(0, 9),  # turns of the event loop before the next arrives
            st.sampled_from(["ends", "ends", "ends", "aborted"]),
        ),
        min_size=4,
        max_size=14,
    ),
    faults=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 60), FAULTS), min_size=2, max_size=8),
    orders=st.lists(st.tuples(st.integers(0, 60), ORDERS), max_size=4),
)
def test_two_ranks_with_one_history_stay_alike(ranks, seed, arrivals, faults, orders):
    prompt = Prompts(seed)
    stems = [prompt(20), prompt(75), prompt(150)]
    turns: list[list[Any]] = [[]]
    for at, (stem, said, answered, wait, how) in enumerate(arrivals):
        tokens = stems[stem % 3][: 80 if stem > 2 else None] + prompt(said)
        stems[stem % 3] = tokens[:200]  # the next one goes on from here: in pages that are not full
        turns[-1].append(Request(f"r{at}.", tokens, answered))
        if how == "aborted":
            turns[-1].append(Abort(f"r{at}."))
        turns += [[] for _ in range(wait)]
    turns += [[] for _ in range(61 - len(turns))]
    for turn, order in orders:
        turns[turn].append(order)
    scripts = [[list(turn) for turn in turns] for _ in range(2)]
    for number, turn, fault in faults:
        scripts[number][turn].append(fault)

    try:
        stays_alike(ranks.both, scripts)
    except BaseException:
        ranks.start()
        raise


def _only_waits(scheduler: Any, rid: str) -> None:
    assert [req.rid for req in scheduler.waiting_queue] == [rid]
    assert scheduler.running_batch.is_empty()


@pytest.mark.parametrize("ranks", ["gqa"], indirect=True)
def test_who_finds_no_memory_together_begins_one_by_one(ranks):
    """No rank knows what the other's driver refuses: they are admitted together again and again, and nothing runs that
    would make room."""
    prompt = Prompts(5)
    requests = [Request(f"r{n}", prompt(20), 8) for n in range(3)]  # in one batch
    one_alone = 3  # pages of 16 tokens: two, and the padding page
    try:
        scripts = [[requests], [[Do(leave_pages, (one_alone,)), *requests]]]
        answers = at_once(ranks.both, lambda rank, number: rank.run(scripts[number]))
        assert all(answer.finish == "FINISH_LENGTH" for told in answers for answer in told.values())
        # The first one is too long for what one rank has: those behind it come to their end.
        queue = [Request("long", prompt(90), 8), *(Request(f"s{n}", prompt(20), 8) for n in range(3))]
        waits = Do(_only_waits, ("long",))
        scripts = [[queue, *([[]] * 200), [waits]], [[Do(leave_pages, (one_alone,)), *queue], *([[]] * 200), [waits]]]
        stays_alike(ranks.both, scripts)
    except BaseException:
        ranks.start()
        raise


def stays_alike(both: list[Scheduler], scripts: list[list[list[Any]]]) -> None:
    answers = at_once(both, lambda rank, number: rank.run([*scripts[number], END]))
    notes = at_once(both, lambda rank, _: rank.call(noted))
    for step, (one, other) in enumerate(zip(*notes, strict=False)):
        assert one == other, f"step {step}"
    assert len(notes[0]) == len(notes[1])
    assert answers[0].keys() == answers[1].keys()
    for rid, one in answers[0].items():
        other = answers[1][rid]
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3), rid  # as in `TIE`
        assert replace(one, logprobs=[], gaps=[], behind=[]) == replace(other, logprobs=[], gaps=[], behind=[]), rid
    for rank in both:
        rank.check()
    assert all(at_once(both, lambda rank, _: rank.flush()))
