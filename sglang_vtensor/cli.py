"""The command `sglang-vtensor`: demo, stats, top, limit, sleep, wake, check, compile."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sglang_vtensor import __version__

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)
#: A pipe has no width of its own; tables need some.
console = Console(width=None if sys.stdout.isatty() else 120)
errors = Console(stderr=True)

URL = "http://127.0.0.1:30000"


def _no_nan(value: float) -> float:
    """A callback for options that have bounds, which let it pass."""
    if math.isnan(value):
        raise typer.BadParameter("nan is no number")
    return value


def _print_version(asked: bool) -> None:
    if asked:
        print(f"sglang-vtensor {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """KV memory for SGLang on virtual tensors."""


@app.command()
def demo(
    model: Annotated[
        str | None,
        typer.Option(
            help="A model's folder or hub id, or tiny: random weights. Default: SmolLM2-135M-Instruct, fetched."
        ),
    ] = None,
    turns: Annotated[int, typer.Option(min=2, help="Turns of each of the two conversations.")] = 4,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port on 127.0.0.1. Default: a free one.")] = None,
) -> None:
    """Start a server, let two users chat under one system prompt, and show what was shared."""
    from sglang_vtensor.demo import NotStarted, run

    # The server is this process's child, and is to end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        raise typer.Exit(run(console, model=model, turns=turns, port=port))
    except NotStarted as error:
        raise _failure(error) from error


Url = Annotated[str, typer.Option(help="The server.")]
Key = Annotated[str | None, typer.Option(help="The server's admin key, if it has one.", envvar="SGLANG_ADMIN_API_KEY")]
UserKey = Annotated[str | None, typer.Option("--key", help="The server's API key, if it has one.")]


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    """Around a command: a server that does not answer, or not as it should, ends it with one."""
    from sglang_vtensor.server_client import NoAnswer

    try:
        yield
    except NoAnswer as error:
        raise _failure(error) from error


@app.command()
@_one_sentence()
def stats(
    url: Url = URL,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable: a list, one object a rank.")] = False,
    key: UserKey = None,
) -> None:
    """Show the KV memory of a running server."""
    from sglang_vtensor.server_client import server_stats

    ranks = server_stats(url, key=key)
    if as_json:
        print(json.dumps(ranks, indent=2))
        return
    for rank, values in enumerate(ranks):
        console.print(stats_table(values, title=f"{url}, rank {rank}" if len(ranks) > 1 else url))


@app.command()
@_one_sentence()
def limit(
    size: Annotated[str, typer.Argument(help="Bytes such as 20GiB, or a share of the KV capacity: 0.5, 50% or all.")],
    url: Url = URL,
    key: Key = None,
) -> None:
    """Change how much memory the KV cache of a running server may hold (of each data-parallel rank)."""
    from sglang_vtensor.server_client import ask

    _tell(url, ask(url, "limit", {"limit": size}, key=key))


@app.command()
@_one_sentence()
def sleep(
    url: Url = URL,
    key: Key = None,
    wait: Annotated[
        float, typer.Option(help="Seconds to wait for running requests to end.", min=0, callback=_no_nan)
    ] = 60.0,
) -> None:
    """Give back everything but the weights. What runs comes to its end; what arrives waits until `wake`."""
    from sglang_vtensor.server_client import ask

    ranks = ask(url, "sleep", key=key)
    deadline = time.monotonic() + wait
    while any("note" in rank or rank["cached_bytes"] for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
        ranks = ask(url, "sleep", key=key)
    _tell(url, ranks)


@app.command()
@_one_sentence()
def wake(url: Url = URL, key: Key = None) -> None:
    """Let a sleeping server serve again."""
    from sglang_vtensor.server_client import ask

    _tell(url, ask(url, "wake", key=key))


@app.command()
def top(
    urls: Annotated[list[str] | None, typer.Argument(help=f"Servers. Default: {URL}.", show_default=False)] = None,
    once: Annotated[bool, typer.Option("--once", help="Print once and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --once: machine-readable.")] = False,
    every: Annotated[
        float, typer.Option(help="Seconds between two looks.", min=0.1, max=86400, callback=_no_nan)
    ] = 1.0,
    key: UserKey = None,
) -> None:
    """A live view of one or several servers: memory by kind, pages and runs, reuse, and the largest prefixes."""
    from sglang_vtensor import top as view

    servers = urls or [URL]
    if as_json and not once:
        errors.print("error: --json prints once: give --once too", style="red")
        raise typer.Exit(2)
    if not once:
        with contextlib.suppress(KeyboardInterrupt):
            view.run(console, servers, every=every, key=key)
        return
    first = {url: view.sample(url, key=key) for url in servers}
    time.sleep(min(every, 1.0))  # rates need two looks
    samples = [view.sample(url, key=key) for url in servers]
    if as_json:
        print(json.dumps([view.summary(one, first[one.url]) for one in samples], indent=2))
    else:
        for one in samples:
            console.print(view.view(one, first[one.url]))
    raise typer.Exit(any(one.error for one in samples))


def _failure(error: Exception) -> typer.Exit:
    """To be raised: the command failed, and has said why."""
    errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    return typer.Exit(1)


def _tell(url: str, ranks: Sequence[dict[str, Any]]) -> None:
    from sglang_vtensor.server_client import sleep_state

    for rank, state in enumerate(ranks):
        awake = sleep_state(state) if state["sleeping"] else f"limit {mib(state['limit_bytes'])}"
        where = f"{url}, rank {rank}" if len(ranks) > 1 else url
        console.print(
            f"{where}: {awake}, backed {mib(state['backed_bytes'])}, live {mib(state['live_bytes'])}, cached "
            f"{mib(state['cached_bytes'])}, {state['requests']} requests",
            soft_wrap=True,
        )
        if "note" in state:
            console.print(f"  {state['note']}", soft_wrap=True)


@app.command()
def check() -> None:
    """Say what this machine offers, which patch would load, and what stands in the way."""
    from sglang_vtensor.check import examine

    table = Table(box=None, show_header=False)
    findings = examine()
    for finding in findings:
        mark = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "problem": "[red]problem[/]"}[finding.level]
        table.add_row(mark, finding.subject, finding.text)
    console.print(table)
    raise typer.Exit(any(finding.level == "problem" for finding in findings))


@app.command("compile", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@_one_sentence()
def compile_kernels(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="A model's folder or hub id. Its weights are not read.")],
    tp: Annotated[int, typer.Option("--tp", "--tp-size", min=1, help="GPUs of the server.")] = 1,
    kv_cache_dtype: Annotated[str, typer.Option(help="As of the server.")] = "auto",
) -> None:
    """Compile the kernels of a server ahead, on the GPU that will serve, so that its first start is as quick as others.

    Further arguments are those of `sglang serve`: give the ones that the server will have. Host, port, TLS and keys are
    left out, as the server that is started for this is asked on 127.0.0.1 only.
    """
    from sglang_vtensor import precompile
    from sglang_vtensor.demo import NotStarted

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as in the demo
    try:
        precompile.run(console, model, tp=tp, kv_cache_dtype=kv_cache_dtype, more=context.args)
    except (precompile.NotCompiled, NotStarted) as error:
        raise _failure(error) from error


def mib(count: float) -> str:
    return f"{count / (1 << 20):,.1f} MiB"


def stats_table(values: dict[str, Any], title: str) -> Table:
    """The statistics as a table of four groups."""
    from sglang_vtensor.server_client import pages_by_state, sleep_state

    table = Table(title=title, box=None, show_header=False, title_justify="left")
    page = values["page_bytes"]
    taken = {state: values[f"{state}_bytes"] for state in ("live", "cached", "kept")}
    taken["free"] = values["backed_bytes"] - page - sum(taken.values())  # without the padding page
    rows: list[tuple[str, str]] = [
        ("state", sleep_state(values)),
        ("page", f"{values['page_tokens']} tokens, {mib(page)}, {values['waste']:.1%} padding"),
        *((f"pages {state}", f"{count:,}  {mib(taken[state])}") for state, count in pages_by_state(values).items()),
        ("pages backed", f"{values['pages_backed']:,}  {mib(values['backed_bytes'])}"),
        ("limit", f"{values['limit_bytes'] // page - 1:,}  {mib(values['limit_bytes'])}"),
        ("of a capacity of", f"{values['pages_capacity']:,}  {mib(values['capacity_bytes'])}"),
        ("requests", f"{values['requests']:,}"),
        ("pages handed out", f"{values['pages_allocated']:,}, {values['pages_in_place']:,} of them in place"),
        (
            "their memory",
            f"{values['pages_with_memory']:,} had it, {values['pages_created_at_once']:,} new",
        ),
        (
            "runs of a context",
            f"{values['context_runs'] / max(1, values['contexts']):.2f}, {values['context_runs_most']:,} at most",
        ),
        ("pages created", f"{values['pages_created']:,}, {values['pages_released']:,} given back"),
        ("prefix tokens served", f"{values['prefix_tokens_served']:,}"),
        ("time of the scheduler", f"{values['scheduling_seconds']:.3f} s"),
        ("of the worker beside it", f"{values['worker_seconds']:.3f} s"),
    ]
    for row in rows:
        table.add_row(*row)
    return table


if __name__ == "__main__":
    app(prog_name=Path(__file__).stem)
