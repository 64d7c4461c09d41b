"""Layers that see a window, on a GPU: what is behind it is not mapped there, so that to read it would be a fault."""

from __future__ import annotations

import pytest
import torch

from sglang_vtensor.kernels.prefix_prefill import plan_prefill, prefix_prefill
from sglang_vtensor.kernels.shared_decode import SharedDecoder
from sglang_vtensor.layout import KVLayout
from sglang_vtensor.memory import Ask, KVMemory
from sglang_vtensor.placement import runs_of
from sglang_vtensor.sharing import Sharing
from sglang_vtensor.vmm import open_vmm
from tests import windowed_models
from tests.e2e.compare import TIE, Prompts, both
from tests.harness import Request, Scheduler

flash_attn = pytest.importorskip("sgl_kernel.flash_attn")

Q_HEADS, KV_HEADS, DIM = 32, 8, 128


@pytest.fixture
def memory():
    vmm = open_vmm("cuda:0")
    layout = KVLayout.choose(
        layers=2, kv_heads=KV_HEADS, head_dim=DIM, dtype=torch.bfloat16, granularity=vmm.granularity, tile_tokens=128
    )
    memory = KVMemory(vmm, [layout, layout], capacity_pages=128, max_tokens=8192, worker=False)
    yield memory
    torch.cuda.synchronize()
    memory.close()


def filled(memory, context, first):
    """The frames of a context with keys and values on the side of windows, from token `first` on, and there alone; and
    the slots of its tokens."""
    tokens = memory.layout.page_tokens
    frames = memory.allocate([Ask(None, memory.layout.pages_for(context))])[0]
    slots = torch.cat([torch.arange(f * tokens, (f + 1) * tokens) for f in frames])[:context].cuda()
    for x in memory.layer_views(1, 1):
        x[slots] = torch.randn(context, KV_HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    memory.let_go(1, frames[: first // tokens])
    memory.complete(memory.launch())
    memory.backings[1].trim(0)
    return frames, slots


def expected(q, k, v, slots, starts, window, sinks):
    """In float32: `q` are the new tokens, of which the first one is at position `starts`."""
    first = max(0, starts - window)
    seen = slots[first:]
    scores = torch.einsum("qhgd,khd->hgqk", q.float().view(len(q), KV_HEADS, -1, DIM), k[seen].float()) * DIM**-0.5
    at = torch.arange(first, len(slots), device="cuda")[None, :]
    position = torch.arange(starts, starts + len(q), device="cuda")[:, None]
    scores = scores.masked_fill((at > position) | (at < position - window), float("-inf"))
    lse = torch.logaddexp(scores.logsumexp(-1), sinks.float().view(KV_HEADS, -1, 1))
    return torch.einsum("hgqk,khd->qhgd", (scores - lse[..., None]).exp(), v[seen].float()).reshape(q.shape)


def relative_error(got, wanted):
    return float((got.float() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("window", [127, 1023])
@pytest.mark.parametrize(("context", "new"), [(3000, 1), (3000, 700), (4096, 129), (900, 900)])
def test_prefill_reads_nothing_behind_a_window(memory, context, new, window):
    """Our kernel by runs; and FlashAttention-3 by pages, with the padding frame behind the window."""
    tokens, starts = memory.layout.page_tokens, context - new
    first = max(0, starts - window) // tokens * tokens
    frames, slots = filled(memory, context, first)
    k, v = memory.layer_views(1, 1)
    q = torch.randn(new, Q_HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    sinks = torch.linspace(-2, 3, Q_HEADS, device="cuda", dtype=torch.bfloat16)
    wanted = expected(q, k, v, slots, starts, window, sinks)
    runs = [(start * tokens, count * tokens) for start, count in runs_of(frames)]
    runs[-1] = (runs[-1][0], runs[-1][1] - (len(frames) * tokens - context))
    plan = plan_prefill(
        [new],
        [runs],
        q_heads=Q_HEADS,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        device=q.device,
        page_tokens=tokens,
        window=window,
    )
    ours = prefix_prefill(q, k, v, plan, scale=DIM**-0.5, sinks=sinks, out=torch.full_like(q, float("nan")))
    table = torch.tensor([frames], dtype=torch.int32, device="cuda")
    table[:, : first // tokens] = 0
    theirs = flash_attn.flash_attn_with_kvcache(
        q=q,
        k_cache=k.unflatten(0, (-1, tokens)),
        v_cache=v.unflatten(0, (-1, tokens)),
        page_table=table,
        cache_seqlens=torch.tensor([context], dtype=torch.int32, device="cuda"),
        cu_seqlens_q=torch.tensor([0, new], dtype=torch.int32, device="cuda"),
        max_seqlen_q=new,
        softmax_scale=DIM**-0.5,
        causal=True,
        window_size=(window, 0),
        sinks=sinks,
    )
    torch.cuda.synchronize()
    assert relative_error(ours, wanted) < 1e-2
    assert relative_error(theirs, wanted) < 1e-2


@pytest.mark.parametrize("window", [127, 1023])
def test_shared_decode_reads_nothing_behind_a_window(memory, window):
    """Three requests behind one run, of which the last two see nothing of it where the window is short."""
    tokens = memory.layout.page_tokens
    stem = 6 * tokens
    contexts = [stem + 40, stem + 700, stem + 1500]
    table = torch.zeros(6, 8192, dtype=torch.int32, device="cuda")
    sharing = Sharing(slots=6, requests=4, page_tokens=tokens)
    first = (stem + 39 - window) // tokens * tokens
    shared, stem_slots = filled(memory, stem, first)
    every = []
    for slot, context in enumerate(contexts, start=1):
        _, own = filled(memory, context - stem, max(0, context - 1 - window - stem) // tokens * tokens)
        slots = torch.cat([stem_slots, own])
        table[slot, :context] = slots.int()
        sharing.join(slot, shared)
        every.append(slots)
    k, v = memory.layer_views(1, 1)
    q = torch.randn(3, Q_HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    sinks = torch.linspace(-2, 3, Q_HEADS, device="cuda", dtype=torch.bfloat16)
    decoder = SharedDecoder(
        max_requests=4,
        slots=6,
        page_tokens=tokens,
        max_tokens=8192,
        q_heads=Q_HEADS,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        device="cuda",
    )
    windowed = decoder.for_window(window)
    lengths = torch.tensor(contexts, dtype=torch.int32, device="cuda")
    who = torch.arange(1, 4, device="cuda")
    decoder.update(sharing.tables)
    decoder.find_pages(table, who, lengths)
    windowed.plan(who, lengths)
    out = windowed(q, k, v, scale=DIM**-0.5, sinks=sinks, out=torch.full_like(q, float("nan")))
    torch.cuda.synchronize()
    for row, slots in enumerate(every):
        wanted = expected(q[row : row + 1], k, v, slots, len(slots) - 1, window, sinks)
        assert relative_error(out[row : row + 1], wanted) < 1e-2, row


@pytest.mark.parametrize("kernel", ["auto", "triton"])
@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
def test_servers_say_the_same(tmp_path, name, kernel):
    """Conversations, branches and chunks, beside SGLang's own memory and FlashAttention-3."""
    model = getattr(windowed_models, name)(tmp_path / name, window=129)
    args = {"dtype": "bfloat16", "mem_fraction_static": 0.2, "cuda_graph_max_bs_decode": 4}
    args |= {"chunked_prefill_size": 1024, "max_total_tokens": 32768}
    tie, prompt = TIE["bfloat16"], Prompts(70)
    with (
        Scheduler(model, wait=False, attention_backend="fa3", **args) as reference,
        Scheduler(model, wait=False, kv_backend="vtensor", vtensor_prefill_kernel=kernel, **args) as ours,
    ):
        stem = prompt(700)
        texts = [stem + prompt(count) for count in (20, 600, 1500)] + [prompt(2000)]
        for turn in range(3):
            requests = [Request(f"t{turn}r{n}", text, 40) for n, text in enumerate(texts)]
            answers = both(reference, ours, requests, tie=tie)
            texts = [text + answer.tokens + prompt(60) for text, answer in zip(texts, answers, strict=True)]
        stats = ours.stats()
        assert 0 < stats["windows_owned_bytes"] < stats["owned_bytes"] / 2
