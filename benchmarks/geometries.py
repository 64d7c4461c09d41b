"""Models of the benchmarks by their geometry: the numbers are those of each model's `config.json`, but where a comment
says what is less; the weights are random.

A server of one needs its weights and `BESIDE` bytes, for its context, graphs, activations and workspaces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

GIB = 1 << 30
BESIDE = 7 * GIB
_ITEM_BYTES = {"bfloat16": 2, "float32": 4}
_COMMON = {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "hidden_act": "silu", "torch_dtype": "bfloat16"}
_QWEN3 = _COMMON | {
    "vocab_size": 151_936,
    "head_dim": 128,
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}


@dataclass(frozen=True)
class Geometry:
    """`label` begins the names of its workloads in results; `weights` are GiB in bfloat16. Of a model with linear
    attention `config` says with `full_attention_interval` which layers keep keys and values; the others keep states."""

    label: str
    weights: int
    config: dict[str, Any]

    @property
    def vocabulary(self) -> int:
        return int(self.config["vocab_size"])

    @property
    def token_bytes(self) -> int:
        """Keys and values of a token, in the layers that keep them."""
        heads, dim = self.config["num_key_value_heads"], self.config["head_dim"]
        return self._layers_with_tokens * 2 * heads * dim * _ITEM_BYTES[self.config["torch_dtype"]]

    @property
    def state_bytes(self) -> int:
        """A state of all layers with linear attention, as SGLang keeps it by default: a float32 matrix of each head of
        values, and the latest inputs of the convolution. 0 for a model without."""
        layers = self.config["num_hidden_layers"] - self._layers_with_tokens
        if not layers:
            return 0
        keys, values = (
            self.config[f"linear_num_{of}_heads"] * self.config[f"linear_{of}_head_dim"] for of in ("key", "value")
        )
        matrices = values * self.config["linear_key_head_dim"] * 4
        inputs = (2 * keys + values) * (self.config["linear_conv_kernel_dim"] - 1)
        return int(layers * (matrices + inputs * _ITEM_BYTES[self.config["torch_dtype"]]))

    @property
    def _layers_with_tokens(self) -> int:
        return int(self.config["num_hidden_layers"] // self.config.get("full_attention_interval", 1))

    @property
    def server_bytes(self) -> int:
        return self.weights * GIB + BESIDE


GEOMETRIES = {
    "llama3-8b": Geometry(
        "",
        15,
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128_256,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
    ),
    "qwen3-0.6b": Geometry(
        "qwen3_0_6b_",
        2,
        _QWEN3
        | {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
    ),
    # Half of its 48 layers, so that three servers fit on a GPU beside each other.
    "qwen3-30b-a3b": Geometry(
        "qwen3moe_",
        29,
        _QWEN3
        | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
        },
    ),
    "gpt-oss-20b": Geometry(
        "gptoss_",
        40,
        {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "vocab_size": 201_088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 24,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "experts_per_token": 4,
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"] * 12,
            "max_position_embeddings": 131_072,
            "initial_context_length": 4096,
            "rope_theta": 150000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "original_max_position_embeddings": 4096,
                "truncate": False,
            },
            "rms_norm_eps": 1e-5,
            "swiglu_limit": 7.0,
            "attention_bias": True,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "eos_token_id": 200002,
            "pad_token_id": 199999,
        },
    ),
}


def qwen3_next(layers: int) -> Geometry:
    """Qwen3-Next-80B-A3B with so many of its 48 layers, of which every fourth has full attention. All of them take 149
    GiB, more than a GPU has."""
    config = _QWEN3 | {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_hidden_layers": layers,
        "full_attention_interval": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "max_position_embeddings": 262_144,
        "partial_rotary_factor": 0.25,
        "rope_theta": 1e7,
        "tie_word_embeddings": False,
    }
    # GiB of the embeddings with the head, and of a layer, whose experts take 3.0.
    return Geometry("qwen3next_", math.ceil(1.16 + 3.07 * layers), config)


LLAMA = GEOMETRIES["llama3-8b"]
