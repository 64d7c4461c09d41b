"""One module or package for each SGLang version: which seam of that version gets which part of `sglang_vtensor.srt`."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_vtensor.patches.common import Patch

#: SGLang versions and the module that patches each.
MODULES = {"0.5.23": "v0_5_23", "0.5.17": "v0_5_17"}


class UnsupportedVersion(RuntimeError):
    """There is no patch module for the installed SGLang."""


def module_name(installed: str) -> str:
    """The patch module of an SGLang version. Raises `UnsupportedVersion` with the versions there are."""
    if installed not in MODULES:
        known = ", ".join(MODULES)
        raise UnsupportedVersion(
            f"sglang-vtensor has no patch for SGLang {installed}; --kv-backend vtensor works with {known}. "
            f"Install sglang=={next(iter(MODULES))}, or a newer sglang-vtensor."
        )
    return MODULES[installed]


def load() -> Patch:
    """The patch of the installed SGLang."""
    patch: Patch = importlib.import_module(f"{__name__}.{module_name(version('sglang'))}").PATCH
    return patch
