"""How a server is asked for our memory: the options reach its settings, and with them every process of it."""

from __future__ import annotations

import multiprocessing
import os
import pickle

import pytest

from sglang_vtensor.srt.options import Options
from tests import versions

GIVEN = {"kv_backend": "vtensor", "vtensor_min": "0.1", "vtensor_idle_seconds": 7.5}


def by_command_line(model, given):
    from sglang.srt.server_args import prepare_server_args

    arguments = ["--model-path", model, "--dtype", "float32"]
    for name, value in given.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    return prepare_server_args(arguments)


def by_config_file(model, given):
    from pathlib import Path

    from sglang.srt.server_args import prepare_server_args

    config = Path(model).parent / "server.yaml"
    config.write_text("".join(f"{name.replace('_', '-')}: {value}\n" for name, value in given.items()))
    return prepare_server_args(["--model-path", model, "--dtype", "float32", "--config", str(config)])


def by_engine(model, given):
    """What an engine starts its processes with."""
    from sglang.srt.entrypoints.engine import Engine

    started = {}

    class Started(Exception):
        pass

    def start(*_, server_args, **__):
        started["with"] = server_args
        raise Started

    Engine._launch_subprocesses = start
    try:
        Engine(model_path=model, dtype="float32", **given)
    except Started:
        return started["with"]


def look(pipe, way, model, given):
    """In a process of its own, as a server's: what its settings are, there and in a process that they are sent to."""
    from sglang.srt.plugins import load_plugins

    from sglang_vtensor import patches

    if way is not by_engine:  # an engine does it
        load_plugins()
    try:
        args = way(model, given)
        versions.settle(args)
        sent = pickle.loads(pickle.dumps(args))
        patch = patches.load()
        settings = patch.settings(sent)
        pipe.send((Options.of(args), Options.of(sent), settings.page_size, settings.attention_backend, ""))
    except BaseException as error:
        pipe.send((None, None, None, None, f"{type(error).__name__}: {error}"))


def ask(way, model, given):
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=look, args=(theirs, way, str(model), given))
    process.start()
    assert ours.poll(100)
    answer = ours.recv()
    process.join()
    return answer


@pytest.mark.parametrize("way", [by_command_line, by_config_file, by_engine])
def test_the_options_reach_every_process(models, way):
    here, there, page_size, attention, wrong = ask(way, models["gqa"], GIVEN)
    assert not wrong
    assert here == there == Options(**GIVEN)
    assert page_size == 16, "chosen for the model"
    assert attention == "vtensor"


@pytest.mark.parametrize("way", [by_command_line, by_engine])
def test_without_them_the_settings_are_sglangs(models, way):
    here, there, page_size, attention, wrong = ask(way, models["gqa"], {})
    assert not wrong
    assert here == there == Options()
    assert page_size == 1
    assert attention == "torch_native"


@pytest.mark.parametrize(("way", "error"), [(by_command_line, "SystemExit: error: "), (by_engine, "Refused: ")])
def test_what_is_wrong_is_said(models, way, error):
    *_, wrong = ask(way, models["gqa"], {"kv_backend": "default", "vtensor_min": "0.5"})
    assert wrong.startswith(f"{error}--vtensor-min 0.5 needs --kv-backend vtensor")


def with_convolutions_in_bfloat16(model, given):
    os.environ["SGLANG_MAMBA_CONV_DTYPE"] = "bfloat16"  # SGLang's default, which tests change
    return by_command_line(model, given)


@pytest.mark.parametrize("model", [name for name in versions.WITH_STATES if name == "nemotron_h"])
def test_a_type_that_mamba_does_not_convert_is_refused(models, model):
    """SGLang's own server ends at the first prompt."""
    *_, wrong = ask(with_convolutions_in_bfloat16, models[model], GIVEN)
    assert wrong.startswith(
        "SystemExit: error: this model computes in float32, and SGLang keeps the inputs of its Mamba"
    )
    assert "set SGLANG_MAMBA_CONV_DTYPE=float32" in wrong
    *_, wrong = ask(by_command_line, models[model], GIVEN)
    assert not wrong
