"""The demo: a real server, two users, one system prompt, four turns each."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import torch
from openai import OpenAI
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sglang_vtensor import real_model, tiny_model
from sglang_vtensor.cli import mib, stats_table
from sglang_vtensor.server_client import server_stats


@dataclass(frozen=True)
class Script:
    """What is said: a system prompt for both users, the questions of each, and the longest answer in tokens."""

    system: str
    questions: dict[str, list[str]]
    max_tokens: int


#: A model that says real things answers from what it was told.
LIBRARY = Script(
    """You are the assistant of a small library in Lisbon. You answer questions about it in one short sentence.
This is what you know about the library.
The library opens at nine in the morning. The library closes at six in the evening. On Sunday the library is closed.
The librarian is called Maria. She has worked in the library for twelve years.
A library card costs five euros a year. For children a library card costs nothing.
A book may be kept for three weeks. Up to eight books may be taken home at the same time.
The children's room is on the first floor. The reading room is on the second floor, beside the large window.
The newspapers are in the hall, to the left of the entrance.
The wireless network is called Bluewhale, and it is free for everyone.
On Thursday evening a writer reads from a new book, and there is tea and cake for all who come.
The library was built in the year 1904, and it burnt down once, in the year 1951. The roof is made of red tiles.
In the garden behind the house there is an old fig tree, and below it there are two benches of stone.
The cat of the library is called Pessoa. It sleeps on the map of Africa, and nobody is allowed to wake it.""",
    {
        "alice": [
            "When does the library open?",
            "Who is the librarian?",
            "How long has she worked here?",
            "What is the name of the cat?",
        ],
        "bob": [
            "What does a library card cost?",
            "Is the library open on Sunday?",
            "What is the name of the wireless network?",
            "When was the library built?",
        ],
    },
    96,
)
#: In words of the tiny model, which has no sentences.
GIBBERISH = Script(
    "you are a helpful assistant that answers every question about virtual memory in a few plain words. "
    + "the pages of a conversation are shared by every turn that continues it and a branch shares what came before. "
    * 12,
    {
        "alice": ["what is a page", "who owns it", "why is the second answer so much faster", "thank you say it again"],
        "bob": ["what is a run", "how long is it", "what happens when memory is short", "give me an example"],
    },
    24,
)
#: In place of a model's folder or hub id.
TINY = "tiny"
START_SECONDS = 600
#: Answers end with their first sentence, as far as this tells one; else with the model's own end, or at their longest.
SENTENCE_ENDS = [". ", ".\n"]


class NotStarted(RuntimeError):
    """The server did not start. The message says why, or has the end of its log."""


def run(console: Console, *, model: str | None, turns: int, port: int | None) -> int:
    """Returns the exit code: 0 only if every turn after a user's first reused its prefix. Raises `NotStarted` if the
    server cannot start, or cannot have the `port` that is given."""
    if port is not None:
        refuse_taken(port)
    with tempfile.TemporaryDirectory(prefix="vtensor-demo-") as folder:
        # Other types are 10 to 100 times slower on a CPU; on a GPU the model's own is best.
        arguments = [] if torch.cuda.is_available() else ["--dtype", "float32"]
        small = ["--max-total-tokens", "16384", "--max-running-requests", "32"]
        script = LIBRARY
        if model is None:
            arguments += small
            model = _real_model(console)
        if model == TINY:
            script = GIBBERISH
            console.print("A tiny model with random weights is made. What it says is meaningless.")
            # On a GPU a page is 2 MiB at least: Llama-3-8B's KV heads make that 128 tokens, which the prompt fills.
            wide = {"hidden": 512, "heads": 8, "kv_heads": 8, "head_dim": 128} if torch.cuda.is_available() else {}
            model = str(tiny_model.build(Path(folder) / "tiny", **wide))
            arguments = arguments or ["--dtype", "bfloat16"]
            arguments += small
        log = Path(folder) / "server.log"
        with serve(console, model, port=port or free_port(), log=log, arguments=arguments) as url:
            rows = chat(console, url, turns, script)
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


def _real_model(console: Console) -> str:
    """The folder of a model that says real things; or `TINY`, and why."""
    try:
        with console.status(f"fetching and converting {real_model.NAME}: a minute, the first time"):
            folder = real_model.fetch()
    except real_model.NotHad as error:
        console.print(
            f"[yellow]{escape(str(error))}. So a tiny model speaks. Give --model, or MODEL= to make, for another.[/]"
        )
        return TINY
    console.print(f"{real_model.NAME} answers, from {folder}.")
    return str(folder)


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
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, preexec_fn=end_with_parent
        )
        try:
            with console.status("starting the server") as status:
                wait_until_ready(process, url, log, status)
            yield url
        finally:
            stop(process)


def end_with_parent() -> None:
    """In a child that is about to begin: it gets SIGTERM when the thread that started it ends, however it does
    (prctl(2), PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def what_failed(log: Sequence[str], most: int = 25) -> Sequence[str]:
    """Of a server's log, the end of the first traceback, which is the cause of those that other processes add; the end
    of the log, if there is none."""
    begin = next((n for n, line in enumerate(log) if "Traceback (most recent call last)" in line), None)
    if begin is None:
        return log[-most:]
    told = (n for n in range(begin + 1, len(log)) if log[n] and not log[n][0].isspace())
    end = next(
        (n for n in told if not log[n].startswith(("Traceback", "During handling", "The above exception"))), None
    )
    return log[begin : len(log) if end is None else end + 1][-most:]


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path, status: Any) -> None:
    start = time.monotonic()
    while True:
        seconds = time.monotonic() - start
        lines = log.read_text(errors="replace").splitlines()
        if process.poll() is not None or seconds > START_SECONDS:
            with tempfile.NamedTemporaryFile(prefix="sglang-vtensor-", suffix=".log", delete=False) as kept:
                kept.write(log.read_bytes())
            raise NotStarted(
                f"the server did not start (exit code {process.poll()} after {seconds:.0f} s):\n"
                f"{chr(10).join(what_failed(lines))}\nIts whole log is in {kept.name}."
            )
        last = next((line for line in reversed(lines) if line.startswith("[")), "importing SGLang")
        status.update(f"starting the server, {seconds:.0f} s: {last[:110]}")
        if answers(process, f"{url}/health_generate"):
            return
        time.sleep(0.5)


def answers(process: subprocess.Popen[bytes], url: str) -> bool:
    """Whether the server that `process` is answers `url`. If it has ended, the answer is that of another server."""
    with contextlib.suppress(requests.RequestException):
        return requests.get(url, timeout=5).status_code == 200 and process.poll() is None
    return False


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server, which ends its own children."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def refuse_taken(port: int) -> None:
    """Raises `NotStarted` for a port of 127.0.0.1 that a server cannot have, such as one where another one listens."""
    try:
        socket.create_server(("127.0.0.1", port)).close()  # it binds as servers do: also where connections just ended
    except OSError as error:
        raise NotStarted(
            f"port {port} of 127.0.0.1 cannot be had: {error}. End the program that has it, or give another "
            "--port, or none, for a free one"
        ) from error


def free_port(but: Set[int] = frozenset()) -> int:
    """A port of 127.0.0.1 that nobody has, for a server that binds it only once it is up; none of `but`, which others
    are to bind. It is none of those that the kernel gives to connections (`ip_local_port_range`): one of these could
    take it in the meantime, even the connection that asks whether the server is up."""
    first, last = (int(port) for port in Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = [port for port in range(10_000, 65_536) if not first <= port <= last and port not in but]
    for port in random.SystemRandom().sample(ports, len(ports)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(
        f"127.0.0.1 has no free port of 10000 and more outside {first} to {last}, which the kernel gives to "
        "connections: make net.ipv4.ip_local_port_range smaller"
    )


def chat(console: Console, url: str, turns: int, script: Script) -> list[dict[str, Any]]:
    """The users take turns. One row a turn: what it took, and what the memory did for it."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    histories = {user: [{"role": "system", "content": script.system}] for user in script.questions}
    rows = []
    for turn in range(1, turns + 1):
        for user, questions in script.questions.items():
            history = histories[user]
            history.append({"role": "user", "content": questions[(turn - 1) % len(questions)]})
            before = server_stats(url)[0]
            text, cut, usage, first = ask(client, model, history, script.max_tokens)
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
