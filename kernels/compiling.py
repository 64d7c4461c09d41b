"""Kernels are compiled before they are needed: several at a time, by threads that do not touch the device.

    calls = {config: [partial(prefix_prefill, ...)], ...}                      what will be called later, by kind
    compiling = Compiling("prefill", {config: launches(some) for config, some in calls.items()}, device=device)
    compiling.ready(config)                                                    whether a call would compile nothing
    compiling.wait()                                                           for all of them

Most of the time a thread is in LLVM, without the interpreter's lock, or waits for `ptxas`. It neither launches nor
loads anything, so CUDA graphs may be captured meanwhile: a kernel is loaded by the thread that launches it first.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import torch

logger = logging.getLogger(__name__)

#: As many threads as half of the cores, as the server starts meanwhile; at least and at most so many.
THREADS = 2, 8

_noted: ContextVar[list[Launch] | None] = ContextVar("launches that are noted and not made", default=None)


class Launch:
    """A launch that was noted and not made: a kernel with its arguments."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.kernel = kernel
        self.name: str = getattr(kernel, "__name__", repr(kernel))
        #: Compiles the kernel for such arguments.
        self.compile: Callable[[], Any] = functools.partial(kernel.warmup, *args, grid=grid, **options)
        #: Equal for launches of one compiled kernel, as far as types and constants tell it.
        self.key = (id(kernel), *(getattr(arg, "dtype", type(arg)) for arg in args), *sorted(options.items()))


def on(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """`kernel[grid]`, to be called with the arguments. Within `launches` such a call is noted, and nothing runs."""
    noted = _noted.get()
    if noted is None:
        launch: Callable[..., Any] = kernel[grid]
        return launch
    return lambda *args, **options: noted.append(Launch(kernel, grid, args, options))


def launches(calls: Iterable[Callable[[], Any]]) -> list[Launch]:
    """What these calls would launch. Nothing is launched, so what the calls return has no meaning."""
    noted: list[Launch] = []
    token = _noted.set(noted)
    try:
        for call in calls:
            call()
    finally:
        _noted.reset(token)
    return noted


class Compiling:
    """Compiles what will be launched for each of several keys, in threads, from now on and in this order. A kernel that
    fails is tried once more. `what` names all of them in the log."""

    def __init__(self, what: str, wanted: Mapping[Any, Sequence[Launch]], *, device: torch.device | str) -> None:
        self.what, self.device = what, torch.device(device)
        different = {launch.key: launch for some in wanted.values() for launch in some}
        self._start, self._lock = time.perf_counter(), threading.Lock()
        self._left, self._failed = len(different), 0
        if self.device.type == "cuda":
            for launch in different.values():
                # Triton makes the table of a kernel's compilations at the first look; two threads would make two.
                launch.kernel.device_caches[torch.cuda.current_device()]
        least, most = THREADS
        threads = min(max(least, (os.cpu_count() or 1) // 2), most)
        pool = ThreadPoolExecutor(threads, thread_name_prefix=f"compile {what}")
        futures = {key: pool.submit(self._compile, launch) for key, launch in different.items()}
        pool.shutdown(wait=False)
        self._futures: dict[Hashable, list[Future[None]]] = {
            key: [futures[launch.key] for launch in some] for key, some in wanted.items()
        }

    @property
    def left(self) -> int:
        """How many kernels are still to be compiled; those that failed twice are not."""
        return self._left

    @property
    def failed(self) -> int:
        """How many kernels failed twice."""
        return self._failed

    def ready(self, key: Hashable) -> bool:
        """Whether what was wanted for `key` is compiled. Never for a key that was not wanted, or if a kernel failed."""
        return key in self._futures and all(map(_succeeded, self._futures[key]))

    def wait(self) -> None:
        """Until nothing more is compiled. Raises what the compiler raised, for the first kernel that failed twice."""
        for futures in self._futures.values():
            for future in futures:
                future.result()

    def _compile(self, launch: Launch) -> None:
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            try:
                launch.compile()
            except Exception as error:  # for a reason that may pass, such as a full folder of temporary files
                logger.warning("%s: %s is compiled again, as it failed: %s", self.what, launch.name, error)
                try:
                    launch.compile()
                except Exception as again:
                    logger.error("%s: %s failed twice, and is not used: %s", self.what, launch.name, again)
                    with self._lock:
                        self._left, self._failed = self._left - 1, self._failed + 1
                    raise
        with self._lock:
            self._left -= 1
        if not self._left and not self._failed:
            logger.info("%s: all kernels are compiled, after %.1f s", self.what, time.perf_counter() - self._start)


def _succeeded(future: Future[None]) -> bool:
    return future.done() and future.exception() is None
