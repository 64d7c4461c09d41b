import argparse
import contextlib
import copy
import json
import math
import re
import reprlib
import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from sglang_vtensor import patches
from sglang_vtensor.layout import KVLayout
from sglang_vtensor.srt import scheduling
from sglang_vtensor.srt.attention_choice import choose_attention, choose_decode, wants_shared_decode
from sglang_vtensor.srt.elastic import Elastic
from sglang_vtensor.srt.options import (
    CUDA_ATTENTION_BACKENDS,
    Options,
    Refused,
    asks_for_fp8_kv,
    kv_dtype,
    parse_share_or_bytes,
    refuse_types,
    refuse_types_of_fa3,
    takes_fa3,
)
from tests import versions


def test_a_known_version_has_its_module():
    module = patches.MODULES[version("sglang")]
    assert type(patches.load()).__module__ == f"sglang_vtensor.patches.{module}"


def test_an_unknown_version_is_refused_with_those_there_are():
    with pytest.raises(patches.UnsupportedVersion, match=r"no patch for SGLang 9\.9\.9.*works with 0\.5\.23, 0\.5\.17"):
        patches.module_name("9.9.9")


@pytest.mark.parametrize("flag", [["--kv-backend", "vtensor"], ["--kv-backend=vtensor"], []])
def test_an_unknown_version_stops_only_who_asks_for_us(flag):
    code = (
        "import sglang_vtensor.patches as p; p.MODULES = {'0.0.1': 'none'}\n"
        "from sglang_vtensor.plugin import register; register()\n"
        "from sglang.srt.entrypoints.engine import Engine\n"
        "try: Engine.server_args_class(model_path='dummy', kv_backend='vtensor')\n"
        "except ValueError as error: assert 'works with 0.0.1' in str(error)\n"
        "else: raise AssertionError('accepted')\n"
        "print('started', Engine.server_args_class(model_path='dummy', kv_backend='default').model_path)"
    )
    done = subprocess.run([sys.executable, "-c", code, *flag], capture_output=True, text=True, check=False)
    if flag:
        assert done.returncode == 1
        assert f"no patch for SGLang {version('sglang')}; --kv-backend vtensor works with 0.0.1" in done.stderr
    else:
        assert done.stdout.strip() == "started dummy", done.stderr


@pytest.mark.parametrize(
    ("given", "value"),
    [("512MiB", 512 << 20), ("2g", 2 * 10**9), ("1.5 GiB", 3 << 29), ("4096B", 4096), ("0B", 0), ("3TB", 3 * 10**12)],
)
def test_a_number_with_a_unit_is_bytes(given, value):
    size = parse_share_or_bytes(given, "--vtensor-reserve")
    assert (size, type(size)) == (value, int)


SHARES = [
    ("0.25", 0.25),
    ("1.0", 1.0),
    ("1", 1.0),
    ("0", 0.0),
    ("100%", 1.0),
    ("50%", 0.5),
    ("2.5 %", 0.025),
    ("ALL", 1.0),
]
SHARES += [(0.1, 0.1), (0, 0.0), (1, 1.0), (1.0, 1.0), (1e-9, 1e-9)]


@pytest.mark.parametrize(("given", "value"), SHARES)
def test_a_number_without_a_unit_is_a_share_and_1_is_all(given, value):
    size = parse_share_or_bytes(given, "--vtensor-reserve")
    assert (size, type(size)) == (value, float)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("2", "2GiB, or 2%"),
        (2, "2GiB, or 2%"),
        ("1.5", "1.5GiB, or 1.5%"),
        (512, "512MiB"),
        ("786432", "786432B"),
        (2.0**31, "2147483648B"),
    ],
)
def test_a_larger_number_without_a_unit_is_refused_with_what_was_meant(given, meant):
    for option in ("--vtensor-reserve", "--vtensor-min", "--vtensor-headroom"):
        with pytest.raises(Refused) as refused:
            Options("vtensor", **{option[2:].replace("-", "_"): given})
        assert str(refused.value) == (
            f"{option} {given!r} has no unit: did you mean {meant}? A number without one is a share, from 0 to 1"
        )
    for suggestion in meant.split(", or "):
        parse_share_or_bytes(suggestion, "--vtensor-reserve")


NONSENSE = [
    "",
    "-1",
    -1,
    "5 parsecs",
    "half",
    "101%",
    "1e3",
    "nan",
    math.nan,
    math.inf,
    1e300,
    10**400,
    None,
    True,
    [1],
]
NONSENSE += ["9" * 400 + "GiB"]


@pytest.mark.parametrize("given", NONSENSE, ids=reprlib.repr)
def test_nonsense_is_refused(given):
    with pytest.raises(Refused, match=r"^--vtensor-reserve .{0,40}: give a share such as 0.02, 2% or all, or bytes"):
        parse_share_or_bytes(given, "--vtensor-reserve")


def test_bytes_are_whole():
    with pytest.raises(Refused, match=r"'0\.3B' is no whole number of bytes"):
        parse_share_or_bytes("0.3B", "--vtensor-reserve")


@pytest.mark.parametrize(
    ("given", "nbytes"),
    [("1.1GiB", 1181116006), ("20.3GiB", 21796959027), ("100.1MiB", 104962458), ("1.001GB", 1001000000), (".5k", 500)],
)
def test_a_size_may_have_decimals(given, nbytes):
    assert parse_share_or_bytes(given, "--vtensor-reserve") == nbytes


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.floats(1, 1e15, exclude_min=True))
def test_what_was_probably_meant_can_be_given(number):
    with pytest.raises(Refused, match="did you mean") as refused:
        parse_share_or_bytes(number, "limit")
    for meant in re.search(r"did you mean (.*)\? A number", str(refused.value))[1].split(", or "):
        parse_share_or_bytes(meant, "limit")


def test_options_travel_on_what_carries_them():
    class Carrier:
        kv_backend = "vtensor"
        vtensor_idle_seconds = 3.0

    assert Options.of(Carrier()) == Options(kv_backend="vtensor", vtensor_idle_seconds=3.0)
    assert Options.of(object()) == Options()


def test_a_reserve_that_is_given_is_kept_when_the_server_is_idle():
    page = 16 << 20
    assert Options("vtensor").reserve_pages(7000, page) == (140, 16), "a fiftieth, and 256 MiB when it is idle"
    assert Options("vtensor").reserve_pages(100, page) == (2, 2)
    assert Options("vtensor", vtensor_reserve="2%").reserve_pages(7000, page) == (140, 140)
    assert Options("vtensor", vtensor_reserve="1GiB").reserve_pages(7000, page) == (64, 64)


@pytest.fixture
def on_hopper(monkeypatch):
    from sglang.srt import platforms

    gpu = SimpleNamespace(device_name="cuda", is_out_of_tree=lambda: False)
    monkeypatch.setattr(platforms, "current_platform", gpu, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


DETERMINISTIC = [{"enable_deterministic_inference": True}, {"rl_on_policy_target": "fsdp"}]


@pytest.mark.parametrize("asked", DETERMINISTIC)
@pytest.mark.parametrize("named", [{}, {"attention_backend": "triton"}])
def test_deterministic_inference_is_left_to_sglangs_kernels(on_hopper, asked, named, caplog):
    assert choose_attention(asked | named, Options(kv_backend="vtensor")) == {}, "SGLang chooses, as without the plugin"
    option = next(iter(asked)).replace("_", "-")
    assert f"--{option}: attention is SGLang's own, by slot, and shared decode is off" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize("asked", DETERMINISTIC)
@pytest.mark.parametrize(
    ("options", "named", "message"),
    [
        ({"vtensor_prefill_kernel": "triton"}, {}, "--vtensor-prefill-kernel is not deterministic, and --"),
        ({}, {"prefill_attention_backend": "vtensor"}, "--prefill-attention-backend vtensor is not deterministic"),
    ],
)
def test_deterministic_inference_refuses_kernels_that_are_not(on_hopper, asked, options, named, message):
    with pytest.raises(Refused, match=message):
        choose_attention(asked | named, Options(kv_backend="vtensor", **options))


def test_without_deterministic_inference_extends_read_segments(on_hopper):
    given = {"enable_deterministic_inference": False, "rl_on_policy_target": None}
    assert choose_attention(given, Options(kv_backend="vtensor")) == {"prefill_attention_backend": "vtensor"}


@pytest.mark.parametrize(
    ("model_type", "capability", "given", "chosen"),
    [
        ("llama", (9, 0), {}, {}),
        ("llama", (12, 0), {}, {}),
        ("llama", (10, 0), {}, {"attention_backend": "flashinfer"}),
        ("llama", (10, 0), {"attention_backend": "triton"}, {}),
        ("llama", (10, 0), {"prefill_attention_backend": "triton"}, {"attention_backend": "flashinfer"}),
        ("llama", (10, 0), {"prefill_attention_backend": None}, {"attention_backend": "flashinfer"}),
        ("llama", (10, 0), {"decode_attention_backend": "triton"}, {}),
        ("llama", (10, 0), {"prefill_attention_backend": None, "enable_deterministic_inference": True}, {}),
        ("olmo2", (10, 0), {}, {"attention_backend": "triton"}),
        ("gpt_oss", (9, 0), {}, {"decode_attention_backend": "fa3"}),
        ("gpt_oss", (9, 0), {"kv_cache_dtype": "fp8_e5m2"}, {"decode_attention_backend": "triton"}),
        ("gpt_oss", (9, 0), {"decode_attention_backend": "triton"}, {}),
        ("gpt_oss", (8, 0), {}, {"decode_attention_backend": "triton"}),
        ("gpt_oss", (10, 0), {}, {"attention_backend": "triton", "decode_attention_backend": "triton"}),
    ],
)
def test_decode_is_by_a_kernel_that_reads_our_memory(monkeypatch, model_type, capability, given, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    settings = {"device": "cuda", "attention_backend": None, "decode_attention_backend": None, "kv_cache_dtype": "auto"}
    settings |= {"enable_deterministic_inference": False, "rl_on_policy_target": None}
    settings |= {"prefill_attention_backend": "vtensor"} | given
    model = SimpleNamespace(hf_config=SimpleNamespace(model_type=model_type))
    assert choose_decode(SimpleNamespace(**settings), model) == chosen
    assert all(name in CUDA_ATTENTION_BACKENDS for name in chosen.values())


def test_a_pool_of_another_type_than_sglang_resolved_is_refused(monkeypatch):
    """SGLang learns of a checkpoint's FP8 KV cache when its weights are there; a pool of another type would be read as
    FP8 by its kernels."""
    patch = patches.load()
    layout = KVLayout.choose(layers=2, kv_heads=2, head_dim=64, dtype=torch.bfloat16, granularity=4096, tile_tokens=1)
    monkeypatch.setattr(patch, "sides", lambda configurator: SimpleNamespace(layouts=[layout]))
    configurator = SimpleNamespace(kv_cache_dtype=torch.float8_e4m3fn)
    with pytest.raises(Refused, match=r"KV cache one of torch\.float8_e4m3fn.*for torch\.bfloat16 before: give"):
        patch.build_pool(configurator, sizes=None, req_to_token_pool=None)


@pytest.mark.parametrize(
    ("given", "asks", "dtype"),
    [
        ("auto", False, torch.bfloat16),
        ("auto", True, torch.float8_e4m3fn),
        ("bf16", True, torch.bfloat16),
        ("fp8_e4m3", False, torch.float8_e4m3fn),
        ("fp8_e5m2", True, torch.float8_e5m2),
    ],
)
def test_the_cache_has_the_type_that_was_given_or_is_asked_for(given, asks, dtype, tmp_path):
    told = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8" if asks else None}
    assert kv_dtype(SimpleNamespace(kv_cache_dtype=given, download_dir=None), checkpoint(tmp_path, told)) == dtype


def checkpoint(folder, told=None, beside=None, key="quantization_config"):
    """SGLang's `ModelConfig` of a checkpoint of Llama, quantized as `told` in its configuration, or `beside` it."""
    from sglang.srt.configs.model_config import ModelConfig

    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config if told is None else config | {key: told}))
    if beside is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps(beside))
    return ModelConfig(str(folder))


#: As most checkpoints with scales for a KV cache say so, and whether this version of SGLang listens.
STATIC = {"type": "float", "num_bits": 8, "strategy": "tensor", "symmetric": True, "dynamic": False}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": STATIC, "input_activations": STATIC}},
    "ignore": ["lm_head"],
}
LISTENS = versions.HERE != "v0_5_17"


@pytest.mark.parametrize(
    ("config", "beside", "asks"),
    [
        (None, None, False),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, None, True),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": None}, None, False),
        ({"quant_algo": "FP8", "kv_cache_scheme": {"type": "float", "num_bits": 8}}, None, True),
        ({"quant_algo": "FP8", "kv_cache_scheme": {"type": "int", "num_bits": 8}}, None, False),
        (COMPRESSED | {"kv_cache_scheme": STATIC}, None, LISTENS),
        (COMPRESSED | {"kv_cache_scheme": STATIC | {"dynamic": True}}, None, False),
        (COMPRESSED | {"kv_cache_scheme": None}, None, False),
        ({"quant_method": "fp8", "activation_scheme": "dynamic", "kv_cache_quant_algo": "FP8"}, None, LISTENS),
        ({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}, None, False),
        (None, {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}, True),
        (None, {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None}}, False),
        (None, {"quantization": {"quant_algo": "FP8", "kv_cache_scheme": {"type": "float", "num_bits": 8}}}, False),
        (None, {"quantization": {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8"}}, False),
        ({"quant_algo": "NVFP4", "kv_cache_scheme": "fp8"}, None, True),
        ({"quant_algo": "NVFP4", "kv_cache_scheme": "nvfp4", "kv_cache_quant_algo": "FP8"}, None, False),
        ({"quant_algo": "FP8", "kv_cache_scheme": "fp8"}, None, False),
        ({"quant_algo": "MXFP8", "kv_cache_quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 4}}, None, LISTENS),
    ],
)
def test_a_checkpoint_that_asks_for_an_fp8_kv_cache_is_told_apart(config, beside, asks, tmp_path):
    model = checkpoint(tmp_path, config, beside)
    before = copy.deepcopy(model.hf_config.to_dict())
    assert asks_for_fp8_kv(model) is asks
    assert model.hf_config.to_dict() == before


def test_a_checkpoint_may_ask_under_the_older_name(tmp_path):
    told = COMPRESSED | {"kv_cache_scheme": STATIC}
    assert asks_for_fp8_kv(checkpoint(tmp_path, told, key="compression_config")) is LISTENS


def test_a_checkpoint_that_sglang_cannot_read_is_left_to_it(tmp_path):
    model = checkpoint(tmp_path, COMPRESSED)
    model.quantization = "no such"
    assert not asks_for_fp8_kv(model)


@pytest.mark.parametrize(
    ("both", "prefill", "decode", "taken"),
    [
        (None, None, None, False),  # SGLang's deterministic inference has a choice of its own
        ("fa3", None, None, True),
        ("triton", None, None, False),
        (None, "fa3", "flashinfer", True),
        (None, "flashinfer", "triton", False),
        ("fa3", "flashinfer", "triton", False),
        ("triton", "flashinfer", None, False),
        (None, "flashinfer", None, "on Hopper"),
        (None, None, "triton", "on Hopper"),
        (None, "vtensor", None, "on Hopper"),
    ],
)
def test_fa3_is_taken_where_it_was_named_or_is_filled_in(both, prefill, decode, taken):
    args = SimpleNamespace(attention_backend=both, prefill_attention_backend=prefill, decode_attention_backend=decode)
    assert takes_fa3(args, (9, 0)) is bool(taken)
    assert takes_fa3(args, (8, 0)) is (taken is True)


@pytest.mark.parametrize(
    ("cache", "computed", "half", "why"),
    [
        (torch.float8_e4m3fn, torch.float16, False, "for a model of torch.bfloat16 only.*use --dtype bfloat16"),
        (torch.float8_e5m2, torch.bfloat16, True, "fa3 does not read a KV cache of fp8_e5m2: name triton"),
        (torch.float8_e5m2, torch.bfloat16, False, None),
        (torch.float8_e4m3fn, torch.bfloat16, True, None),
        (torch.float16, torch.float16, True, None),
    ],
)
def test_types_that_a_named_fa3_does_not_read_are_refused(cache, computed, half, why):
    with contextlib.nullcontext() if why is None else pytest.raises(Refused, match=why):
        refuse_types_of_fa3(cache, computed, half=half)


@pytest.mark.parametrize(
    ("cache", "computed", "capability", "why"),
    [
        (torch.bfloat16, torch.float32, (9, 0), r"--dtype torch.float32: our kernels compute in float16 and bfloat16"),
        (torch.float8_e4m3fn, torch.bfloat16, (8, 0), r"fp8_e4m3 needs sm_89 .* is sm_80: use --kv-cache-dtype fp8_e5"),
        (torch.bfloat16, torch.float16, (9, 0), r"a KV cache of torch.bfloat16 with a model of torch.float16"),
        (torch.float8_e4m3fn, torch.float16, (9, 0), r"fp8_e4m3 with a model of torch.float16: .* --dtype bfloat16"),
        (torch.float8_e4m3fn, torch.float16, (8, 9), None),
        (torch.float8_e5m2, torch.float16, (9, 0), None),
        (torch.float8_e5m2, torch.float16, (8, 0), None),
        (torch.float8_e4m3fn, torch.bfloat16, (8, 9), None),
        (torch.float16, torch.float16, (8, 0), None),
    ],
)
def test_types_that_the_kernels_do_not_read_are_refused(cache, computed, capability, why):
    with contextlib.nullcontext() if why is None else pytest.raises(Refused, match=why):
        refuse_types(cache, computed, capability)


@pytest.mark.parametrize(
    ("server_args", "wanted", "why"),
    [
        ({}, True, ""),
        ({"vtensor_shared_decode": "off"}, False, ""),
        ({"device": "cpu"}, False, ""),
        ({"prefill_attention_backend": None}, False, "attention backend was named"),
        ({"prefill_attention_backend": None, "enable_deterministic_inference": True}, False, ""),
    ],
)
def test_shared_decode_says_where_it_cannot_be(server_args, wanted, why, caplog):
    args = {"device": "cuda", "prefill_attention_backend": "vtensor", "enable_deterministic_inference": False}
    args |= server_args
    options = Options("vtensor", vtensor_shared_decode=args.pop("vtensor_shared_decode", "auto"))
    assert wants_shared_decode(SimpleNamespace(**args), options) is wanted
    assert why in caplog.text
    assert bool(why) == bool(caplog.records)


def test_shared_decode_is_off_beside_linear_attention(caplog):
    args = SimpleNamespace(device="cuda", prefill_attention_backend="vtensor", enable_deterministic_inference=False)
    assert not wants_shared_decode(args, Options("vtensor", vtensor_shared_decode="off"), states=True)
    assert not caplog.records
    assert not wants_shared_decode(args, Options("vtensor"), states=True)
    assert "Shared decode is off, as layers of this model keep states" in caplog.text


@pytest.mark.parametrize(("beside_others", "slept"), [(False, [1000]), (True, [50])])
def test_an_event_loop_sleeps_in_naps_beside_neighbours(beside_others, slept):
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.scheduler_components.idle_sleeper import IdleSleeper

    sleeper, polls = IdleSleeper([]), []
    sleeper.poller = SimpleNamespace(poll=polls.append)
    scheduler = SimpleNamespace(idle_sleeper=sleeper, vtensor_elastic=SimpleNamespace(beside_others=beside_others))
    scheduling.sleep_on_idle(Scheduler.maybe_sleep_on_idle, scheduler)
    assert polls == slept


@pytest.mark.parametrize(
    ("sleeping", "running", "waiting", "sleeps"),
    [
        (True, {}, [False], True),
        (True, {}, [False, True], False),  # one was retracted, and comes to its end
        (True, {1: None}, [False], False),
        (True, {}, [], False),  # SGLang sleeps of itself
        (False, {}, [False], False),
    ],
)
def test_an_event_loop_sleeps_while_requests_wait_for_a_sleeping_server(sleeping, running, waiting, sleeps):
    elastic = Elastic.__new__(Elastic)
    elastic.tick = lambda waiting: None
    history = SimpleNamespace(sample=lambda: None)
    elastic.runtime = SimpleNamespace(requests=running, idle=lambda: None, metrics=None, history=history, copies=[])
    elastic.sleeping, elastic.released, elastic.release_when_idle = sleeping, frozenset(), None
    called = []
    scheduler = SimpleNamespace(
        vtensor_elastic=elastic,
        waiting_queue=[SimpleNamespace(is_retracted=retracted) for retracted in waiting],
        token_to_kv_pool_allocator=SimpleNamespace(runtime=elastic.runtime),
        maybe_sleep_on_idle=lambda: called.append("sleeps"),
    )
    scheduling.on_idle(lambda self: called.append("SGLang's own"), scheduler)
    assert called == ["SGLang's own", "sleeps"][: 1 + sleeps], "health checks are answered first"


def test_without_the_option_an_event_loop_does_not_sleep():
    from sglang.srt.managers.scheduler import Scheduler

    scheduler = SimpleNamespace(idle_sleeper=None, vtensor_elastic=SimpleNamespace(beside_others=True))
    scheduling.sleep_on_idle(Scheduler.maybe_sleep_on_idle, scheduler)


def test_a_program_may_give_defaults_and_a_command_line_nothing_that_does_nothing():
    """Who starts an engine with all arguments of another one gives each of our options, at its default."""
    everything = {name: getattr(Options(), name) for name in Options.names()}
    assert Options.given(everything) == Options()
    with pytest.raises(Refused, match=r"--vtensor-min 0\.5 needs --kv-backend vtensor"):
        Options.given(everything | {"vtensor_min": "0.5"})
    with pytest.raises(Refused, match=r"--vtensor-min 0\.05 needs --kv-backend vtensor"):
        Options.parsed(argparse.Namespace(kv_backend="default", vtensor_min="0.05", model_path="model"))
    assert Options.parsed(argparse.Namespace(kv_backend="default", model_path="model")) == Options()


def test_a_shared_decode_that_there_is_not():
    with pytest.raises(Refused, match="--vtensor-shared-decode 'on' is unknown: choose from auto, off"):
        Options(vtensor_shared_decode="on")
