"""What SGLang offers beside plain text and runs on a GPU only."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

from tests.e2e.compare import TIE, Prompts, both
from tests.harness import Request, Scheduler


def adapter(folder, model, seed):
    """One that changes what every layer says, keys and values too."""
    config = json.loads((model / "config.json").read_text())
    hidden, dim = config["hidden_size"], config["head_dim"]
    shapes = {"q_proj": config["num_attention_heads"] * dim}
    shapes |= dict.fromkeys(("k_proj", "v_proj"), config["num_key_value_heads"] * dim)
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, rows in shapes.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{at}.lora_A.weight"] = torch.randn(8, hidden, generator=random) / hidden**0.5
            weights[f"{at}.lora_B.weight"] = torch.randn(rows, 8, generator=random) / 3
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": sorted(shapes)}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return str(folder)


def test_adapters_share_nothing_with_each_other(models, tmp_path):
    paths = [f"{name}={adapter(tmp_path / name, models['gqa'], seed)}" for seed, name in enumerate("ab")]
    args = {"enable_lora": True, "lora_paths": paths, "dtype": "bfloat16", "mem_fraction_static": 0.2}
    args |= {"cuda_graph_max_bs_decode": 4}
    tie, text = TIE["bfloat16"], Prompts(40)(300)
    with (
        Scheduler(models["gqa"], wait=False, attention_backend="fa3", page_size=128, **args) as reference,
        Scheduler(models["gqa"], wait=False, kv_backend="vtensor", **args) as ours,
    ):
        first = [Request(f"first{lora}", text, 12, lora=lora) for lora in (None, "a", "b")]
        said = [answer.tokens for answer in both(reference, ours, first, tie=tie, cached=[0, 0, 0])]
        assert said[0] != said[1] != said[2] != said[0], "the adapters do nothing"
        again = [Request(f"again{lora}", text[:270] + [7] * 20, 12, lora=lora) for lora in (None, "a", "b")]
        both(reference, ours, again, tie=tie, cached=[270, 270, 270])
