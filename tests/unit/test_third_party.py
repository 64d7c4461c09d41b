"""Other people's benchmarks: their command lines, what is read of what they write, and the tokenizer that is made."""

import json
import random
import shlex
from dataclasses import replace

import pytest
import typer
from transformers import AutoTokenizer

from benchmarks import contestants, evidence, report, rounds, serving, third_party, tokenizer
from benchmarks.geometries import LLAMA
from tests.unit.test_results import HEAD, measured

TOLD = {
    "duration": 2.0,
    "completed": 4,
    "request_throughput": 2.0,
    "output_throughput": 16.0,
    "total_input_tokens": 400,
    "total_output_tokens": 32,
    "max_concurrent_requests": 3,
    "median_ttft_ms": 10.0,
    "p99_ttft_ms": 20.0,
    "median_tpot_ms": 1.0,
    "p99_tpot_ms": 2.0,
}
SGLANG = TOLD | {"total_throughput": 216.0, "errors": [""] * 4, "slo_attainment": 0.75, "request_goodput": 1.5}
SGLANG |= {"goodput_slos_ms": {"ttft": 2000.0, "tpot": 50.0}}
SGLANG |= {"ttfts": [0.01] * 4, "cache_report": {"total_cached_tokens": 100, "total_prompt_tokens": 400}}
VLLM = TOLD | {"total_token_throughput": 216.0, "failed": 0, "request_goodput": None}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer.write(folder, LLAMA.vocabulary, LLAMA.config["bos_token_id"], LLAMA.config["eos_token_id"])
    (folder / "config.json").write_text(json.dumps(LLAMA.config))
    return AutoTokenizer.from_pretrained(folder)


def test_random_tokens_are_read_as_the_same_tokens_again(made):
    rng = random.Random(1)
    words = [token for text, token in made.get_vocab().items() if text.startswith(tokenizer.SPACE) and len(text) > 1]
    tokens = rng.choices(words, k=4096)
    assert made.encode(made.decode(tokens)) == tokens
    of_all = rng.choices(range(LLAMA.vocabulary), k=4096)
    assert len(made.encode(made.decode(of_all))) == pytest.approx(4096, rel=0.01)


def test_the_tokenizer_is_as_large_as_the_model_and_each_token_is_text(made):
    assert len(made) == made.vocab_size == LLAMA.vocabulary
    assert (made.bos_token_id, made.eos_token_id) == (LLAMA.config["bos_token_id"], LLAMA.config["eos_token_id"])
    texts = made.batch_decode([[token] for token in range(LLAMA.vocabulary)])
    assert all(text and text.isascii() for text in texts)
    assert len(set(texts)) == LLAMA.vocabulary


def test_what_mooncake_writes_for_a_block_is_told_apart_by_its_first_tokens(made):
    one, other = (made.encode(f"{block}" + " ".join(["hi"] * 128)) for block in (1234, 1235))
    assert len(one) == len(other) == 130
    assert one[1] != other[1]
    assert one[2:] == other[2:]


@pytest.mark.parametrize("vocabulary", [200, 200_000])
def test_a_vocabulary_that_cannot_be_made_is_refused(tmp_path, vocabulary):
    with pytest.raises(ValueError, match=f"{vocabulary} tokens cannot be made"):
        tokenizer.write(tmp_path, vocabulary, 0, 1)


def test_a_row_is_what_upstream_says():
    row = third_party.read(json.dumps(SGLANG))
    assert (row["tokens_per_second"], row["cached_share"], row["goodput_share"]) == (216.0, 0.25, 0.75)
    assert (row["ttft_p99_ms"], row["tpot_median_ms"], row["most_at_once"]) == (20.0, 1.0, 3)
    row = third_party.read(json.dumps(VLLM))
    assert (row["tokens_per_second"], row["requests"]) == (216.0, 4)
    assert not {"cached_share", "goodput_share", "goodput_requests_per_second"} & set(row), "vLLM's client does not say"


def test_prompts_of_many_turns_are_added_up():
    told = SGLANG | {"total_input_tokens": 0, "total_throughput": 16.0, "input_lens": [50, 70, 90, 110]}
    row = third_party.read(json.dumps(told))
    assert (row["prompt_tokens"], row["tokens_per_second"]) == (320, 176.0)


@pytest.mark.parametrize(
    "told",
    [
        SGLANG | {"errors": ["", "", "", "cut off"]},
        SGLANG | {"ttfts": [0.01, 0.01, 0.0, 0.01]},  # refused in a stream, and no error for upstream's client
        VLLM | {"failed": 2},
        VLLM | {"completed": 0},
    ],
)
def test_a_run_with_failures_is_no_measurement(told):
    with pytest.raises(RuntimeError, match="requests failed or got no token"):
        third_party.read(json.dumps(told))


def test_command_lines_are_upstreams(tmp_path):
    plan = contestants.Plan(tmp_path / "model", 400, 4096, 8192, vllm_boot=tmp_path / "boot", text=True)
    out, url = tmp_path / "out.json", "http://127.0.0.1:1"
    files = {"trace": tmp_path / "trace.jsonl", "agentic": tmp_path / "agents.json"}
    made = third_party.choose("gsp,mooncake", "--mooncake-slowdown-factor 0.5", quick=False, vllm=False, **files)
    line = shlex.join(third_party.command(made["gsp"], contestants.Client(url, 400), plan, out))
    assert " -m sglang.bench_serving --backend sglang " in line
    assert " --dataset-name generated-shared-prefix " in line
    assert " --cache-report" in line
    assert f" --dataset-path {tmp_path}/trace.jsonl --mooncake-slowdown-factor 0.5" in shlex.join(
        made["mooncake"].arguments
    )
    assert str(tmp_path) not in shlex.join(third_party.shown(made["mooncake"]))
    line = shlex.join(third_party.command(made["gsp"], contestants.VllmClient(url, 400), plan, out))
    assert " --backend vllm " in line
    assert f" --served-model-name {contestants.VLLM_NAME} " in line
    assert "--cache-report" not in line
    made = third_party.choose("agentic", "", quick=False, vllm=False, **files)["agentic"]
    assert made.arguments == ("--dataset-name", "agentic-trace", "--dataset-path", str(files["agentic"]))
    for client, backend in ((contestants.Client, "sglang-oai-chat"), (contestants.VllmClient, "vllm-chat")):
        assert f" --backend {backend} " in shlex.join(third_party.command(made, client(url, 400), plan, out))
    (of_vllm,) = third_party.choose("prefix_repetition", "", quick=True, vllm=True).values()
    line = shlex.join(third_party.command(of_vllm, contestants.Client(url, 400), plan, out))
    assert f"{tmp_path}/boot python3 -m vllm.entrypoints.cli.main bench serve --backend openai" in line
    assert f" --served-model-name {plan.model} " in line


def test_servers_of_text_have_their_tokenizer_and_stream_as_they_ship(tmp_path):
    plan = contestants.Plan(tmp_path, 400, 4096, 8192)
    for text in (False, True):
        ours = serving.command(tmp_path, 1, [], {}, text=text)
        vllm = contestants.vllm_command(replace(plan, text=text), 1)
        assert ("--skip-tokenizer-init" in ours) is ("--skip-tokenizer-init" in vllm) is not text
        assert vllm[vllm.index("--stream-interval") + 1] == ("1" if text else "16")


@pytest.mark.parametrize(
    ("kinds", "why"),
    [
        *[("mooncake", "needs --trace"), ("agentic", "needs --agentic"), ("prefix_repetition", "needs vLLM")],
        ("x", "unknown"),
        ("multi_turn", f"needs --multi-turn .* with {third_party.SCRIPT}"),
    ],
)
def test_what_cannot_run_is_refused(tmp_path, kinds, why):
    for folder in (None, tmp_path):
        with pytest.raises(typer.BadParameter, match=why):
            third_party.choose(kinds, "", quick=True, vllm=False, multi_turn=folder)


CLIENT = """
import json, sys
given = dict(zip(sys.argv[1:-2:2], sys.argv[2::2]))
read = json.load(open("multi_turn.json"))
assert all(len(open(name).read().split()) > 60_000 for name in read["text_files"]), read
turn = {"ttft_ms": 10.0, "tpot_ms": 2.0, "latency_ms": 500.0, "input_num_tokens": 90, "output_num_tokens": 10}
turns = [turn | {"start_time_ms": 1000.0 + 500.0 * n} for n in range(3)]
turns[2]["ttft_ms"] = 40.0
json.dump(turns, open(sys.argv[-1], "w"))
ended = 2 if given["--url"].endswith("1") else 1
print(f"All clients exited (successfully finished {ended} out of {read['num_conversations']} conversations)")
"""


@pytest.fixture
def multi_turn(tmp_path):
    """A folder with a client that does as upstream's of many turns: three turns of two conversations."""
    folder = tmp_path / "multi_turn"
    folder.mkdir()
    (folder / third_party.CONVERSATIONS).write_text('{"num_conversations": 2, "text_files": ["book.txt"]}')
    (folder / third_party.SCRIPT).write_text(CLIENT)
    return folder


def test_conversations_run_by_upstreams_client(tmp_path, multi_turn):
    plan = contestants.Plan(tmp_path / "model", 400, 4096, 8192, host=True, text=True)
    chosen = third_party.choose("multi_turn", "", quick=False, vllm=False, multi_turn=multi_turn)
    third_party.write_conversations(multi_turn, tmp_path)
    suite = third_party.ThirdParty(["vtensor"], chosen, plan, {}, None)
    row = suite._upstream(chosen["multi_turn"], "vtensor", contestants.Client("http://127.0.0.1:1", 400))
    assert (row["seconds"], row["requests"], row["tokens_per_second"]) == (1.5, 3, 200.0)
    assert (row["ttft_median_ms"], row["tpot_p99_ms"]) == (10.0, 2.0)
    assert third_party.shown(chosen["multi_turn"])[:3] == [third_party.SCRIPT, "--input-file", "multi_turn.json"]
    with pytest.raises(RuntimeError, match="did not come to their end: finished 1 out of 2"):
        suite._upstream(chosen["multi_turn"], "vtensor", contestants.Client("http://127.0.0.1:2", 400))


def test_what_can_run_is_chosen():
    assert list(third_party.choose("", "", quick=True, vllm=False)) == ["gsp"]


def test_the_table_says_what_was_run_and_what_a_client_does_not_tell():
    rows = measured({"vtensor": [4, 6, 5], "fa3": [4, 3, 5], "vllm": [2, 2, 2]}, workload="prefix_repetition")
    for row in rows:
        row["upstream"] = "python -m vllm.entrypoints.cli.main bench serve --dataset-name prefix_repetition"
        del row["cached_share"]
    record = HEAD | {"name": "third_party", "summary": rounds.summarize(rows), "rows": rows}
    record |= {"comparisons": rounds.compare(rows)}
    table = report.third_party(record).splitlines()
    assert [line.split(" | ")[1] for line in table[2:5]] == ["fa3", "vllm", "vtensor"]
    assert all(" | not told | " in line for line in table[2:5])
    assert table[-1] == f"- prefix_repetition: `{rows[0]['upstream']}`"
    assert evidence.check("third_party", record) == ""


def test_goodput_of_upstreams_client_reaches_summary_and_page():
    rows = [
        row | third_party.read(json.dumps(SGLANG | {"request_goodput": good})) | {"upstream": "u"}
        for row, good in zip(
            measured({"vtensor": [1], "fa3": [1], "fa3-page128": [1]}, workload="mooncake"),
            (1.0, 0.5, 1.5),
            strict=True,
        )
    ]
    summary = rounds.summarize(rows)
    good = {row["contestant"]: row["goodput_requests_per_second"] for row in rows}
    assert summary["mooncake_goodput_vs_fa3"] == pytest.approx(good["vtensor"] / good["fa3"])
    assert summary["mooncake_goodput_vs_best"] == min(summary[f"mooncake_goodput_vs_{peer}"] for peer in rounds.PEERS)
    record = HEAD | {"name": "third_party", "summary": summary, "rows": rows, "comparisons": rounds.compare(rows)}
    said = "good requests/s, 75.0% of all (TTFT at most 2000 ms, TPOT at most 50 ms)"
    assert f"- mooncake, vtensor: {good['vtensor']:.2f} {said}" in report.third_party(record).splitlines()
