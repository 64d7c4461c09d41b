import pytest
import torch

from sglang_vtensor.layout import KVLayout

MIB = 1 << 20
LLAMA3_8B = {"layers": 32, "kv_heads": 8, "head_dim": 128, "dtype": torch.bfloat16, "granularity": 2 * MIB}


def test_views_address_every_element_once_and_token_major():
    layout = KVLayout(3, 2, 4, torch.float32, page_tokens=4, stride_bytes=3 * 2 * 2 * 4 * 4 + 64, granularity=64)
    region = torch.zeros(10 * layout.stride_bytes, dtype=torch.uint8)
    seen = torch.zeros_like(region)
    for layer in range(3):
        k, v = layout.layer_views(region, layer)
        assert k.shape == v.shape == (10, 2, 4)
        assert k.stride() == (layout.stride_bytes // 4, 4, 1)
        for part, view in enumerate((k, v)):
            view[:] = torch.arange(80).view(10, 2, 4) + 1000 * layer + 100 * part
    flat = region.view(torch.float32).view(10, -1)
    for layer in range(3):
        for part in range(2):
            at = (layer * 2 + part) * 8
            assert flat[3, at : at + 8].tolist() == [24.0 + 1000 * layer + 100 * part + i for i in range(8)]
    assert not flat[:, 48:].any(), "padding was written"
    assert not seen.any()


@pytest.mark.parametrize("tile", [1, 128])
def test_a_size_is_found_for_every_usual_model(tile):
    for layers, heads, dim in [(32, 8, 128), (80, 8, 128), (28, 8, 128), (36, 8, 128), (64, 8, 128), (48, 4, 128)]:
        for tp in (1, 2, 4, 8):
            layout = KVLayout.choose(
                layers=layers,
                kv_heads=max(1, heads // tp),
                head_dim=dim,
                dtype=torch.bfloat16,
                granularity=2 * MIB,
                tile_tokens=tile,
            )
            # The scheduler asks again with the size that was chosen, and must get the same strides, padding and all.
            geometry = {"layers": layers, "kv_heads": max(1, heads // tp), "head_dim": dim, "dtype": torch.bfloat16}
            again = {"granularity": 2 * MIB, "tile_tokens": tile, "page_tokens": layout.page_tokens}
            assert KVLayout.choose(**geometry, **again) == layout
            assert layout.page_bytes % (2 * MIB) == 0
            assert layout.page_tokens % tile == 0
            assert layout.waste <= 0.125


def test_a_padded_stride_is_kept_when_its_size_is_named():
    narrow = {"layers": 28, "kv_heads": 1, "head_dim": 128, "dtype": torch.bfloat16}  # Qwen3-0.6B at TP 8
    layout = KVLayout.choose(**narrow, granularity=2 * MIB, tile_tokens=128)
    assert layout.waste > 0
    assert KVLayout.choose(**narrow, granularity=2 * MIB, tile_tokens=128, page_tokens=layout.page_tokens) == layout


def test_llama_3_8b_pages_need_no_padding():
    assert KVLayout.choose(**LLAMA3_8B).page_tokens == 16
    layout = KVLayout.choose(**LLAMA3_8B, tile_tokens=128)
    assert (layout.page_tokens, layout.page_bytes, layout.waste) == (128, 16 * MIB, 0.0)


def test_an_impossible_page_size_is_refused_with_those_that_fit():
    with pytest.raises(ValueError, match=r"--page-size 8 cannot be mapped.*multiples of 16: 16, 32, 64, 128"):
        KVLayout.choose(**LLAMA3_8B, page_tokens=8)
    with pytest.raises(ValueError, match=r"multiples of 128: 128, 256"):
        KVLayout.choose(**LLAMA3_8B, tile_tokens=128, page_tokens=64)
    with pytest.raises(ValueError, match="--page-size 0"):
        KVLayout.choose(**LLAMA3_8B, page_tokens=0)
    assert KVLayout.choose(**LLAMA3_8B, page_tokens=48).page_tokens == 48


def test_a_layout_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="cannot hold"):
        KVLayout(1, 1, 64, torch.float32, page_tokens=16, stride_bytes=100, granularity=4096)
    with pytest.raises(ValueError, match="not a multiple of the granularity"):
        KVLayout(1, 1, 64, torch.float32, page_tokens=3, stride_bytes=512, granularity=4096)
