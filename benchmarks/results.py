"""Results files: what was measured, where, and with what."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Hashable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks import rounds

#: A results file.
Record = dict[str, Any]
FOLDER = Path(__file__).parent / "results"
PACKAGES = (
    *("sglang", "sglang-vtensor", "torch", "triton", "sglang-kernel", "flashinfer-python", "cuda-bindings"),
    "kvcached",
)


def head() -> dict[str, Any]:
    """What is measured here and now: the command, the commit, the day, the device and the versions."""
    name_of_device, driver = device()
    # Paths of one machine do not belong in results; a file of rows does not exist yet when this is read.
    arguments = [Path(argument).name if os.sep in argument else argument for argument in sys.argv[1:]]
    return {
        "command": shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *arguments]),
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": name_of_device,
        "driver": driver,
        "versions": {"python": sys.version.split()[0]} | {p: v for p in PACKAGES if (v := _version(p))},
    }


def write(name: str, summary: dict[str, float], rows: list[dict[str, Any]], *, after: str = "") -> Path:
    """Write `results/<name>.json`. Ratios above 1 are in our favour; shares are between 0 and 1. `after` is the command
    that measured those of the rows that were there before."""
    here = head()
    here["command"] = f"{after} && {here['command']}" if after else here["command"]
    return save(name, here, summary, {"rows": rows})


def add_parts(
    name: str,
    rows: list[Record],
    which: Callable[[Record], Hashable],
    summarize: Callable[[list[Record]], dict[str, float]],
) -> tuple[Path, list[Record], str]:
    """Add rows of some parts to `results/<name>.json`. They replace those that are equal by `which`, and all rows of
    another commit, device or versions. Returns its path, all its rows, and why what it had was dropped, or ""."""
    kept, here, before, dropped = read(name), head(), "", ""
    if kept is not None:
        anew = set(map(which, rows))
        try:
            rounds.check_same([kept, here])
        except rounds.Differ as error:
            dropped = str(error)
        else:
            others = [row for row in kept["rows"] if which(row) not in anew]
            if others:
                before = " && ".join(one for one in kept["command"].split(" && ") if one != here["command"])
            rows = others + rows
    return write(name, summarize(rows), rows, after=before), rows, dropped


def add_rounds(name: str, runs: list[list[dict[str, Any]]]) -> tuple[Path, str]:
    """Add runs of contestants side by side, and releases (`benchmarks.rollout`), each row with its head in it, to
    `results/<name>.json`. Releases replace those of the same contestant. Returns its path, and why what it had was
    dropped, or "". Raises `rounds.Differ` if the runs do not belong together, `ValueError` if there is neither a whole
    round nor a release."""
    releases = [row for run in runs for row in run if rounds.is_release(row)]
    added = rounds.joined([[row for row in run if not rounds.is_release(row)] for run in runs])
    if not added and not releases:
        raise ValueError("no round of these runs was finished by all contestants")
    rounds.check_same([*added, *releases])
    kept, dropped = read(name), ""
    if kept is not None:
        before, released = rounds.with_heads(kept), rounds.releases_of(kept)
        if not before and not released:
            dropped = "rows without rounds"
        try:
            rounds.check_same([*before, *released, *added, *releases])
            added = rounds.joined([before, added])
            anew = {row["contestant"] for row in releases}
            releases = [row for row in released if row["contestant"] not in anew] + releases
        except rounds.Differ as error:
            dropped = str(error)
    head = rounds.head_of([*added, *releases])
    rows, releases = (
        [{key: value for key, value in row.items() if key not in rounds.HEAD} for row in of] for of in (added, releases)
    )
    summary = rounds.summarize(rows) | rounds.of_releases(releases)
    more = {"comparisons": rounds.compare(rows), "rows": rows} | ({"releases": releases} if releases else {})
    return save(name, head, summary, more), dropped


def written(path: Path, dropped: str) -> str:
    """What a benchmark says at its end: where its results are, and why what that file had was dropped, if it was."""
    return f"written to {path}" + (f"; dropped what it had: {dropped}" if dropped else "")


def keep(file: Path | None, rows: Sequence[Record]) -> None:
    """Write what a run has measured so far to the file that `--rows` names, if it names one: what comes next may
    fail."""
    if file is not None:
        file.write_text(json.dumps(rows, indent=1))


def save(name: str, head: dict[str, Any], summary: dict[str, float], more: dict[str, Any]) -> Path:
    """Write what was measured where `head` says."""
    record = {"name": name} | head | {"summary": {key: round(value, 4) for key, value in summary.items()}} | more
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def read(name: str) -> dict[str, Any] | None:
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def source(record: Record) -> str:
    """Where a table comes from, in one line."""
    named = ("sglang", "torch", *(["vllm"] if "vllm" in record["versions"] else []))
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in named)
    return f"`{record['command']}`, {record['device']}, {versions}, commit {record['commit']}, {record['date']}."


def where(record: Record) -> str:
    """On what a table was measured, in half a line: docs/benchmarks.md has the command too."""
    versions = record["versions"]
    return f"{record['device']}, SGLang {versions['sglang']}, commit {record['commit']}, {record['date']}."


def commit() -> str:
    """The commit that was measured, with a mark if the tree had changes beside results.

    Where the tree travelled without its history, `VTENSOR_COMMIT` says which it is.
    """
    if "VTENSOR_COMMIT" in os.environ:
        return os.environ["VTENSOR_COMMIT"]
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = [line for line in _git("status", "--porcelain").splitlines() if "benchmarks/results/" not in line]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if changed else "")


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=FOLDER.parent, capture_output=True, text=True, check=True).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device() -> tuple[str, str]:
    """The device's name, and its driver."""
    import torch

    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0].strip()
        return torch.cuda.get_device_name(0), driver
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1] for line in lines if line.startswith("model name")), "CPU")
    return f"{model.strip()}, {torch.get_num_threads()} threads", "none"
