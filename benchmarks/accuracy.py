"""`python -m benchmarks.accuracy`: questions with known answers, to the same server with and without the plugin.

A document is a list of facts. Several questions follow each document and share it as their prefix: lookups of a fact,
and sums that have nothing to do with the document. An answer is right if the wanted number is in it. The benchmark
counts the right answers of each side, and the answers that are word for word the same on both. A small model is often
wrong; the plugin must not change how often.

    python -m benchmarks.accuracy                                         300 questions, for a GPU
    python -m benchmarks.accuracy --kv-cache-dtype fp8_e4m3               over an FP8 cache
    python -m benchmarks.accuracy --lengths 200,1000 --documents 3        few enough for a CPU
"""

from __future__ import annotations

import random
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import requests
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import results
from benchmarks.serving import server
from sglang_vtensor import real_model

console = Console(width=130)
LENGTHS = "200,1000,4000,8000"
QUESTIONS, NEW, AT_ONCE = 5, 24, 8
#: Tokens of a prompt that are not its document: the chat template and the question.
RESERVED = 64
NAMES = ["Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Irene", "Jonas"]
NAMES += ["Karla", "Leo", "Mona", "Nils", "Olga", "Paul", "Rosa", "Simon", "Tina", "Uwe"]
THINGS = ["boat", "bridge", "castle", "door", "engine", "forest", "garden", "hammer", "island", "kettle"]
THINGS += ["ladder", "mirror", "notebook", "orchard", "piano", "quilt", "radio", "saddle", "tower", "umbrella"]
THINGS += ["anchor", "basket", "candle", "drum", "fountain", "glove", "helmet", "jacket", "lantern", "wagon"]
NUMBERS = range(100, 1000)


@dataclass(frozen=True)
class Question:
    """A question behind a document. Its prompt has at most `length` tokens; a right answer has the number `wanted`."""

    kind: str
    length: int
    document: str
    asked: str
    wanted: str


def questions(tokenizer: Any, lengths: list[int], documents: int, seed: int = 0) -> list[Question]:
    """Questions of both kinds, for so many documents of each length. Equal arguments give equal questions. Raises
    `ValueError` if there are too few facts for a length."""
    rng = random.Random(seed)
    made = []
    for length in lengths:
        for _ in range(documents):
            pairs = [(name, thing) for name in NAMES for thing in THINGS]
            rng.shuffle(pairs)
            numbers = rng.sample(NUMBERS, len(pairs))
            lines: list[str] = []
            tokens = RESERVED
            for (name, thing), number in zip(pairs, numbers, strict=True):
                line = f"The number of the {thing} of {name} is {number}."
                tokens += len(tokenizer(line)["input_ids"]) + 1  # and the end of the line
                if tokens > length:
                    break
                lines.append(line)
            else:
                raise ValueError(f"All {len(pairs)} facts have {tokens} tokens, fewer than {length}: ask for less.")
            if not lines:
                raise ValueError(f"No fact fits into {length} tokens: ask for more than {tokens}.")
            document = "\n".join(lines)
            for n in range(QUESTIONS):
                if n % 2:
                    a, b = rng.randrange(2, 20), rng.randrange(2, 20)
                    made.append(Question("arithmetic", length, document, f"What is {a} plus {b}?", str(a + b)))
                else:
                    at = rng.randrange(len(lines))
                    name, thing = pairs[at]
                    asked = f"What is the number of the {thing} of {name}?"
                    made.append(Question("lookup", length, document, asked, str(numbers[at])))
    return made


def answers(url: str, tokenizer: Any, asked: list[Question]) -> list[str]:
    """The server's greedy answer to each question, as text."""

    def ask(question: Question) -> str:
        chat = [{"role": "system", "content": question.document}, {"role": "user", "content": question.asked}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        body = {"input_ids": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": NEW}}
        answer = requests.post(f"{url}/generate", json=body, timeout=600)
        answer.raise_for_status()
        return str(tokenizer.decode(answer.json()["output_ids"], skip_special_tokens=True)).strip()

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(ask, asked))


def is_right(question: Question, said: str) -> bool:
    """Whether the wanted number is one of the numbers of the answer."""
    return question.wanted in re.findall(r"\d+", said)


def main(
    model: Annotated[str | None, typer.Option(help="A model's folder. Default: SmolLM2-135M-Instruct.")] = None,
    lengths: Annotated[str, typer.Option(help="Most tokens of a prompt, with commas.")] = LENGTHS,
    documents: Annotated[int, typer.Option(min=1, help="Documents of each length.")] = 15,
    kv_cache_dtype: Annotated[str, typer.Option(help="Of the KV cache, on both sides.")] = "auto",
    against: Annotated[str, typer.Option(help="SGLang's own attention backend on a GPU.")] = "fa3",
    write: Annotated[bool, typer.Option(help="Write accuracy.json: with _<dtype>, and with _host on a CPU.")] = True,
) -> None:
    """Ask, compare, print and write."""
    from transformers import AutoTokenizer

    folder = Path(model) if model else real_model.fetch()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = questions(tokenizer, [int(length) for length in lengths.split(",")], documents)
    host = not torch.cuda.is_available()
    common = ["--load-format", "auto", "--kv-cache-dtype", kv_cache_dtype]
    sides = {"sglang": [] if host else ["--attention-backend", against], "vtensor": ["--kv-backend", "vtensor"]}
    said = {}
    with tempfile.TemporaryDirectory() as logs:
        for name, arguments in sides.items():
            with server(name, folder, Path(logs) / name, arguments=[*arguments, *common], host=host) as (url, _):
                said[name] = answers(url, tokenizer, asked)
    rows: list[dict[str, Any]] = []
    for kind, length in dict.fromkeys((question.kind, question.length) for question in asked):
        those = [n for n, question in enumerate(asked) if (question.kind, question.length) == (kind, length)]
        right = {name: sum(is_right(asked[n], said[name][n]) for n in those) for name in sides}
        same = sum(said["sglang"][n] == said["vtensor"][n] for n in those)
        rows.append({"kind": kind, "tokens": length, "questions": len(those), **right, "same": same})
    table = Table(title=f"{folder.name}, KV cache {kv_cache_dtype}: right answers, and answers that are the same")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)
    total = {key: sum(row[key] for row in rows) for key in ("questions", "sglang", "vtensor", "same")}
    summary = {
        "accuracy_questions": total["questions"],
        "accuracy_sglang": total["sglang"] / total["questions"],
        "accuracy_vtensor": total["vtensor"] / total["questions"],
        "accuracy_same": total["same"] / total["questions"],
    }
    console.print(summary)
    if write:
        name = "accuracy" + ("" if kv_cache_dtype == "auto" else f"_{kv_cache_dtype}") + ("_host" if host else "")
        console.print(f"written to {results.write(name, summary, rows)}")


if __name__ == "__main__":
    typer.run(main)
