"""How a seam is written down and hooked, and names of SGLang's that several seams begin with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"


@dataclass(frozen=True)
class Seam:
    """`target`, a function or a method of SGLang by its dotted name, gets `body` in its place, or around, before or
    behind it. SGLang's registry only logs a target that is gone; `tests/unit/test_seams.py` binds each body to the
    signature of its target."""

    target: str
    body: Callable[..., Any]
    kind: HookType = HookType.AROUND


def hook(seams: Iterable[Seam]) -> None:
    """Register them. SGLang applies what was registered when it starts, or when it is told to."""
    for seam in seams:
        HookRegistry.register(seam.target, seam.body, seam.kind)
