"""Models and schedulers, each started once and shared; every test leaves its scheduler with an empty cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_vtensor import tiny_model
from tests.harness import Scheduler


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "gqa": tiny_model.build(root / "gqa"),
        "mha": tiny_model.build(root / "mha", layers=2, heads=4, kv_heads=4),
    }


@pytest.fixture(scope="session")
def schedulers(models):
    """`schedulers(model, **server_args)`: the one with these arguments, started on the first call, flushed on each."""
    started: dict[tuple, Scheduler] = {}

    def get(model: str = "gqa", **server_args) -> Scheduler:
        key = (model, *sorted(server_args.items()))
        if key not in started:
            started[key] = Scheduler(models[model], **({"dtype": "float32"} | server_args))
        assert started[key].flush()
        return started[key]

    yield get
    for scheduler in started.values():
        scheduler.close()
