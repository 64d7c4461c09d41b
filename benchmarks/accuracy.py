"""`python -m benchmarks.accuracy`: questions with known answers, to the same server with and without the plugin.

A document has a few facts among many sentences. Several questions follow each document and share it as their prefix:
lookups of a fact, and sums that have nothing to do with the document. The answer to a lookup is begun as the fact
begins: so even a small model finds what it reads anywhere in its context, and keys and values that are not the
document's own would show. A lookup is right if its first number is the wanted one, and a sum if the wanted number is in
it. The benchmark counts the right answers of each side, and the answers that are word for word the same on both. A
small model is often wrong; the plugin must not change how often.

SGLang is asked twice, the second time with pages of another size: where it answers differently itself, the model's
numbers are that near to one another. What counts is the questions that only one side answers rightly. If the plugin
changes nothing, each side has half of them. Where what was seen is less likely than one in a hundred, this exits with
1.

    python -m benchmarks.accuracy                                         300 questions, for a GPU
    python -m benchmarks.accuracy --kv-cache-dtype fp8_e4m3               over an FP8 cache
    python -m benchmarks.accuracy --lengths 200,1000 --documents 1        10 questions: 7 minutes on two busy CPU cores
"""

from __future__ import annotations

import math
import random
import re
import string
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import requests
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import results
from benchmarks.contestants import compiled
from benchmarks.serving import end_with_servers, server
from sglang_vtensor import real_model

console = Console(width=130)
LENGTHS = "200,1000,4000,8000"
QUESTIONS, NEW, AT_ONCE = 5, 24, 8
#: Who is compared with SGLang: itself with pages of so many tokens, and the plugin.
OTHERS, PAGE = ("again", "vtensor"), "64"
UNLIKELY = 0.01
#: Of each server on a GPU: more than the questions that are asked at once take.
TOKENS = "131072"
#: Tokens of a prompt that are not its document: the chat template, the question, and how the answer begins.
RESERVED = 80
#: Facts of a document, and letters of the code that each has.
FACTS, LETTERS = 10, 3
NAMES = ["Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Irene", "Jonas"]
NAMES += ["Karla", "Leo", "Mona", "Nils", "Olga", "Paul", "Rosa", "Simon", "Tina", "Uwe"]
THINGS = ["boat", "bridge", "castle", "door", "engine", "forest", "garden", "hammer", "island", "kettle"]
THINGS += ["ladder", "mirror", "notebook", "orchard", "piano", "quilt", "radio", "saddle", "tower", "umbrella"]
THINGS += ["anchor", "basket", "candle", "drum", "fountain", "glove", "helmet", "jacket", "lantern", "wagon"]
IS = ["old", "new", "red", "blue", "small", "large", "quiet", "heavy", "light", "cold", "warm", "broken", "clean"]
NUMBERS = range(100, 1000)


@dataclass(frozen=True)
class Question:
    """A question behind a document. Its prompt has at most `length` tokens, `begun` among them: how the answer begins.
    A right answer has the number `wanted`."""

    kind: str
    length: int
    document: str
    asked: str
    wanted: str
    begun: str = ""


def questions(tokenizer: Any, lengths: list[int], documents: int, seed: int = 0) -> list[Question]:
    """Questions of both kinds, for so many documents of each length. Equal arguments give equal questions. Raises
    `ValueError` for a length that has no room for a fact."""
    rng = random.Random(seed)
    made = []
    for length in lengths:
        for _ in range(documents):
            lines, facts = _document(tokenizer, length - RESERVED, rng)
            if not facts:
                raise ValueError(f"No fact fits into {length} tokens: ask for more than {length}.")
            document = "\n".join(lines)
            for n in range(QUESTIONS):
                if n % 2:
                    a, b = rng.randrange(2, 20), rng.randrange(2, 20)
                    made.append(Question("arithmetic", length, document, f"What is {a} plus {b}?", str(a + b)))
                else:
                    code, begun, number = rng.choice(facts)
                    asked = f"Repeat the line of parcel {code}."
                    made.append(Question("lookup", length, document, asked, str(number), begun))
    return made


def _document(tokenizer: Any, tokens: int, rng: random.Random) -> tuple[list[str], list[tuple[str, str, int]]]:
    """Lines of so many tokens at most, and the facts that stand somewhere among them: the code of each, how its line
    begins, and its number."""
    lines: list[str] = []
    facts: list[tuple[str, str, int]] = []

    def fits(line: str) -> bool:
        nonlocal tokens
        tokens -= len(tokenizer(line)["input_ids"]) + 1  # and the end of the line
        return tokens >= 0

    for number in rng.sample(NUMBERS, FACTS):
        code = "".join(rng.sample(string.ascii_uppercase, LETTERS))
        begun = f"Parcel {code} {rng.choice(THINGS)} {rng.choice(NAMES)}:"
        if not fits(f"{begun} {number}."):
            return lines, facts
        facts.append((code, begun, number))
        lines.append(f"{begun} {number}.")
    while True:
        line = f"The {rng.choice(THINGS)} near the {rng.choice(THINGS)} is {rng.choice(IS)} and {rng.choice(IS)}."
        if not fits(line):
            return lines, facts
        lines.insert(rng.randrange(len(lines) + 1), line)


def answers(url: str, tokenizer: Any, asked: list[Question]) -> list[str]:
    """The server's greedy answer to each question, as text."""

    def ask(question: Question) -> str:
        chat = [{"role": "system", "content": question.document}, {"role": "user", "content": question.asked}]
        prompt = list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])
        prompt += tokenizer(question.begun)["input_ids"] if question.begun else []
        body = {"input_ids": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": NEW}}
        answer = requests.post(f"{url}/generate", json=body, timeout=600)
        answer.raise_for_status()
        return str(tokenizer.decode(answer.json()["output_ids"], skip_special_tokens=True)).strip()

    with ThreadPoolExecutor(AT_ONCE) as pool:
        said = pool.map(ask, asked)
        return list(track(said, "questions answered", total=len(asked), console=console))


def is_right(question: Question, said: str) -> bool:
    """Whether the wanted number is one of the numbers of the answer; of a lookup, the first one."""
    numbers = re.findall(r"\d+", said)
    return question.wanted in (numbers[:1] if question.kind == "lookup" else numbers)


def told(asked: list[Question], said: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Each question, with the answers of those that were asked already."""
    return [
        {"kind": question.kind, "tokens": question.length, "asked": question.asked, "wanted": question.wanted}
        | {name: answered[n] for name, answered in said.items()}
        for n, question in enumerate(asked)
    ]


def likely(one: int, other: int) -> float:
    """How likely it is that of `one + other` questions, each of which falls to either side alike, so few or fewer fall
    to the side that has less (both ways; McNemar's exact test)."""
    both = one + other
    return min(1.0, 2 * sum(math.comb(both, n) for n in range(min(one, other) + 1)) / 2**both)


def main(
    model: Annotated[str | None, typer.Option(help="A model's folder. Default: SmolLM2-135M-Instruct.")] = None,
    lengths: Annotated[str, typer.Option(help="Most tokens of a prompt, with commas.")] = LENGTHS,
    documents: Annotated[int, typer.Option(min=1, help="Documents of each length.")] = 15,
    kv_cache_dtype: Annotated[str, typer.Option(help="Of the KV cache, on both sides.")] = "auto",
    against: Annotated[str, typer.Option(help="SGLang's own attention backend on a GPU.")] = "fa3",
    write: Annotated[bool, typer.Option(help="Write accuracy.json: with _<dtype>, and with _host on a CPU.")] = True,
    rows_file: Annotated[
        Path | None, typer.Option("--rows", help="Write all answers, as JSON, here: after each server.")
    ] = None,
) -> None:
    """Ask, compare, print and write."""
    end_with_servers()
    from transformers import AutoTokenizer

    folder = Path(model) if model else real_model.fetch()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = questions(tokenizer, [int(length) for length in lengths.split(",")], documents)
    host = not torch.cuda.is_available()
    common = ["--load-format", "auto", "--kv-cache-dtype", kv_cache_dtype]
    common += [] if host else ["--max-total-tokens", TOKENS]  # a small model, and not alone on the GPU
    own = [] if host else ["--attention-backend", against]
    sides = {"sglang": own, "again": [*own, "--page-size", PAGE], "vtensor": ["--kv-backend", "vtensor"]}
    said: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as logs:
        for name, arguments in sides.items():
            console.print(f"{name}: the server starts")
            with server(name, folder, Path(logs) / name, arguments=[*arguments, *common], host=host) as (url, _):
                compiled(name, url)
                said[name] = answers(url, tokenizer, asked)
            console.print(f"{name}: {len(asked)} questions answered")
            results.keep(rows_file, told(asked, said))
    rows: list[dict[str, Any]] = []
    for kind, length in dict.fromkeys((question.kind, question.length) for question in asked):
        those = [n for n, question in enumerate(asked) if (question.kind, question.length) == (kind, length)]
        right = {name: sum(is_right(asked[n], said[name][n]) for n in those) for name in sides}
        same = {f"same_{name}": sum(said["sglang"][n] == said[name][n] for n in those) for name in OTHERS}
        rows.append({"kind": kind, "tokens": length, "questions": len(those), **right, **same})
    table = Table(title=f"{folder.name}, KV cache {kv_cache_dtype}: right answers, and answers that are the same")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)
    summary: dict[str, float] = {"accuracy_questions": len(asked)}
    summary |= {f"accuracy_{name}": sum(row[name] for row in rows) / len(asked) for name in sides}
    for name in OTHERS:
        pairs = [(is_right(q, said["sglang"][n]), is_right(q, said[name][n])) for n, q in enumerate(asked)]
        theirs, mine = pairs.count((True, False)), pairs.count((False, True))
        summary |= {f"only_sglang_right_vs_{name}": theirs, f"only_{name}_right": mine}
        summary[f"likely_{name}"] = likely(theirs, mine)
        summary[f"accuracy_same_{name}"] = sum(row[f"same_{name}"] for row in rows) / len(asked)
    console.print(summary)
    if write:
        name = "accuracy" + ("" if kv_cache_dtype == "auto" else f"_{kv_cache_dtype}") + ("_host" if host else "")
        console.print(f"written to {results.write(name, summary, rows)}")
    if summary["likely_vtensor"] < UNLIKELY:
        console.print("The plugin changes how often answers are right.")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
