"""What the benchmark of rollouts makes of its cases and of its rows."""

import contextlib
import json
import statistics
from types import SimpleNamespace

import pytest

from benchmarks import contestants, logprobs, results, rollout, rounds, server_tables
from tests.unit.test_results import HEAD, measured


def test_uneven_answers_are_drawn_once_and_the_longest_is_four_times_the_median():
    case = rollout.CASES["rollout_8k_uneven"]
    lengths = case.lengths()
    assert lengths == case.lengths()
    assert len(lengths) == case.groups * case.samples
    assert max(lengths) == 2 * case.new
    assert statistics.median(lengths) == pytest.approx(max(lengths) / 4, rel=0.02)
    assert set(rollout.CASES["rollout_8k"].lengths()) == {1000}


def test_a_case_has_room_for_all_its_pages():
    case = rollout.Case(prompt=200, new=100, groups=2, samples=3)
    pages = 2 * (2 + 3 * 2)  # a prompt's; of each sample the last page of the prompt and one more
    assert case.tokens == int(128 * pages * rollout.MORE)


def test_time_a_token_is_compared_where_prompts_were_computed_before():
    rows = measured({"vtensor": [3, 3], "fa3": [1, 1], "fa3-page128": [2, 2]}, workload="rollout_8k")
    assert not [key for key in rounds.summarize(rows) if "tpot" in key]
    times = {"vtensor": 10.0, "fa3": 40.0, "fa3-page128": 30.0}
    rows = [row | {"prompt_seconds": 1.0, "tpot_median_ms": times[row["contestant"]]} for row in rows]
    summary = rounds.summarize(rows)
    assert summary["rollout_8k_vs_fa3"] == 3
    assert summary["rollout_8k_tpot_vs_fa3"] == pytest.approx(4)
    assert summary["rollout_8k_tpot_vs_best"] == pytest.approx(3)


def released(name, *, held=1000, freed=(990, 10, 10), used=(5, 7, 7)):
    return [
        {"contestant": name, "turn": turn, "held_bytes": held, "freed_bytes": free, "used_bytes": use}
        | {"release_seconds": 0.1 * (turn + 1), "resume_seconds": 0.01}
        for turn, (free, use) in enumerate(zip(freed, used, strict=True))
    ]


def test_what_releases_say():
    summary = rounds.of_releases([*released("vtensor-saver"), *released("fa3-saver", used=(5, 7, 9))])
    assert summary["freed_share"] == 0.99
    assert summary["release_seconds"] == pytest.approx(0.2)
    assert summary["leaked_bytes_3_turns"] == 0
    assert summary["leaked_bytes_3_turns_fa3"] == 2


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    return tmp_path


def of_a_case(**head):
    rows = measured({"vtensor": [2], "fa3": [1]}, workload="rollout_8k", **head)
    return [row | {"prompt_seconds": 1.0} for row in rows]


def of_releases(*names, **head):
    return [HEAD | head | row for name in names for row in released(name)]


def test_rounds_and_releases_stand_in_one_file(folder):
    rows = of_a_case()
    for run in (rows, of_releases("vtensor-saver", command="r"), [row | {"round": 2} for row in rows]):
        _, dropped = results.add_rounds("rollout", [run])
        assert not dropped
    record = results.read("rollout")
    assert [row["round"] for row in record["rows"]] == [1, 1, 2, 2]
    assert len(record["releases"]) == 3
    assert (record["summary"]["rollout_8k_vs_fa3"], record["summary"]["freed_share"]) == (2, 0.99)
    assert (record["commit"], record["command"]) == (HEAD["commit"], f"{HEAD['command']} && r")
    assert server_tables.rollout(record).count("| rollout_8k |") == 2, "with releases of one side only, none is told"
    results.add_rounds("rollout", [of_releases("fa3-saver", command="r")])
    again = results.read("rollout")
    assert (len(again["releases"]), again["command"]) == (6, record["command"])
    assert "A release frees 0.990" in server_tables.rollout(again)


@pytest.mark.parametrize("rounds_first", [True, False])
def test_what_is_of_another_commit_goes_with_either_part(folder, rounds_first):
    parts = [of_a_case, lambda **head: of_releases("vtensor-saver", **head)]
    first, second = parts if rounds_first else reversed(parts)
    results.add_rounds("rollout", [first()])
    _, dropped = results.add_rounds("rollout", [second(commit="ba9876543210")])
    record = results.read("rollout")
    assert (record["commit"], "ba9876543210" in dropped) == ("ba9876543210", True)
    assert bool(record["rows"]) is not rounds_first
    assert ("releases" in record) is ("freed_share" in record["summary"]) is rounds_first
    with pytest.raises(rounds.Differ):
        results.add_rounds("rollout", [first() + second(commit="ba9876543210")])


def test_releases_alone_make_a_file(folder):
    results.add_rounds("rollout", [of_releases("vtensor-saver")])
    assert results.read("rollout")["summary"]["freed_share"] == 0.99


def test_tokens_are_compared_until_one_differs():
    one = [[(1, -0.5), (2, -1.0), (3, -2.0)], [(7, -1.0)]]
    other = [[(1, -0.25), (2, -1.0), (4, -9.0)], [(8, -1.0)]]
    assert logprobs.differences(one, other) == [0.25, 0]
    assert logprobs.row("a", one, other)["max"] == 0.25
    with pytest.raises(RuntimeError, match="the first tokens differ already, of all 1 texts"):
        logprobs.row("a", one[1:], other[1:])


@pytest.mark.parametrize(("host", "shared"), [(False, 3), (False, 0), (True, 0)])
def test_shared_decode_that_did_not_happen_is_not_measured(tmp_path, monkeypatch, host, shared):
    @contextlib.contextmanager
    def server(name, *_, **__):
        yield name, 1.0

    waited, file = [], tmp_path / "rows.json"
    monkeypatch.setattr(logprobs, "server", server)
    monkeypatch.setattr(contestants.precompile, "wait", waited.append)
    monkeypatch.setattr(logprobs, "ask", lambda url, texts, *_, **__: [[(1, -0.5)]] * len(texts))
    monkeypatch.setattr(
        logprobs, "server_stats", lambda url: [{"decode_steps_shared": shared if url == "vtensor" else 0}]
    )
    names = logprobs.QUICK if host else logprobs.SERVERS
    fails = contextlib.nullcontext() if host or shared else pytest.raises(RuntimeError, match="shared nothing")
    with fails:
        rows = logprobs.compared(tmp_path, tmp_path, names, logprobs.SMALL, host=host, rows_file=file)
        assert [row["steps_shared"] for row in rows if row["what"] == "vtensor decode"] == [shared]
    reference = [row for row in json.loads(file.read_text()) if row["what"].startswith(names[0])]
    assert len(reference) == 2, "which was measured before"
    assert waited[0] == "vtensor", "without its kernels it shares nothing"
    if shared:
        record = HEAD | {"rows": rows}
        assert server_tables.logprobs(record).count("| 0.0000 | 0.0000 | 0.0000 |") == len(rows) == 5


def test_over_fp8_both_sides_stand_beside_one_cache_in_the_models_type(tmp_path, monkeypatch):
    started = []

    @contextlib.contextmanager
    def server(name, *_, arguments, **__):
        started.append((name, arguments[-1] if "--kv-cache-dtype" in arguments else "auto"))
        yield name, 1.0

    monkeypatch.setattr(logprobs, "server", server)
    monkeypatch.setattr(contestants.precompile, "wait", lambda _: 0)
    monkeypatch.setattr(logprobs, "ask", lambda url, texts, *_, **__: [[(1, -0.5)]] * len(texts))
    monkeypatch.setattr(logprobs, "server_stats", lambda url: [{"decode_steps_shared": 0}])
    rows = logprobs.compared(tmp_path, tmp_path, logprobs.QUICK_FP8, logprobs.SMALL, host=True)
    assert started == [("torch_native", "auto"), ("torch_native", logprobs.FP8), ("vtensor", logprobs.FP8)]
    greatest = {key for key in logprobs.summarize(rows) if "_max" in key}
    of = ["torch_native", "torch_native_prefill", "fp8_torch_native", "fp8_torch_native_prefill", "fp8", "fp8_prefill"]
    assert greatest == {f"logprob_difference_max_{name}" for name in of}


def test_log_probabilities_of_inputs_have_the_texts_own_tokens(monkeypatch):
    """SGLang names the last token of a vocabulary 0 there."""
    told = [[None, 5, None], [-0.5, 7, None], [-1.5, 0, None]]
    answer = SimpleNamespace(
        raise_for_status=lambda: None, json=lambda: [{"meta_info": {"input_token_logprobs": told}}]
    )
    monkeypatch.setattr(logprobs.requests, "post", lambda *_, **__: answer)
    assert logprobs.ask("url", [[1, 5, 7, 511]], 1, at_once=1, told_from=1) == [[(7, -0.5), (511, -1.5)]]
