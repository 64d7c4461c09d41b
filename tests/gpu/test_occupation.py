"""All memory of a server is released, used by this process, and resumed: with --enable-memory-saver beside us.

    python -m tests.gpu.test_occupation

Llama-3-8B's geometry with random weights. Weights and graphs are torch_memory_saver's, the KV cache is ours.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path

import requests
import torch

from benchmarks.geometries import LLAMA
from benchmarks.serving import server
from sglang_vtensor.server_client import server_stats

TURNS = 3
ARGUMENTS = ["--kv-backend", "vtensor", "--enable-memory-saver", "--enable-weights-cpu-backup"]
# SGLang's graphs of prefill do not go with a saver of graphs: it says so, and does not start.
ARGUMENTS += ["--disable-prefill-cuda-graph", "--cuda-graph-max-bs-decode", "8", "--mem-fraction-static", "0.7"]
#: What neither saver has: CUDA's contexts, libraries, buffers of kernels.
REST = 6 << 30


def post(url: str, what: str, **body: object) -> float:
    """Returns seconds."""
    start = time.perf_counter()
    answer = requests.post(f"{url}/{what}", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return time.perf_counter() - start


def generate(url: str) -> list[list[int]]:
    """One after another, so that batches, and with them the last bits of sums, are the same each time."""
    params = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
    answers = []
    for n in range(4):
        prompt = [1000 + 7 * n + token % 911 for token in range(3000)]
        answer = requests.post(f"{url}/generate", json={"input_ids": prompt, "sampling_params": params}, timeout=300)
        answers.append(answer.json()["output_ids"])
    return answers


def device_bytes() -> tuple[int, int]:
    """Used by all processes, and all there is."""
    free, total = torch.cuda.mem_get_info()
    return total - free, total


def turns(url: str) -> list[dict[str, float]]:
    before = generate(url)
    told = []
    for turn in range(TURNS):
        (held,) = server_stats(url)
        used, _ = device_bytes()
        released = post(url, "release_memory_occupation")
        (stats,) = server_stats(url)
        left, total = device_bytes()
        weights = held["weights_bytes"]
        assert stats["pages_backed"] == 1
        assert used - left >= 0.98 * (held["backed_bytes"] + weights), (used, left, held["backed_bytes"], weights)
        assert left < REST, f"{left} bytes are used by a server that released everything"
        mine = [
            torch.full((1 << 30,), turn + 1, dtype=torch.uint8, device="cuda")
            for _ in range((total - left) // (1 << 30) - 2)
        ]
        assert int(mine[-1][-1]) == turn + 1
        refused = requests.post(f"{url}/resume_memory_occupation", json={"tags": ["weights"]}, timeout=60)
        assert refused.status_code == 400, "there is no room for the weights"
        assert "the weights need" in refused.text
        mine.clear()
        torch.cuda.empty_cache()
        resumed = post(url, "resume_memory_occupation", tags=["weights", "cuda_graph"])
        resumed += post(url, "resume_memory_occupation", tags=["kv_cache"])
        assert generate(url) == before, "weights, graphs or the cache are not what they were"
        told.append({"release_seconds": released, "resume_seconds": resumed, "freed_bytes": used - left})
    return told


def test_everything_is_released_used_and_resumed(tmp_path, monkeypatch):
    monkeypatch.setenv("SGLANG_MEMORY_SAVER_CUDA_GRAPH", "1")
    measure(tmp_path)


def measure(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(LLAMA.config))
    with server("vtensor", folder, folder / "log", arguments=ARGUMENTS) as (url, seconds):
        print(f"up in {seconds:.0f} s", *turns(url), sep="\n")


if __name__ == "__main__":
    os.environ["SGLANG_MEMORY_SAVER_CUDA_GRAPH"] = "1"
    with tempfile.TemporaryDirectory() as name:
        measure(Path(name))
