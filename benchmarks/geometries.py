"""Models of the benchmarks by their geometry: the numbers are those of each model's `config.json`, the weights random.

A server of one needs its weights and `BESIDE` bytes, for its context, graphs, activations and workspaces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GIB = 1 << 30
BESIDE = 7 * GIB
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
    """`label` begins the names of its workloads in results; `weights` are GiB in bfloat16."""

    label: str
    weights: int
    config: dict[str, Any]

    @property
    def vocabulary(self) -> int:
        return int(self.config["vocab_size"])

    @property
    def token_bytes(self) -> int:
        """Keys and values of a token in bfloat16."""
        heads, dim = self.config["num_key_value_heads"], self.config["head_dim"]
        return int(self.config["num_hidden_layers"] * 2 * heads * dim * 2)

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
    "qwen3-30b-a3b": Geometry(
        "qwen3moe_",
        57,
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
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
        },
    ),
}
LLAMA = GEOMETRIES["llama3-8b"]
