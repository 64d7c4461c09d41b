"""`python -m benchmarks.merge FILE...`: the rounds of several runs of the prefix suite, as one results file.

    python -m benchmarks.prefix --workloads chat --rows chat.json
    python -m benchmarks.prefix --workloads agent --compare fa3 --rows agent.json
    python -m benchmarks.merge chat.json agent.json

The files are what `--rows` wrote, and say by themselves where they were measured: this may run on another machine. They
must be of one commit, one kind of device and the same versions. What the results file has is kept under the same
condition, and dropped otherwise; `benchmarks.rounds.joined` says which rounds replace others.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import results
from benchmarks.rounds import Differ


def main(
    files: Annotated[list[Path], typer.Argument(exists=True)],
    name: Annotated[str, typer.Option(help="The results file: results/NAME.json.")] = "prefix",
) -> None:
    """Merge, and say what was dropped."""
    try:
        path, dropped = results.add_rounds(name, [json.loads(file.read_text()) for file in files])
    except Differ as error:
        raise typer.BadParameter(f"these runs do not belong together: {error}") from None
    if dropped:
        print(f"dropped what {path.name} had: {dropped}")
    print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
