"""How far log-probabilities are from those of SGLang's FlashAttention-3, and how far these are from themselves.

    python -m benchmarks.logprobs            servers on a GPU, one after the other; --write for results/logprobs.json
    python -m benchmarks.logprobs --fp8      what an FP8 cache changes, beside the same of a cache in the model's type
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
#: Contestants; behind a colon, the type of its KV cache. The first one is the reference.
SERVERS = ("fa3", "vtensor", "vtensor-plain")
QUICK = ("torch_native", "vtensor")
FP8 = "fp8_e4m3"
SERVERS_FP8 = ("fa3", f"fa3:{FP8}", f"vtensor:{FP8}", f"vtensor-plain:{FP8}")
QUICK_FP8 = ("torch_native", f"torch_native:{FP8}", f"vtensor:{FP8}")
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


#: Tokens that a request may have more room for: a page that is not full.
MARGIN = 128
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
    model: Path,
    folder: Path,
    names: Sequence[str],
    size: Size,
    *,
    host: bool,
    more: Sequence[str] = (),
    rows_file: Path | None = None,
) -> list[dict[str, Any]]:
    """The first of `names` is the reference; each is given `more` arguments too. Raises `RuntimeError` where ours is to
    share what it decodes, on a GPU, and does not. Rows are written to `rows_file` as they come."""
    rows: list[dict[str, Any]] = []
    prompts, together = size.prompts(), size.groups * size.samples
    decoded: list[Said] = []
    prefilled: list[Said] = []
    texts: list[list[int]] = []
    begin = size.shared + size.own

    def note(one: dict[str, Any]) -> None:
        rows.append(one)
        results.keep(rows_file, rows)

    for name in names:
        contestant, _, cache = name.partition(":")
        arguments = [*(HOST if host else GPU)[contestant], *(["--kv-cache-dtype", cache] if cache else []), *more]
        if not host:
            # Room for all of them at once, and no share of a GPU that others use too.
            room = len(prompts) * (begin + size.new + MARGIN)
            arguments += ["--load-format", "auto", "--max-total-tokens", str(room)]
        with server(contestant, model, folder / f"{contestant}{cache}.log", arguments=arguments, host=host) as (url, _):
            compiled(contestant, url)
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
            decode = row(f"{name} decode", mine, decoded)
            if contestant.startswith("vtensor"):
                decode["steps_shared"] = server_stats(url)[0]["decode_steps_shared"]
                if contestant == "vtensor" and not decode["steps_shared"] and not host:
                    raise RuntimeError("vtensor shared nothing, so it says nothing about shared decode")
            note(decode)
            if contestant != "vtensor-plain":  # its prefill is that of vtensor
                told = ask(url, texts, 1, at_once=together, told_from=begin)
                note(row(f"{name} prefill", told, prefilled))
    return rows


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The greatest differences and the mean ones: ours with shared decode, without, in prefill, and those of SGLang."""
    summary = {}
    for one in rows:
        name, what = one["what"].split(" ", 1)
        contestant, _, cache = name.partition(":")
        whose = {"vtensor": [], "vtensor-plain": ["plain"]}.get(contestant, [contestant])
        parts = [*(["fp8"] if cache else []), *whose, *(["prefill"] if what.startswith("prefill") else [])]
        for key in ("max", "mean"):
            summary["_".join(["logprob_difference", key, *parts])] = one[key]
    return summary


def main(
    quick: Annotated[bool, typer.Option(help="A small model on the host backend.")] = False,
    fp8: Annotated[bool, typer.Option("--fp8", help="Caches in FP8, beside one in the model's own type.")] = False,
    write: Annotated[bool, typer.Option(help="Write the results file.")] = False,
    rows_file: Annotated[Path | None, typer.Option("--rows", help="Write this run's rows, as JSON, here.")] = None,
) -> None:
    """Measure and print."""
    end_with_servers()
    names = (QUICK_FP8 if fp8 else QUICK) if quick else (SERVERS_FP8 if fp8 else SERVERS)
    size = SMALL if quick else FULL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny_model.build(folder / "model", **({} if quick else GEOMETRY))
        rows = compared(model, folder, names, size, host=quick, rows_file=rows_file)
    table = Table("against the same of " + names[0], "texts", "tokens", "mean", "p99", "max", "steps shared", box=None)
    for one in rows:
        numbers = [f"{one[key]:.2e}" for key in ("mean", "p99", "max")]
        table.add_row(one["what"], str(one["texts"]), str(one["tokens"]), *numbers, str(one.get("steps_shared", "")))
    console.print(table)
    summary = summarize(rows)
    console.print(summary)
    if write:
        file = "logprobs" + (f"_{FP8}" if fp8 else "") + ("_quick" if quick else "")
        console.print(f"written to {results.write(file, summary, rows)}")


if __name__ == "__main__":
    typer.run(main)
