"""What cannot work is refused at start, with the option, the reason and what to use instead."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil

import pytest

from tests import versions
from tests.harness import Scheduler


@pytest.mark.parametrize(
    ("server_args", "message"),
    [
        ({"kv_backend": "paged"}, "--kv-backend 'paged' is unknown: choose from default, vtensor"),
        ({"page_size": 3}, r"--page-size 3 cannot be mapped.*Sizes that fit are the multiples of 2: 2, 4, 8, 16"),
        (
            {"kv_cache_dtype": versions.FP4},
            f"--kv-cache-dtype {versions.FP4}: its scales lie beside tokens.*Use --kv-cache-dtype fp8_e4",
        ),
        ({"enable_hierarchical_cache": True}, "--enable-hierarchical-cache: pages have no copy on the host"),
        ({"enable_mixed_chunk": True}, "--enable-mixed-chunk"),
        ({"enable_deterministic_inference": True}, "--enable-deterministic-inference on host memory: SGLang has no"),
        ({"rl_on_policy_target": "fsdp"}, "--rl-on-policy-target on host memory: SGLang has no deterministic"),
        (
            {"enable_memory_saver": True},
            "--enable-memory-saver on host memory: torch_memory_saver keeps the memory of a",
        ),
        ({"attention_backend": "triton"}, "--attention-backend triton does not run on host memory: use vtensor or"),
        ({"grammar_backend": "xgrammar"}, "--grammar-backend xgrammar needs a GPU's pinned memory.*Use llguidance"),
        ({"vtensor_reserve": "lots"}, "--vtensor-reserve 'lots': give a share such as 0.02, 2% or all, or bytes"),
        ({"vtensor_reserve": 2}, r"--vtensor-reserve 2 has no unit: did you mean 2GiB, or 2%\?"),
        ({"vtensor_idle_seconds": -1.0}, "--vtensor-idle-seconds -1.0"),
        ({"vtensor_idle_seconds": float("nan")}, "--vtensor-idle-seconds nan: give 0 or more seconds"),
        ({"vtensor_idle_seconds": "3"}, "--vtensor-idle-seconds '3': give 0 or more seconds"),
        ({"vtensor_cache_idle_seconds": float("inf")}, "--vtensor-cache-idle-seconds inf: give more than 0 seconds"),
        ({"kv_backend": "default", "attention_backend": "vtensor"}, "memory of --kv-backend vtensor: give both"),
        *(
            ({"kv_backend": "default", "page_size": size}, f"--page-size {size} needs a GPU with SGLang's own KV cache")
            for size in versions.REFUSED_PAGES
        ),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_options(models, server_args, message):
    args = {"kv_backend": "vtensor", "dtype": "bfloat16"} | server_args
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        Scheduler(models["gqa"], **args)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--vtensor-reserve 2", "--vtensor-reserve '2' has no unit: did you mean 2GiB, or 2%? A number without one is"),
        ("--vtensor-idle-seconds nan", "--vtensor-idle-seconds nan: give 0 or more seconds"),
        ("--vtensor-cache-idle-seconds inf", "--vtensor-cache-idle-seconds inf: give more than 0 seconds"),
        ("--vtensor-headroom 1000TiB", "--vtensor-headroom 1000TiB leaves the KV cache nothing of a device of "),
        ("--vtensor-reserve 900TiB", "--vtensor-reserve 900TiB is more than a device of "),
        ("--vtensor-min 900TiB", "--vtensor-min 900TiB is more than a device of "),
        (
            "--disable-radix-cache --vtensor-cache-idle-seconds 5",
            "--kv-backend vtensor does not support --vtensor-cache-idle-seconds with --disable-radix-cache: nothing",
        ),
        ("--vtensor-headroom 100%", "--vtensor-headroom 100% leaves the KV cache nothing of a device of "),
        ("--page-size 3", "--page-size 3 cannot be mapped: "),
        ("--page-size 1000000", "--page-size 1000000 is longer than the longest context, 4096 tokens: leave it out"),
        ("--max-total-tokens 8", "--max-total-tokens 8 is less than one page of 16 tokens: give more"),
        (
            "--chunked-prefill-size 1000",
            "--chunked-prefill-size 1000 is not a multiple of the page size, 16 tokens: give",
        ),
        ("--vtensor-prefill-kernel fa3", "--vtensor-prefill-kernel fa3 needs an NVIDIA GPU: on host memory"),
        ("--grammar-backend xgrammar", "--grammar-backend xgrammar needs a GPU's pinned memory: "),
        ("--enable-torch-compile", "--enable-torch-compile is for GPUs: on host memory nothing is compiled. Leave it"),
        ("--enable-mixed-chunk", "--kv-backend vtensor does not support --enable-mixed-chunk: "),
        (
            "--hicache-storage-backend file",
            "--kv-backend vtensor does not support --hicache-storage-backend: pages have",
        ),
        *((f"{option}", f"--kv-backend vtensor does not support {option}: ") for option in versions.REFUSED_OPTIONS),
        ("--kv-backend default --vtensor-min 0", "--vtensor-min 0 needs --kv-backend vtensor: give that too, or leave"),
        ("--kv-backend default --vtensor-reserve 0.02", "--vtensor-reserve 0.02 needs --kv-backend vtensor: give that"),
    ],
    ids=lambda value: value if value.startswith("--") and len(value) < 50 else "",
)
def test_a_command_ends_with_one_line(models, tmp_path, command, message):
    """`sglang serve --kv-backend vtensor ...` says what is wrong before it loads the model, and without a traceback."""
    said = tmp_path / "said"
    arguments = ["--model-path", str(models["gqa"]), "--kv-backend", "vtensor", *command.split()]
    # A child of the server that the harness has SGLang imported in.
    process = multiprocessing.get_context("forkserver").Process(target=parse, args=(arguments, said))
    process.start()
    process.join()
    assert process.exitcode == 1
    errors = [line for line in said.read_text().splitlines() if line.startswith(("error", "Traceback", "usage"))]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {message}")


def parse(arguments, said):
    """What every command of SGLang's does first; in a process of its own, which this may end."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    versions.settle(prepare_server_args(arguments))


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
                "architectures": ["Gemma2ForCausalLM"],
                "model_type": "gemma2",
                "sliding_window": 128,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            "Gemma2ForCausalLM: of models whose layers see a window, it serves GptOssForCausalLM, Gemma3",
        ),
    ],
    ids=["mla", "sliding-window"],
)
def test_models(models, tmp_path, config, message):
    model = tmp_path / "model"
    shutil.copytree(models["gqa"], model)
    plain = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(plain | config))
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        Scheduler(model, kv_backend="vtensor", dtype="bfloat16", load_format="dummy")
