"""Models, schedulers and a server, each started once and shared; a test leaves its scheduler with an empty cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from sglang_vtensor import demo, tiny_model
from tests import state_models, windowed_models
from tests.harness import Scheduler


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "gqa": tiny_model.build(root / "gqa"),
        "mha": tiny_model.build(root / "mha", layers=2, heads=4, kv_heads=4),
        "gemma3": windowed_models.gemma3(root / "gemma3", window=41),
        "gpt_oss": windowed_models.gpt_oss(root / "gpt_oss", window=41),
        "qwen3_5": state_models.qwen3_5(root / "qwen3_5"),
        "qwen3_5_deep": state_models.qwen3_5(root / "qwen3_5_deep", layers=8, interval=8),
        "qwen3_next": state_models.qwen3_next(root / "qwen3_next"),
        "nemotron_h": state_models.nemotron_h(root / "nemotron_h"),
        "nemotron_h_deep": state_models.nemotron_h(root / "nemotron_h_deep", pattern="MMMMMMM*-"),
    }


#: So many schedulers are kept, the last used; each takes some 400 MB. A test has no more than four at a time.
KEPT = 12


@pytest.fixture(scope="session")
def schedulers(models):
    """`schedulers(model, **server_args)`: the one with these arguments, flushed; started anew if it is not kept.
    `schedulers.both` gives two, which start at once if they have to."""
    started: dict[tuple, Scheduler] = {}

    def start(model: str = "gqa", **server_args) -> Scheduler:
        key = (model, *sorted((name, repr(value)) for name, value in server_args.items()))
        scheduler = started.pop(key, None)
        if scheduler is None:
            while len(started) >= KEPT:
                started.pop(next(iter(started))).close()
            scheduler = Scheduler(models[model], wait=False, **({"dtype": "float32"} | server_args))
        started[key] = scheduler
        return scheduler

    def get(model: str = "gqa", **server_args) -> Scheduler:
        scheduler = start(model, **server_args)
        assert scheduler.flush()
        return scheduler

    def close() -> None:
        """All of them; who asks again gets a new one."""
        while started:
            started.popitem()[1].close()

    def both(one: dict, other: dict) -> tuple[Scheduler, Scheduler]:
        start(**one)
        start(**other)
        return get(**one), get(**other)

    get.both, get.close = both, close
    yield get
    close()


@pytest.fixture(scope="session")
def server(models, tmp_path_factory):
    """The URL of a whole server, started on a machine without a C++ compiler, as far as it can see."""
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = ["--max-total-tokens", "4096", "--max-running-requests", "16", "--dtype", "float32"]
    arguments += ["--enable-metrics"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", "/nowhere/c++")
        with demo.serve(Console(), str(models["gqa"]), port=demo.free_port(), log=log, arguments=arguments) as url:
            yield url
    text = log.read_text(errors="replace")
    assert "Traceback" not in text, text[-3000:]
