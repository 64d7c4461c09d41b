"""Kernels against plain references, on random inputs, with poisoned outputs."""

from __future__ import annotations

import pytest
import torch

from sglang_vtensor.handout import Ask
from sglang_vtensor.kernels.kv_store import store_kv
from sglang_vtensor.kernels.prefix_prefill import plan_prefill, prefix_prefill
from sglang_vtensor.layout import KVLayout
from sglang_vtensor.memory import KVMemory
from sglang_vtensor.placement import runs_of
from sglang_vtensor.vmm import open_vmm

flash_attn = pytest.importorskip("sgl_kernel.flash_attn")


@pytest.mark.parametrize(("heads", "dim"), [(8, 128), (1, 64), (3, 80), (32, 128)])
@pytest.mark.parametrize("tokens", [1, 7, 513])
def test_store(heads, dim, tokens):
    row = heads * dim
    qkv = torch.randn(tokens, 5 * row, device="cuda", dtype=torch.bfloat16)
    k = qkv[:, row : 2 * row].view(tokens, heads, dim)
    v = qkv[:, 3 * row : 4 * row].view(tokens, heads, dim)
    pool = torch.full((1024, 4, row), float("nan"), device="cuda", dtype=torch.bfloat16)
    k_cache, v_cache = pool[:, 1].view(1024, heads, dim), pool[:, 2].view(1024, heads, dim)
    slots = torch.randperm(1024, device="cuda")[:tokens]
    store_kv(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache[slots], k)
    assert torch.equal(v_cache[slots], v)
    untouched = torch.ones(1024, dtype=torch.bool, device="cuda")
    untouched[slots] = False
    assert pool[untouched].isnan().all(), "another token was written"
    assert pool[:, (0, 3)].isnan().all(), "another layer was written"


def test_store_refuses_what_does_not_fit():
    k = torch.zeros(4, 2, 64, device="cuda", dtype=torch.bfloat16)
    cache = torch.zeros(16, 2, 64, device="cuda", dtype=torch.bfloat16)
    slots = torch.zeros(4, dtype=torch.int64, device="cuda")
    with pytest.raises(ValueError, match="one dtype wanted"):
        store_kv(k.float(), k, cache, cache, slots)
    with pytest.raises(ValueError, match=r"slots are \(4,\)"):
        store_kv(k, k, cache, cache, slots[:3])
    with pytest.raises(ValueError, match="contiguous"):
        store_kv(k, k, cache.transpose(0, 1).contiguous().transpose(0, 1), cache, slots)


@pytest.fixture(scope="module")
def memory():
    vmm = open_vmm("cuda:0")
    layout = KVLayout.choose(
        layers=2, kv_heads=8, head_dim=128, dtype=torch.bfloat16, granularity=vmm.granularity, tile_tokens=128
    )
    return KVMemory(vmm, layout, capacity_pages=128, max_tokens=8192, worker=False)


@pytest.mark.parametrize(
    "shapes",
    [[(1, 1)], [(128, 1)], [(129, 129)], [(1, 1), (127, 127), (128, 5), (1000, 300), (4095, 64), (255, 1)]],
    ids=str,
)
@pytest.mark.parametrize("broken", [False, True], ids=["one run", "broken"])
def test_frames_far_apart_with_nothing_mapped_between(memory, shapes, broken):
    """FlashAttention-3 by pages and our kernel by runs against float32: `(context, new)` a request.

    Between lanes, and behind a context's last page, nothing is mapped: an over-read would fault.
    """
    tokens = memory.layout.page_tokens
    k, v = memory.layer_views(1)
    every = []
    for context, _ in shapes:
        pages = memory.layout.pages_for(context)
        asks = [Ask(None, 1)] * pages if broken else [Ask(None, pages)]
        frames = [frame for some in memory.allocate(asks) for frame in some]
        assert (len(list(runs_of(frames))) == 1) == (not broken or pages == 1)
        slots = torch.cat([torch.arange(f * tokens, (f + 1) * tokens) for f in frames])[:context].cuda()
        k[slots] = torch.randn(context, 8, 128, device="cuda", dtype=torch.bfloat16)
        v[slots] = torch.randn(context, 8, 128, device="cuda", dtype=torch.bfloat16)
        every.append((frames, slots))
    new = [count for _, count in shapes]
    q = torch.randn(sum(new), 32, 128, device="cuda", dtype=torch.bfloat16)
    starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    table = torch.zeros(len(shapes), max(len(frames) for frames, _ in every), dtype=torch.int32)
    runs = []
    for i, (frames, slots) in enumerate(every):
        table[i, : len(frames)] = torch.tensor(frames)
        some = [(first * tokens, count * tokens) for first, count in runs_of(frames)]
        some[-1] = (some[-1][0], some[-1][1] - (len(frames) * tokens - len(slots)))
        runs.append(some)
    by_page = flash_attn.flash_attn_with_kvcache(
        q=q,
        k_cache=k.unflatten(0, (-1, tokens)),
        v_cache=v.unflatten(0, (-1, tokens)),
        page_table=table.cuda(),
        cache_seqlens=torch.tensor([context for context, _ in shapes], dtype=torch.int32, device="cuda"),
        cu_seqlens_q=starts,
        max_seqlen_q=max(new),
        softmax_scale=128**-0.5,
        causal=True,
    )
    plan = plan_prefill(new, runs, q_heads=32, kv_heads=8, head_dim=128, device=q.device, page_tokens=tokens)
    by_run = prefix_prefill(q, k, v, plan, scale=128**-0.5, out=torch.full_like(q, float("nan")))
    torch.cuda.synchronize()
    for i, (context, count) in enumerate(shapes):
        rows = slice(int(starts[i]), int(starts[i + 1]))
        slots = every[i][1]
        scores = torch.einsum("qhgd,khd->hgqk", q[rows].float().view(count, 8, 4, 128), k[slots].float()) * (128**-0.5)
        mask = torch.ones(count, context, dtype=torch.bool, device="cuda").tril(context - count)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        expected = torch.einsum("hgqk,khd->qhgd", weights, v[slots].float()).reshape(count, 32, 128)
        for got in (by_page, by_run):
            error = (got[rows].float() - expected).norm() / expected.norm()
            assert error < 1e-2, (i, context, count, float(error))
    for frames, _ in every:
        memory.free(frames)
    memory.complete(memory.launch())
    memory.check_integrity()


def quantized(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).to(torch.float8_e4m3fn)


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.float() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("shape", [(2000, 300), (4096, 1), (1024, 64)], ids=str)
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(32, 8), (8, 1), (12, 4)])
def test_over_fp8_errors_are_smaller_than_those_of_flash_attention(shape, q_heads, kv_heads):
    """Against float32 over the same FP8 keys and values, with the same scales. FlashAttention-3 has queries and weights
    in FP8 too, so the two cannot be equal."""
    context, new = shape
    k, v = (quantized(-(-context // 128) * 128, kv_heads, 128) for _ in range(2))
    q = torch.randn(new, q_heads, 128, device="cuda", dtype=torch.bfloat16)
    scales = tuple(torch.tensor(x, device="cuda") for x in (0.7, 1.3))
    plan = plan_prefill(
        [new],
        [[(0, context)]],
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=128,
        device="cuda",
        page_tokens=128,
        kv_dtype=k.dtype,
    )
    out = torch.full_like(q, float("nan"))
    prefix_prefill(q, k, v, plan, scale=128**-0.5, out=out, scales=scales)
    pages = torch.arange(len(k) // 128, device="cuda", dtype=torch.int32)[None]
    theirs = flash_attn.flash_attn_with_kvcache(
        q=q.to(k.dtype),
        k_cache=k.unflatten(0, (-1, 128)),
        v_cache=v.unflatten(0, (-1, 128)),
        page_table=pages,
        cache_seqlens=torch.tensor([context], device="cuda", dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, new], device="cuda", dtype=torch.int32),
        max_seqlen_q=new,
        softmax_scale=128**-0.5,
        causal=True,
        k_descale=scales[0].expand(1, kv_heads),
        v_descale=scales[1].expand(1, kv_heads),
    )
    wide_k, wide_v = (
        scale * x[:context].float().repeat_interleave(q_heads // kv_heads, 1)
        for x, scale in zip((k, v), scales, strict=True)
    )
    scores = torch.einsum("qhd,khd->hqk", q.float(), wide_k) * 128**-0.5
    seen = torch.ones(new, context, dtype=torch.bool, device="cuda").tril(context - new)
    wanted = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), wide_v)
    assert relative_error(out, wanted) < 0.01
    assert relative_error(out, wanted) <= relative_error(theirs, wanted) < 0.1
