"""The same requests on SGLang's own KV cache and on ours."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tests.harness import Answer, Request, Scheduler, side_by_side

#: By how much (nats) the reference's best token must beat its second for a difference to be an error. A different page
#: size splits a prompt into other batches, and the last bits of a sum depend on the batch: below this, a tie is a tie.
#: Over an FP8 cache the model is float32: where one rounds a value up and the other down, it is an eighth larger. Leads
#: of the best token differed by 0.0001 in the median of 2,283 tokens, by 0.03 in one of a hundred, and by 0.1 at most.
TIE = {"float32": 1e-3, "bfloat16": 0.26, "fp8": 0.2}


class Prompts:
    """Random token ids that the tiny model's vocabulary has."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def __call__(self, count: int) -> list[int]:
        return [self._random.randrange(6, 400) for _ in range(count)]


def assert_same(reference: Answer, ours: Answer, *, tie: float, what: str = "") -> None:
    """Token for token the same, unless the reference itself was undecided where they part."""
    assert len(reference.tokens) == len(ours.tokens), (what, reference.finish, ours.finish)
    for i, (theirs, mine) in enumerate(zip(reference.tokens, ours.tokens, strict=True)):
        if theirs != mine:
            gap = reference.gaps[i]
            assert gap <= tie, f"{what}: token {i} is {mine}, the reference says {theirs}, ahead by {gap} nats"
            return


def answers_of_both(
    reference: Scheduler, ours: Scheduler, requests: list[Request]
) -> tuple[list[Answer], list[Answer]]:
    """All requests at once, on both."""
    expected, got = side_by_side(reference, ours, [requests])
    return [expected[request.rid] for request in requests], [got[request.rid] for request in requests]


def both(
    reference: Scheduler, ours: Scheduler, requests: list[Request], *, tie: float, cached: list[int] | None = None
) -> list[Answer]:
    """Run the requests at once on both, compare, check the invariants; and how many tokens ours did not compute again:
    of a model whose layers see a window, so many at most, as the window may be gone. Returns the reference's answers,
    from which a conversation goes on, so that both sides are always asked the same."""
    expected, got = answers_of_both(reference, ours, requests)
    for request, theirs, mine in zip(requests, expected, got, strict=True):
        assert_same(theirs, mine, tie=tie, what=request.rid)
    if cached is not None:
        found = [answer.cached for answer in got]
        exact = not ours.call(sees_windows)
        good = found == cached if exact else all(a <= b for a, b in zip(found, cached, strict=True))
        assert good, f"cached: {found}, wanted: {cached}"
    ours.check()
    return expected


def sees_windows(scheduler: Any) -> bool:
    """Whether layers of its model see a window."""
    return scheduler.token_to_kv_pool_allocator.runtime.window is not None


@contextlib.contextmanager
def having(ours: Scheduler, **values: int) -> Iterator[None]:
    """With other values of what is made for contexts much longer than those here."""
    before = ours.call(_set, values)
    try:
        yield
    finally:
        ours.call(_set, before)


def _set(_: object, values: dict[str, int]) -> dict[str, int]:
    from sglang_vtensor.srt import matching, runtime

    modules = {"AWAITED_TOKENS": matching, "MAX_MAPS_AHEAD": runtime}
    before = {name: getattr(modules[name], name) for name in values}
    for name, value in values.items():
        setattr(modules[name], name, value)
    return before


Pair = tuple[Scheduler, Scheduler, float]
Pairs = Callable[..., Pair]


def mean_difference(one: Sequence[Sequence[tuple[int, float]]], other: Sequence[Sequence[tuple[int, float]]]) -> float:
    """Of the log-probabilities of equal texts (`benchmarks.logprobs.ask`)."""
    pairs = [(a, b) for mine, theirs in zip(one, other, strict=True) for a, b in zip(mine, theirs, strict=True)]
    assert all(a[0] == b[0] for a, b in pairs), "other texts"
    return sum(abs(a[1] - b[1]) for a, b in pairs) / len(pairs)
