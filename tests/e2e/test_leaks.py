"""A thousand mixed requests, and nothing is left."""

from __future__ import annotations

import random

import pytest

from tests.e2e.compare import Prompts
from tests.harness import Abort, Request


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_thousand_requests_leave_nothing(schedulers, page_size):
    ours = schedulers(kv_backend="vtensor", page_size=page_size, max_total_tokens=1024, chunked_prefill_size=64)
    before = ours.stats()
    prompt, rng = Prompts(20), random.Random(20)
    stems = [prompt(rng.randrange(10, 120)) for _ in range(8)]
    for wave in range(10):
        script, running = [], []
        for turn in range(25):
            arriving = []
            for n in range(4):
                rid = f"w{wave}t{turn}n{n}"
                arriving.append(Request(rid, rng.choice(stems) + prompt(rng.randrange(1, 60)), rng.randrange(1, 12)))
                running.append(rid)
            if rng.random() < 0.4:
                arriving.append(Abort(rng.choice(running)))
            script.append(arriving)
        ours.run(script)
        ours.check()
    assert ours.flush()
    after = ours.stats()
    for key in ("pages_owned", "pages_stuck", "requests", "tree_tokens"):
        assert after[key] == before[key] == 0, key
    ours.check()
    assert after["pages_allocated"] > 1000
