"""SGLang's own memory and bookkeeping of states, with our kernels for linear attention and Mamba on the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.e2e.compare import TIE, Prompts, answers_of_both, assert_same
from tests.harness import Abort, Answer, Request, Scheduler
from tests.versions import WITH_STATES

#: States are kept on a grid, which is one of 64 tokens here, in prefill and in decode.
GRID = 64
#: SGLang keeps inputs of convolutions in bfloat16, whatever the model has, unless it is told.
COMMON: dict[str, Any] = {
    "environment": {"SGLANG_MAMBA_CONV_DTYPE": "float32"},
    "max_mamba_cache_size": 64,
    "max_running_requests": 8,
    "chunked_prefill_size": 256,
    "page_size": GRID,
    "mamba_track_interval": GRID,
}


@pytest.fixture(params=[*WITH_STATES, "qwen3_next"], scope="module")
def model(request) -> str:
    return request.param


@pytest.fixture
def scheduler(schedulers, model) -> Scheduler:
    return schedulers(model, **COMMON)


@pytest.fixture(scope="module")
def transformer(models, model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(models[model], dtype=torch.float32).eval()


def settled(scheduler: Any) -> tuple[Any, ...]:
    from sglang.srt.runtime_context import get_exec

    pool = scheduler.req_to_token_pool.mamba_pool.mamba_cache
    strategy = get_exec().mamba.mamba_radix_cache_strategy
    return strategy, scheduler.enable_overlap, scheduler.page_size, pool.conv[0].dtype, pool.temporal.dtype


def test_sglang_chooses_as_on_a_gpu(scheduler):
    assert scheduler.call(settled) == ("extra_buffer", True, GRID, torch.float32, torch.float32)


@torch.inference_mode()
def greedy(model: Any, tokens: list[int], new: int) -> Answer:
    """What transformers says, computed anew for each token."""
    answer = Answer([], 0, 0, "")
    for _ in range(new):
        logprobs = model(torch.tensor([tokens + answer.tokens]), use_cache=False).logits[0, -1].log_softmax(-1)
        (best, second), (token, _) = (x.tolist() for x in logprobs.topk(2))
        answer.tokens.append(token)
        answer.logprobs.append(best)
        answer.gaps.append(best - second)
    return answer


def assert_close(expected: Answer, got: Answer, what: str) -> None:
    """The same tokens, and as probable."""
    assert_same(expected, got, tie=TIE["float32"], what=what)
    if expected.tokens == got.tokens:
        assert got.logprobs == pytest.approx(expected.logprobs, abs=TIE["float32"]), what


def test_answers_are_those_of_transformers(scheduler, transformer):
    """Alone and in a batch; in one prefill and in chunks."""
    prompt = Prompts(1)
    requests = [Request(f"r{count}", prompt(count), 12) for count in (1, 3, 63, 64, 130, 400)]
    for request, got in zip(requests, scheduler.generate(*requests), strict=True):
        assert_close(greedy(transformer, list(request.tokens), 12), got, request.rid)


def assert_as_anew(scheduler: Scheduler, request: Request, got: Answer, new: int = 12) -> None:
    """A server that knows nothing begins its answer with the same tokens."""
    assert scheduler.flush()
    (answer,) = scheduler.generate(replace(request, rid="anew", new=new))
    assert answer.cached == 0
    assert_close(answer, replace(got, tokens=got.tokens[:new], logprobs=got.logprobs[:new]), request.rid)


def test_a_conversation_goes_on_from_a_state(scheduler):
    """Two conversations under one system prompt, with answers that cross the grid."""
    prompt = Prompts(2)
    system = prompt(150)
    talks, turns = [system, system], []
    for turn in range(3):
        talks = [tokens + prompt(30 + 20 * n) for n, tokens in enumerate(talks)]
        requests = [Request(f"turn {turn} of {n}", tokens, 70) for n, tokens in enumerate(talks)]
        answers = scheduler.generate(*requests)
        turns += zip(requests, answers, strict=True)
        talks = [tokens + answer.tokens for tokens, answer in zip(talks, answers, strict=True)]
    # The last token of an answer was never computed, and what lies behind the grid is computed again.
    known = [(len(request.tokens) + 69) // GRID * GRID for request, _ in turns[:-2]]
    assert [answer.cached for _, answer in turns] == [0, 0, *known]
    for request, answer in turns[2:]:
        assert_as_anew(scheduler, request, answer)


def test_prompts_that_branch(scheduler):
    """The second prompt makes SGLang keep a state where it parts from the first one; the others start there."""
    prompt = Prompts(3)
    stem = prompt(200)
    requests = [Request(f"branch {n}", stem + prompt(100), 4) for n in range(4)]
    answers = [scheduler.generate(request)[0] for request in requests]
    assert [answer.cached for answer in answers] == [0, 0, 192, 192]
    for request, answer in zip(requests[2:], answers[2:], strict=True):
        assert_as_anew(scheduler, request, answer, new=4)


def test_memory_is_short(schedulers, model):
    """Requests wait, are retracted and given up. Nothing leaks, which SGLang checks when it is idle."""
    short = {"max_mamba_cache_size": 32, "max_total_tokens": 512, "chunked_prefill_size": 128}
    short["schedule_conservativeness"] = 0.1  # more requests are let in than there is memory for
    scheduler = schedulers(model, **COMMON | short)
    prompt = Prompts(4)
    stem = prompt(70)
    requests = [Request(f"r{n}", stem[: 35 * (n % 3)] + prompt(20 + 5 * n), 70) for n in range(9)]
    answers = scheduler.run([requests, [], [], [], [], [Abort("r1")]])
    retracted = {rid for rid, answer in answers.items() if answer.retractions}
    assert retracted
    assert [rid for rid, answer in answers.items() if answer.finish != "FINISH_LENGTH"] == ["r1"]
    for request in requests:
        if request.rid in retracted or answers[request.rid].cached:
            assert_as_anew(scheduler, request, answers[request.rid])


def test_ours_says_the_same(schedulers, model):
    """Conversations that go on from states, over both memories. More of this is in `test_states.py`."""
    reference, ours = schedulers(model), schedulers(model, kv_backend="vtensor", page_size=16)
    prompt = Prompts(5)
    chats = [prompt(140 + 30 * n) for n in range(3)]
    found = 0
    for turn in range(3):
        requests = [Request(f"{turn} of {n}", chat, 30) for n, chat in enumerate(chats)]
        expected, got = answers_of_both(reference, ours, requests)
        for request, theirs, mine in zip(requests, expected, got, strict=True):
            assert_same(theirs, mine, tie=TIE["float32"], what=request.rid)
        ours.check()
        found += sum(answer.cached for answer in got)
        chats = [chat + answer.tokens + prompt(30) for chat, answer in zip(chats, expected, strict=True)]
    assert found > 2 * 3 * 128
