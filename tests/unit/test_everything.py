"""The commands of `benchmarks.everything`, and how they are run."""

from __future__ import annotations

import importlib
import shlex
from itertools import chain

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import everything
from benchmarks.everything import GROUPS, Command, Runs

LINES = [command.line for command in chain.from_iterable(GROUPS.values())]


@pytest.mark.parametrize("line", LINES)
def test_each_command_takes_what_it_is_given(tmp_path, line):
    name, *arguments = shlex.split(line.format(folder=tmp_path, trace=tmp_path / "trace"))
    for argument in arguments:
        if argument.startswith(str(tmp_path)):
            (tmp_path / argument).touch()  # `merge` and `--trace` want files that exist
    module = importlib.import_module(f"benchmarks.{name}")
    app = getattr(module, "app", None)
    if app is None:
        app = typer.Typer()
        app.command()(module.main)
    command = typer.main.get_command(app)
    if hasattr(command, "commands"):
        sub, *arguments = arguments
        command = command.commands[sub]
    assert command.make_context(name, arguments).params


def run(monkeypatch, tmp_path, groups, *arguments):
    monkeypatch.setattr(everything, "GROUPS", groups)
    app = typer.Typer()
    app.command()(everything.main)
    return CliRunner().invoke(app, ["--folder", str(tmp_path / "runs"), *arguments])


def test_groups_run_and_say_what_became_of_each_command(monkeypatch, tmp_path):
    groups = {
        "one": [Command("merge --help", 1), Command("merge --nothing x", 1), Command("merge {folder}/old.json", 1)],
        "other": [Command("memory --help --rows {folder}/old.json", 1), Command("memory --trace {trace}", 1)],
    }
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "old.json").write_text("of an earlier run")
    done = run(monkeypatch, tmp_path, groups, "--devices", "0,1")
    assert done.exit_code == 1
    said = " ".join(done.stdout.split())
    assert "exit code 2, see" in said
    assert "nothing to merge" in said
    assert "left out: there is no --trace" in said
    logs = {path.name: path.read_text() for path in (tmp_path / "runs").iterdir()}
    assert logs.keys() == {"one-0.log", "one-1.log", "other-0.log"}
    assert "Usage: python -m benchmarks.merge" in logs["one-0.log"]
    assert run(monkeypatch, tmp_path, groups, "one", "--devices", "0").exit_code == 1
    assert run(monkeypatch, tmp_path, groups, "other").exit_code == 0


def test_what_is_unknown_is_said(monkeypatch, tmp_path):
    done = run(monkeypatch, tmp_path, {"one": []}, "two")
    assert done.exit_code == 2
    assert "two unknown: there are one" in " ".join(done.stderr.replace("│", " ").split())


def test_a_command_that_takes_too_long_is_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(everything, "PATIENCE", 1 / 600)
    runs = Runs(tmp_path, ["0"], None)
    assert not runs.all({"one": [Command("host", 1)]})
    assert runs.outcomes == {("one", 0): "took too long"}
