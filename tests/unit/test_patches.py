import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from sglang_vtensor import patches
from sglang_vtensor.layout import KVLayout
from sglang_vtensor.manager import affordable_segments
from sglang_vtensor.srt.options import Options, Refused, parse_share_or_bytes


def test_a_known_version_has_its_module():
    assert patches.load().__name__ == "sglang_vtensor.patches.v0_5_17"


def test_an_unknown_version_is_refused_with_those_there_are():
    with pytest.raises(patches.UnsupportedVersion, match=r"no patch for SGLang 9\.9\.9.*works with 0\.5\.17"):
        patches.module_name("9.9.9")


@pytest.mark.parametrize("flag", [["--kv-backend", "vtensor"], ["--kv-backend=vtensor"], []])
def test_an_unknown_version_stops_only_who_asks_for_us(flag):
    code = (
        "import sglang_vtensor.patches as p; p.MODULES = {'0.0.1': 'none'}\n"
        "from sglang_vtensor.plugin import register; register(); print('started')"
    )
    done = subprocess.run([sys.executable, "-c", code, *flag], capture_output=True, text=True, check=False)
    if flag:
        assert done.returncode == 1
        assert "no patch for SGLang 0.5.17; --kv-backend vtensor works with 0.0.1" in done.stderr
    else:
        assert done.stdout.strip() == "started", done.stderr


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.25", 0.25), ("0", 0), ("512MiB", 512 << 20), ("2g", 2 * 10**9), ("1.5 GiB", 3 << 29), ("4096B", 4096)],
)
def test_sizes_and_shares(text, value):
    assert parse_share_or_bytes(text, "--vtensor-reserve") == value


@pytest.mark.parametrize("text", ["", "-1", "5 parsecs", "1.5", "half"])
def test_nonsense_is_refused(text):
    with pytest.raises(Refused, match="--vtensor-reserve"):
        parse_share_or_bytes(text, "--vtensor-reserve")


def test_options_travel_on_what_carries_them():
    class Carrier:
        kv_backend = "vtensor"
        vtensor_idle_seconds = 3.0

    assert Options.of(Carrier()) == Options(kv_backend="vtensor", vtensor_idle_seconds=3.0)
    assert Options.of(object()) == Options()


@pytest.mark.parametrize(
    ("context", "kv_heads", "most"),
    [
        (8192, 8, 4096),
        (65_536, 8, 2044),  # 32 TiB of addresses, two segments a request
        (131_072, 8, 1023),
        (262_144, 1, 4094),  # 2^31 tokens
    ],
)
def test_long_contexts_limit_how_many_requests_run(context, kv_heads, most, monkeypatch, caplog):
    layout = KVLayout.choose(
        layers=32, kv_heads=kv_heads, head_dim=128, dtype=torch.bfloat16, granularity=2 << 20, tile_tokens=128
    )
    module = patches.load()
    monkeypatch.setattr(module, "_layout", lambda configurator: layout)
    configurator = SimpleNamespace(model_config=SimpleNamespace(context_len=context))
    assert module._limit_requests(lambda self, capacity: 4096, configurator, 10**6) == most
    assert bool(caplog.records) == (most < 4096)
    if most < 4096:
        assert f"{most} requests run at a time instead of 4096" in caplog.text
    # What is left is enough for the memory itself.
    assert affordable_segments(layout, context + 4) > most


@pytest.mark.parametrize(
    ("server_args", "wanted", "why"),
    [
        ({}, True, ""),
        ({"vtensor_shared_decode": "off"}, False, ""),
        ({"device": "cpu"}, False, ""),
        ({"prefill_attention_backend": None}, False, "attention backend was named"),
    ],
)
def test_shared_decode_says_where_it_cannot_be(server_args, wanted, why, caplog):
    args = {"device": "cuda", "prefill_attention_backend": "vtensor"} | server_args
    assert patches.load()._wants_shared_decode(SimpleNamespace(**args)) is wanted
    assert why in caplog.text
    assert bool(why) == bool(caplog.records)


def test_a_shared_decode_that_there_is_not():
    with pytest.raises(Refused, match="--vtensor-shared-decode 'on' is unknown: choose from auto, off"):
        Options(vtensor_shared_decode="on")
