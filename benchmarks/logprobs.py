"""How far log-probabilities are from those of SGLang's FlashAttention-3, and how far these are from themselves.

    python -m benchmarks.logprobs            servers on a GPU, one after the other; --write for results/logprobs.json
    python -m benchmarks.logprobs --quick    the host backend: does it run?

A small model with Llama-3-8B's heads and random weights that are no noise: its best tokens lead clearly. Groups of
requests begin with one prompt, and each ends with words of its own.

- Decode: all requests at once, greedily. Tokens are compared until the first one that differs; from there on they would
  be other texts. Ours reads what a group shares once (`vtensor`), or each request reads all (`vtensor-plain`).
- Prefill: the log-probabilities of the reference's answers, as parts of prompts.
- The reference is asked twice: all at once, and one request after the other. What that makes a difference of is no
  error, and the measure of the rest.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import requests
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import results
from benchmarks.contestants import GPU, HOST, compiled
from benchmarks.serving import end_with_servers, server
from sglang_vtensor import tiny_model
from sglang_vtensor.server_client import server_stats

console = Console(width=150)
GEOMETRY = {"layers": 8, "hidden": 1024, "heads": 32, "kv_heads": 8, "head_dim": 128, "max_tokens": 16_384}
SERVERS = ("fa3", "vtensor", "vtensor-plain")
QUICK = ("torch_native", "vtensor")
#: Words of the small model.
FIRST_WORD, LAST_WORD = 6, 400


@dataclass(frozen=True)
class Size:
    """`groups` of `samples` requests: `shared` tokens for a group, `own` for each, and `new` ones."""

    groups: int
    samples: int
    shared: int
    own: int
    new: int

    def prompts(self) -> list[list[int]]:
        rng = random.Random(0)

        def words(count: int) -> list[int]:
            return [rng.randrange(FIRST_WORD, LAST_WORD) for _ in range(count)]

        stems = [words(self.shared) for _ in range(self.groups)]
        return [stem + words(self.own) for stem in stems for _ in range(self.samples)]


FULL, SMALL = Size(4, 16, 4096, 32, 64), Size(2, 3, 100, 8, 8)

#: Tokens and their log-probabilities.
Said = list[tuple[int, float]]


def ask(url: str, texts: Sequence[list[int]], new: int, *, at_once: int, told_from: int = -1) -> list[Said]:
    """What follows each text; with `told_from`, instead, what the text itself has from this token on."""
    said: list[Said] = []
    for at in range(0, len(texts), at_once):
        body = {
            "input_ids": texts[at : at + at_once],
            "sampling_params": {"temperature": 0, "max_new_tokens": new, "ignore_eos": True},
            "return_logprob": True,
            "logprob_start_len": told_from,
        }
        answer = requests.post(f"{url}/generate", json=body, timeout=600)
        answer.raise_for_status()
        for text, one in zip(texts[at : at + at_once], answer.json(), strict=True):
            if told_from < 0:
                said.append([(token, value) for value, token, *_ in one["meta_info"]["output_token_logprobs"]])
            else:
                # Of inputs, SGLang names a vocabulary's last token 0.
                told = zip(text[told_from:], one["meta_info"]["input_token_logprobs"], strict=True)
                said.append([(token, value) for token, (value, *_) in told if value is not None])
    return said


def spoken(prompts: Sequence[list[int]], said: Sequence[Said]) -> list[list[int]]:
    """Each prompt with what was said behind it."""
    return [prompt + [token for token, _ in answer] for prompt, answer in zip(prompts, said, strict=True)]


def differences(one: Sequence[Said], other: Sequence[Said]) -> list[float]:
    """Of the tokens of each text, until one is another."""
    found = []
    for mine, theirs in zip(one, other, strict=True):
        for (token, value), (their_token, their_value) in zip(mine, theirs, strict=True):
            if token != their_token:
                break
            found.append(abs(value - their_value))
    return found


def row(name: str, one: Sequence[Said], other: Sequence[Said]) -> dict[str, Any]:
    """Raises `RuntimeError` if there is nothing to compare."""
    found = sorted(differences(one, other))
    if not found:
        raise RuntimeError(f"{name}: the first tokens differ already, of all {len(one)} texts")
    return {
        "what": name,
        "texts": len(one),
        "tokens": len(found),
        "mean": sum(found) / len(found),
        "p99": found[int(0.99 * (len(found) - 1))],
        "max": found[-1],
    }


def compared(
    model: Path, folder: Path, names: Sequence[str], size: Size, *, host: bool, rows_file: Path | None = None
) -> list[dict[str, Any]]:
    """The first of `names` is the reference. Raises `RuntimeError` where ours is to share what it decodes, on a GPU,
    and does not. Rows are written to `rows_file` as they come."""
    rows: list[dict[str, Any]] = []
    prompts, together = size.prompts(), size.groups * size.samples
    decoded: list[Said] = []
    prefilled: list[Said] = []
    texts: list[list[int]] = []
    begin = size.shared + size.own

    def note(one: dict[str, Any]) -> None:
        rows.append(one)
        if rows_file is not None:
            rows_file.write_text(json.dumps(rows, indent=1))

    for name in names:
        arguments = [*(HOST if host else GPU)[name]]
        if not host:
            arguments += ["--load-format", "auto", "--mem-fraction-static", "0.3"]
        with server(name, model, folder / f"{name}.log", arguments=arguments, host=host) as (url, _):
            compiled(name, url)
            mine = ask(url, prompts, size.new, at_once=together)
            if name == names[0]:
                decoded = mine
                texts = spoken(prompts, decoded)
                prefilled = ask(url, texts, 1, at_once=together, told_from=begin)
                alone = ask(url, prompts, size.new, at_once=1)
                note(row(f"{name} decode, one at a time", alone, decoded))
                alone = ask(url, texts, 1, at_once=1, told_from=begin)
                note(row(f"{name} prefill, one at a time", alone, prefilled))
                continue
            shared = server_stats(url)[0]["decode_steps_shared"]
            if name == "vtensor" and not shared and not host:
                raise RuntimeError("vtensor shared nothing, so it says nothing about shared decode")
            note(row(f"{name} decode", mine, decoded) | {"steps_shared": shared})
            if name == "vtensor":
                told = ask(url, texts, 1, at_once=together, told_from=begin)
                note(row(f"{name} prefill", told, prefilled))
    return rows


def summarize(rows: Sequence[dict[str, Any]], reference: str) -> dict[str, float]:
    """The greatest differences: ours with shared decode, without, in prefill, and those of the reference."""
    names = {
        "vtensor decode": "",
        "vtensor-plain decode": "_plain",
        "vtensor prefill": "_prefill",
        f"{reference} decode, one at a time": f"_{reference}",
        f"{reference} prefill, one at a time": f"_{reference}_prefill",
    }
    summary = {}
    for one in rows:
        for key in ("max", "mean"):
            summary[f"logprob_difference_{key}{names[one['what']]}"] = one[key]
    return summary


def main(
    quick: Annotated[bool, typer.Option(help="A small model on the host backend.")] = False,
    write: Annotated[bool, typer.Option(help="Write the results file.")] = False,
    rows_file: Annotated[Path | None, typer.Option("--rows", help="Write this run's rows, as JSON, here.")] = None,
) -> None:
    """Measure and print."""
    end_with_servers()
    names, size = (QUICK, SMALL) if quick else (SERVERS, FULL)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny_model.build(folder / "model", **({} if quick else GEOMETRY))
        rows = compared(model, folder, names, size, host=quick, rows_file=rows_file)
    table = Table("against the same of " + names[0], "texts", "tokens", "mean", "p99", "max", "steps shared", box=None)
    for one in rows:
        numbers = [f"{one[key]:.2e}" for key in ("mean", "p99", "max")]
        table.add_row(one["what"], str(one["texts"]), str(one["tokens"]), *numbers, str(one.get("steps_shared", "")))
    console.print(table)
    summary = summarize(rows, names[0])
    console.print(summary)
    if write:
        console.print(f"written to {results.write('logprobs_quick' if quick else 'logprobs', summary, rows)}")


if __name__ == "__main__":
    typer.run(main)
