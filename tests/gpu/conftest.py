from __future__ import annotations

import functools
import json
import os

os.environ["VTENSOR_TEST_GPU"] = "1"  # before the harness is imported

import pytest
import torch

from benchmarks import results
from sglang_vtensor import tiny_model
from tests.e2e.compare import TIE
from tests.e2e.conftest import schedulers  # noqa: F401
from tests.harness import Scheduler


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.gpu)


#: What needs a second GPU is not there without one.
collect_ignore = ["test_tensor_parallel.py"] if torch.cuda.device_count() < 2 else []


def pytest_sessionstart(session):
    if not torch.cuda.is_available():
        pytest.exit("tests/gpu needs an NVIDIA GPU: run `make test` for what runs without one", returncode=2)


@functools.cache
def here():
    """Where and with what these tests run."""
    head = results.head()
    del head["command"]
    return head


def pytest_runtest_logreport(report):
    """Append what came of each test to the file that `VTENSOR_GPU_RESULTS` names, for `benchmarks.gpu_tests`."""
    path = os.environ.get("VTENSOR_GPU_RESULTS")
    if path and (report.when == "call" or report.outcome != "passed"):
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 1)}
        line |= here()
        with open(path, "a") as file:
            file.write(json.dumps(line | dict(report.user_properties)) + "\n")


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Llama-3-8B's KV heads at a depth of four: 16 KiB a token, pages of 128 tokens and 2 MiB."""
    root = tmp_path_factory.mktemp("models")
    geometry = {"layers": 4, "hidden": 512, "heads": 32, "kv_heads": 8, "head_dim": 128, "max_tokens": 69632}
    return {"gqa": tiny_model.build(root / "gqa", **geometry)}


FLASHINFER = {"dtype": "bfloat16", "mem_fraction_static": 0.2, "cuda_graph_max_bs_decode": 4}


@pytest.fixture(scope="session", autouse=True)
def flashinfer(request, models):
    """SGLang with FlashInfer, which compiles its kernels for two minutes: it begins before all other tests."""
    if not any("test_flashinfer" in item.nodeid for item in request.session.items):
        yield None
        return
    reference = Scheduler(models["gqa"], wait=False, attention_backend="flashinfer", **FLASHINFER)
    yield reference
    reference.close()


#: What ours is told, and SGLang's own kernel on the other side.
PAIRS = {
    "auto": ({}, "fa3"),
    "ours": ({"vtensor_prefill_kernel": "triton"}, "fa3"),
    "fa3": ({"attention_backend": "fa3"}, "fa3"),
    "triton": ({"attention_backend": "triton"}, "triton"),
}


@pytest.fixture(params=list(PAIRS))
def pair(request, schedulers):  # noqa: F811
    """Ours in extend by pages (FlashAttention-3), by runs (our kernel), or by slot; SGLang's own on the other side."""
    ours_by, kernel = PAIRS[request.param]

    def get(**server_args):
        common = {"dtype": "bfloat16", "mem_fraction_static": 0.2, "cuda_graph_max_bs_decode": 8} | server_args
        # By slot with the same kernel, page sizes are the same too, so that only the memory differs.
        page_size = {"page_size": 128} if request.param == "fa3" else {}
        reference = {"attention_backend": kernel, **page_size, **common}
        ours = {"kv_backend": "vtensor", **ours_by, **common}
        return *schedulers.both(reference, ours), TIE["bfloat16"]

    get.page_size = 128
    return get
