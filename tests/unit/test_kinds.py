"""What `benchmarks.kinds` makes of its rows, and what it gives and sends to servers."""

from __future__ import annotations

import json

import pytest
import typer

from benchmarks import kinds, sides
from benchmarks.geometries import GEOMETRIES, GIB, qwen3_next
from benchmarks.kind_models import MODELS

BOTH = pytest.mark.parametrize(("model", "key"), [("gpt-oss", "swa"), ("qwen3-next", "linear")])


def admitted(what: str, context: int, most: int, model: str = "gpt-oss") -> dict:
    return {"model": model, "part": "admitted", "what": what, "context": context, "most_running": most}


def served(model: str, beside: str, ours: list[float], theirs: list[float]) -> list[dict]:
    row = {"model": model, "part": "served", "beside": beside}
    return [
        row | {"what": what, "output_tokens_per_second": rate}
        for what, rates in (("vtensor", ours), (beside, theirs))
        for rate in rates
    ]


def moved(model: str, *shares: float) -> list[dict]:
    return [{"model": model, "part": "moved", "what": f"x{n}", "share": share} for n, share in enumerate(shares)]


@BOTH
def test_ratios_of_requests_at_once_are_a_mean_of_long_contexts(model, key):
    rows = [admitted(name, 32_768, most, model) for name, most in (("sglang", 50), ("unified", 60), ("vtensor", 100))]
    rows += [admitted(name, 2048, most, model) for name, most in (("sglang", 800), ("vtensor", 900))]
    rows += [admitted(name, 512, most, model) for name, most in (("sglang", 2000), ("vtensor", 1500))]
    summary = kinds.summarize([*rows, {"model": model, "part": "admitted", "what": "unified", "failed": "why"}])
    assert summary[f"{key}_admitted_vs_sglang"] == pytest.approx((2.0 * 1.125) ** 0.5)
    assert summary[f"{key}_admitted_vs_sglang_32768"] == 2.0
    assert summary[f"{key}_admitted_vs_sglang_512"] == 0.75, "published, and no part of the mean"
    assert summary[f"{key}_admitted_vs_unified"] == pytest.approx(100 / 60)
    assert all(name.startswith(key) for name in summary), "nothing of the other model"


def test_rounds_are_paired_and_the_slower_move_counts():
    rows = served("gpt-oss", "sglang", [110.0, 90.0, 120.0], [100.0, 100.0, 100.0])
    summary = kinds.summarize(rows + moved("gpt-oss", 0.99, 0.96))
    assert (summary["gptoss_served_vs_sglang"], summary["side_moved_share"]) == (1.1, 0.96)
    assert (summary["gptoss_served_vs_sglang_least"], summary["gptoss_served_vs_sglang_most"]) == (0.9, 1.2)


def test_the_better_split_of_sglang_counts():
    own = served("qwen3-next", "sglang", [150.0, 160.0, 155.0], [100.0, 100.0, 100.0])
    suited = served("qwen3-next", "sglang-suited", [150.0, 120.0, 130.0], [125.0, 125.0, 125.0])
    summary = kinds.summarize(own + suited)
    assert summary["qwen3next_served_vs_sglang"] == pytest.approx(1.04)
    assert summary["qwen3next_served_vs_sglang_least"] == pytest.approx(0.96)
    assert summary["qwen3next_served_vs_sglang_most"] == pytest.approx(1.2)
    for one in (own, suited):
        assert kinds.summarize(one) == {}, "before both were measured nothing is said"


def test_moves_are_of_both_models():
    assert kinds.summarize(moved("gpt-oss", 0.99) + moved("qwen3-next", 0.97, 0.98))["side_moved_share"] == 0.97


def test_what_is_held_is_a_median():
    samples = [(n / 10, [n, 100 - n]) for n in range(100)]
    samples[35] = (3.5, [999, -999])
    assert kinds.held(samples, 3.0, 4.0) == [36, 64]
    assert kinds.held(samples, 5.0, 12.0) == [74, 25]


def test_a_run_replaces_what_it_measured_and_nothing_else():
    before = [admitted("vtensor", 2048, 5), admitted("sglang", 2048, 4), admitted("vtensor", 2048, 9, "qwen3-next")]
    suited = served("qwen3-next", "sglang-suited", [1.0], [1.0])
    before += suited + served("qwen3-next", "sglang", [1.0], [1.0]) + moved("gpt-oss", 0.9, 0.8)
    new = [admitted("vtensor", 2048, 6), *served("qwen3-next", "sglang", [2.0], [2.0]), *moved("gpt-oss", 0.7)]
    anew = set(map(kinds.which, new))
    assert [row for row in before if kinds.which(row) not in anew] == [*before[1:3], *suited]


def test_the_log_of_sglang_says_how_many_run():
    lines = ["[..] Decode batch, #running-req: 12, #token: 3", "Prefill batch, #running-req: 99"]
    log = "\n".join([*lines, "Decode batch [7], #running-req: 3"])
    assert [int(found) for found in kinds.RUNNING.findall(log)] == [12, 3]


@pytest.mark.parametrize(
    ("model", "parts", "contestants", "why"),
    [
        ("llama", "", "", "there are gpt-oss, qwen3-next"),
        ("gpt-oss", "x", "", "there are admitted, served, moved"),
        ("gpt-oss", "admitted", "sglang,x", "x unknown in admitted"),
        ("gpt-oss", "served", "sglang-suited", "served has none of the contestants sglang-suited"),
        ("qwen3-next", "admitted", "sglang-suited", "admitted has none"),
        ("qwen3-next", "moved", "sglang", "moved has none"),
        ("qwen3-next", "served,moved", "sglang", "moved has none"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, parts, contestants, why):
    with pytest.raises(typer.BadParameter, match=why):
        kinds.main(parts=parts, model=model, contestants=contestants, rounds=1, quick=False, rows_file=None)


def test_contestants_of_a_part_are_chosen(tmp_path):
    def of(part: str, *only: str) -> list[str]:
        return kinds.Bench(tmp_path, MODELS["qwen3-next"], False, 1, list(only), None).contestants(part)

    assert of("admitted") == ["sglang", "unified", "vtensor"]
    assert of("served") == ["sglang", "sglang-suited"]
    assert of("served", "vtensor", "sglang-suited") == ["sglang-suited"]


def test_qwen3_next_is_what_the_table_of_sides_says():
    tokens, states = sides.MODELS["Qwen3-Next-80B-A3B"]
    whole = qwen3_next(48)
    assert whole.token_bytes == tokens.bytes_a_token(1)
    assert whole.state_bytes == states.bytes_a_state(1)
    assert GEOMETRIES["gpt-oss-20b"].state_bytes == 0
    # Its 80 billion weights, by its config.
    of = whole.config
    hidden, experts = of["hidden_size"], of["num_experts"] + 1
    layer = 3 * hidden * of["moe_intermediate_size"] * experts + hidden * experts
    full = hidden * of["head_dim"] * (3 * of["num_attention_heads"] + 2 * of["num_key_value_heads"])
    keys, values = 16 * 128, 32 * 128
    linear = hidden * (2 * keys + 3 * values + 2 * 32)
    for geometry in (whole, MODELS["qwen3-next"].alone, MODELS["qwen3-next"].pair):
        layers = geometry.config["num_hidden_layers"]
        weights = 2 * of["vocab_size"] * hidden + layers * (layer + full / 4 + linear * 3 / 4)
        assert 2 * weights / GIB <= geometry.weights < 2 * weights / GIB + 1


H200 = 143_771 << 20  # as its driver says


def test_more_requests_of_qwen3_next_are_sent_than_run():
    """With us, as with SGLang's two ways less memory is left; of a GPU of 141 GB, 0.91 of which SGLang takes."""
    model = MODELS["qwen3-next"]
    nbytes = int(0.91 * H200) - model.alone.weights * GIB
    state = 38 << 20  # in whole granules
    assert state - (2 << 20) < model.alone.state_bytes <= state
    for context, count in model.sizes.admitted.items():
        pages = -(-(context + model.sizes.answer) // 512)
        at_once = nbytes // (3 * state + pages * 512 * model.alone.token_bytes)
        assert 1.25 * at_once < count < 1.4 * at_once


def test_as_many_bytes_are_divided_as_sglang_divides_them():
    model = MODELS["qwen3-next"]
    nbytes = (H200 - 2 * model.pair.server_bytes) // 2
    assert nbytes > 11 * GIB, "two servers fit"
    state, token = model.pair.state_bytes, model.pair.token_bytes
    rooms = {}
    for name in ("sglang", "sglang-suited"):
        arguments = model.room(name, model.pair, nbytes)
        assert arguments[::2] == ["--max-mamba-cache-size", "--max-total-tokens"]
        states, tokens = rooms[name] = [int(number) for number in arguments[1::2]]
        assert nbytes - 16 * token < (states + 1) * state + tokens * token <= nbytes
    own, suited = rooms["sglang"], rooms["sglang-suited"]
    assert (own[0] + 1) * state / (own[1] * token) == pytest.approx(0.9, rel=0.01)
    assert suited[1] >= 1.25 * model.sizes.chat
    assert own[0] // 5 < 64 <= suited[0] // 5, "all conversations of the workload run at once"
    (option, ours), most = model.room("vtensor", model.pair, nbytes), (nbytes - state) / token
    assert option == "--max-total-tokens"
    assert most - 16 < int(ours) <= most


def test_windows_have_less_with_sglang():
    model, nbytes = MODELS["gpt-oss"], 10 * GIB
    ours, theirs = (int(model.room(name, model.pair, nbytes)[1]) for name in ("vtensor", "sglang"))
    assert ours * model.pair.token_bytes == pytest.approx(nbytes, rel=1e-3)
    assert theirs == pytest.approx(ours * 2 / 1.8, rel=1e-3)


def test_sglang_takes_the_config(tmp_path):
    """As that of an architecture that it knows, without weights."""
    from sglang.srt.configs.model_config import ModelConfig

    geometry = MODELS["qwen3-next"].alone
    (tmp_path / "config.json").write_text(json.dumps(geometry.config))
    model = ModelConfig(str(tmp_path))
    full = model.hf_config.full_attention_layer_ids
    assert full == list(range(3, 24, 4))
    assert (model.num_hidden_layers, model.head_dim, model.get_num_kv_heads(1)) == (24, 256, 2)
    assert geometry.token_bytes == len(full) * 2 * 2 * 256 * 2
    assert (model.context_len, model.vocab_size) == (262_144, 151_936)
