"""Many samples of one prompt: the KV of the prompt is computed once, and is in memory once.

    python examples/samples.py MODEL --samples 64
    SGLANG_PLATFORM=vtensor_host python examples/samples.py       without a GPU, with a tiny model

On a GPU, decode reads the pages of the prompt once for all samples of a batch.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import sglang as sgl

from sglang_vtensor import tiny_model

PROMPT = "Please tell a short story about a page of memory and the two users who shared it. " * 20


def main() -> None:
    parser = argparse.ArgumentParser(description="Sample one prompt many times, and see which pages the samples share.")
    parser.add_argument(
        "model", nargs="?", help="A model's folder or hub id. Default: a tiny model with random weights."
    )
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=32, help="Tokens of each sample.")
    arguments = parser.parse_args()
    if arguments.samples < 1:
        parser.error(f"--samples is {arguments.samples}: give 1 or more")
    if arguments.max_tokens < 1:
        parser.error(f"--max-tokens is {arguments.max_tokens}: give 1 or more")
    with tempfile.TemporaryDirectory(prefix="vtensor-samples-") as folder:
        more = {} if arguments.model else {"max_total_tokens": 16384, "dtype": "bfloat16"}
        model = arguments.model or str(tiny_model.build(Path(folder) / "tiny"))
        engine = sgl.Engine(model_path=model, kv_backend="vtensor", **more)
        try:
            sample(engine, arguments.samples, arguments.max_tokens)
        finally:
            engine.shutdown()


def sample(engine: sgl.Engine, samples: int, max_tokens: int) -> None:
    """Print the samples, and what they cost."""
    before, start = memory(engine), time.perf_counter()
    params = {"n": samples, "temperature": 1.0, "max_new_tokens": max_tokens, "ignore_eos": True}
    answers = engine.generate([PROMPT], params)  # of a list, the answers are one too, also for one sample
    seconds, after = time.perf_counter() - start, memory(engine)
    for answer in answers:
        print("-", " ".join(answer["text"].split())[:100])
    prompt = answers[0]["meta_info"]["prompt_tokens"]
    served, asked = (after[key] - before[key] for key in ("prefix_tokens_served", "prompt_tokens"))
    pages = after["pages_allocated"] - before["pages_allocated"]
    print(f"{samples} samples of {prompt} prompt tokens took {seconds:.1f} s.")
    print(f"{served} of {asked} prompt tokens were not computed again.")
    print(f"The samples took {pages} new pages of {after['page_tokens']} tokens.")
    print(f"Without sharing they would take {samples * -(-(prompt + max_tokens) // after['page_tokens'])} pages.")


def memory(engine: sgl.Engine) -> dict[str, int]:
    """The statistics of the KV memory, as `GET /server_info` has them."""
    return engine.get_server_info()["internal_states"][0]["vtensor"]


if __name__ == "__main__":  # SGLang starts its processes anew, and they import this file
    main()
