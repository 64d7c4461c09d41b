"""`python -m benchmarks.gpu_tests FILE...`: what the GPU tests printed, as results/gpu_tests.json.

    VTENSOR_GPU_RESULTS=$PWD/gpu.jsonl make test-gpu && python -m benchmarks.gpu_tests gpu.jsonl

Each line says where it was measured, so that this runs on any machine. Several files, of several runs of parts of the
tests, become one if they are of one commit, one kind of device and equal versions; a test that ran twice keeps its last
outcome.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import results

#: What must be equal, and is said once for all tests.
HEAD = ("commit", "device", "driver", "versions")


def main(files: Annotated[list[Path], typer.Argument(exists=True)]) -> None:
    rows: dict[str, dict[str, Any]] = {}
    for file in files:
        for line in file.read_text().splitlines():
            row = json.loads(line)
            rows[row["test"]] = row
    heads = [{key: row.pop(key) for key in HEAD} for row in rows.values()]
    for key in HEAD:
        there = {json.dumps(head[key], sort_keys=True) for head in heads}
        if len(there) > 1:
            raise typer.BadParameter(f"{key} differs: {', '.join(sorted(there))}. Rerun those of one of them")
    date = max(row.pop("date") for row in rows.values())
    outcomes = [row["outcome"] for row in rows.values()]
    summary = {outcome: float(outcomes.count(outcome)) for outcome in ("passed", "failed", "skipped")}
    head = {"command": "make test-gpu", "date": date} | heads[0]
    print(results.save("gpu_tests", head, summary, {"rows": [rows[name] for name in sorted(rows)]}), summary)


if __name__ == "__main__":
    typer.run(main)
