"""The decode backend that stands around SGLang's: real pool, real tables; SGLang's half is a stand-in."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend

from sglang_vtensor import patches
from sglang_vtensor.handout import Ask
from sglang_vtensor.srt import shared_decode
from sglang_vtensor.srt.kv_pool import VTensorKVPool
from sglang_vtensor.srt.options import Options
from sglang_vtensor.srt.runtime import RequestFrames
from sglang_vtensor.srt.shared_decode import SharedDecodeBackend
from sglang_vtensor.srt.sides import Sides
from tests import versions
from tests.kernels.reference import DEVICE, assert_close, one_by_slot

Q_HEADS, KV_HEADS, DIM = 8, 2, 64
PAGE = 16 if DEVICE == "cpu" else 64


class Inner:
    """SGLang's decode backend: says what it was asked."""

    needs_cpu_seq_lens = False
    some_state = "of the inner one"

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append(name)
            return name

        return call


class Server:
    """A pool of memory with requests in it, and a backend."""

    def __init__(self, layout, monkeypatch, window=None):
        """With a `window`, the second layer sees one, and is on a side of its own."""
        plain = Sides([layout], [(0, n) for n in range(layout.layers)], [None])
        self.pool = VTensorKVPool(
            64 * PAGE,
            sides=plain if window is None else Sides([layout, layout], [(0, 0), (1, 0)], [None, window]),
            options=Options(kv_backend="vtensor"),
            device=DEVICE,
            max_running=7,
            max_tokens=20 * PAGE,
            start_layer=0,
            end_layer=layout.layers,
            sglang=patches.load().requests,
        )
        self.runtime = self.pool.runtime
        self.table = torch.zeros(8, 20 * PAGE, dtype=torch.int32)
        monkeypatch.setattr(shared_decode, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1))
        self.inner = Inner()
        self.runner = SimpleNamespace(
            token_to_kv_pool=self.pool,
            req_to_token_pool=SimpleNamespace(req_to_token=self.table.to(DEVICE)),
            model_config=SimpleNamespace(num_attention_heads=Q_HEADS, head_dim=DIM),
            model=torch.nn.Module(),
            dtype=torch.bfloat16,
        )
        self.backend = SharedDecodeBackend.around(self.runner, self.inner)

    def frames(self, count):
        return self.runtime.memory.allocate([Ask(None, count)])[0]

    def admit(self, slot, shared, own, context):
        """A request: frames of the tree, as many of its own, and `context` tokens with the next one."""
        record = RequestFrames([*shared, *self.frames(own)], len(shared), len(shared))
        self.runtime.requests[slot] = record
        slots = torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in record.frames])
        self.runner.req_to_token_pool.req_to_token[slot, :context] = slots[:context].to(DEVICE, torch.int32)
        return int(slots[context - 1])

    def decode(self, slots, contexts, layer=1, meanwhile=None, window=None, **extra):
        """A step, as the scheduler begins it and the model runs it. The result, and what it should be. `meanwhile` is
        called when SGLang would write to the table of slots again: once the graph is launched."""
        seq_lens = torch.tensor(contexts, device=DEVICE)
        batch = SimpleNamespace(
            forward_mode=SimpleNamespace(is_decode=lambda: True),
            batch_size=len(slots),
            req_pool_indices=torch.tensor(slots, device=DEVICE),
            seq_lens=seq_lens,
            out_cache_loc=self.runner.req_to_token_pool.req_to_token[slots, seq_lens - 1].long(),
        )
        self.runtime.sharing.begin(list(slots), sum(contexts), max(contexts))
        attention = SimpleNamespace(
            layer_id=layer,
            tp_q_head_num=Q_HEADS,
            head_dim=DIM,
            v_head_dim=DIM,
            scaling=DIM**-0.5,
            logit_cap=0.0,
            sliding_window_size=window,
            k_scale=None,
            v_scale=None,
        )
        q, k, v = (
            torch.randn(len(slots), heads * DIM, dtype=torch.bfloat16, device=DEVICE)
            for heads in (Q_HEADS, KV_HEADS, KV_HEADS)
        )
        self.backend.init_forward_metadata_out_graph(batch)
        table = self.runner.req_to_token_pool.req_to_token
        slots_of = [table[slot, :context].clone() for slot, context in zip(slots, contexts, strict=True)]
        if meanwhile is not None:
            meanwhile(table)
        self.backend.init_forward_metadata_in_graph(batch)
        out = self.backend.forward_decode(
            q, k.view(-1, KV_HEADS, DIM), v.view(-1, KV_HEADS, DIM), attention, batch, **extra
        )
        keys, values = self.pool.k_buffer[layer], self.pool.v_buffer[layer]
        expected = []
        for row, at in zip(q.view(-1, Q_HEADS, DIM), slots_of, strict=True):
            seen = at if window is None else at[max(0, len(at) - 1 - window) :]
            expected.append(one_by_slot(row, keys, values, seen).flatten())
        return out, torch.stack(expected)


@pytest.fixture
def layout():
    from sglang_vtensor.layout import KVLayout
    from sglang_vtensor.vmm import page_units

    granularity, _ = page_units(DEVICE)
    layers = max(2, granularity // (2 * KV_HEADS * DIM * 2 * PAGE))
    return KVLayout.choose(
        layers=layers,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=torch.bfloat16,
        granularity=granularity,
        tile_tokens=PAGE,
        page_tokens=PAGE,
    )


@pytest.fixture
def server(layout, monkeypatch):
    server = served(Server(layout, monkeypatch), monkeypatch)
    yield server
    server.runtime.memory.close()


def served(server, monkeypatch):
    monkeypatch.setattr(server.runtime.sharing, "token_bytes", 1 << 40)  # whatever is shared pays
    monkeypatch.setattr(server.runtime.sharing, "capability", 0)  # and nothing else
    return server


def fill(server):
    """Every page that was handed out gets keys and values."""
    for record in server.runtime.requests.values():
        for page in record.frames:
            for buffer in (*server.pool.k_buffer, *server.pool.v_buffer):
                buffer[page * PAGE : (page + 1) * PAGE].normal_()


def test_a_batch_that_shares_is_read_once_and_others_go_through(server):
    stem = server.frames(5)
    contexts = {1: 5 * PAGE + 20, 4: 5 * PAGE + 1, 2: 6 * PAGE, 6: PAGE + 3}
    for slot, context in contexts.items():
        server.admit(slot, stem if slot != 6 else [], -(-context // PAGE) - (5 if slot != 6 else 0), context)
    fill(server)
    for slots in ([1, 4, 2, 6], [4, 1], [4, 2, 6]):
        out, expected = server.decode(slots, [contexts[slot] for slot in slots])
        assert_close(out, expected)
    assert server.inner.calls == []
    out, _ = server.decode([4, 6], [contexts[4], contexts[6]], sinks=torch.zeros(Q_HEADS))
    assert out == "forward_decode"
    assert server.inner.calls == [
        "init_forward_metadata_out_graph",
        "init_forward_metadata_in_graph",
        "forward_decode",
    ]
    stats = server.runtime.stats()
    assert (stats["decode_steps_shared"], stats["decode_steps_plain"]) == (3, 1)
    tokens = 2 * 5 * PAGE + 5 * PAGE + 5 * PAGE
    assert stats["shared_bytes_saved"] == tokens * server.runtime.memory.layout.kv_bytes
    assert server.backend.some_state == "of the inner one"


def test_layers_that_see_a_window_have_a_plan_of_their_own(layout, monkeypatch):
    """One step of a model with both kinds. What is behind all windows has no memory on their side: to read there would
    be a fault."""
    window = PAGE + 5
    server = served(Server(layout, monkeypatch, window), monkeypatch)
    memory = server.runtime.memory
    stem = server.frames(5)
    contexts = {1: 5 * PAGE + 2, 4: 7 * PAGE + 1, 2: 6 * PAGE}
    for slot, context in contexts.items():
        server.admit(slot, stem, -(-context // PAGE) - 5, context)
    fill(server)
    memory.let_go(1, stem[:3])
    memory.complete(memory.launch())
    with memory.held_still():
        memory.backings[1].trim(0)
    for layer, seen in ((1, window), (0, None), (1, window)):
        out, expected = server.decode([4, 1, 2], [contexts[slot] for slot in (4, 1, 2)], layer=layer, window=seen)
        assert_close(out, expected)
    assert server.inner.calls == []
    memory.close()


def test_pages_that_are_swapped_for_equal_ones(server):
    """The tree took equal pages of another request: the record and the table have those now, the old ones are free."""
    stem, twin = server.frames(3), server.frames(3)
    server.admit(3, twin, 1, 3 * PAGE + 2)
    server.admit(5, stem, 1, 3 * PAGE + 2)
    fill(server)
    server.decode([3, 5], [3 * PAGE + 2] * 2)
    assert server.inner.calls.count("forward_decode") == 1, "nothing is shared yet"
    record = server.runtime.requests[3]
    old, record.frames[:3] = record.frames[:3], stem
    server.runtime.sharing.changed(3)
    table = server.runner.req_to_token_pool.req_to_token
    table[3, : 3 * PAGE] = table[5, : 3 * PAGE]
    for page in old:
        for buffer in (*server.pool.k_buffer, *server.pool.v_buffer):
            buffer[page * PAGE : (page + 1) * PAGE] = float("nan")
    for slots in ([3, 5], [5, 3], [3]):
        out, expected = server.decode(slots, [3 * PAGE + 2] * len(slots))
        if len(slots) > 1:
            assert_close(out, expected)
    assert server.inner.calls.count("forward_decode") == 2, "before, and alone"


def test_the_slots_of_a_request_that_ended_may_be_anothers_while_a_batch_is_in_flight(server):
    """With overlap, SGLang ends a request while a batch still has it, gives its place to another one, and writes that
    one's slots to the table; whoever shared with it must not read them."""
    stem = server.frames(4)
    for slot in (1, 2, 3):
        server.admit(slot, stem, 1, 4 * PAGE + 2)
    fill(server)

    def another(table):
        table[:] = 0

    out, expected = server.decode([1, 2, 3], [4 * PAGE + 2] * 3, meanwhile=another)
    assert_close(out, expected)
    assert server.inner.calls == []
    server.runtime.end_request(1, 4 * PAGE + 2)
    assert 1 not in server.runtime.sharing.sharing


def test_a_head_dimension_that_the_kernel_does_not_take(server, caplog):
    server.runner.model_config.head_dim = 72
    assert SharedDecodeBackend.around(server.runner, server.inner) is server.inner
    assert (
        "shared decode is off: it takes head dimensions 64, 80, 96, 128, 192, 256, and this model's is 72"
        in caplog.text
    )


def test_more_query_heads_than_the_kernel_takes(server, caplog):
    server.runner.model_config.num_attention_heads = 71 * server.runtime.memory.layout.kv_heads
    assert SharedDecodeBackend.around(server.runner, server.inner) is server.inner
    assert "shared decode is off: it takes up to" in caplog.text
    assert "query heads a KV head, and this model has 71; decode reads" in caplog.text


def decode_batch(size):
    return SimpleNamespace(
        forward_mode=SimpleNamespace(is_decode=lambda: True),
        batch_size=size,
        req_pool_indices=torch.zeros(size, dtype=torch.int64, device=DEVICE),
        seq_lens=torch.ones(size, dtype=torch.int64, device=DEVICE),
    )


def test_graphs_of_both_kinds_are_captured_under_keys_of_their_own(server):
    """Larger batches than shared decode has room for have SGLang's graph only."""
    room = server.backend.decoder.max_requests
    assert room == 7, "as many as run at once"
    hybrid = HybridAttnBackend.__new__(HybridAttnBackend)
    hybrid.decode_backend = server.backend
    sizes = [4, room, room + 1, 640]
    runner = SimpleNamespace(attn_backend=hybrid, capture_bs=sizes)
    keys = versions.captured(
        runner, (None, "lora"), lambda size: server.backend.init_forward_metadata_out_graph(decode_batch(size), True)
    )
    wanted = [(size, label, False) for size in sizes for label in (None, "lora")]
    wanted += [(size, label, True) for size in (4, room) for label in (None, "lora")]
    assert sorted(keys.values(), key=str) == sorted(wanted, key=str)
    assert len(keys) == len(wanted), "two graphs under one key"
    assert runner.capture_bs == sizes
    assert not server.backend.capturing
    server.backend.capturing = True
    server.backend.init_forward_metadata_out_graph(decode_batch(room + 1), in_capture=True)
    assert not server.backend.shared
    others = SimpleNamespace(attn_backend=server.inner, capture_bs=sizes)
    assert set(versions.captured(others, (None,), lambda size: None).values()) == {(size, None, None) for size in sizes}


def test_a_batch_is_decided_once(server):
    """SGLang may ask which graph it is before its metadata is made, and again; sizes of graphs are padded."""
    stem = server.frames(2)
    for slot in (1, 2, 3):
        server.admit(slot, stem, 1, 2 * PAGE + 5)
    fill(server)
    for pays in (True, False):
        server.runtime.sharing.begin([1, 2, 3], 3 * (2 * PAGE + 5), 2 * PAGE + 5)
        server.runtime.sharing.pays = pays
        before = server.runtime.sharing.stats()
        batch = decode_batch(3)
        assert [server.backend.decide(batch, size) for size in (4, 4, 3)] == [pays] * 3
        server.backend.init_forward_metadata_out_graph(batch)
        assert server.backend.shared == pays
        counted = server.runtime.sharing.stats()
        kind = "decode_steps_shared" if pays else "decode_steps_plain"
        assert counted[kind] == before[kind] + 1
    prefill = SimpleNamespace(forward_mode=SimpleNamespace(is_decode=lambda: False), batch_size=3)
    assert not server.backend.decide(prefill, 3)
