"""Other people's kernels: what they are told of a batch, and the table that has them beside ours."""

from types import SimpleNamespace

import torch

from benchmarks import kernel_tables, kernels, peers

HEAD = {"command": "c", "commit": "0123456789ab", "date": "2026-11-29", "device": "NVIDIA H200", "driver": "580"}
HEAD |= {"name": "shared_decode", "versions": {"sglang": "0.5.23", "torch": "2.14.1"}}


def test_levels_of_a_cascade_are_each_context_once():
    """8 requests: 4 pages for all, 2 for each 4, 3 of their own."""
    requests, page = 8, 2
    order = torch.randperm(4 + 2 * 2 + 8 * 3, dtype=torch.int32)
    each = torch.arange(requests)
    table = torch.empty(requests, 9, dtype=torch.int32)
    table[:, :4] = order[:4]
    table[:, 4:6] = order[4 + each[:, None] // 4 * 2 + torch.arange(2)]
    table[:, 6:] = order[8 + each[:, None] * 3 + torch.arange(3)]
    levels = [(8, 0, 8), (4, 8, 12), (1, 12, 18)]
    queries, starts, pages, last = peers.cascade_levels(table, levels, page)
    assert [len(one) for one in pages] == [4, 4, 24], "each page is read once"
    assert [one.tolist() for one in queries] == [[0, 8], [0, 4, 8], list(range(9))]
    assert all(set(one.tolist()) == {page} for one in last)
    for request in range(requests):
        seen = []
        for q, at, which in zip(queries, starts, pages, strict=True):
            group = int((q <= request).sum()) - 1
            seen += which[at[group] : at[group + 1]].tolist()
        assert seen == table[request].tolist()


def test_levels_of_the_cases_are_their_contexts():
    """Of two of them; the others differ in numbers only."""
    for name, levels in {
        "two_level": [(64, 0, 2048), (8, 2048, 6144), (1, 6144, 6656)],
        "no_sharing": [(1, 0, 4096)],
    }.items():
        assert kernels.levels(*kernels.SHARED[name]) == levels


def test_ratios_are_taken_round_by_round_against_the_strongest():
    seen = {"fa3_page1": [30.0, 33.0, 40.0], "cascade_page1": [20.0, 44.0, 21.0], "ours": [10.0, 11.0, 20.0]}
    row = kernels.told(seen) | kernels.against_each(seen)
    assert row["strongest"] == "cascade_page1"
    assert [row[f"cascade_page1_ratio{end}"] for end in ("", "_least", "_most")] == [2.0, 1.05, 4.0]
    assert (row["rounds"], row["ours"], row["ours_least"], row["ours_most"]) == (3, 11.0, 10.0, 20.0)
    record = HEAD | {"rows": [row | {"case": "two_level", "floor_us": 9.0, "plan_us": 4.0}], "summary": {}}
    table = kernel_tables.shared_decode(record).splitlines()
    assert table[0].split(" | ")[3:5] == ["FlashInfer's cascade, pages of 1", "FlashAttention-3, pages of 1"]
    assert table[2].endswith("| 9 us | 11 us | 21 us | 33 us | **2.00** (1.05 to 4.00) |")
    assert "Medians of 3 rounds" in table[4]


def test_a_cascade_that_does_not_compile_leaves_the_others(monkeypatch):
    def cascade(case, page, backend):
        if backend == "fa2":
            raise RuntimeError("ninja failed")
        return lambda layer: torch.full((2,), float(page != 128) + 1)

    monkeypatch.setattr(kernels, "flashinfer_cascade", cascade)
    monkeypatch.setattr(kernels, "graph", lambda call, rotation: call)
    graphs, failed = kernels.cascades(SimpleNamespace(rotation=1), lambda layer: torch.full((2,), 2.0))
    assert list(graphs) == ["cascade_page1"]
    assert failed["cascade_fa2_page1"] == failed["cascade_fa2_page128"] == "RuntimeError: ninja failed"
    assert "cascade_page128 differs" in failed["cascade_page128"]


def test_a_contestant_that_failed_in_one_case_stands_in_the_others():
    def of(case, seen):
        told = kernels.told(seen) | kernels.against_each(seen)
        return told | {"case": case, "floor_us": 1.0, "plan_us": 1.0}

    fast, slow, ours = [20.0] * 3, [30.0] * 3, [10.0] * 3
    rows = [of("two_level", {"fa3_page1": slow, "cascade_fa2_page1": fast, "ours": ours})]
    rows += [of("no_sharing", {"fa3_page1": slow, "ours": ours}) | {"failed": {"cascade_fa2_page1": "why"}}]
    summary = kernels.summarize_shared(rows)
    assert (summary["two_level_vs_best"], summary["two_level_vs_cascade"], summary["no_sharing_vs_best"]) == (2, 2, 3)
    assert "no_sharing_vs_cascade" not in summary
    table = kernel_tables.shared_decode(HEAD | {"rows": rows, "summary": summary}).splitlines()
    assert table[2].endswith("| 10 us | 20 us | 30 us | **2.00** (2.00 to 2.00) |")
    assert table[3].endswith("| 10 us | failed | 30 us | **3.00** (3.00 to 3.00) |")
