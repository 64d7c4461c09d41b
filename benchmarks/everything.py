"""`python -m benchmarks.everything [GROUP ...]`: the measurements that docs/benchmarks.md shows, on the GPUs at hand.

    python -m benchmarks.everything --list
    python -m benchmarks.everything prefix rollout --folder runs --trace conversation_trace.jsonl

A group writes one results file. Its commands run one after the other on one GPU, so that none loses what another one
merges. Groups run side by side, each on a GPU that no other one has. What a command says goes to a file in the folder
as it runs, and a command that takes three times as long as it should is ended.
"""

from __future__ import annotations

import os
import queue
import re
import shlex
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sglang_vtensor.demo import end_with_parent

console = Console(width=150)
#: A command is ended after so many times the minutes that it should take.
PATIENCE = 3
LEFT_OUT = "left out: there is no --trace"


@dataclass(frozen=True)
class Command:
    """`python -m benchmarks.<line>`, which takes about so many minutes on an H200. `{folder}` and `{trace}` in it are
    replaced; one with a trace is left out where there is none."""

    line: str
    minutes: int


_PAIR = "--compare fa3,fa3-page128 --rounds 3"
_SUITE, _ROWS = f"prefix {_PAIR} --no-write --workloads", "--rows {folder}"
#: Of mooncake, so that a round takes a minute and a half.
_SHORTER = "--extra '--num-prompts 300 --mooncake-slowdown-factor 0.25 --goodput ttft:2000 tpot:50'"
GROUPS: dict[str, list[Command]] = {
    "prefix": [
        Command(f"{_SUITE} chat,documents,tree {_ROWS}/suite.json", 8),
        Command(f"{_SUITE} chat_full {_ROWS}/chat_full.json", 6),
        Command(f"{_SUITE} agent_full {_ROWS}/agent_full.json", 15),
        Command("merge {folder}/suite.json {folder}/chat_full.json {folder}/agent_full.json", 1),
    ],
    "fp8": [
        Command(f"{_SUITE} chat,agent --kv-cache-dtype fp8_e4m3 --tokens 364544 {_ROWS}/fp8.json", 10),
        Command("merge --name fp8 {folder}/fp8.json", 1),
    ],
    "fp8_decode": [Command("fp8 --parts decode", 3)],
    "fp8_prefill": [Command("fp8 --parts prefill", 6)],
    "live_tokens": [Command("live_tokens", 5)],
    "models": [
        Command(f"prefix --compare fa3 --rounds 3 --no-write --model qwen3-0.6b --workloads chat {_ROWS}/qwen.json", 5),
        Command("merge --name models {folder}/qwen.json", 1),
    ],
    "qwen3moe": [
        Command(f"{_SUITE} chat --model qwen3-30b-a3b {_ROWS}/qwen3moe.json", 6),
        Command("merge --name qwen3moe {folder}/qwen3moe.json", 1),
    ],
    "kinds": [
        Command("kinds --model gpt-oss --parts admitted --rows {folder}/gpt-oss-admitted.json", 14),
        Command("kinds --model gpt-oss --parts served,moved --rows {folder}/gpt-oss.json", 10),
        Command("kinds --model qwen3-next --parts admitted --rows {folder}/qwen3-next-admitted.json", 14),
        Command("kinds --model qwen3-next --parts served,moved --rows {folder}/qwen3-next.json", 14),
    ],
    "rollout": [
        Command("rollout --cases rollout_8k --compare fa3 --rows {folder}/rollout-fa3.json", 5),
        Command("rollout --cases rollout_8k --compare fa3-page128 --rows {folder}/rollout-page128.json", 5),
        Command("rollout --release --rows {folder}/release.json", 5),
        Command(
            "merge --name rollout {folder}/rollout-fa3.json {folder}/rollout-page128.json {folder}/release.json", 1
        ),
    ],
    "logprobs": [Command("logprobs --write --rows {folder}/logprobs.json", 5)],
    "logprobs_fp8_e4m3": [Command("logprobs --fp8 --write --rows {folder}/logprobs_fp8.json", 6)],
    "accuracy": [Command("accuracy --rows {folder}/accuracy.json", 5)],
    "accuracy_fp8_e4m3": [Command("accuracy --kv-cache-dtype fp8_e4m3 --rows {folder}/accuracy_fp8.json", 5)],
    "memory": [
        Command("memory --parts held,backed,returned,two,pair --rows {folder}/memory.json", 15),
        Command("memory --parts live --trace {trace} --rows {folder}/live.json", 5),
    ],
    "servers": [
        Command("servers --parts cold --rows {folder}/cold.json", 13),
        Command("servers --parts alone,two --rows {folder}/two.json", 9),
        Command("servers --parts both --rows {folder}/both.json", 7),
        Command("servers --parts third,stranger --rows {folder}/third.json", 25),
        Command("servers --parts killed,idle --rows {folder}/killed.json", 6),
        Command("servers --parts three,static --rows {folder}/three.json", 18),
    ],
    "third_party": [
        Command(f"third_party --benchmarks gsp {_PAIR} {_ROWS}/gsp.json", 22),
        Command(f"third_party --benchmarks mooncake --trace {{trace}} {_PAIR} {_ROWS}/mooncake.json {_SHORTER}", 15),
    ],
    "prefill": [Command("kernels prefill", 4)],
    "shared_decode": [Command("kernels shared-decode", 7)],
    "plain_decode": [Command("kernels plain-decode", 4)],
    "host": [Command("host --rounds 5", 10)],
    "hit_rates": [Command("hit_rates --trace {trace}", 15)],
}


def told(groups: dict[str, list[Command]]) -> Table:
    """What there is to run."""
    table = Table("group", "command", "minutes")
    for name, commands in groups.items():
        for command in commands:
            table.add_row(name, f"python -m benchmarks.{command.line}", str(command.minutes))
    return table


class Runs:
    """Groups whose commands run on `devices`, by their names for CUDA_VISIBLE_DEVICES."""

    def __init__(self, folder: Path, devices: list[str], trace: Path | None) -> None:
        self.folder = folder
        self.devices = devices
        self.trace = trace
        #: What each command came to, by group and number.
        self.outcomes: dict[tuple[str, int], str] = {}

    def all(self, groups: dict[str, list[Command]]) -> bool:
        """Run them. Whether no command failed."""
        for command in chain.from_iterable(groups.values()):
            if rows := re.search(r"--rows (\S+)", command.line):  # of an earlier run
                Path(rows[1].format(folder=self.folder)).unlink(missing_ok=True)
        waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
        for name in groups:
            waiting.put(name)

        def work(device: str) -> None:
            while True:
                try:
                    name = waiting.get_nowait()
                except queue.Empty:
                    return
                for number, command in enumerate(groups[name]):
                    self.outcomes[name, number] = self.one(f"{name}-{number}", command, device)

        threads = [threading.Thread(target=work, args=(device,), daemon=True) for device in self.devices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ended = [self.outcomes.get((name, number), "") for name in groups for number in range(len(groups[name]))]
        return set(ended) <= {"done", LEFT_OUT}

    def one(self, name: str, command: Command, device: str) -> str:
        """Run it, and say what came of it."""
        if "{trace}" in command.line and self.trace is None:
            return LEFT_OUT
        line = command.line.format(folder=shlex.quote(str(self.folder)), trace=shlex.quote(str(self.trace)))
        what, *arguments = shlex.split(line)
        if what == "merge" and (files := [one for one in arguments if one.endswith(".json")]):
            missing = {one for one in files if not Path(one).exists()}  # a command that failed did not write them
            arguments = [one for one in arguments if one not in missing]
            if len(missing) == len(files):
                return "nothing to merge"
        log, began = self.folder / f"{name}.log", time.monotonic()
        console.print(f"GPU {device}: {line}, to {log}")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", f"benchmarks.{what}", *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": device},
                preexec_fn=end_with_parent,
            )
            try:
                code = process.wait(PATIENCE * 60 * command.minutes)
            except subprocess.TimeoutExpired:
                process.terminate()  # its servers end with it
                process.wait()
                code = None
        outcome = "done" if code == 0 else "took too long" if code is None else f"exit code {code}, see {log}"
        console.print(f"GPU {device}: {name} {outcome}, after {time.monotonic() - began:.0f} s")
        return outcome

    def table(self, groups: dict[str, list[Command]]) -> Table:
        table = Table("group", "command", "outcome")
        for (name, number), outcome in sorted(self.outcomes.items()):
            table.add_row(name, groups[name][number].line, outcome)
        return table


def main(
    names: Annotated[list[str] | None, typer.Argument(metavar="GROUP...", help="All of them by default.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Say what there is, and run nothing.")] = False,
    folder: Annotated[Path, typer.Option(help="Of logs, and of rows before they are merged.")] = Path("runs"),
    devices: Annotated[str, typer.Option(help="GPUs, with commas.")] = "0",
    trace: Annotated[Path | None, typer.Option(exists=True, help="A Mooncake trace.")] = None,
) -> None:
    """Measure what these groups have, and write their results files. Exit code 1 if a command failed."""
    chosen = {name: GROUPS[name] for name in names or GROUPS if name in GROUPS}
    if unknown := set(names or []).difference(GROUPS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))} unknown: there are {', '.join(GROUPS)}")
    if listed:
        console.print(told(chosen))
        return
    folder.mkdir(parents=True, exist_ok=True)
    runs = Runs(folder, devices.split(","), trace)
    done = runs.all(chosen)
    console.print(runs.table(chosen))
    if not done:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
