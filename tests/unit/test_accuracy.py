"""The accuracy benchmark: its questions have the answers that it wants, and it counts what the servers say."""

import contextlib
import io
import json
import re
from types import SimpleNamespace

import pytest
import typer
from rich.console import Console

from benchmarks import accuracy, results


def by_words(text):
    """A tokenizer whose tokens are words."""
    return {"input_ids": text.split()}


def test_the_wanted_number_is_the_answer():
    asked = accuracy.questions(by_words, [200, 1000], documents=3)
    assert {question.kind for question in asked} == {"lookup", "arithmetic"}
    for question in asked:
        if question.kind == "lookup":
            code = re.fullmatch(r"Repeat the line of parcel ([A-Z]{3})\.", question.asked)[1]
            assert question.begun.startswith(f"Parcel {code} ")
            assert question.document.splitlines().count(f"{question.begun} {question.wanted}.") == 1
            assert question.document.count(question.wanted) == 1, "another fact would be taken for the right one"
        else:
            a, b = re.fullmatch(r"What is (\d+) plus (\d+)\?", question.asked).groups()
            assert int(question.wanted) == int(a) + int(b)


@pytest.mark.parametrize("length", [200, 1000, 4000, 6000])
def test_a_document_is_as_long_as_it_says(length):
    (document,) = {question.document for question in accuracy.questions(by_words, [length], documents=1)}
    tokens = sum(len(line.split()) + 1 for line in document.splitlines())
    assert length - accuracy.RESERVED - 12 < tokens <= length - accuracy.RESERVED


def test_facts_stand_anywhere_in_a_document():
    asked = [one for one in accuracy.questions(by_words, [4000], documents=30) if one.kind == "lookup"]
    places = [one.document.index(one.begun) / len(one.document) for one in asked]
    assert min(places) < 0.1
    assert max(places) > 0.9


def test_a_length_that_no_fact_fits_into_is_refused():
    with pytest.raises(ValueError, match="No fact fits into 82 tokens: ask for more than 82"):
        accuracy.questions(by_words, [82], documents=1)


def test_equal_arguments_give_equal_questions():
    first, again, other = (accuracy.questions(by_words, [200], 2, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("said", "right"), [("It is 345.", True), ("345", True), ("It is 1345.", False), ("It is 45.", False), ("", False)]
)
@pytest.mark.parametrize("kind", ["lookup", "arithmetic"])
def test_a_right_answer_has_the_whole_number(kind, said, right):
    assert accuracy.is_right(accuracy.Question(kind, 200, "", "", "345"), said) == right


@pytest.mark.parametrize(("kind", "right"), [("lookup", False), ("arithmetic", True)])
def test_of_a_lookup_the_first_number_counts(kind, right):
    """A model that goes on may come to any line of the document."""
    assert accuracy.is_right(accuracy.Question(kind, 200, "", "", "345"), "100.\nParcel: 345.") == right


def test_answers_are_counted_as_they_come(monkeypatch):
    """And they stand as they were asked for, whichever comes first."""
    tokenizer = SimpleNamespace(
        apply_chat_template=lambda chat, **_: {"input_ids": [int(chat[1]["content"])]},
        decode=lambda ids, **_: f"{ids[0]} ",
    )

    def post(url, json, **_):
        return SimpleNamespace(raise_for_status=lambda: None, json=lambda: {"output_ids": json["input_ids"]})

    shown = io.StringIO()
    monkeypatch.setattr(accuracy, "console", Console(file=shown, force_terminal=True, width=80))
    monkeypatch.setattr(accuracy.requests, "post", post)
    asked = [accuracy.Question("arithmetic", 200, "", str(n), str(n)) for n in range(20)]
    assert accuracy.answers("http://127.0.0.1:1", tokenizer, asked) == [str(n) for n in range(20)]
    assert re.search(r"questions answered .*100%", shown.getvalue())


@pytest.fixture
def no_servers(monkeypatch, tmp_path):
    """Servers have their names as addresses, and results a folder of their own."""

    @contextlib.contextmanager
    def server(name, *_, **__):
        yield name, 0.0

    monkeypatch.setattr(accuracy, "server", server)
    monkeypatch.setattr(accuracy, "compiled", lambda *_: None)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: by_words)
    monkeypatch.setattr(accuracy.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setenv("VTENSOR_COMMIT", "0123456789ab")


def test_right_and_same_answers_are_counted(monkeypatch, no_servers):
    def answers(url, _, asked):
        """SGLang is wrong in the first answer, and the plugin in the first two, in other words."""
        wrong = {"sglang": ["none"], "again": ["none"], "vtensor": ["nothing", "none"]}[url]
        return wrong + [question.wanted for question in asked[len(wrong) :]]

    monkeypatch.setattr(accuracy, "answers", answers)
    accuracy.main(model="some", lengths="200", documents=2, kv_cache_dtype="fp8_e4m3")
    record = results.read("accuracy_fp8_e4m3_host")
    numbers = ("questions", "sglang", "again", "vtensor", "same_again", "same_vtensor")
    assert record["rows"] == [
        {"kind": "lookup", "tokens": 200} | dict(zip(numbers, (6, 5, 5, 5, 6, 5), strict=True)),
        {"kind": "arithmetic", "tokens": 200} | dict(zip(numbers, (4, 4, 4, 3, 4, 3), strict=True)),
    ]
    summary = record["summary"]
    assert [summary[f"accuracy_{name}"] for name in ("sglang", "again", "vtensor", "same_again")] == [
        0.9,
        0.9,
        0.8,
        1.0,
    ]
    assert (summary["only_sglang_right_vs_vtensor"], summary["only_vtensor_right"]) == (1, 0)
    assert summary["likely_vtensor"] == 1.0, "one question says nothing"


def test_a_plugin_that_answers_worse_is_told(monkeypatch, no_servers):
    def answers(url, _, asked):
        return ["none" if url == "vtensor" and n < 8 else question.wanted for n, question in enumerate(asked)]

    monkeypatch.setattr(accuracy, "answers", answers)
    with pytest.raises(typer.Exit):
        accuracy.main(model="some", lengths="200", documents=2)


def test_a_server_that_fails_leaves_the_answers_of_those_before(monkeypatch, no_servers, tmp_path):
    def answers(url, _, asked):
        if url == "vtensor":
            raise RuntimeError("gone")
        return [f"{url} says {question.wanted}" for question in asked]

    monkeypatch.setattr(accuracy, "answers", answers)
    with pytest.raises(RuntimeError, match="gone"):
        accuracy.main(model="some", lengths="200", documents=1, rows_file=tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == accuracy.QUESTIONS
    assert {(row["sglang"], row["again"]) for row in rows} == {
        (f"sglang says {row['wanted']}", f"again says {row['wanted']}") for row in rows
    }


def test_how_likely_a_division_is():
    assert accuracy.likely(0, 0) == accuracy.likely(5, 5) == 1.0
    assert accuracy.likely(0, 8) == pytest.approx(2 / 2**8)
    assert accuracy.likely(8, 0) == accuracy.likely(0, 8)
    assert accuracy.likely(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
