"""Which kernel the table takes for a prefill batch, held to what was measured on an H200."""

import pytest
import torch

from sglang_vtensor.kernels import configs

RAGGED = [(32768, 16), (0, 2048), (2048, 300), (700, 700), (12000, 33)]


@pytest.fixture(autouse=True)
def h200(monkeypatch):
    monkeypatch.setattr(configs, "multiprocessors", lambda device: 132)


@pytest.mark.parametrize(
    ("requests", "heads", "ours"),
    [
        (RAGGED, (32, 8, 128), True),  # measured: 1.82 times as fast
        (RAGGED, (64, 8, 128), True),  # 1.16
        (RAGGED, (32, 4, 256), False),  # the kernel for Hopper has no such heads
        ([(8192, 64)] * 4, (32, 8, 128), False),  # 0.85: few tiles, of one length
        ([(8192, 512)] * 4, (32, 8, 128), False),
        ([(32768, 2048)], (32, 8, 128), False),
        ([(8192, 16)] * 4, (32, 8, 128), False),  # one tile each
        ([(8192, 512)] * 4, (32, 8, 64), True),
        ([(0, 512)] * 4, (32, 8, 64), False),
    ],
)
def test_ours_is_taken_where_it_is_faster(requests, heads, ours):
    new, contexts = [new for _, new in requests], [prefix + new for prefix, new in requests]
    assert configs.ours_before_fa3(new, contexts, *heads, "cuda") is ours
    assert not configs.ours_before_fa3(new, contexts, *heads, "cuda", torch.float8_e4m3fn), "0.54 times over FP8"
