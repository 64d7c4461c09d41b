"""`sglang-vtensor top`: what the servers of a machine hold, live."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sglang_vtensor.server_client import NoAnswer, pages_by_state, server_stats, sleep_state

#: Kinds of memory, as they are stacked in the bar.
KINDS = {"weights": "blue", "live": "green", "cached": "yellow", "kept": "cyan", "reserve": "magenta"}
KINDS |= {"free": "bright_black"}
BAR = 60


@dataclass
class Sample:
    """A server at a moment: the statistics of its ranks, or why there are none."""

    url: str
    at: float
    ranks: Sequence[dict[str, Any]] = field(default_factory=list)
    error: str = ""


def sample(url: str, *, key: str | None = None) -> Sample:
    try:
        seen = Sample(url, time.monotonic(), server_stats(url, key=key))
        summary(seen)  # it tells all that is shown
        return seen
    except NoAnswer as error:
        return Sample(url, time.monotonic(), error=str(error))


def memory(rank: dict[str, Any]) -> dict[str, int]:
    """Bytes of a rank's device by kind. `reserve` is backed and nobody's; what others hold is in none of them."""
    held = {state: rank[f"{state}_bytes"] for state in ("live", "cached", "kept")}
    return {
        "weights": rank["weights_bytes"],
        **held,
        "reserve": rank["backed_bytes"] - sum(held.values()),
        "free": rank["device_free_bytes"],
    }


def summary(now: Sample, before: Sample | None = None) -> dict[str, Any]:
    """What `--json` prints of a server, numbers only; rates are over the time since `before`."""
    if now.error:
        return {"url": now.url, "error": now.error}
    ranks = []
    for n, rank in enumerate(now.ranks):
        prompt, served, created = rank["prompt_tokens"], rank["prefix_tokens_served"], rank["pages_created"]
        rate = 0.0
        if before is not None and n < len(before.ranks) and now.at > before.at:
            rate = (created - before.ranks[n]["pages_created"]) / (now.at - before.at)
        ranks.append(
            {
                "memory_bytes": memory(rank),
                "device_bytes": rank["device_bytes"],
                "limit_bytes": rank["limit_bytes"],
                "sleeping": bool(rank["sleeping"]),
                "state": sleep_state(rank),
                "requests": rank["requests"],
                "pages": pages_by_state(rank) | {"capacity": rank["pages_capacity"]},
                "runs_per_context": rank["context_runs"] / max(1, rank["contexts"]),
                "prefix_hit_rate": served / prompt if prompt else 0.0,
                "pages_created_per_second": max(0.0, rate),
                "shared_prefixes": rank["shared_prefixes"],
            }
        )
    return {"url": now.url, "ranks": ranks}


def view(now: Sample, before: Sample | None = None) -> Panel:
    """A server's panel."""
    told = summary(now, before)
    if "error" in told:
        return Panel(Text(told["error"], style="red"), title=now.url, title_align="left")
    parts: list[Any] = []
    for n, rank in enumerate(told["ranks"]):
        if n:
            parts.append(Text(f"rank {n}", style="bold"))
        parts += [_bar(rank), _numbers(rank)]
        if rank["shared_prefixes"]:
            parts.append(_prefixes(rank["shared_prefixes"]))
    states = sorted({rank["state"] for rank in told["ranks"]} - {"awake"})
    return Panel(Group(*parts), title=" ".join([now.url, *(f"({state})" for state in states)]), title_align="left")


def _bar(rank: dict[str, Any]) -> Text:
    """The device's memory, to scale; the gap is what others hold."""
    total = max(rank["device_bytes"], 1)
    text = Text()
    used = 0
    for kind, style in KINDS.items():
        if kind == "free":
            free = min(BAR - used, round(BAR * rank["memory_bytes"]["free"] / total))
            text.append("·" * (BAR - used - free), style="red")
            text.append("░" * free, style=style)
        else:
            width = min(BAR - used, round(BAR * rank["memory_bytes"][kind] / total))
            text.append("█" * width, style=style)
            used += width
    return text


def _numbers(rank: dict[str, Any]) -> Table:
    """Rows of numbers, each with its word: as many in a line as fit."""
    pages = rank["pages"]
    table = Table.grid(padding=(0, 2, 0, 0))
    held = [Text.assemble((kind, style), f" {_size(rank['memory_bytes'][kind])}") for kind, style in KINDS.items()]
    table.add_row("memory", _cells(held))
    counts = [f"{pages[state]:,} {state}" for state in ("live", "cached", "kept", "free")]
    table.add_row("pages", _cells([*counts, f"of {pages['capacity']:,}"]))
    cells = [f"prefix hits {rank['prefix_hit_rate']:.1%}", f"runs a context {rank['runs_per_context']:.2f}"]
    table.add_row("requests", _cells([f"{rank['requests']:,}", *cells]))
    table.add_row(
        "limit", _cells([_size(rank["limit_bytes"]), f"pages created/s {rank['pages_created_per_second']:,.0f}"])
    )
    return table


def _cells(cells: Sequence[str | Text]) -> Columns:
    return Columns(cells, padding=(0, 3, 0, 0))


def _prefixes(prefixes: list[dict[str, int]]) -> Table:
    table = Table("shared prefix, tokens", "branches", "saved", box=None, padding=(0, 2, 0, 0), header_style="dim")
    for prefix in prefixes:
        table.add_row(f"{prefix['tokens']:,}", f"{prefix['branches']:,}", _size(prefix["saved_bytes"]))
    return table


def _size(nbytes: float) -> str:
    return f"{nbytes / (1 << 30):,.2f} GiB" if nbytes >= 1 << 30 else f"{nbytes / (1 << 20):,.1f} MiB"


def run(console: Console, urls: Sequence[str], *, every: float, key: str | None = None) -> None:
    """Show the servers at `urls` and refresh the view `every` so many seconds, until interrupted."""
    before: dict[str, Sample] = {}
    with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
        while True:
            samples = [sample(url, key=key) for url in urls]
            live.update(Group(*(view(one, before.get(one.url)) for one in samples)), refresh=True)
            before = {one.url: one for one in samples}
            time.sleep(every)
