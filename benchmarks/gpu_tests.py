"""`python -m benchmarks.gpu_tests FILE...`: what the GPU tests printed, as results/gpu_tests.json.

    VTENSOR_GPU_RESULTS=$PWD/gpu.jsonl make test-gpu && python -m benchmarks.gpu_tests gpu.jsonl

Each line says where it was measured, so that this runs on any machine. Several files, of several runs of parts of the
tests, become one if they are of one kind of device and equal versions; a test that ran twice keeps its last outcome.
The file's commit is the last one, and a test that ran at another one says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import results, rounds


def main(files: Annotated[list[Path], typer.Argument(exists=True)]) -> None:
    rows: dict[str, dict[str, Any]] = {}
    for file in files:
        for line in file.read_text().splitlines():
            row = json.loads(line)
            rows.pop(row["test"], None)  # what ran last comes last: its commit is the file's
            rows[row["test"]] = {"command": "make test-gpu"} | row
    measured = list(rows.values())
    try:
        rounds.check_same(measured, ("device", "driver"))
    except rounds.Differ as error:
        raise typer.BadParameter(f"these runs do not belong together: {error}") from None
    head = rounds.head_of(measured)
    outcomes = [row["outcome"] for row in rows.values()]
    summary = {outcome: float(outcomes.count(outcome)) for outcome in ("passed", "failed", "skipped")}
    told = []
    for _, row in sorted(rows.items()):
        elsewhere = {} if row["commit"] == head["commit"] else {"commit": row["commit"]}
        told.append({key: value for key, value in row.items() if key not in rounds.HEAD} | elsewhere)
    print(results.save("gpu_tests", head, summary, {"rows": told}), summary)


if __name__ == "__main__":
    typer.run(main)
