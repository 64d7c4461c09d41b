"""Conversations with a model that says real things: token for token what the same SGLang answers without the plugin,
and right."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from sglang_vtensor import demo, real_model
from tests.e2e.compare import TIE, answers_of_both, assert_same
from tests.harness import Request, Scheduler

NEW = 24
#: What the user asks, and a word of the right answer.
LIBRARY = [
    [("When does the library open?", "nine"), ("Who is the librarian?", "Maria"), ("What is her name?", "Maria")],
    [("What does a library card cost?", "five euros"), ("Is the library open on Sunday?", "closed")],
    [("What is the name of the wireless network?", "Bluewhale"), ("Where are the newspapers?", "hall")],
    [("What is the name of the cat?", "Pessoa"), ("When was the library built?", "1904")],
]
PLAIN = "You are a helpful assistant. Answer in one short sentence."
GENERAL = [
    [("What is the capital of France?", "Paris"), ("And of Italy?", "Rome")],
    [("What color is the sky on a clear day?", "blue"), ("What is the opposite of hot?", "cold")],
    [("How many days has a week?", "seven"), ("How many legs has a dog?", "four")],
]


@pytest.fixture(scope="module")
def pair():
    model = real_model.fetch()
    kind = {"dtype": "float32", "max_total_tokens": 8192, "max_running_requests": 16}
    reference = Scheduler(model, wait=False, **kind)
    with reference, Scheduler(model, kv_backend="vtensor", **kind) as ours:
        yield reference, ours


def test_conversations_are_those_of_sglang_and_right(pair):
    reference, ours = pair
    tokenizer = AutoTokenizer.from_pretrained(real_model.fetch())
    assert tokenizer.eos_token == "<|im_end|>", f"made by an earlier version: remove {real_model.cached()}"
    chats = [(demo.LIBRARY.system, turns) for turns in LIBRARY] + [(PLAIN, turns) for turns in GENERAL]
    histories = [[{"role": "system", "content": system}] for system, _ in chats]
    right, wrong = 0, []
    for turn in range(3):
        going = [n for n, (_, turns) in enumerate(chats) if turn < len(turns)]
        requests = []
        for n in going:
            histories[n].append({"role": "user", "content": chats[n][1][turn][0]})
            prompt = tokenizer.apply_chat_template(histories[n], add_generation_prompt=True, return_dict=True)
            requests.append(Request(f"turn {turn}, conversation {n}", prompt["input_ids"], NEW))
        expected, got = answers_of_both(reference, ours, requests)
        ours.check()
        for n, request, theirs, mine in zip(going, requests, expected, got, strict=True):
            assert_same(theirs, mine, tie=TIE["float32"], what=request.rid)
            assert not turn or mine.cached > len(request.tokens) // 2, "what was said before is not computed again"
            end = [*theirs.tokens, tokenizer.eos_token_id].index(tokenizer.eos_token_id)
            said = tokenizer.decode(theirs.tokens[:end])
            histories[n].append({"role": "assistant", "content": said})
            if chats[n][1][turn][1].lower() in said.lower():
                right += 1
            else:
                wrong.append((chats[n][1][turn], said))
    assert right >= 0.8 * (right + len(wrong)), wrong  # it has 135 million parameters
