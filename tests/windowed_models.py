"""Small models with random weights of which some layers see a window: Gemma 3's and gpt-oss's architectures."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 256, 4, 2, 64, 512
KINDS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


class _Random:
    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator) * (scale / shape[-1] ** 0.5)


def gemma3(folder: Path, *, window: int, kinds: list[str] = KINDS, dtype: str = "float32") -> Path:
    """Config (of that dtype) and weights (float32). A token sees `window` tokens, itself among them, as the checkpoint
    counts."""
    config = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": len(kinds),
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "query_pre_attn_scalar": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "sliding_window": window,
        "layer_types": kinds,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "torch_dtype": dtype,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    random = _Random()
    weights = {"model.embed_tokens.weight": random(VOCAB, HIDDEN), "model.norm.weight": torch.full((HIDDEN,), 3.0)}
    for i in range(len(kinds)):
        at = f"model.layers.{i}"
        # Gemma's norms multiply with one more. Embeddings are the head, too: what layers add must outweigh them.
        for name, weight in (("input", 0), ("post_attention", 6), ("pre_feedforward", 0), ("post_feedforward", 3)):
            weights[f"{at}.{name}_layernorm.weight"] = torch.full((HIDDEN,), float(weight))
        weights |= {
            f"{at}.self_attn.q_norm.weight": torch.full((HEAD_DIM,), 0.7),
            f"{at}.self_attn.k_norm.weight": torch.full((HEAD_DIM,), 0.7),
            f"{at}.self_attn.q_proj.weight": random(HEADS * HEAD_DIM, HIDDEN),
            f"{at}.self_attn.k_proj.weight": random(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{at}.self_attn.v_proj.weight": random(KV_HEADS * HEAD_DIM, HIDDEN, scale=2.0),
            f"{at}.self_attn.o_proj.weight": random(HIDDEN, HEADS * HEAD_DIM, scale=2.0),
            f"{at}.mlp.gate_proj.weight": random(2 * HIDDEN, HIDDEN),
            f"{at}.mlp.up_proj.weight": random(2 * HIDDEN, HIDDEN),
            f"{at}.mlp.down_proj.weight": random(HIDDEN, 2 * HIDDEN),
        }
    return _write(folder, config, weights)


def gpt_oss(folder: Path, *, window: int, kinds: list[str] = KINDS, dtype: str = "float32") -> Path:
    """Config (of that dtype) and weights (float32, experts unquantized). `window` as above; sinks are large enough to
    matter."""
    experts, inner = 4, 128
    config = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": HIDDEN,
        "intermediate_size": inner,
        "num_hidden_layers": len(kinds),
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "initial_context_length": 4096,
        "sliding_window": window,
        "layer_types": kinds,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "experts_per_token": 2,
        "swiglu_limit": 7.0,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": dtype,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    random = _Random()
    weights = {
        "model.embed_tokens.weight": random(VOCAB, HIDDEN, scale=HIDDEN**0.5),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": random(VOCAB, HIDDEN, scale=6.0),
    }
    for i in range(len(kinds)):
        at = f"model.layers.{i}"
        weights |= {
            f"{at}.input_layernorm.weight": torch.ones(HIDDEN),
            f"{at}.post_attention_layernorm.weight": torch.ones(HIDDEN),
            f"{at}.self_attn.q_proj.weight": random(HEADS * HEAD_DIM, HIDDEN, scale=1.5),
            f"{at}.self_attn.k_proj.weight": random(KV_HEADS * HEAD_DIM, HIDDEN, scale=1.5),
            f"{at}.self_attn.v_proj.weight": random(KV_HEADS * HEAD_DIM, HIDDEN, scale=2.0),
            f"{at}.self_attn.o_proj.weight": random(HIDDEN, HEADS * HEAD_DIM, scale=2.0),
            f"{at}.self_attn.q_proj.bias": torch.zeros(HEADS * HEAD_DIM),
            f"{at}.self_attn.k_proj.bias": torch.zeros(KV_HEADS * HEAD_DIM),
            f"{at}.self_attn.v_proj.bias": torch.zeros(KV_HEADS * HEAD_DIM),
            f"{at}.self_attn.o_proj.bias": torch.zeros(HIDDEN),
            f"{at}.self_attn.sinks": torch.tensor([0.0, 1.5, 2.5, 4.0]),  # SGLang keeps them in bfloat16
            f"{at}.mlp.router.weight": random(experts, HIDDEN),
            f"{at}.mlp.router.bias": torch.zeros(experts),
            f"{at}.mlp.experts.gate_up_proj": random(experts, HIDDEN, 2 * inner, scale=1.0),
            f"{at}.mlp.experts.gate_up_proj_bias": torch.zeros(experts, 2 * inner),
            f"{at}.mlp.experts.down_proj": random(experts, inner, HIDDEN, scale=1.0),
            f"{at}.mlp.experts.down_proj_bias": torch.zeros(experts, HIDDEN),
        }
    return _write(folder, config, weights)


def _write(folder: Path, config: dict[str, object], weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
