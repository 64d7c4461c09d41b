"""Attention in float32, plainly written; and random batches laid out as segments are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Batch:
    """A ragged batch: request `i` has `new[i]` new tokens, at the end of `contexts[i]`, from token `first[i]` on."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    first: torch.Tensor
    new: list[int]
    contexts: list[int]
    scale: float

    @classmethod
    def random(cls, new, contexts, *, q_heads, kv_heads, dim, dtype=torch.float16, seed=0, gap=5, layers=3) -> Batch:
        """Contexts lie behind one another in one pool, in the middle one of `layers`; what is between them is NaN."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        total = sum(contexts) + gap * (len(contexts) + 1)
        pool = torch.full((total, layers, 2, kv_heads, dim), float("nan"), dtype=dtype)
        first, at = [], gap
        for context in contexts:
            pool[at : at + context, layers // 2] = normal(context, 2, kv_heads, dim)
            first.append(at)
            at += context + gap
        pool = pool.to(DEVICE)
        return cls(
            q=normal(sum(new), q_heads, dim).to(DEVICE),
            k=pool[:, layers // 2, 0],
            v=pool[:, layers // 2, 1],
            first=torch.tensor(first, dtype=torch.int64, device=DEVICE),
            new=list(new),
            contexts=list(contexts),
            scale=dim**-0.5,
        )

    def expected(self, *, window=-1, soft_cap=0.0, sinks=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and log-sum-exp, float32."""
        outs, lses = [], []
        kv_heads = self.k.shape[1]
        rows = 0
        for first, new, context in zip(self.first.tolist(), self.new, self.contexts, strict=True):
            q = self.q[rows : rows + new].float()
            rows += new
            k = self.k[first : first + context].float().repeat_interleave(q.shape[1] // kv_heads, 1)
            v = self.v[first : first + context].float().repeat_interleave(q.shape[1] // kv_heads, 1)
            scores = torch.einsum("qhd,khd->hqk", q, k) * self.scale
            if soft_cap:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            position = torch.arange(context - new, context, device=q.device)[:, None]
            keys = torch.arange(context, device=q.device)[None, :]
            seen = keys <= position
            if window >= 0:
                seen &= keys >= position - window
            scores = scores.masked_fill(~seen, float("-inf"))
            lse = scores.logsumexp(-1)
            if sinks is not None:
                lse = torch.logaddexp(lse, sinks.float()[:, None])
            weights = (scores - lse[..., None]).exp()
            # What a row does not see does not reach it, not even a NaN.
            values = torch.where(seen[None, ..., None], v.permute(1, 0, 2)[:, None], 0.0)
            outs.append(torch.einsum("hqk,hqkd->qhd", weights, values))
            lses.append(lse.T)
        return torch.cat(outs), torch.cat(lses)


def one_by_slot(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """One request's new token, `(q_heads, head_dim)`, in float32; its keys and values lie in `slots` of a pool."""
    group = q.shape[0] // keys.shape[1]
    k, v = (x[slots.long()].float().repeat_interleave(group, 1) for x in (keys, values))
    weights = (torch.einsum("hd,nhd->hn", q.float(), k) * q.shape[1] ** -0.5).softmax(-1)
    return torch.einsum("hn,nhd->hd", weights, v)


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Within what rounding weights and results to a half-precision type explains, and finite where that is."""
    finite = expected.isfinite()
    assert torch.equal(got.float().isfinite(), finite), "NaN or infinity in the wrong rows"
    difference = (got.float() - expected)[finite].abs()
    scale = 4e-3 if got.dtype == torch.float16 else 2e-2
    if got.dtype == torch.float32:
        scale = 2e-3
    assert (difference <= scale * (1 + expected[finite].abs())).all(), float(difference.max())
