"""Which layers are on which side, what its pages are, and which models with windows are served."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

import tests.harness  # noqa: F401  (chooses the platform before SGLang is imported)
from sglang_vtensor.layout import KVLayout
from sglang_vtensor.srt.options import Refused
from sglang_vtensor.srt.sides import Sides
from sglang_vtensor.srt.state_models import chunk_tokens, refuse_page, refuse_states, track_interval
from sglang_vtensor.srt.windows import hold_to, refuse_readers, windows_of

MIB = 1 << 20
GPU = {"granularity": 2 * MIB, "tile_tokens": 128, "dtype": torch.bfloat16}
GPT_OSS_20B = [127, None] * 12
GEMMA_3_27B = [*[1023] * 5, None] * 10 + [1023] * 2


def test_layers_of_two_kinds():
    sides = Sides.choose(GPT_OSS_20B, kv_heads=8, head_dim=64, **GPU)
    assert sides.windows == [None, 127]
    assert sides.layers == [(side, n // 2) for n, side in enumerate([1, 0] * 12)]
    full, windowed = sides.layouts
    assert full == windowed
    assert (full.layers, full.page_tokens, full.page_bytes, full.waste) == (12, 256, 6 * MIB, 0.0)
    assert (sides.page_tokens, sides.page_bytes, sides.waste) == (256, 12 * MIB, 0.0)


def test_a_model_of_one_kind_has_what_it_had():
    sides = Sides.choose([None] * 32, kv_heads=8, head_dim=128, **GPU)
    assert sides.layouts == [KVLayout.choose(layers=32, kv_heads=8, head_dim=128, **GPU)]
    assert (sides.windows, sides.layers) == ([None], [(0, n) for n in range(32)])


def test_layers_without_keys_and_values_are_on_no_side():
    """As of Qwen3-Next: three layers have linear attention for each one that reads all tokens."""
    linear = {n for n in range(48) if n % 4 != 3}
    sides = Sides.choose([None] * 48, kv_heads=2, head_dim=256, without=linear, **GPU)
    assert sides.layouts == [KVLayout.choose(layers=12, kv_heads=2, head_dim=256, **GPU)]
    assert sides.layers == [None if n in linear else (0, n // 4) for n in range(48)]
    both = Sides.choose([None, 127, None, 127, None], kv_heads=8, head_dim=64, without={0, 3}, **GPU)
    assert both.layers == [None, (1, 0), (0, 0), None, (0, 1)]


def settings(**given):
    names = {"mamba_radix_cache_strategy": "auto", "mamba_track_interval": 256, "enable_linear_replayssm": False}
    names |= {"linear_attn_backend": "triton", "linear_attn_prefill_backend": None, "linear_attn_decode_backend": None}
    names |= {"mamba_backend": "triton", "mamba_max_states_per_path": -1}
    names |= {"enable_int8_mamba_checkpoint": False, "enable_mis": False}
    return SimpleNamespace(**{**names, **given})


@pytest.mark.parametrize(
    ("name", "given", "why"),
    [
        ("Qwen3NextForCausalLM", {}, None),
        ("Qwen3_5MoeForConditionalGeneration", {"mamba_radix_cache_strategy": "extra_buffer"}, None),
        (
            "FalconH1ForCausalLM",
            {},
            r"FalconH1ForCausalLM: of models with state-space .* it serves Qwen3NextForCausal",
        ),
        ("NemotronHForCausalLM", {}, None),
        ("NemotronHForCausalLM", {"mamba_max_states_per_path": 4}, "-states-per-path 4: .* --max-mamba-cache-size"),
        ("NemotronHForCausalLM", {"mamba_backend": "flashinfer"}, "--mamba-backend flashinfer: .*, or give triton"),
        (
            "Qwen3NextForCausalLM",
            {"mamba_radix_cache_strategy": "no_buffer"},
            "strategy no_buffer: .*or give extra_buf",
        ),
        ("Qwen3NextForCausalLM", {"mamba_radix_cache_strategy": "extra_buffer_lazy"}, "strategy extra_buffer_lazy"),
        ("Qwen3NextForCausalLM", {"enable_linear_replayssm": True}, "--enable-linear-replayssm: states lie in pages"),
        ("Qwen3NextForCausalLM", {"mamba_track_interval": 0}, "--mamba-track-interval 0: give 1 token or more"),
        ("Qwen3NextForCausalLM", {"linear_attn_prefill_backend": "flashinfer"}, None),
        ("Qwen3NextForCausalLM", {"linear_attn_decode_backend": "cutedsl"}, "-decode-backend cutedsl: states of a req"),
        (
            "Qwen3NextForCausalLM",
            {"linear_attn_decode_backend": "flashinfer"},
            "-backend flashinfer: .*, or give triton",
        ),
        ("Qwen3NextForCausalLM", {"linear_attn_backend": "flashinfer"}, "--linear-attn-backend flashinfer: states of"),
        ("Qwen3NextForCausalLM", {"enable_mis": True}, "--enable-mis: states lie in pages of their own"),
        ("Qwen3NextForCausalLM", {"enable_int8_mamba_checkpoint": True}, "--enable-int8-mamba-checkpoint: states"),
    ],
)
def test_models_and_settings_that_states_do_not_go_with_are_refused(name, given, why):
    with contextlib.nullcontext() if why is None else pytest.raises(Refused, match=why):
        refuse_states(name, settings(**given))


def test_pages_and_chunks_of_a_prompt_end_together():
    assert chunk_tokens(SimpleNamespace()) == 64
    assert chunk_tokens(SimpleNamespace(mamba_chunk_size=256)) == 256
    for page in (1, 16, 32, 64, 128, 512):
        refuse_page(page, 64)
    for page, chunk in ((48, 64), (96, 64), (96, 128)):
        with pytest.raises(Refused, match=f"--page-size {page}: with states a page .* a multiple of {chunk} tokens"):
            refuse_page(page, chunk)


def test_states_are_kept_of_whole_pages_of_an_answer():
    assert [track_interval(256, page, 64) for page in (1, 16, 128, 256, 512)] == [256, 256, 256, 256, 512]
    assert track_interval(64, 16, 64) == 64
    assert track_interval(64, 16, 256) == 256


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("windows", "heads", "dim"), [(GPT_OSS_20B, 8, 64), ([127, None] * 18, 8, 64), (GEMMA_3_27B, 16, 128)]
)
def test_pages_are_whole_granules_on_each_side(windows, heads, dim, tp):
    shape = {"kv_heads": max(1, heads // tp), "head_dim": dim, **GPU}
    sides = Sides.choose(windows, **shape)
    assert [layout.page_tokens for layout in sides.layouts] == [sides.page_tokens] * 2
    assert all(layout.page_bytes % (2 * MIB) == 0 for layout in sides.layouts)
    # The scheduler asks again with the size that was chosen, and must get the same strides, padding and all.
    assert Sides.choose(windows, **shape, page_tokens=sides.page_tokens) == sides


def test_sizes_that_cannot_be_are_refused():
    shape = {"kv_heads": 8, "head_dim": 64, **GPU}
    with pytest.raises(ValueError, match=r"--page-size 128 cannot be mapped.*Sizes that fit: 256, 512\. Leave"):
        Sides.choose(GPT_OSS_20B, **shape, page_tokens=128)
    with pytest.raises(ValueError, match="--page-size 100 cannot"):
        Sides.choose(GPT_OSS_20B, **shape, page_tokens=100)
    assert Sides.choose(GPT_OSS_20B, **shape, page_tokens=512).page_tokens == 512
    for windows in ([127] * 4, [127, 63, None]):
        with pytest.raises(ValueError, match="layers that read all tokens, and one window of others, wanted"):
            Sides.choose(windows, **shape)


def model(architecture, kinds, window=128, hybrid=True):
    return SimpleNamespace(
        hf_config=SimpleNamespace(architectures=[architecture]),
        hf_text_config=SimpleNamespace(layer_types=kinds, sliding_window=window),
        is_hybrid_swa=hybrid,
        sliding_window_size=window,
        num_hidden_layers=len(kinds or [0, 0]),
    )


def test_windows_of_a_configuration():
    kinds = ["sliding_attention", "full_attention"]
    assert windows_of(model("GptOssForCausalLM", kinds)) == [127, None], "a checkpoint counts the token itself"
    assert windows_of(model("Gemma3ForCausalLM", kinds * 2, 1024, hybrid=False)) == [1023, None] * 2
    assert windows_of(model("LlamaForCausalLM", None, None, hybrid=False)) == [None, None]
    with pytest.raises(Refused, match=r"Gemma4ForCausalLM: of models whose layers see a window, it serves GptOss"):
        windows_of(model("Gemma4ForCausalLM", kinds))
    for some, window in ((None, 128), (["sliding_attention"], 128), (["full_attention", "x"], 128), (kinds, 1)):
        with pytest.raises(Refused, match="does not support this GptOssForCausalLM: its layers are"):
            windows_of(model("GptOssForCausalLM", some, window))


def test_the_layers_that_were_built_are_held_to_it(monkeypatch):
    from sglang.srt.layers import radix_attention

    class Attention(torch.nn.Module):
        def __init__(self, layer_id, window):
            super().__init__()
            self.layer_id, self.sliding_window_size = layer_id, window

    monkeypatch.setattr(radix_attention, "RadixAttention", Attention)
    built = torch.nn.ModuleList([Attention(0, 127), Attention(1, -1), Attention(2, None)])
    sides = [(1, 0), (0, 0), (0, 1)]
    hold_to([None, 127], sides, built)
    for windows in ([None, 128], [127, 127]):
        with pytest.raises(Refused, match=r"layer \d of ModuleList sees a window of"):
            hold_to(windows, sides, built)


def test_who_reads_behind_a_window():
    refuse_readers([None, None], ["torch_native"])
    refuse_readers([None, 127], ["vtensor", None])
    with pytest.raises(Refused, match="torch_native reads contexts from their start"):
        refuse_readers([None, 127], [None, "torch_native"])


def test_flash_attention_finds_the_padding_frame_behind_a_window():
    """Its tiles begin at multiples of their own length, also before the window, where nothing has memory."""
    from sglang_vtensor.srt.attention_cuda import FlashAttention3

    backend = FlashAttention3.__new__(FlashAttention3)
    backend.page_tokens = 128
    frames = torch.arange(1, 13).view(2, 6)
    batch = SimpleNamespace(seq_lens=torch.tensor([700, 300]), extend_seq_lens=torch.tensor([10, 300]))
    # The first new token is number 690, and sees from 563 on, which is in the fifth frame.
    assert backend._within(127, frames, batch).tolist() == [[0, 0, 0, 0, 5, 6], [7, 8, 9, 10, 11, 12]]
    assert backend._within(None, frames, batch) is frames
