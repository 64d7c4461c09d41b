"""What a results file must have before a table of it is shown."""

import json

import pytest

from benchmarks import evidence, report, results

RECORD = {"name": "x", "command": "python -m benchmarks.x", "commit": "0123456789ab"}


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"rows": [{"round": 1}, {"round": 2}, {"round": 3}]}, ""),
        ({"rows": [{"rounds": 3}, {"rounds": 7}]}, ""),
        ({"rows": [], "comparisons": [{"rounds": 3}]}, ""),
        ({"rows": [{"rounds": 2}, {"rounds": 7}]}, "2 rounds"),
        ({"rows": [{"round": 1}, {"round": 1}]}, "1 rounds"),
        ({"rows": [{"live_tokens": 1}, *({"round": n, "seconds": 1.0} for n in range(3))]}, ""),
        ({"rows": [{"seconds": 1.0}, *({"round": n, "seconds": 1.0} for n in range(3))]}, "no rounds"),
        ({"rows": [{"part": part, "round": n, "seconds": 1.0} for part in "ab" for n in range(3)]}, ""),
        ({"rows": [{"part": part, "round": n, "seconds": 1.0} for part in "ab" for n in range(3)][:-1]}, "2 rounds"),
        ({"rows": [], "comparisons": [{"rounds": 3}, {"rounds": 2}]}, "2 rounds"),
        ({"rows": [{}, {"rounds": 3}]}, "no rounds"),
        ({"rows": []}, "no rounds"),
        ({"rows": [{"round": n, "commit": str(n)} for n in range(3)]}, "not of one commit"),
        ({"rows": [{"rounds": 3}], "commit": "0123456789ab-dirty"}, "without changes"),
        ({"rows": [{"rounds": 3}], "commit": "0123456789ab (chat) and ba9876543210"}, "not of one commit"),
    ],
)
def test_a_file_of_few_rounds_or_of_several_commits_is_refused(more, why):
    record = RECORD | more
    if not why:
        assert evidence.check("x", record) == ""
    else:
        with pytest.raises(evidence.Refused, match=why) as refused:
            evidence.check("x", record)
        assert record["command"] in str(refused.value), "it says what to do"


def test_what_does_not_meet_this_yet_says_so_under_its_table():
    for name in evidence.NOT_YET:
        record = results.read(name)
        if record is not None:
            again = evidence.check(name, record)
            assert "To be measured again" in again
            assert report.render(f"<!-- results {name} -->\n<!-- end -->").endswith(f"{again}\n<!-- end -->")


def test_an_exception_ends_when_its_file_is_measured_anew():
    name = next(iter(evidence.NOT_YET))
    with pytest.raises(evidence.Refused, match="NOT_YET"):
        evidence.check(name, RECORD | {"rows": [{"rounds": 3}]})


def test_a_page_with_a_table_of_such_a_file_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    record = RECORD | {"name": "prefix", "rows": [], "comparisons": [{"rounds": 1}]}
    (tmp_path / "prefix.json").write_text(json.dumps(record))
    with pytest.raises(evidence.Refused, match=r"prefix\.json is refused: 1 rounds"):
        report.render("<!-- results prefix -->\n<!-- end -->")


def test_the_strongest_contestant_stands_first():
    rates = {"fa3": 2.0, "vtensor": 1.0, "triton": 9.0, "vllm": 3.0}
    compared = [
        {"workload": "chat", "among": "all", "contestant": name, "tokens_per_second": rate}
        for name, rate in rates.items()
    ]
    assert [one["contestant"] for one in report._strongest_first(compared)] == ["vllm", "fa3", "triton", "vtensor"]
