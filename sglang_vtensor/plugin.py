"""The entry points that SGLang discovers: `sglang.srt.plugins` and `sglang.srt.platforms`.

SGLang logs an exception of a plugin and goes on without it, so what must stop a start ends the process instead.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

logger = logging.getLogger(__name__)


def register() -> None:
    """Put `--kv-backend` on SGLang's command line, by the patch module of the installed version."""
    import sglang_vtensor.patches as patches

    try:
        patch = patches.load()
    except patches.UnsupportedVersion as error:
        logger.info("%s Nothing is changed without --kv-backend vtensor.", error)
        _refuse_flag(str(error))
        return
    patch.register()


def host_platform() -> str | None:
    """The no-GPU platform, if the environment asks for it by name."""
    if os.environ.get("SGLANG_PLATFORM") != "vtensor_host":
        return None
    return "sglang_vtensor.srt.platform.HostPlatform"


def _refuse_flag(message: str) -> None:
    """With an unknown SGLang version: refuse the flag wherever it may come from, and touch nothing else."""
    asked = " ".join(sys.argv[1:]).replace("=", " ")
    if "--kv-backend vtensor" in asked:
        raise SystemExit(f"error: {message}")

    from sglang.srt.entrypoints.engine import Engine

    make = Engine.server_args_class

    def refuse(**given: Any) -> Any:
        if given.pop("kv_backend", "default") != "default":
            raise ValueError(message)
        return make(**given)

    Engine.server_args_class = staticmethod(refuse)
