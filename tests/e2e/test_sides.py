"""Models of which some layers see a window: such layers are on a side of their own, which has memory for the last
tokens of each context only, and a match ends where the window before its end is there."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

from tests import versions
from tests.e2e.compare import TIE, Prompts, answers_of_both, assert_same, both
from tests.e2e.test_elastic import SLEEP, WAKE, limit, settle
from tests.harness import Do, Request, Scheduler

#: Of the models: so many tokens before one are seen.
WINDOW = 40
PAGE = 16
ARGS = {"kv_backend": "vtensor", "page_size": PAGE}
pytestmark = pytest.mark.parametrize("model", versions.WINDOWED)


@pytest.fixture
def pair(model, schedulers):
    def get(**server_args):
        return schedulers(model, **server_args), schedulers(model, **ARGS, **server_args)

    return get


@pytest.mark.parametrize("caching", [False, True])
def test_a_side_of_windows_has_memory_for_the_windows_only(pair, caching):
    theirs, ours = pair(disable_radix_cache=not caching, max_total_tokens=4096)
    prompt = Prompts(60)
    requests = [Request(f"r{n}", prompt(20 + 37 * n), 60) for n in range(8)]
    expected = theirs.generate(*requests)
    got = ours.run([[Do(watch_sides), *requests]])
    for request, answer in zip(requests, expected, strict=True):
        assert_same(answer, got[request.rid], tie=TIE["float32"], what=request.rid)
    most_full, most_windows, beyond = ours.call(watched)
    # A window of 40 tokens lies in four pages of 16 at most, and there is one for the token that comes. With the tree,
    # the windows of the ends of prompts stay too.
    assert most_windows <= len(requests) * (5 + 3 * caching) < most_full
    assert beyond == 0, "pages behind a window that had memory before a batch"
    ours.check()
    stats = ours.stats()
    left = stats["pages_owned"] + stats["pages_kept"]
    assert (left > 0) == caching
    # Of what is cached, the windows of two ends each: the prompt's and the answer's.
    assert ours.call(used) == [left, min(left, ours.call(used)[1])]
    assert ours.call(used)[1] <= len(requests) * 6 + 8


def test_what_never_goes_to_the_tree_has_memory_for_its_window_only(pair):
    """As of a request with embeddings in place of some of its tokens' own."""
    theirs, ours = pair(chunked_prefill_size=64)
    request = Request("r", Prompts(64)(200), 60)
    (expected,) = theirs.generate(request)
    script = [[request, Do(keep_from_the_tree)], *[[]] * 20, [Do(within_its_window)]]
    assert_same(expected, ours.run(script)["r"], tie=TIE["float32"])
    ours.check()
    assert ours.call(used) == [0, 0]


def keep_from_the_tree(scheduler):
    queue = scheduler._add_request_to_queue

    def queued(req, *args, **more):
        req.skip_radix_cache_insert, scheduler._add_request_to_queue = True, queue
        return queue(req, *args, **more)

    scheduler._add_request_to_queue = queued


def within_its_window(scheduler):
    (record,) = scheduler.token_to_kv_pool_allocator.runtime.requests.values()
    assert len(record.frames) > 12
    assert used(scheduler)[1] <= 5


def used(scheduler):
    return [backing.used for backing in scheduler.token_to_kv_pool_allocator.runtime.memory.backings]


def watch_sides(scheduler):
    runtime, launch = scheduler.token_to_kv_pool_allocator.runtime, scheduler.run_batch
    scheduler.most_used, scheduler.unwatched = [0, 0, 0], launch

    def watching(batch, *args, **kwargs):
        if not batch.forward_mode.is_decode():
            return launch(batch, *args, **kwargs)  # it writes all of its tokens, on both sides
        if any(record.awaited for record in runtime.requests.values()):
            return launch(batch, *args, **kwargs)  # the tree has not got them yet
        full, windows = (backing.used for backing in runtime.memory.backings)
        beyond = sum(
            runtime.memory.backings[1].uses(frame)
            for record in runtime.requests.values()
            for frame in record.frames[record.protected : record.behind]
        )
        scheduler.most_used = [max(pair) for pair in zip(scheduler.most_used, (full, windows, beyond), strict=True)]
        return launch(batch, *args, **kwargs)

    scheduler.run_batch = watching


def watched(scheduler):
    scheduler.run_batch = scheduler.unwatched
    return scheduler.most_used


def test_what_is_found_again(pair):
    """A turn goes on at the very token. A branch finds nothing at first, as the window before it is gone; it is there
    from then on, and the pages of both are one."""
    theirs, ours = pair()
    tie, prompt = TIE["float32"], Prompts(61)
    stem = prompt(150)
    (answer,) = both(theirs, ours, [Request("first", stem + prompt(50), 60)], tie=tie)
    text = stem + Prompts(61)(200)[150:] + answer.tokens
    _, (second,) = answers_of_both(theirs, ours, [Request("turn", text + prompt(9), 8)])
    assert second.cached == len(text) - 1, "but for the last token, which had no KV yet"
    for n, found in enumerate([0, 150, 150]):
        branch = Request(f"branch{n}", stem + prompt(60), 50)
        before = ours.stats()["pages_owned"]
        _, (mine,) = both_answers(theirs, ours, [branch], tie)
        assert mine.cached == found
        assert ours.stats()["pages_owned"] - before <= -(-(60 + 50 + 6) // PAGE), "pages of the stem are kept once"


def both_answers(theirs, ours, requests, tie):
    expected, got = answers_of_both(theirs, ours, requests)
    for request, answer, mine in zip(requests, expected, got, strict=True):
        assert_same(answer, mine, tie=tie, what=request.rid)
    ours.check()
    return expected, got


def test_a_shared_prompt_is_found_while_its_end_is_in_a_window(pair):
    """Requests that begin alike read its end, each in its own window; it goes with the last of them."""
    theirs, ours = pair()
    tie, prompt = TIE["float32"], Prompts(62)
    system = prompt(10 * PAGE)
    both(theirs, ours, [Request("system", system, 1)], tie=tie)
    requests = [Request(f"r{n}", system + prompt(5 + 30 * n), 70) for n in range(4)]
    both(theirs, ours, requests, tie=tie, cached=[len(system)] * 4)
    again = [Request(f"again{n}", system + prompt(7), 8) for n in range(2)]
    _, got = both_answers(theirs, ours, again, tie)
    assert [mine.cached for mine in got] == [len(system)] * 2, "a node ends there"


def test_the_limit_and_sleep_count_both_sides(pair):
    """A page of the limit is one of each side; what is told of each state adds up to what the driver gave."""
    theirs, ours = pair(max_total_tokens=1024)
    tie, prompt = TIE["float32"], Prompts(64)
    requests = [Request(f"r{n}", prompt(60), 20) for n in range(6)]
    both(theirs, ours, requests, tie=tie)
    page_bytes = ours.stats()["page_bytes"]
    ours.run([[limit(8)]])
    ours.call(settle)
    stats = ours.stats()
    assert stats["backed_bytes"] <= stats["limit_bytes"] == 9 * page_bytes
    assert 0 < stats["pages_cached"] <= 8
    assert stats["live_bytes"] == 0
    assert stats["cached_bytes"] + stats["kept_bytes"] == stats["owned_bytes"]
    assert 0 < stats["windows_owned_bytes"] <= stats["owned_bytes"] / 2
    both(theirs, ours, requests, tie=tie)
    ours.run([[SLEEP]])
    ours.call(settle)
    assert ours.stats()["backed_bytes"] == page_bytes, "the padding pages"
    ours.run([[WAKE, limit(64)]])
    both(theirs, ours, requests, tie=tie)


def test_a_checkpoint_that_is_not_served(model, models, tmp_path):
    """What a window is laid out by must be known before the weights are."""
    folder = tmp_path / "model"
    shutil.copytree(models[model], folder)
    plain = json.loads((folder / "config.json").read_text())
    for changes, message in (
        ({"layer_types": ["sliding_attention"] * 4}, "full_attention layers, sliding_attention ones and a window of 2"),
        ({"layer_types": ["full_attention", "chunked_attention"] * 2}, "its layers are"),
    ):
        (folder / "config.json").write_text(json.dumps(plain | changes))
        with pytest.raises(RuntimeError, match=f"(?s){re.escape(message)}"):
            Scheduler(folder, kv_backend="vtensor", dtype="float32", load_format="dummy")


def test_an_attention_backend_that_reads_behind_windows_is_refused(model, models):
    with pytest.raises(RuntimeError, match="torch_native reads contexts from their start"):
        Scheduler(models[model], dtype="float32", attention_backend="torch_native", **ARGS)


def test_gpt_oss_says_what_transformers_says(model, models, schedulers):
    """SGLang has no attention for it on the host: windows, and sinks in all layers, are held to transformers, in
    float32, where SGLang runs everything but attention."""
    from transformers import AutoModelForCausalLM

    ours = schedulers("gpt_oss", moe_runner_backend="triton", chunked_prefill_size=64, **ARGS)
    truth = AutoModelForCausalLM.from_pretrained(models["gpt_oss"], dtype=torch.float32, attn_implementation="eager")
    prompt = Prompts(63)
    texts = [prompt(count) for count in (5, 40, 41, 100, 190)]
    for turn in range(3):
        requests = [Request(f"t{turn}r{n}", text, 30) for n, text in enumerate(texts)]
        answers = ours.generate(*requests)
        ours.check()
        for n, (text, answer) in enumerate(zip(texts, answers, strict=True)):
            whole = torch.tensor([text + answer.tokens])
            with torch.no_grad():
                logits = truth(whole).logits[0, len(text) - 1 : -1]
            best, second = logits.topk(2).indices.unbind(1)
            gaps = logits.gather(1, best[:, None]) - logits.gather(1, second[:, None])
            for token, mine, gap in zip(best.tolist(), answer.tokens, gaps[:, 0].tolist(), strict=True):
                assert token == mine or gap < TIE["float32"], (turn, n)
            assert not turn or answer.cached >= len(text) - 12 - 1, "the last turn is there"
        texts = [text + answer.tokens + prompt(11) for text, answer in zip(texts, answers, strict=True)]
