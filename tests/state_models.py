"""Small models with random weights of which some layers keep states: Qwen3.5's architecture for text and Qwen3-Next's,
with linear attention, and Nemotron-H's, with Mamba-2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.windowed_models import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, VOCAB, _Random, _write

#: Of how many tokens a chunk of a prompt is, between which a state may be kept. Nemotron-H's config says so.
CHUNKS = {"qwen3_5": 64, "qwen3_next": 64, "nemotron_h": 32}

#: Of the linear layers. Two value heads share a key head.
KEY_HEADS, VALUE_HEADS, KERNEL = 2, 4, 4
#: Of keys and of values. A GPU's kernels want powers of two.
DIMS = (32, 48)
#: Experts, how many of them a token meets, and how wide each is.
EXPERTS, MET, EXPERT_SIZE = 4, 2, 64


def qwen3_5(
    folder: Path, *, layers: int = 4, interval: int = 2, dtype: str = "float32", dims: tuple[int, int] = DIMS
) -> Path:
    """Config (of that dtype) and weights (float32). Every `interval`-th layer has full attention, the others are gated
    delta nets, with keys and values of the lengths `dims`."""
    config = {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "intermediate_size": 2 * HIDDEN}
    random = _Random()
    conv, values = _sizes(dims)

    def layer(at: str) -> dict[str, torch.Tensor]:
        return {
            f"{at}.mlp.gate_proj.weight": random(2 * HIDDEN, HIDDEN),
            f"{at}.mlp.up_proj.weight": random(2 * HIDDEN, HIDDEN),
            f"{at}.mlp.down_proj.weight": random(HIDDEN, 2 * HIDDEN),
        }

    def projections(at: str) -> dict[str, torch.Tensor]:
        return {
            f"{at}.in_proj_qkv.weight": random(conv, HIDDEN),
            f"{at}.in_proj_z.weight": random(values, HIDDEN),
            f"{at}.in_proj_b.weight": random(VALUE_HEADS, HIDDEN),
            f"{at}.in_proj_a.weight": random(VALUE_HEADS, HIDDEN),
        }

    return _qwen(folder, config, random, layers, interval, dtype, dims, layer, projections)


def qwen3_next(
    folder: Path, *, layers: int = 4, interval: int = 2, dtype: str = "float32", dims: tuple[int, int] = DIMS
) -> Path:
    """The same, with experts behind each layer, and one projection for all that a delta net takes."""
    config = {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "intermediate_size": EXPERT_SIZE,
        "moe_intermediate_size": EXPERT_SIZE,
        "shared_expert_intermediate_size": EXPERT_SIZE,
        "num_experts": EXPERTS,
        "num_experts_per_tok": MET,
        "norm_topk_prob": True,
    }
    random = _Random()
    conv, values = _sizes(dims)

    def layer(at: str) -> dict[str, torch.Tensor]:
        weights = {
            # So far apart that what is rounded chooses no other expert.
            f"{at}.mlp.gate.weight": random(EXPERTS, HIDDEN, scale=4.0),
            f"{at}.mlp.shared_expert_gate.weight": random(1, HIDDEN),
        }
        for expert in ["shared_expert", *(f"experts.{n}" for n in range(EXPERTS))]:
            weights |= {
                f"{at}.mlp.{expert}.gate_proj.weight": random(EXPERT_SIZE, HIDDEN),
                f"{at}.mlp.{expert}.up_proj.weight": random(EXPERT_SIZE, HIDDEN),
                f"{at}.mlp.{expert}.down_proj.weight": random(HIDDEN, EXPERT_SIZE, scale=2.0),
            }
        return weights

    def projections(at: str) -> dict[str, torch.Tensor]:
        return {
            f"{at}.in_proj_qkvz.weight": random(conv + values, HIDDEN),
            f"{at}.in_proj_ba.weight": random(2 * VALUE_HEADS, HIDDEN),
        }

    return _qwen(folder, config, random, layers, interval, dtype, dims, layer, projections)


def _sizes(dims: tuple[int, int]) -> tuple[int, int]:
    """Of what is convolved of a token, and of its values."""
    values = VALUE_HEADS * dims[1]
    return 2 * KEY_HEADS * dims[0] + values, values


def _qwen(
    folder: Path,
    config: dict[str, Any],
    random: _Random,
    layers: int,
    interval: int,
    dtype: str,
    dims: tuple[int, int],
    layer: Callable[[str], dict[str, torch.Tensor]],
    projections: Callable[[str], dict[str, torch.Tensor]],
) -> Path:
    """`layer` has the weights behind the attention of each layer, and `projections` what delta nets begin with."""
    conv, values = _sizes(dims)
    config |= {
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "full_attention_interval": interval,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "linear_num_key_heads": KEY_HEADS,
        "linear_num_value_heads": VALUE_HEADS,
        "linear_key_head_dim": dims[0],
        "linear_value_head_dim": dims[1],
        "linear_conv_kernel_dim": KERNEL,
        "mamba_ssm_dtype": "float32",
        "attn_output_gate": True,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    weights = {
        "model.embed_tokens.weight": random(VOCAB, HIDDEN, scale=HIDDEN**0.5),
        "model.norm.weight": torch.zeros(HIDDEN),  # these norms multiply with one more
        "lm_head.weight": random(VOCAB, HIDDEN, scale=6.0),
    }
    for i in range(layers):
        at = f"model.layers.{i}"
        weights |= {
            f"{at}.input_layernorm.weight": torch.zeros(HIDDEN),
            f"{at}.post_attention_layernorm.weight": torch.zeros(HIDDEN),
            **layer(at),
        }
        if (i + 1) % interval == 0:
            weights |= {
                # Beside each head of queries stands its gate.
                f"{at}.self_attn.q_proj.weight": random(2 * HEADS * HEAD_DIM, HIDDEN, scale=1.5),
                f"{at}.self_attn.k_proj.weight": random(KV_HEADS * HEAD_DIM, HIDDEN, scale=1.5),
                f"{at}.self_attn.v_proj.weight": random(KV_HEADS * HEAD_DIM, HIDDEN, scale=2.0),
                f"{at}.self_attn.o_proj.weight": random(HIDDEN, HEADS * HEAD_DIM, scale=4.0),
                f"{at}.self_attn.q_norm.weight": torch.full((HEAD_DIM,), 0.2),
                f"{at}.self_attn.k_norm.weight": torch.full((HEAD_DIM,), 0.2),
            }
            continue
        weights |= {
            **projections(f"{at}.linear_attn"),
            f"{at}.linear_attn.conv1d.weight": random(conv, 1, KERNEL, scale=2.0),
            # One head forgets half of its state in a few tokens, another one in some hundred.
            f"{at}.linear_attn.A_log": torch.linspace(-5.0, 0.0, VALUE_HEADS),
            f"{at}.linear_attn.dt_bias": torch.full((VALUE_HEADS,), -1.0),
            f"{at}.linear_attn.norm.weight": torch.ones(dims[1]),
            f"{at}.linear_attn.out_proj.weight": random(HIDDEN, values, scale=4.0),
        }
    return _write(folder, config, weights)


#: Of the Mamba-2 layers. Two heads share what they write and read of a state by.
MAMBA_HEADS, MAMBA_CHANNELS, MAMBA_GROUPS, STATE = 4, 32, 2, 48


def nemotron_h(folder: Path, *, pattern: str = "M-*M*-", dtype: str = "float32") -> Path:
    """Config (of that dtype) and weights (float32). A layer is one of Mamba-2 (`M`), of full attention (`*`) or of a
    perceptron (`-`)."""
    inner, written = MAMBA_HEADS * MAMBA_CHANNELS, MAMBA_GROUPS * STATE
    config = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "hybrid_override_pattern": pattern,
        "num_hidden_layers": len(pattern),
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "mlp_hidden_act": "relu2",
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "mamba_num_heads": MAMBA_HEADS,
        "mamba_head_dim": MAMBA_CHANNELS,
        "mamba_n_groups": MAMBA_GROUPS,
        "n_groups": MAMBA_GROUPS,
        "ssm_state_size": STATE,
        "conv_kernel": KERNEL,
        "chunk_size": CHUNKS["nemotron_h"],
        "use_conv_bias": True,
        "mamba_ssm_cache_dtype": "float32",
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    random = _Random()
    weights = {
        "backbone.embeddings.weight": random(VOCAB, HIDDEN, scale=HIDDEN**0.5),
        "backbone.norm_f.weight": torch.ones(HIDDEN),
        "lm_head.weight": random(VOCAB, HIDDEN, scale=6.0),
    }
    for i, kind in enumerate(pattern):
        at = f"backbone.layers.{i}"
        weights[f"{at}.norm.weight"] = torch.ones(HIDDEN)
        at = f"{at}.mixer"
        if kind == "*":
            weights |= {
                f"{at}.q_proj.weight": random(HEADS * HEAD_DIM, HIDDEN, scale=1.5),
                f"{at}.k_proj.weight": random(KV_HEADS * HEAD_DIM, HIDDEN, scale=1.5),
                f"{at}.v_proj.weight": random(KV_HEADS * HEAD_DIM, HIDDEN, scale=2.0),
                f"{at}.o_proj.weight": random(HIDDEN, HEADS * HEAD_DIM, scale=4.0),
            }
        elif kind == "-":
            weights |= {
                f"{at}.up_proj.weight": random(2 * HIDDEN, HIDDEN),
                f"{at}.down_proj.weight": random(HIDDEN, 2 * HIDDEN),
            }
        else:
            weights |= {
                f"{at}.in_proj.weight": random(2 * inner + 2 * written + MAMBA_HEADS, HIDDEN),
                f"{at}.conv1d.weight": random(inner + 2 * written, 1, KERNEL, scale=2.0),
                f"{at}.conv1d.bias": random(inner + 2 * written),
                # One head forgets half of its state in a few tokens, another one in some hundred.
                f"{at}.A_log": torch.linspace(-5.0, 0.0, MAMBA_HEADS),
                f"{at}.D": torch.ones(MAMBA_HEADS),
                f"{at}.dt_bias": torch.full((MAMBA_HEADS,), -1.0),
                f"{at}.norm.weight": torch.ones(inner),
                f"{at}.out_proj.weight": random(HIDDEN, inner, scale=4.0),
            }
    return _write(folder, config, weights)
