"""Chat with a model in this process, and see how much of each prompt was not computed again.

    python examples/chat.py MODEL                              type questions; an empty line ends the chat
    SGLANG_PLATFORM=vtensor_host python examples/chat.py       without a GPU, with a tiny model (it speaks nonsense)

Each turn sends the whole conversation. The KV of the earlier turns lies in memory, and the new turn goes on behind it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

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
    tokenizer = engine.tokenizer_manager.tokenizer
    messages = [{"role": "system", "content": SYSTEM}]
    while question := ask():
        messages.append({"role": "user", "content": question})
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        answer = engine.generate(prompt, {"temperature": 0, "max_new_tokens": max_tokens})
        messages.append({"role": "assistant", "content": answer["text"]})
        told = answer["meta_info"]
        print(answer["text"].strip())
        print(f"[{told['cached_tokens']} of {told['prompt_tokens']} prompt tokens were in memory]", flush=True)


def ask() -> str:
    """The next question; "" where there is none."""
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    return sys.stdin.readline().strip()


if __name__ == "__main__":  # SGLang starts its processes anew, and they import this file
    main()
