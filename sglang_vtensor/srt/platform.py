"""The platform `vtensor_host`: SGLang's whole engine on a machine without a GPU.

Chosen by `SGLANG_PLATFORM=vtensor_host` and by nothing else. With the default KV backend it is SGLang's own pool,
allocator and tree with `torch_native` attention; with `--kv-backend vtensor` it is ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from sglang_vtensor.srt import linear_host
from sglang_vtensor.srt.options import Options, Refused

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

NAME = "vtensor_host"


class HostPlatform(SRTPlatform, CpuDeviceMixin):
    """Host memory and torch's own operators."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def apply_server_args_defaults(self, server_args: ServerArgs) -> None:
        """Replace defaults that need a GPU, or compile kernels for one."""
        server_args.device = "cpu"
        if server_args.attention_backend in (None, "intel_amx"):
            server_args.attention_backend = self.get_default_attention_backend()
        server_args.sampling_backend = "pytorch"
        if server_args.grammar_backend == "xgrammar":
            raise Refused(
                "--grammar-backend xgrammar needs a GPU's pinned memory: the first request with a grammar would end "
                "the server. Use llguidance, or leave it out."
            )
        if server_args.grammar_backend is None:
            server_args.grammar_backend = "llguidance"
        if server_args.enable_torch_compile:
            raise Refused("--enable-torch-compile is for GPUs: on host memory nothing is compiled. Leave it out.")
        paged = server_args.page_size not in (None, 1) and not Options.of(server_args).ours
        if paged and not _allocates_pages():
            raise Refused(
                f"--page-size {server_args.page_size} needs a GPU with SGLang's own KV cache: its paged allocator "
                "launches Triton kernels. Use --page-size 1, or --kv-backend vtensor."
            )

    def init_backend(self) -> None:
        """Compile nothing, in any worker: the first request with a grammar or a penalty would wait 10 s for it, and end
        the server where there is no C++ compiler. And who waits for the device waits for none: a build of PyTorch for
        CUDA would look for a driver."""
        torch.compiler.set_stance("force_eager")
        torch.get_device_module = functools.cache(lambda device=None: torch.cpu)
        # Memory is pinned for a device. SGLang does so for models with linear layers, and asks for no device before.
        torch.Tensor.pin_memory = _pinned  # type: ignore[assignment, method-assign]
        if linear_host.available():
            linear_host.install()

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        """By kind, as newer versions of SGLang ask; those before asked for the pool of the first kind only."""
        return self.get_mha_kv_pool_cls() if kind == "mha" else None

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_paged_allocator_cls(self) -> Callable[..., Any]:
        """SGLang's own by the arguments of a paged one, which older versions give with page size 1, too."""
        from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator

        def allocator(size: int, page_size: int, **kwargs: Any) -> Any:
            if page_size == 1:
                return TokenToKVPoolAllocator(size, **kwargs)
            return PagedTokenToKVPoolAllocator(size, page_size=page_size, **kwargs)

        return allocator

    def support_mamba_cache_extra_buffer(self) -> bool:
        """States of linear layers are copied to slots of their own while a request runs (`linear_host`)."""
        return True

    def get_device(self, *_: Any, **__: Any) -> str:
        return "cpu"  # SGLang splits it as text, as it does "cuda:0"


def _pinned(tensor: Any, device: Any = None) -> torch.Tensor:
    """Itself: there is no device that would copy from it."""
    return tensor


def _allocates_pages() -> bool:
    """Whether this version of SGLang allocates pages without Triton where a platform says that it has none."""
    return hasattr(HostPlatform, "capabilities")
