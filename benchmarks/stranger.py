"""A process that takes a GPU's memory with plain torch, and knows nothing of vtensor."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection

import torch

PATIENCE = 120.0


class Stranger:
    """`take(leave_bytes)`: everything that is free but so much; `let_go()`: nothing is its own any more."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._ask(None)  # it has its CUDA context from here on, which takes memory too

    def take(self, leave_bytes: int) -> int:
        """Returns how many bytes it has."""
        return self._ask(leave_bytes)

    def let_go(self) -> None:
        self._ask(None)

    def _ask(self, leave_bytes: int | None) -> int:
        self._pipe.send(leave_bytes)
        if not self._pipe.poll(PATIENCE):
            raise RuntimeError(f"the process that takes memory did not answer within {PATIENCE} s")
        return int(self._pipe.recv())

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(pipe: Connection) -> None:
    held: list[torch.Tensor] = []
    torch.empty(1, device="cuda")
    while True:
        try:
            leave_bytes = pipe.recv()
        except EOFError:
            return
        held.clear()
        torch.cuda.empty_cache()
        if leave_bytes is not None:
            _take(held, leave_bytes)
        pipe.send(sum(tensor.numel() for tensor in held))


def _take(held: list[torch.Tensor], leave_bytes: int) -> None:
    """Others take and give memory meanwhile: what is free now may be gone when it is asked for."""
    for _ in range(100):
        free, _ = torch.cuda.mem_get_info()
        if free - leave_bytes < 1 << 21:
            return
        try:
            held.append(torch.empty(free - leave_bytes, dtype=torch.uint8, device="cuda"))
        except torch.cuda.OutOfMemoryError:
            time.sleep(0.02)
