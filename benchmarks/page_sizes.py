"""The page sizes that are chosen for the usual models, as a table in `docs/page-sizes.md`. Arithmetic, no measurement.

python -m benchmarks.page_sizes
"""

from __future__ import annotations

from pathlib import Path

import torch

from sglang_vtensor.layout import KVLayout

PAGE = Path(__file__).parents[1] / "docs" / "page-sizes.md"
GRANULARITY = 2 << 20
TILE_TOKENS = 128
#: Layers, KV heads, head dimension; from each model's config.json.
MODELS = {
    "Llama-3-8B": (32, 8, 128),
    "Llama-3-70B": (80, 8, 128),
    "Llama-2-7B": (32, 32, 128),
    "Mistral-7B": (32, 8, 128),
    "Qwen3-0.6B, 1.7B": (28, 8, 128),
    "Qwen3-4B, 8B": (36, 8, 128),
    "Qwen3-14B": (40, 8, 128),
    "Qwen3-32B": (64, 8, 128),
    "Qwen3-30B-A3B": (48, 4, 128),
    "GLM-4.5-Air": (46, 8, 128),
    "MiniMax-M2": (62, 8, 128),
    "Yi-6B": (32, 4, 128),
    "Yi-9B": (48, 4, 128),
    "Yi-34B": (60, 8, 128),
}
HEAD = """# Page sizes

What `--kv-backend vtensor` chooses on an NVIDIA GPU (granularity 2 MiB, tiles of 128 tokens) when `--page-size` is left
out, for a KV cache of bfloat16 and for one of FP8: the smallest of 16 to 512 tokens that is whole tiles and granules;
or, where that were a page of more than 64 MiB, or there is none, a padded token stride. Tensor parallelism divides the
KV heads; a rank has at least one. Made by `python -m benchmarks.page_sizes`.

| model | TP | bytes a token | page, tokens | page, MiB | padding | FP8: bytes | tokens | MiB | padding |
|---|---|---|---|---|---|---|---|---|---|
"""


def table() -> str:
    """The whole page."""
    lines = []
    for name, (layers, heads, dim) in MODELS.items():
        for tp in (1, 2, 4, 8):
            chosen = [
                KVLayout.choose(
                    layers=layers,
                    kv_heads=max(1, heads // tp),
                    head_dim=dim,
                    dtype=dtype,
                    granularity=GRANULARITY,
                    tile_tokens=TILE_TOKENS,
                )
                for dtype in (torch.bfloat16, torch.float8_e4m3fn)
            ]
            cells = [
                f"{layout.kv_bytes:,} | {layout.page_tokens} | {layout.page_bytes >> 20} | {layout.waste:.1%}"
                for layout in chosen
            ]
            lines.append(f"| {name} | {tp} | {' | '.join(cells)} |")
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(table())
    print(f"written to {PAGE}")
