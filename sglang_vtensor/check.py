"""What a machine offers for `--kv-backend vtensor`."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from sglang_vtensor.vmm import VirtualMemory, VMMError, open_vmm


@dataclass(frozen=True)
class Finding:
    level: Literal["ok", "note", "problem"]
    subject: str
    text: str


def examine() -> list[Finding]:
    """Look at SGLang, the GPU and the virtual memory of both. Creates and maps one page on each."""
    findings = [_sglang(), Finding("ok", "Python", f"{platform.python_version()} on {platform.machine()}")]
    findings += _gpu()
    findings.append(_memory("host memory", "cpu"))
    return findings


def _sglang() -> Finding:
    import sglang_vtensor.patches as patches

    try:
        installed = version("sglang")
    except PackageNotFoundError:
        return Finding("problem", "SGLang", f"not installed: install sglang=={next(iter(patches.MODULES))}")
    try:
        return Finding("ok", "SGLang", f"{installed}, patch {patches.module_name(installed)}")
    except patches.UnsupportedVersion as error:
        return Finding("problem", "SGLang", str(error))


def _gpu() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        return [Finding("note", "GPU", "none: SGLANG_PLATFORM=vtensor_host runs the server on host memory")]
    findings = []
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        major, minor = torch.cuda.get_device_capability(index)
        findings.append(Finding("ok", f"GPU {index}", f"{name}, sm_{major}{minor}, CUDA {torch.version.cuda}"))
        findings.append(_memory(f"GPU {index} memory", f"cuda:{index}"))
    return findings


def _memory(subject: str, device: str) -> Finding:
    """Map one page twice, write through one address and read through the other."""
    try:
        vmm = open_vmm(device)
        size = vmm.granularity
        base = vmm.reserve(2 * size)
        page = vmm.create(size)
        try:
            return _try_alias(subject, vmm, base, page)
        finally:
            vmm.release(page)
            vmm.free(base, 2 * size)
    except VMMError as error:
        return Finding("problem", subject, str(error))


def _try_alias(subject: str, vmm: VirtualMemory, base: int, page: object) -> Finding:
    size = vmm.granularity
    for address in (base, base + size):
        vmm.map(address, size, page)  # type: ignore[arg-type]
    try:
        region = vmm.tensor(base, 2 * size)
        region[0] = 42
        seen = int(region[size])
        del region
    finally:
        for address in (base, base + size):
            vmm.unmap(address, size)
    free, total = vmm.memory()
    if seen != 42:
        return Finding("problem", subject, "a page mapped at two addresses does not show the same bytes")
    return Finding("ok", subject, f"pages of {size >> 10} KiB, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
