"""Which kernel the table takes for a prefill batch, held to what was measured on an H200."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import GEOMETRIES, HEADS, PREFILL, SERVED, TOKENS_IN_ALL
from sglang_vtensor.kernels import configs

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
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


def test_over_fp8_ours_is_taken_in_every_measured_batch_in_which_it_is_much_faster_and_in_none_in_which_it_is_slower():
    rows = json.loads((RESULTS / "fp8_prefill.json").read_text())["rows"]
    shapes = {}
    for row in rows:  # each geometry has the same ones, in this order
        shapes.setdefault(row["geometry"], []).append(row)
    taken = 0
    for geometry, measured in shapes.items():
        heads = (GEOMETRIES | SERVED | HEADS)[geometry][:3]
        batches = [some for some in PREFILL if sum(map(sum, some)) <= TOKENS_IN_ALL]
        for row, batch in zip(measured, batches, strict=True):
            new, contexts = [new for _, new in batch], [prefix + new for prefix, new in batch]
            ours = configs.ours_before_fa3(new, contexts, *heads, "cuda", torch.float8_e4m3fn)
            faster = row["fa3_in_ours"] / row["ours"]
            assert (faster > 1.0) if ours else (faster < 1.07), (geometry, row["shape"])
            taken += ours
    assert taken == 5
