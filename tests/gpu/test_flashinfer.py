"""SGLang's FlashInfer backend by slot over the identity region. It compiles its kernels on first use."""

import pytest

from tests.e2e.compare import TIE, Prompts, both
from tests.gpu.conftest import FLASHINFER
from tests.harness import Request

pytest.importorskip("flashinfer")


def test_flashinfer_reads_the_identity_region(flashinfer, schedulers):
    ours = schedulers(kv_backend="vtensor", attention_backend="flashinfer", **FLASHINFER)
    prompt = Prompts(40)
    stem = prompt(200)
    for turn in range(2):
        requests = [Request(f"t{turn}r{n}", stem + prompt(30 * n), 20) for n in range(3)]
        both(flashinfer, ours, requests, tie=TIE["bfloat16"])
