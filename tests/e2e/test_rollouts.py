"""What a post-training framework asks of a server: memory is released and taken again by SGLang's own calls, weights
change meanwhile, and the answers are those of a server that began with them."""

from __future__ import annotations

import base64
import threading
import time
from pathlib import Path

import pytest
import requests
import torch
from safetensors.torch import load_file
from sglang.srt.utils import MultiprocessingSerializer

from benchmarks.serving import server
from sglang_vtensor import tiny_model
from sglang_vtensor.server_client import NoAnswer, server_stats
from sglang_vtensor.server_client import ask as ask_for
from tests import versions
from tests.conversations import asking, flush
from tests.e2e.compare import TIE, Prompts, assert_same
from tests.harness import Request, Scheduler

KV = {"tags": ["kv_cache"]}
NEW = 12


@pytest.fixture(scope="module")
def rollout(models, tmp_path_factory):
    arguments = ["--kv-backend", "vtensor", "--page-size", "16"]
    log = tmp_path_factory.mktemp("rollout") / "server.log"
    with server("vtensor", models["gqa"], log, arguments=arguments, host=True) as (url, _):
        yield url


def post(url: str, what: str, body: dict | None = None) -> requests.Response:
    answer = requests.post(f"{url}/{what}", json=body or {}, timeout=120)
    answer.raise_for_status()
    return answer


def change_weights(url: str, folder: Path, *, from_disk: bool) -> None:
    if from_disk:
        post(url, "update_weights_from_disk", {"model_path": str(folder)})
        return
    tensors = list(load_file(folder / "model.safetensors").items())
    torch.multiprocessing.set_sharing_strategy("file_system")  # descriptors are for a process's own children
    payload = base64.b64encode(MultiprocessingSerializer.serialize(tensors)).decode()
    if versions.WEIGHT_SESSIONS:
        post(url, "begin_weight_update")
    assert post(url, "update_weights_from_tensor", {"serialized_named_tensors": [payload]}).json()["success"]
    if versions.WEIGHT_SESSIONS:
        post(url, "end_weight_update")


def test_twenty_turns(rollout, models, schedulers, tmp_path_factory):
    """Generate, pause, release everything; another process uses the memory; resume the weights, update them, resume the
    KV cache, go on."""
    other = tiny_model.build(tmp_path_factory.mktemp("weights") / "other", seed=1)
    second = Scheduler(other, dtype="float32")
    prompt, ask = Prompts(51), asking(rollout, NEW)
    system = prompt(60)
    (before,) = server_stats(rollout)
    try:
        for turn in range(20):
            reference = (schedulers(), second)[turn % 2]
            prompts = [system + prompt(10 + 5 * n) for n in range(4)]
            expected = reference.generate(*[Request(f"t{turn}r{n}", p, NEW) for n, p in enumerate(prompts)])
            for theirs, mine in zip(expected, ask(prompts), strict=True):
                assert_same(theirs, mine, tie=TIE["float32"], what=f"turn {turn}")
            (held,) = server_stats(rollout)
            post(rollout, "pause_generation")
            post(rollout, "release_memory_occupation", {} if turn % 3 else {"tags": ["kv_cache", "weights"]})
            (stats,) = server_stats(rollout)
            assert (stats["pages_backed"], stats["pages_owned"], stats["tree_tokens"]) == (1, 0, 0), "but for padding"
            freed = held["backed_bytes"] - stats["backed_bytes"]
            trained = torch.full((freed,), turn, dtype=torch.uint8)
            assert freed > 0
            assert int(trained[-1]) == turn
            del trained
            post(rollout, "resume_memory_occupation", {"tags": ["weights"]})
            change_weights(rollout, (other, models["gqa"])[turn % 2], from_disk=turn % 4 < 2)
            post(rollout, "resume_memory_occupation", {} if turn % 3 else KV)
            post(rollout, "continue_generation")
        (after,) = server_stats(rollout)
        gained = after["pages_created"] - before["pages_created"]
        lost = after["pages_released"] - before["pages_released"]
        assert gained == lost + after["pages_backed"] - before["pages_backed"]
        assert gained > 0
    finally:
        second.close()


def test_a_refusal_has_its_reason_and_harms_nobody(rollout):
    answers: list = []
    running = threading.Thread(target=lambda: answers.extend(asking(rollout, 1000)([Prompts(55)(40)])))
    running.start()
    deadline = time.monotonic() + 30
    while not server_stats(rollout)[0]["requests"] and time.monotonic() < deadline:
        time.sleep(0.01)
    cases = [
        ("release", {}, "1 requests have not ended, and memory is released by a server that runs nothing"),
        ("resume", KV, "of kv_cache, released is nothing: resume what is released"),
        ("release", {"tags": ["weight"]}, "tags 'weight' are unknown: give of kv_cache, weights, cuda_graph"),
    ]
    for what, body, why in cases:
        answer = requests.post(f"{rollout}/{what}_memory_occupation", json=body, timeout=60)
        assert answer.status_code == 400
        assert why in answer.text
    running.join()
    assert len(answers[0].tokens) == 1000
    post(rollout, "release_memory_occupation", KV)
    post(rollout, "resume_memory_occupation", KV)


def test_who_comes_while_memory_is_released_waits_for_it(rollout):
    flush(rollout)
    post(rollout, "release_memory_occupation", KV)
    answers: list = []
    waiting = threading.Thread(target=lambda: answers.extend(asking(rollout, NEW)([Prompts(52)(40)])))
    waiting.start()
    with pytest.raises(NoAnswer, match="refused by the scheduler"):
        ask_for(rollout, "wake")
    assert requests.get(f"{rollout}/health", timeout=60).status_code == 200
    waiting.join(2)
    assert waiting.is_alive()
    (stats,) = server_stats(rollout)
    assert stats["pages_backed"] == 1, "nobody creates pages meanwhile"
    post(rollout, "resume_memory_occupation", KV)
    waiting.join(60)
    assert len(answers[0].tokens) == NEW


def test_releasing_the_weights_alone_leaves_the_cache(rollout):
    """Without --enable-memory-saver SGLang releases none of them, and says so in its log."""
    prompt = Prompts(53)(70)
    asking(rollout, NEW)([prompt])
    (before,) = server_stats(rollout)
    post(rollout, "release_memory_occupation", {"tags": ["weights"]})
    post(rollout, "resume_memory_occupation", {"tags": ["weights"]})
    (again,) = asking(rollout, NEW)([prompt])
    (after,) = server_stats(rollout)
    assert before["pages_backed"] > 1
    assert after["prefix_tokens_served"] > before["prefix_tokens_served"]
    assert again.cached >= 64


def computed(url: str) -> int:
    """Prompt tokens that were not found in the cache, so far."""
    (stats,) = server_stats(url)
    return stats["prompt_tokens"] - stats["prefix_tokens_served"]


@pytest.mark.parametrize("how", ["one request for eight", "eight requests"])
def test_samples_of_one_prompt_compute_it_once(rollout, how):
    """Its unfilled last page is copied for each, and the whole pages are there once."""
    flush(rollout)
    samples, prompt = 8, Prompts(54)(700)
    before, (held,) = computed(rollout), server_stats(rollout)
    params = {"temperature": 3.0, "max_new_tokens": NEW, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": params | {"n": samples}}
    if how == "eight requests":
        body = {"input_ids": [prompt] * samples, "sampling_params": params}
    answers = post(rollout, "generate", body).json()
    assert len(answers) == samples
    assert len({tuple(answer["output_ids"]) for answer in answers}) > 1, "samples differ"
    assert computed(rollout) - before <= len(prompt) + samples, "but for its last token, which each of them computes"
    (after,) = server_stats(rollout)
    assert after["pages_cached"] - held["pages_cached"] <= (len(prompt) + samples * (NEW + 16)) // 16
