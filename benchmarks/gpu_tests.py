"""`python -m benchmarks.gpu_tests FILE...`: what the GPU tests printed, as results/gpu_tests.json.

    VTENSOR_GPU_RESULTS=$PWD/gpu.jsonl make test-gpu && python -m benchmarks.gpu_tests gpu.jsonl

Run it on the machine that ran the tests: it notes the device and the versions. Several files, of several runs of parts
of the tests, become one if they are of one commit and one kind of device; a test that ran twice keeps its last outcome.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import results


def main(files: Annotated[list[Path], typer.Argument(exists=True)]) -> None:
    rows: dict[str, dict] = {}
    for file in files:
        for line in file.read_text().splitlines():
            row = json.loads(line)
            rows[row["test"]] = row
    for key, here in (("commit", results.commit()), ("device", results.device()[0])):
        if others := {row.get(key, "none") for row in rows.values()} - {here}:
            raise typer.BadParameter(f"rows of {key} {', '.join(sorted(others))}, and here it is {here}: rerun those")
    outcomes = [row["outcome"] for row in rows.values()]
    summary = {outcome: float(outcomes.count(outcome)) for outcome in ("passed", "failed", "skipped")}
    print(results.write("gpu_tests", summary, [rows[name] for name in sorted(rows)]), summary)


if __name__ == "__main__":
    typer.run(main)
