"""Simulated hit rates are those that can be counted by hand."""

import json

import pytest

from benchmarks import hit_rates, workloads


@pytest.fixture
def arrivals(tmp_path):
    """Two blocks for all; the first request comes back whole at the end."""
    requests = [([0, 1, 2], 1324), ([0, 1, 3], 1500), ([0, 1, 2], 1324)]
    trace = tmp_path / "trace.jsonl"
    with trace.open("w") as file:
        for n, (blocks, prompt) in enumerate(requests):
            entry = {"timestamp": n, "input_length": prompt, "output_length": 40, "hash_ids": blocks}
            file.write(json.dumps(entry) + "\n")
    return workloads.read_trace(trace, 100, 1 << 30, 1.0)


@pytest.mark.parametrize(
    ("tree", "again"), [("vtensor", 1323), ("sglang-page1", 1323), ("sglang-page64", 1280), ("sglang-page128", 1280)]
)
def test_what_is_found_where_there_is_room_for_everything(arrivals, tree, again):
    """The last token of a prompt is always computed."""
    row = hit_rates.simulate(tree, hit_rates.rooms(arrivals)["everything"], arrivals)
    assert (row["prompt_tokens"], row["found_tokens"]) == (1324 + 1500 + 1324, 0 + 1024 + again)


@pytest.mark.parametrize("tree", hit_rates.TREES)
def test_a_small_cache_forgets_what_was_not_read_for_longest(arrivals, tree):
    """It has room for one request and a little: the third finds what the second had in common with it."""
    row = hit_rates.simulate(tree, 1664, arrivals)
    assert row["found_tokens"] == 2 * 1024


def test_a_request_with_too_few_blocks_is_refused(arrivals):
    with pytest.raises(ValueError, match="only 3 blocks"):
        list(hit_rates.texts([workloads.Arrival(0.0, [0, 1, 2], 1537, 1)]))
