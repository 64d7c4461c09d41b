"""Results files: what several runs become together."""

import json

import pytest
import typer

from benchmarks import contestants, gpu_tests, merge, report, results, rounds, workloads


@pytest.fixture
def outcomes(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setenv("VTENSOR_COMMIT", "0123456789ab")
    here = {key: value for key, value in results.head().items() if key != "command"}

    def write(name, *rows):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(here | row) + "\n" for row in rows))
        return file

    return write


def test_runs_of_parts_of_the_gpu_tests_become_one(outcomes):
    first = outcomes("first", {"test": "a", "outcome": "failed"}, {"test": "b", "outcome": "passed"})
    gpu_tests.main([first, outcomes("second", {"test": "a", "outcome": "passed"})])
    record = results.read("gpu_tests")
    assert record["commit"] == "0123456789ab"
    assert record["summary"] == {"passed": 2, "failed": 0, "skipped": 0}


def test_a_test_that_ran_at_another_commit_says_so(outcomes):
    first = outcomes("first", {"test": "a", "outcome": "failed"}, {"test": "b", "outcome": "passed"})
    gpu_tests.main([first, outcomes("second", {"test": "a", "outcome": "passed", "commit": "ba9876543210"})])
    record = results.read("gpu_tests")
    assert record["commit"] == "ba9876543210"
    told = {row["test"]: (row["outcome"], row.get("commit")) for row in record["rows"]}
    assert told == {"a": ("passed", None), "b": ("passed", "0123456789ab")}


@pytest.mark.parametrize("other", [{"device": "NVIDIA A100"}, {"driver": "1.2.3"}])
def test_runs_on_another_device_are_refused(outcomes, other):
    first = outcomes("first", {"test": "a", "outcome": "passed"})
    second = outcomes("second", {"test": "b", "outcome": "passed"} | other)
    with pytest.raises(typer.BadParameter, match=next(iter(other.values()))):
        gpu_tests.main([first, second])
    assert results.read("gpu_tests") is None


HEAD = {
    "command": "python -m benchmarks.prefix",
    "commit": "0123456789ab",
    "date": "2026-11-26",
    "device": "NVIDIA H200",
    "driver": "580",
    "versions": {"sglang": "0.5.23", "torch": "2.14.1"},
}
MEASURED = {
    "seconds": 2.0,
    "requests_per_second": 1.0,
    "ttft_median_ms": 10.0,
    "ttft_p99_ms": 20.0,
    "tpot_median_ms": 5.0,
    "cached_share": 0.5,
    "mapping_share": 0.01,
    "kv_tokens": 1024,
}
OURS = {"worker_seconds": 0.5, "worker_driver_seconds": 0.25, "contexts": 10, "context_runs": 19, "broken_runs": 1}
OURS |= {"pages_allocated": 20, "pages_with_memory": 15}


def measured(rates, *, run="a", workload="chat", first=1, **head):
    """Rows of a run: `rates` has tokens a second by contestant, round by round."""
    rows = []
    for number in range(len(rates["vtensor"])):
        for place, name in enumerate(rounds.rotated(list(rates), first + number)):
            row = {"workload": workload, "contestant": name, "among": ",".join(sorted(rates)), "run": run}
            row |= {"round": first + number, "place": place, "tokens_per_second": float(rates[name][number])}
            rows.append(HEAD | head | MEASURED | row | (OURS if name == "vtensor" else {}))
    return rows


def test_ratios_are_taken_within_rounds_and_the_stronger_peer_counts():
    rows = measured({"vtensor": [120, 90, 110], "fa3": [100, 100, 100], "fa3-page128": [60, 60, 60]})
    summary = rounds.summarize(rows)
    # In each round ours is measured beside its own peer: medians of ratios, not ratios of medians.
    assert [summary[f"chat_vs_fa3{end}"] for end in ("", "_least", "_most")] == [1.1, 0.9, 1.2]
    assert [summary[f"chat_vs_best{end}"] for end in ("", "_least", "_most")] == [1.1, 0.9, 1.2]
    assert summary["chat_vs_fa3-page128"] == pytest.approx(110 / 60)
    assert (summary["worker_share_worst"], summary["worker_driver_share_worst"]) == (0.25, 0.125)
    assert (summary["runs_per_context_chat"], summary["broken_runs_chat"]) == (1.9, 3)
    assert summary["pages_with_memory_chat"] == 0.75


def test_there_is_no_best_where_one_peer_was_not_measured():
    assert "chat_vs_best" not in rounds.summarize(measured({"vtensor": [2], "fa3": [1]}))


def test_pairs_that_ran_apart_are_never_mixed():
    rows = measured({"vtensor": [100], "fa3": [50]}, run="a") + measured({"vtensor": [10], "vllm": [20]}, run="b")
    summary = rounds.summarize(rows)
    assert (summary["chat_vs_fa3"], summary["chat_vs_vllm"]) == (2, 0.5)


def test_a_comparison_has_its_rounds_its_least_and_its_most():
    compared = rounds.compare(measured({"vtensor": [4, 6, 5], "fa3": [4, 3, 5]}))
    theirs, ours = compared  # ours comes last, as in the table
    assert (ours["rounds"], ours["least"], ours["tokens_per_second"], ours["most"]) == (3, 4, 5, 6)
    assert (theirs["ratio_least"], theirs["ratio"], theirs["ratio_most"]) == (1, 1, 2)
    assert ours["first"] + theirs["first"] == 3, "one of them begins each round"


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_each_contestant_goes_first_equally_often(count):
    names = [str(n) for n in range(count)]
    orders = [rounds.rotated(names, number) for number in range(1, 1 + 2 * count)]
    assert sorted(order[0] for order in orders) == sorted(2 * names)
    assert all(sorted(order) == names for order in orders)


def test_a_round_that_was_cut_off_is_left_out():
    rows = measured({"vtensor": [1, 2], "fa3": [1, 1]})[:-1]
    assert {row["round"] for row in rounds.whole(rows)} == {1}


def test_runs_become_one_file_and_later_rounds_replace_equal_ones(outcomes, tmp_path, monkeypatch):
    first = measured({"vtensor": [1, 1, 1], "fa3": [1, 1, 1]})
    others = [
        measured({"vtensor": [3, 3, 3], "vllm": [1, 1, 1]}, run="b", versions=HEAD["versions"] | {"vllm": "0.33.0"}),
        measured({"vtensor": [2, 2], "fa3": [1, 1]}, run="c", first=3, command="python -m benchmarks.prefix --first 3"),
    ]
    for name, rows in zip("abc", [first, *others], strict=True):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    merge.main([tmp_path / "a.json"], "suite")
    merge.main([tmp_path / "b.json", tmp_path / "c.json"], "suite")
    record = results.read("suite")
    assert record["versions"] == {"sglang": "0.5.23", "torch": "2.14.1", "vllm": "0.33.0"}
    assert record["command"] == "python -m benchmarks.prefix && python -m benchmarks.prefix --first 3"
    assert record["device"] == "NVIDIA H200", "where it was measured, not where it was merged"
    by_round = {(row["run"], row["round"]) for row in record["rows"] if "fa3" in row["among"]}
    assert by_round == {("a", 1), ("a", 2), ("c", 3), ("c", 4)}
    assert record["summary"]["chat_vs_vllm"] == 3
    assert report.prefix(record).count("| chat |") == 4
    merge.main([tmp_path / "c.json"], "suite")
    assert results.read("suite")["rows"] == record["rows"], "the same run again changes nothing"


def parts(monkeypatch, names, value, **head):
    """Add rows of these parts, as another command would."""
    here = HEAD | {"command": f"measure {names}"} | head
    monkeypatch.setattr(results, "head", lambda: here)
    rows = [{"part": name, "value": value} for name in names]
    return results.add_parts("parts", rows, lambda row: row["part"], lambda rows: {"rows": len(rows)})


def test_parts_become_one_file_with_all_its_commands(outcomes, monkeypatch):
    parts(monkeypatch, "ab", 1)
    parts(monkeypatch, "bc", 2)
    parts(monkeypatch, "c", 3)
    _, rows, dropped = parts(monkeypatch, "bc", 4)
    record = results.read("parts")
    assert (record["rows"], record["summary"], dropped) == (rows, {"rows": 3}, "")
    assert {row["part"]: row["value"] for row in rows} == {"a": 1, "b": 4, "c": 4}
    assert record["command"] == "measure ab && measure c && measure bc"
    parts(monkeypatch, "abc", 5)
    assert results.read("parts")["command"] == "measure abc", "what is there no more was not measured by it"


@pytest.mark.parametrize(
    "other", [{"commit": "ba9876543210"}, {"device": "NVIDIA H100"}, {"versions": {"sglang": "0.5.17"}}]
)
def test_parts_of_another_commit_device_or_version_do_not_stay(outcomes, monkeypatch, other):
    parts(monkeypatch, "ab", 1, **other)
    _, rows, dropped = parts(monkeypatch, "b", 2)
    record = results.read("parts")
    assert record["rows"] == rows == [{"part": "b", "value": 2}]
    assert (record["command"], bool(dropped)) == ("measure b", True)


@pytest.mark.parametrize(
    "other", [{"commit": "ba9876543210"}, {"device": "NVIDIA H100"}, {"versions": {"sglang": "0.5.17"}}]
)
def test_runs_that_differ_are_refused_and_older_results_of_another_kind_dropped(outcomes, tmp_path, capsys, other):
    files = [tmp_path / "old.json", tmp_path / "new.json"]
    files[0].write_text(json.dumps(measured({"vtensor": [1], "fa3": [1]}, workload="tree", **other)))
    files[1].write_text(json.dumps(measured({"vtensor": [1], "fa3": [1]})))
    with pytest.raises(typer.BadParameter, match="do not belong together"):
        merge.main(files, "suite")
    merge.main(files[:1], "suite")
    assert not capsys.readouterr().out.startswith("dropped")
    merge.main(files[1:], "suite")
    assert capsys.readouterr().out.startswith("dropped what suite.json had")
    assert {row["workload"] for row in results.read("suite")["rows"]} == {"chat"}


def test_the_workloads_fit_beside_each_other_as_documented():
    h200, h100 = 139 << 30, 79 << 30
    for kind in ("chat", "documents", "tree", "random"):
        assert contestants.capacity(h200, 3) >= workloads.TOKENS[kind]
    assert contestants.capacity(h200, 3) < workloads.TOKENS["agent"] <= contestants.capacity(h200, 2)
    assert workloads.TOKENS["agent"] <= contestants.capacity(h100, 1)
    assert contestants.capacity(h100, 4) <= 0
