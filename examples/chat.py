"""Chat with a model in this process, and see how much of each prompt was not computed again.

    python examples/chat.py MODEL                              type questions; an empty line ends the chat
    SGLANG_PLATFORM=vtensor_host python examples/chat.py       without a GPU, with a tiny model (it speaks nonsense)

Each turn sends the whole conversation. The KV of the earlier turns lies in memory, and the new turn goes on behind it.
Where the conversation gets longer than the model can read, its older half is forgotten.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import sglang as sgl

from sglang_vtensor import tiny_model

SYSTEM = "You are a helpful assistant. You answer in one or two plain sentences. " * 8


def main() -> None:
    parser = argparse.ArgumentParser(description="Chat, and see what the KV cache does.")
    parser.add_argument(
        "model", nargs="?", help="A model's folder or hub id. Default: a tiny model with random weights."
    )
    parser.add_argument("--max-tokens", type=int, default=64, help="The longest answer, in tokens.")
    arguments = parser.parse_args()
    if arguments.max_tokens < 1:
        parser.error(f"--max-tokens is {arguments.max_tokens}: give 1 or more")
    with tempfile.TemporaryDirectory(prefix="vtensor-chat-") as folder:
        more = {} if arguments.model else {"max_total_tokens": 16384, "dtype": "bfloat16"}
        model = arguments.model or str(tiny_model.build(Path(folder) / "tiny"))
        engine = sgl.Engine(model_path=model, kv_backend="vtensor", **more)
        try:
            chat(engine, arguments.max_tokens)
        finally:
            engine.shutdown()


def chat(engine: sgl.Engine, max_tokens: int) -> None:
    """Answer the lines of standard input until one is empty."""
    messages = [{"role": "system", "content": SYSTEM}]
    while question := ask():
        messages.append({"role": "user", "content": question})
        answer = answer_of(engine, messages, max_tokens)
        if answer is None:
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer["text"]})
        told = answer["meta_info"]
        print(answer["text"].strip())
        print(f"[{told['cached_tokens']} of {told['prompt_tokens']} prompt tokens were in memory]", flush=True)


def answer_of(engine: sgl.Engine, messages: list[dict[str, str]], max_tokens: int) -> dict[str, Any] | None:
    """The answer to the question that ends `messages`. If they are too long for the model, the older half of the turns
    is removed from them, and half of the rest, until they are not. None if the question alone is too long."""
    tokenizer = engine.tokenizer_manager.tokenizer
    kept = list(messages)
    while True:
        prompt = tokenizer.apply_chat_template(kept, tokenize=False, add_generation_prompt=True)
        try:
            answer = engine.generate(prompt, {"temperature": 0, "max_new_tokens": max_tokens})
            break
        except ValueError as error:
            turns = len(kept) // 2 - 1  # each is a question and its answer, between the system prompt and this question
            if turns == 0:
                print(f"[this question cannot be answered: {error}]", flush=True)
                return None
            del kept[1 : 1 + 2 * -(-turns // 2)]
    if forgotten := (len(messages) - len(kept)) // 2:
        print(f"[the conversation was too long for the model: the oldest turns are forgotten, {forgotten} of them]")
        messages[:] = kept
    return answer


def ask() -> str:
    """The next question; "" where there is none."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.buffer.readline()
        try:
            return line.decode().strip()
        except UnicodeDecodeError as error:
            print(
                f"[this line is not UTF-8, from its byte {line[error.start]:#x} on: give it again in UTF-8]", flush=True
            )


if __name__ == "__main__":  # SGLang starts its processes anew, and they import this file
    main()
