"""Samples of one prompt, as rollouts ask for them: it is computed once, and its unfilled last page is copied."""

from __future__ import annotations

import re

import pytest
import requests
from openai import OpenAI

from sglang_vtensor.server_client import server_stats
from tests.conversations import flush

PROMPT = "what is a page and who owns it when two users ask about the same thing " * 12
NEW = 12


def costs(url: str) -> dict[str, int]:
    """So far: prompt tokens that were computed, and samples that took the unfilled last page of their prompt."""
    (stats,) = server_stats(url)
    return {
        "computed": stats["prompt_tokens"] - stats["prefix_tokens_served"],
        "ends": stats["partial_copies"] + stats["tails_continued"],
    }


def since(before: dict[str, int], url: str) -> dict[str, int]:
    return {name: value - before[name] for name, value in costs(url).items()}


@pytest.mark.parametrize("count", [8, 64])
@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
def test_samples_of_the_openai_api(server, chat, count):
    """More of them, too, than run at once."""
    flush(server)
    before = costs(server)
    client = OpenAI(base_url=f"{server}/v1", api_key="none")
    asked = {"model": "default", "n": count, "temperature": 2.0, "max_tokens": NEW, "extra_body": {"ignore_eos": True}}
    if chat:
        answer = client.chat.completions.create(messages=[{"role": "user", "content": PROMPT}], **asked)
        texts = [choice.message.content for choice in answer.choices]
    else:
        answer = client.completions.create(prompt=PROMPT, **asked)
        texts = [choice.text for choice in answer.choices]
    assert len(texts) == count
    assert len(set(texts)) > 1, "samples differ"
    tokens, cost = answer.usage.prompt_tokens, since(before, server)
    assert tokens > 100
    # SGLang computes the prompt for itself first. Of each sample, the last token of the prompt is computed again.
    assert tokens <= cost["computed"] <= tokens + count, cost
    (stats,) = server_stats(server)
    if (tokens - 1) % stats["page_tokens"]:
        assert cost["ends"] == count, cost


@pytest.mark.parametrize(
    "more",
    [
        {"regex": "(yes|no), (page|segment) [0-9]{2}"},
        {"frequency_penalty": 1.5, "presence_penalty": 0.5},
        {"repetition_penalty": 1.3},
        {"top_p": 0.9, "top_k": 20, "min_p": 0.01},
    ],
    ids=["grammar", "penalties", "repetition", "nucleus"],
)
def test_each_sample_is_what_it_would_be_alone(server, more):
    """Greedily, so that it can be compared; and at a temperature, whose samples keep to the grammar."""
    params = {"temperature": 0, "max_new_tokens": NEW, "ignore_eos": "regex" not in more} | more

    def ask(**changes):
        body = {"text": PROMPT, "sampling_params": params | changes}
        answer = requests.post(f"{server}/generate", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        return answer.json()

    flush(server)
    alone = ask()["text"]
    flush(server)
    assert {sample["text"] for sample in ask(n=16)} == {alone}
    texts = [sample["text"] for sample in ask(n=16, temperature=1.0, max_new_tokens=60)]
    assert len(texts) == 16
    assert "regex" not in more or all(re.fullmatch(more["regex"], text) for text in texts), texts
