"""Which of two kernels does a batch of prefill, where both can be had. The kernels are stand-ins."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from sglang_vtensor.srt import attention_cuda
from sglang_vtensor.srt.attention_cuda import Fastest


class Backend:
    """Counts what it was told."""

    def __init__(self):
        self.q_heads, self.kv_heads, self.head_dim = 32, 8, 128
        self.compiled, self.compiling = False, SimpleNamespace(left=5)
        self.told, self.done = [], []

    def ready(self, window):
        return self.compiled

    def init_forward_metadata(self, batch):
        self.told.append(batch)

    def attend(self, *args):
        self.done.append(args)


@pytest.fixture
def fastest(monkeypatch):
    backend = Fastest.__new__(Fastest)
    backend.fa3, backend.ours, backend._said = Backend(), Backend(), False
    backend.slots, backend.windows = torch.zeros(1), [None]
    backend.pool = SimpleNamespace(dtype=torch.bfloat16)
    backend.ours_first = True
    monkeypatch.setattr(attention_cuda, "ours_before_fa3", lambda *_: backend.ours_first)
    return backend


def batch():
    return SimpleNamespace(extend_seq_lens_cpu=[1], extend_prefix_lens_cpu=[2])


def step(backend):
    """Which of the two does the next batch."""
    told = batch()
    backend.init_forward_metadata(told)
    layer = SimpleNamespace(sliding_window_size=-1)
    backend.attend("q", "k", "v", layer, None, None)
    chosen = backend.chosen[None]
    assert chosen.told[-1] is told
    assert chosen.done.pop() == ("q", "k", "v", layer, None, None)
    return "ours" if chosen is backend.ours else "fa3"


def test_what_is_not_compiled_yet_is_done_by_flashattention_and_said_once(fastest, caplog):
    caplog.set_level(logging.INFO, attention_cuda.__name__)
    assert [step(fastest), step(fastest)] == ["fa3", "fa3"]
    assert caplog.text.count("as 5 of our kernels are not compiled yet") == 1
    fastest.ours.compiled = True
    assert step(fastest) == "ours"


def test_a_batch_for_which_ours_is_slower_does_not_wait_for_ours(fastest, caplog):
    caplog.set_level(logging.INFO, attention_cuda.__name__)
    fastest.ours_first = False
    for ready in (False, True):
        fastest.ours.compiled = ready
        assert step(fastest) == "fa3"
    assert fastest.ours.told == []
    assert caplog.text == ""
