"""Without the flag, SGLang is as if the plugin were not installed."""

from __future__ import annotations

import os

from sglang_vtensor import patches
from tests.e2e.compare import Prompts
from tests.harness import Request, Scheduler


def classes(scheduler):
    from sglang.srt.plugins.hook_registry import HookRegistry

    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    backend = scheduler.tp_worker.model_runner.attn_backend
    used = [scheduler.tree_cache, scheduler.token_to_kv_pool_allocator, pool, backend]
    return {type(thing).__module__.split(".")[0] for thing in used}, sorted(HookRegistry._patched)


def test_the_default_backend_is_sglangs_own(schedulers):
    packages, patched = schedulers().call(classes)
    assert packages <= {"sglang", "sglang_vtensor"}
    assert patched == sorted(seam.target for seam in patches.load().everywhere())
    assert {name.split(".")[-1] for name in patched} <= {
        "add_cli_args",
        "from_cli_args",
        "__init__",
        "resolve_once",
        "_handle_model_specific_adjustments",
        "check_server_args",
        "configure_scheduler_process",
        "decide_request_auth",
    }, "settings, where a scheduler begins, and who sees the page"


def allocator_module(scheduler):
    bases = type(scheduler.token_to_kv_pool_allocator).__mro__
    return next(base.__module__ for base in bases if base.__module__.startswith("sglang."))


def test_it_answers_as_without_the_plugin(schedulers, models, monkeypatch):
    ours = schedulers()
    assert ours.call(allocator_module) == "sglang.srt.mem_cache.allocator.token"
    prompt = Prompts(30)
    stem = prompt(50)
    requests = [Request(f"r{n}", stem + prompt(10 * n), 20) for n in range(5)]
    # SGLANG_PLUGINS names the plugins that SGLang may load: none of that name is installed.
    with Scheduler(models["gqa"], dtype="float32", environment={"SGLANG_PLUGINS": "none"}) as without:
        assert without.call(classes)[1] == []
        for expected, got in zip(without.generate(*requests), ours.generate(*requests), strict=True):
            assert (expected.tokens, expected.gaps, expected.cached) == (got.tokens, got.gaps, got.cached)


def test_the_platform_takes_over_only_when_asked(monkeypatch):
    from sglang_vtensor.plugin import host_platform

    for asked, answer in [(None, None), ("cuda", None), ("vtensor_host", "sglang_vtensor.srt.platform.HostPlatform")]:
        monkeypatch.setattr(os, "environ", {} if asked is None else {"SGLANG_PLATFORM": asked})
        assert host_platform() == answer
