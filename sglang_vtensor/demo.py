"""The demo: a real server, two users, one system prompt, four turns each."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import requests
import torch
from openai import OpenAI
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sglang_vtensor import tiny_model
from sglang_vtensor.cli import mib, stats_table
from sglang_vtensor.server_client import server_stats

SYSTEM = (
    "you are a helpful assistant that answers every question about virtual memory in a few plain words. "
    + "the pages of a conversation are shared by every turn that continues it and a branch shares what came before. "
    * 12
)
QUESTIONS = {
    "alice": ["what is a page", "who owns it", "why is the second answer so much faster", "thank you say it again"],
    "bob": ["what is a run", "how long is it", "what happens when memory is short", "give me an example"],
}
START_SECONDS = 600
#: Answers end with their first sentence, as far as this tells one; else with the model's own end, or after so many
#: tokens: of a real model, and of the tiny one, which has no sentences.
SENTENCE_ENDS = [". ", ".\n"]
MAX_TOKENS, TINY_MAX_TOKENS = 96, 24


class NotStarted(RuntimeError):
    """The server did not start. The message has the end of its log."""


def run(console: Console, *, model: str | None, turns: int, port: int | None) -> int:
    """Returns the exit code: 0 only if every turn after a user's first reused its prefix."""
    with tempfile.TemporaryDirectory(prefix="vtensor-demo-") as folder:
        # Other types are 10 to 100 times slower on a CPU; on a GPU the model's own is best.
        arguments = [] if torch.cuda.is_available() else ["--dtype", "float32"]
        max_tokens = MAX_TOKENS
        if model is None:
            max_tokens = TINY_MAX_TOKENS
            console.print("No model given: a tiny one with random weights is made. What it says is meaningless.")
            # On a GPU a page is 2 MiB at least: Llama-3-8B's KV heads make that 128 tokens, which the prompt fills.
            wide = {"hidden": 512, "heads": 8, "kv_heads": 8, "head_dim": 128} if torch.cuda.is_available() else {}
            model = str(tiny_model.build(Path(folder) / "tiny", **wide))
            arguments = arguments or ["--dtype", "bfloat16"]
            arguments += ["--max-total-tokens", "16384", "--max-running-requests", "32"]
        log = Path(folder) / "server.log"
        with serve(console, model, port=port or free_port(), log=log, arguments=arguments) as url:
            rows = chat(console, url, turns, max_tokens=max_tokens)
            console.print(turns_table(rows))
            for rank in server_stats(url):
                console.print(stats_table(rank, title="After the chat"))
    missed = [row for row in rows if row["turn"] > 1 and not row["cached"]]
    if missed:
        console.print(f"[red]{len(missed)} turns computed their prefix again.[/]")
        return 1
    served, asked = sum(row["cached"] for row in rows), sum(row["prompt"] for row in rows)
    console.print(
        f"Every turn after the first reused its prefix: {served:,} of {asked:,} prompt tokens were not computed."
    )
    return 0


@contextlib.contextmanager
def serve(console: Console, model: str, *, port: int, log: Path, arguments: Sequence[str] = ()) -> Iterator[str]:
    """`sglang serve --kv-backend vtensor` on 127.0.0.1, on the GPU if there is one. Yields its URL."""
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["SGLANG_PLATFORM"] = "vtensor_host"
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model, "--kv-backend", "vtensor"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enable-cache-report", "--sleep-on-idle"]
    command += arguments
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, preexec_fn=_end_with_parent
        )
        try:
            with console.status("starting the server") as status:
                wait_until_ready(process, url, log, status)
            yield url
        finally:
            stop(process)


def _end_with_parent() -> None:
    """In a child that is about to begin: it gets SIGTERM when the thread that started it ends, however it does
    (prctl(2), PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path, status: Any) -> None:
    start = time.monotonic()
    while True:
        seconds = time.monotonic() - start
        lines = log.read_text(errors="replace").splitlines()
        if process.poll() is not None or seconds > START_SECONDS:
            tail = "\n".join(lines[-25:])
            raise NotStarted(f"the server did not start (exit code {process.poll()} after {seconds:.0f} s):\n{tail}")
        last = next((line for line in reversed(lines) if line.startswith("[")), "importing SGLang")
        status.update(f"starting the server, {seconds:.0f} s: {last[:110]}")
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{url}/health_generate", timeout=5).status_code == 200:
                return
        time.sleep(0.5)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server, which ends its own children."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def chat(console: Console, url: str, turns: int, *, max_tokens: int = TINY_MAX_TOKENS) -> list[dict[str, Any]]:
    """The users take turns. One row a turn: what it took, and what the memory did for it."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    histories = {user: [{"role": "system", "content": SYSTEM}] for user in QUESTIONS}
    rows = []
    for turn in range(1, turns + 1):
        for user, questions in QUESTIONS.items():
            history = histories[user]
            history.append({"role": "user", "content": questions[(turn - 1) % len(questions)]})
            before = server_stats(url)[0]
            text, cut, usage, first = ask(client, model, history, max_tokens)
            after = server_stats(url)[0]
            history.append({"role": "assistant", "content": text})
            console.print(f"[dim]{user}:[/] {history[-2]['content']}", highlight=False)
            console.print(Text.assemble(("model:", "dim"), f" {text.strip()}{' ...' if cut else ''}"))
            gain = {key: after[key] - before[key] for key in ("pages_allocated", "pages_shared", "pages_in_place")}
            rows.append(
                {
                    "turn": turn,
                    "user": user,
                    "prompt": usage.prompt_tokens,
                    "cached": usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0,
                    "new": gain["pages_allocated"],
                    "shared": gain["pages_shared"],
                    "in_place": gain["pages_in_place"],
                    "backed": after["backed_bytes"],
                    "first": first,
                }
            )
    return rows


def ask(client: OpenAI, model: str, history: list[Any], max_tokens: int) -> tuple[str, bool, Any, float]:
    """One streamed answer: the text, whether `max_tokens` cut it, the usage, and the seconds to the first token."""
    start = time.perf_counter()
    first, text, finish, usage = 0.0, "", None, None
    stream = client.chat.completions.create(
        model=model,
        messages=history,
        max_tokens=max_tokens,
        temperature=0,
        stop=SENTENCE_ENDS,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"no_stop_trim": True},
    )
    for part in stream:
        if part.choices and part.choices[0].delta.content:
            first = first or time.perf_counter() - start
            text += part.choices[0].delta.content
        if part.choices:
            finish = part.choices[0].finish_reason or finish
        usage = part.usage or usage
    return text.rstrip(), finish == "length", usage, first


def turns_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Each turn", title_justify="left")
    for heading in (
        "turn",
        "user",
        "prompt tokens",
        "cached",
        "pages new",
        "pages shared",
        "in place",
        "backed",
        "TTFT",
    ):
        table.add_column(heading, justify="left" if heading == "user" else "right")
    for row in rows:
        table.add_row(
            str(row["turn"]),
            row["user"],
            f"{row['prompt']:,}",
            f"{row['cached']:,}",
            str(row["new"]),
            str(row["shared"]),
            str(row["in_place"]),
            mib(row["backed"]),
            f"{1000 * row['first']:.0f} ms",
        )
    return table
