"""Results files: what several runs become together."""

import json

import pytest
import typer

from benchmarks import gpu_tests, results


@pytest.fixture
def outcomes(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setenv("VTENSOR_COMMIT", "0123456789ab")
    here = {"commit": "0123456789ab", "device": results.device()[0]}

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


@pytest.mark.parametrize("other", [{"commit": "ba9876543210"}, {"device": "NVIDIA A100"}])
def test_runs_of_another_commit_or_device_are_refused(outcomes, other):
    first = outcomes("first", {"test": "a", "outcome": "passed"})
    second = outcomes("second", {"test": "b", "outcome": "passed"} | other)
    with pytest.raises(typer.BadParameter, match=next(iter(other.values()))):
        gpu_tests.main([first, second])
    assert results.read("gpu_tests") is None
