"""Attention in float32, plainly written; and random batches laid out in runs of slots."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Batch:
    """A ragged batch: request `i` has `new[i]` new tokens, at the end of a context that lies in `runs[i]`, of each the
    first slot and the tokens. Runs but the last are whole pages of `page` tokens."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    runs: list[list[tuple[int, int]]]
    new: list[int]
    scale: float
    page: int

    @classmethod
    def random(
        cls,
        new,
        contexts,
        *,
        q_heads,
        kv_heads,
        dim,
        dtype=torch.float16,
        seed=0,
        page=None,
        whole=0.5,
        layers=3,
        cache=None,
    ) -> Batch:
        """Contexts lie in one pool, in the middle one of `layers`, and everything else there is NaN. They are one run
        each; with a `page`, runs of whole pages at page bounds, anywhere in the pool: two pages follow one another with
        the probability `whole`. Keys and values are such that a `cache` of another type has (`stored`)."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        rng = random.Random(seed)
        runs = [list(divided(context, page, whole, rng)) for context in contexts]
        # Where each run begins: in any order, with something between them.
        every = [(request, n) for request, some in enumerate(runs) for n in range(len(some))]
        rng.shuffle(every)
        at = page or 5
        for request, n in every:
            tokens = runs[request][n]
            runs[request][n] = (at, tokens)
            at += -(-tokens // page) * page + rng.choice((0, page)) if page else tokens + 5
        pool = torch.full((at + 128, layers, 2, kv_heads, dim), float("nan"), dtype=dtype)
        for first, tokens in (run for some in runs for run in some):
            pool[first : first + tokens, layers // 2] = normal(tokens, 2, kv_heads, dim).to(cache or dtype).to(dtype)
        pool = pool.to(DEVICE)
        return cls(
            q=normal(sum(new), q_heads, dim).to(DEVICE),
            k=pool[:, layers // 2, 0],
            v=pool[:, layers // 2, 1],
            runs=runs,
            new=list(new),
            scale=dim**-0.5,
            page=page or 1,
        )

    @property
    def contexts(self) -> list[int]:
        return [sum(tokens for _, tokens in some) for some in self.runs]

    def slots(self, request: int) -> torch.Tensor:
        """Where its tokens are, one after another."""
        runs = [torch.arange(first, first + tokens, device=DEVICE) for first, tokens in self.runs[request]]
        return torch.cat([torch.empty(0, dtype=torch.int64, device=DEVICE), *runs])

    def behind(self, window: int) -> torch.Tensor:
        """The slots of the pages that are behind the window of a request's first new token, and have no memory."""
        gone = [torch.empty(0, dtype=torch.int64, device=DEVICE)]
        for request, (new, context) in enumerate(zip(self.new, self.contexts, strict=True)):
            gone.append(self.slots(request)[: max(0, context - new - window) // self.page * self.page])
        return torch.cat(gone)

    def expected(self, *, soft_cap=0.0, sinks=None, scales=None, window=None) -> torch.Tensor:
        """In float32."""
        k_scale, v_scale = map(float, scales or (1.0, 1.0))
        outs = []
        kv_heads = self.k.shape[1]
        rows = 0
        for request, new in enumerate(self.new):
            slots = self.slots(request)
            context = len(slots)
            q = self.q[rows : rows + new].float()
            rows += new
            k = k_scale * self.k[slots].float().repeat_interleave(q.shape[1] // kv_heads, 1)
            v = v_scale * self.v[slots].float().repeat_interleave(q.shape[1] // kv_heads, 1)
            scores = torch.einsum("qhd,khd->hqk", q, k) * self.scale
            if soft_cap:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            position = torch.arange(context - new, context, device=q.device)[:, None]
            keys = torch.arange(context, device=q.device)[None, :]
            seen = keys <= position
            if window is not None:
                seen &= keys >= position - window
            scores = scores.masked_fill(~seen, float("-inf"))
            lse = scores.logsumexp(-1)
            if sinks is not None:
                lse = torch.logaddexp(lse, sinks.float()[:, None])
            weights = (scores - lse[..., None]).exp()
            # What a row does not see does not reach it, not even a NaN.
            values = torch.where(seen[None, ..., None], v.permute(1, 0, 2)[:, None], 0.0)
            outs.append(torch.einsum("hqk,hqkd->qhd", weights, values))
        return torch.cat(outs)


def stored(x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Keys or values in a cache of that type, at the same strides in elements; what lies between them is NaN. Of an
    8-bit type, of which torch can do little."""
    if dtype is None:
        return x
    size = sum((count - 1) * stride for count, stride in zip(x.shape, x.stride(), strict=True)) + 1
    raw = torch.full((size + 128 * x.stride(0),), 0xFF, dtype=torch.uint8, device=x.device)
    raw.as_strided(x.shape, x.stride()).copy_(x.to(dtype).view(torch.uint8))
    return raw.view(dtype).as_strided(x.shape, x.stride())


@contextlib.contextmanager
def without_memory(slots: torch.Tensor, *tensors: torch.Tensor) -> Iterator[None]:
    """Keys or values have no memory in these slots: on the host a kernel that reads there is an error. On a GPU these
    are NaN, and `tests/gpu` reads where really nothing is mapped."""
    if DEVICE == "cuda":
        for x in tensors:
            x[slots] = torch.full((), float("nan"), device=DEVICE).to(x.dtype)
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder

    gone = set(slots.tolist())
    original = InterpreterBuilder.create_masked_load

    def load(self, ptrs, mask, *rest):
        pointers, there = np.broadcast_arrays(ptrs.data, mask.data)
        at = pointers[there.astype(bool)].astype(np.int64)
        for x in tensors:
            of_slot = (at - x.data_ptr()) // (x.stride(0) * x.itemsize)
            inside = (at - x.data_ptr()) % (x.stride(0) * x.itemsize) < x.shape[1] * x.shape[2] * x.itemsize
            bad = gone & set(of_slot[inside & (of_slot >= 0) & (of_slot < x.shape[0])].tolist())
            assert not bad, f"slots {sorted(bad)} were read, and have no memory"
        return original(self, ptrs, mask, *rest)

    InterpreterBuilder.create_masked_load = load
    try:
        yield
    finally:
        InterpreterBuilder.create_masked_load = original


def divided(context: int, page: int | None, whole: float, rng: random.Random) -> Iterator[int]:
    """Tokens of each run of a context."""
    run = 0
    for at in range(0, context, page or max(1, context)):
        if run and rng.random() >= whole:
            yield run
            run = 0
        run += min(page or context, context - at)
    if run:
        yield run


def one_by_slot(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """One request's new token, `(q_heads, head_dim)`, in float32; its keys and values lie in `slots` of a pool."""
    group = q.shape[0] // keys.shape[1]
    k, v = (x[slots.long()].float().repeat_interleave(group, 1) for x in (keys, values))
    weights = (torch.einsum("hd,nhd->hn", q.float(), k) * q.shape[1] ** -0.5).softmax(-1)
    return torch.einsum("hn,nhd->hd", weights, v)


def assert_close(got: torch.Tensor, expected: torch.Tensor, *, narrow: bool = False) -> None:
    """Within what rounding weights and results to a half-precision type explains, and finite where that is; `narrow`:
    and queries to float8_e4m3fn, where Triton's interpreter does not round to the nearest."""
    finite = expected.isfinite()
    assert torch.equal(got.float().isfinite(), finite), "NaN or infinity in the wrong rows"
    difference = (got.float() - expected)[finite].abs()
    scale = 4e-3 if got.dtype == torch.float16 else 2e-2
    if got.dtype == torch.float32:
        scale = 2e-3
    if narrow:
        assert difference.norm() <= (0.03 if DEVICE == "cuda" else 0.1) * expected[finite].norm(), float(
            difference.norm()
        )
        return
    assert (difference <= scale * (1 + expected[finite].abs())).all(), float(difference.max())
