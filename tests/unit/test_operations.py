"""docs/operations.md names every option, command, route and metric; docs/faq.md names all that is refused. The lists
are the code's."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from fastapi import FastAPI

from sglang_vtensor import cli, patches
from sglang_vtensor.srt import options, state_models
from sglang_vtensor.srt.http import add_routes
from sglang_vtensor.srt.metrics import COUNTERS, GAUGES

DOCS = Path(__file__).parents[2] / "docs"
OPERATIONS = (DOCS / "operations.md").read_text()


def first_cells(page: str) -> set[str]:
    """What stands in backquotes in the first column of a table."""
    cells = re.findall(r"^\| (`.*?) \|(?: |$)", page.replace(r"\|", "/"), re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def ours() -> list[argparse.Action]:
    parser = argparse.ArgumentParser(add_help=False)
    options.add_arguments(parser)
    return parser._actions


def test_every_option_is_there_and_no_other():
    told = {name.split()[0] for name in first_cells(OPERATIONS) if name.startswith(("--kv-backend", "--vtensor"))}
    assert told == {action.option_strings[0] for action in ours()}
    assert told == {f"--{name.replace('_', '-')}" for name in options.Options.names()}


@pytest.mark.parametrize("action", ours(), ids=lambda action: action.option_strings[0])
def test_an_option_has_its_choices_and_its_default(action):
    (row,) = re.findall(rf"^\| (`{action.option_strings[0]}[ `].*)$", OPERATIONS.replace(r"\|", "/"), re.MULTILINE)
    default = getattr(options.Options, action.dest)
    default = "none" if default is None else f"`{default:g}`" if isinstance(default, float) else f"`{default}`"
    assert row.split(" | ")[1] == default
    if action.choices:
        assert "{" + ",".join(action.choices) + "}" in row


def test_every_command_is_there_and_no_other():
    commands = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    told = {name.split()[1] for name in first_cells(OPERATIONS) if name.startswith("sglang-vtensor ")}
    assert told == commands


def test_every_parameter_of_a_command_is_there():
    group = typer.main.get_command(cli.app)
    parameters = [parameter for command in (group, *group.commands.values()) for parameter in command.params]
    for parameter in parameters:
        names = [name for name in parameter.opts if name.startswith("--")]
        assert not names or any(re.search(rf"{name}\b", OPERATIONS) for name in names), names
        assert parameter.envvar is None or f"`{parameter.envvar}`" in OPERATIONS


def test_every_route_is_there():
    app = FastAPI()
    add_routes(app, SimpleNamespace(), keyed=False)
    routes = {
        f"{method} {route.path}"
        for route in app.routes
        if route.path.startswith("/vtensor")
        for method in route.methods - {"HEAD"}
    }
    told = {name for name in first_cells(OPERATIONS) if re.match(r"[A-Z]+ /vtensor", name)}
    assert told == routes


def test_every_metric_is_there_and_no_other_and_its_statistic_too():
    wanted = {f"{name}_total": key for name, (key, _) in COUNTERS.items()}
    for name, gauge in GAUGES.items():
        for value, key in gauge.values.items():
            wanted[f'{name}{{{gauge.label}="{value}"}}' if gauge.label else name] = key
    assert dict(re.findall(r"^\| `(vtensor_[^`]+)` \| `(\w+)` \|", OPERATIONS, re.MULTILINE)) == wanted


def test_an_alarm_names_metrics_that_there_are():
    known = set(GAUGES) | {f"{name}_total" for name in COUNTERS}
    assert set(re.findall(r"\bvtensor_(?!host)\w+", OPERATIONS)) - {"vtensor_reserve"} <= known


def test_every_variable_of_the_environment_is_there():
    """Those that the package reads."""
    code = "".join(path.read_text() for path in (DOCS.parent / "sglang_vtensor").rglob("*.py"))
    read = set(re.findall(r'os\.environ(?:\.get\(|\[)"(\w+)"(?!\] =)', code))
    assert read <= {name.split("=")[0] for name in first_cells(OPERATIONS)}


def test_all_that_is_refused_is_named():
    page = (DOCS / "faq.md").read_text()
    refusing = [inspect.getsource(options.refuse_unsupported), inspect.getsource(state_models.refuse_states)]
    for module in patches.MODULES.values():
        found = importlib.util.find_spec(f"{patches.__name__}.{module}")
        text = Path(found.origin).read_text()
        refusing += re.findall(r"def refused\(.*?(?=\n    def )", text, re.DOTALL)
    names = {name for text in refusing for name in re.findall(r'\(\s*f?"(--[a-z-]+|SGLANG_\w+)', text)}
    names |= {f"--{option.replace('_', '-')}" for option in state_models.KERNELS}
    assert len(names) > 30
    assert {name for name in names if f"`{name}" not in page} == set()
