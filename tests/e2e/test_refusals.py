"""What cannot work is refused at start, with the option, the reason and what to use instead."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.harness import Scheduler


@pytest.mark.parametrize(
    ("server_args", "message"),
    [
        ({"kv_backend": "paged"}, "--kv-backend 'paged' is unknown: choose from default, vtensor"),
        ({"page_size": 3}, r"--page-size 3 cannot be mapped.*Sizes that fit are the multiples of 2: 2, 4, 8, 16"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype fp8_e5m2: pages hold keys.*Use --kv-cache-dtype auto"),
        ({"enable_hierarchical_cache": True}, "--enable-hierarchical-cache: pages have no copy on the host"),
        ({"enable_mixed_chunk": True}, "--enable-mixed-chunk"),
        ({"enable_deterministic_inference": True}, "--enable-deterministic-inference on host memory: SGLang has no"),
        ({"rl_on_policy_target": "fsdp"}, "--rl-on-policy-target on host memory: SGLang has no deterministic"),
        ({"attention_backend": "triton"}, "--attention-backend triton does not run on host memory: use vtensor or"),
        ({"grammar_backend": "xgrammar"}, "--grammar-backend xgrammar needs a GPU's pinned memory.*Use llguidance"),
        ({"vtensor_reserve": "lots"}, "--vtensor-reserve 'lots': give a share such as 0.02, 2% or all, or bytes"),
        ({"vtensor_idle_seconds": -1.0}, "--vtensor-idle-seconds -1.0"),
        ({"kv_backend": "default", "attention_backend": "vtensor"}, "use it with --kv-backend vtensor"),
        ({"kv_backend": "default", "page_size": 16}, "--page-size 16 needs a GPU with SGLang's own KV cache"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_options(models, server_args, message):
    args = {"kv_backend": "vtensor", "dtype": "bfloat16"} | server_args
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        Scheduler(models["gqa"], **args)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {
                "architectures": ["DeepseekV2ForCausalLM"],
                "model_type": "deepseek_v2",
                "kv_lora_rank": 64,
                "q_lora_rank": 64,
                "qk_nope_head_dim": 32,
                "qk_rope_head_dim": 32,
                "v_head_dim": 32,
            },
            "DeepseekV2ForCausalLM: multi-head latent attention.*Run this model with --kv-backend default",
        ),
        (
            {
                "architectures": ["GptOssForCausalLM"],
                "model_type": "gpt_oss",
                "sliding_window": 128,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
            },
            "GptOssForCausalLM: its sliding-window layers",
        ),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}},
            "the FP8 KV cache that this checkpoint asks for: pages hold keys.*Give --kv-cache-dtype bfloat16",
        ),
    ],
    ids=["mla", "sliding-window", "fp8-checkpoint"],
)
def test_models(models, tmp_path, config, message):
    model = tmp_path / "model"
    shutil.copytree(models["gqa"], model)
    plain = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(plain | config))
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        Scheduler(model, kv_backend="vtensor", dtype="bfloat16", load_format="dummy")
