"""The chat on the host backend against SGLang's own KV cache with torch_native attention; and what the scheduling
thread does for a turn in tree and pools, beside SGLang's tree in Rust (`unified`), and for a decode step to know who
shares what (`grouping`).

Both engines run at once and take turns, so that what the machine does beside hits both alike. A turn is timed in two
parts: the prompt with one new token (prefill of what is not cached), and the answer (decode). Medians over rounds.

    python -m benchmarks.host [--rounds N]
"""

from __future__ import annotations

import multiprocessing
import os
import random
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import grouping, results, unified
from sglang_vtensor import tiny_model

USERS, TURNS, SYSTEM, QUESTION, ANSWER = 4, 4, 1024, 192, 48
console = Console(width=110)


class Engine:
    """An `sglang.Engine` in a process of its own."""

    def __init__(self, name: str, model: Path, **kwargs: Any) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, str(model), kwargs))
        self._process.start()

    def ask(self, prompts: list[list[int]] | None, new: int = 0) -> tuple[float, list[list[int]]]:
        """Seconds, and the new tokens of each prompt. `None` flushes the cache."""
        self._pipe.send((prompts, new))
        answer: tuple[float, list[list[int]]] = self._pipe.recv()
        return answer

    def close(self) -> None:
        self._pipe.close()
        self._process.join(60)


def _serve(pipe: Connection, model: str, kwargs: dict[str, Any]) -> None:
    import sglang

    engine = sglang.Engine(
        model_path=model,
        dtype="float32",
        skip_tokenizer_init=True,
        grammar_backend="none",
        mem_fraction_static=0.3,
        max_total_tokens=32768,
        max_running_requests=32,
        sleep_on_idle=True,  # the engine that is not asked must not take a core
        **kwargs,
    )
    while True:
        try:
            prompts, new = pipe.recv()
        except EOFError:
            break
        start = time.perf_counter()
        if prompts is None:
            engine.flush_cache()
            pipe.send((0.0, []))
            continue
        params = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
        answers = engine.generate(input_ids=prompts, sampling_params=params)
        pipe.send((time.perf_counter() - start, [answer["output_ids"] for answer in answers]))
    engine.shutdown()


def chat(engine: Engine, seed: int) -> dict[str, float]:
    """Tokens a second of one whole chat: of prompts beyond what was cached before, and of answers."""
    engine.ask(None)
    rng = random.Random(seed)

    def words(count: int) -> list[int]:
        return [rng.randrange(6, 400) for _ in range(count)]

    system = words(SYSTEM)
    chats = [list(system) for _ in range(USERS)]
    prefill = decode = 0.0
    for _ in range(TURNS):
        chats = [chat + words(QUESTION) for chat in chats]
        seconds, _ = engine.ask(chats, 1)
        prefill += seconds
        seconds, answers = engine.ask(chats, ANSWER)
        decode += seconds
        chats = [chat + answer for chat, answer in zip(chats, answers, strict=True)]
    new_prompt = SYSTEM + USERS * TURNS * QUESTION
    return {"prefill": new_prompt / prefill, "decode": USERS * TURNS * ANSWER / decode}


def main(rounds: Annotated[int, typer.Option(min=1, help="Chats timed on each engine.")] = 7) -> None:
    """Measure, print and write host.json."""
    os.environ["SGLANG_PLATFORM"] = "vtensor_host"
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model.build(Path(folder) / "tiny")
        engines = [
            Engine("torch_native", model, attention_backend="torch_native"),
            Engine("vtensor", model, kv_backend="vtensor"),
        ]
        rows: list[dict[str, Any]] = []
        for number in track(range(rounds + 1), "chats", console=console):
            for engine in engines if number % 2 else engines[::-1]:
                rates = chat(engine, number)
                if number:  # the first chat warms up
                    rows.append({"engine": engine.name, "round": number} | {k: round(v, 1) for k, v in rates.items()})
        for engine in engines:
            engine.close()
    median = {
        (name, part): statistics.median(row[part] for row in rows if row["engine"] == name)
        for name in ("torch_native", "vtensor")
        for part in ("prefill", "decode")
    }
    summary = {
        f"{part}_vs_torch_native": median["vtensor", part] / median["torch_native", part]
        for part in ("prefill", "decode")
    }
    summary |= unified.compare()
    summary["grouping_us_256"] = grouping.step_us(256)
    console.print({key: round(value, 1) for key, value in summary.items() if "_us_" in key})
    table = Table("tokens/s", "torch_native", "vtensor", "ratio", box=None)
    for part in ("prefill", "decode"):
        ratio = summary[f"{part}_vs_torch_native"]
        table.add_row(part, f"{median['torch_native', part]:,.0f}", f"{median['vtensor', part]:,.0f}", f"{ratio:.2f}")
    console.print(table)
    console.print(f"written to {results.write('host', summary, rows)}")


if __name__ == "__main__":
    typer.run(main)
