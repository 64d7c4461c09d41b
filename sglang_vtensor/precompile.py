"""Filling the caches of compiled kernels before a server is wanted, for an image or a volume.

A server is started as it will be, but with random weights, and ended when all its kernels are compiled. So what is
compiled is what a server compiles, for each rank: ours, SGLang's, and what either of them leaves to others.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from sglang_vtensor import demo
from sglang_vtensor.server_client import server_stats

#: After the server answers, for the kernels that it compiles meanwhile.
PATIENCE_SECONDS = 300.0
#: Options of `sglang serve` with a value, which say how a server is asked.
ADDRESS = (
    "--host",
    "--port",
    "--ssl-keyfile",
    "--ssl-certfile",
    "--ssl-ca-certs",
    "--ssl-keyfile-password",
    "--api-key",
    "--admin-api-key",
)


class NotCompiled(RuntimeError):
    """The message says what is missing."""


def run(console: Console, model: str, *, tp: int, kv_cache_dtype: str, more: Sequence[str] = ()) -> None:
    """Compile what a server of `model` with these settings needs, `more` being arguments of `sglang serve`. Raises
    `NotCompiled` where there are too few GPUs or a kernel was not compiled, `demo.NotStarted` if the server does not
    start, `server_client.NoAnswer` if it ends before its kernels are compiled."""
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if there < tp:
        raise NotCompiled(
            f"{there} GPUs are here, and --tp {tp} needs {tp} of the kind that will serve: kernels are compiled for "
            "the GPU at hand. Run this on such a machine; else the first start of the server compiles them"
        )
    arguments = ["--load-format", "dummy", "--skip-tokenizer-init", "--tp-size", str(tp)]
    arguments += ["--kv-cache-dtype", kv_cache_dtype, *asked_here(more)]
    before, start = kernels(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="vtensor-compile-") as folder:
        log = Path(folder) / "server.log"
        with demo.serve(console, model, port=(port := demo.free_port()), log=log, arguments=arguments):
            answered = time.perf_counter() - start
            left = wait(f"http://127.0.0.1:{port}")
        if left:
            raise NotCompiled(f"{left} kernels were not compiled; the server said:\n{log.read_text()[-4000:]}")
    seconds = time.perf_counter() - start
    console.print(
        f"The server answered after {answered:.0f} s, and all kernels were compiled after {seconds:.0f} s: "
        f"{kernels() - before} new ones of Triton's in {triton_cache()}. Keep that folder and ~/.cache.",
        soft_wrap=True,
        highlight=False,
    )


def asked_here(arguments: Sequence[str]) -> list[str]:
    """These arguments without those of the server's address, TLS and keys: this process asks it, on a port of its own
    choice."""
    parser = argparse.ArgumentParser(add_help=False)
    for name in ADDRESS:
        parser.add_argument(name)
    parser.add_argument("--enable-ssl-refresh", action="store_true")
    return parser.parse_known_args(arguments)[1]


def wait(url: str) -> int:
    """Until the server at `url` compiles no more kernels. Returns how many it did not compile: they failed, or it took
    too long."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        ranks = server_stats(url)
        left = sum(rank["kernels_uncompiled"] for rank in ranks)
        if not left or time.monotonic() > deadline:
            return left + sum(rank["kernels_failed"] for rank in ranks)
        time.sleep(0.5)


def triton_cache() -> Path:
    return Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))


def kernels() -> int:
    """How many Triton has compiled, for any GPU."""
    return sum(1 for _ in triton_cache().glob("*/*.cubin"))
