"""The accuracy benchmark: its questions have the answers that it wants, and it counts what the servers say."""

import contextlib
import re

import pytest

from benchmarks import accuracy, results


def by_words(text):
    """A tokenizer whose tokens are words."""
    return {"input_ids": text.split()}


def test_the_wanted_number_is_the_answer():
    asked = accuracy.questions(by_words, [200, 1000], documents=3)
    assert {question.kind for question in asked} == {"lookup", "arithmetic"}
    for question in asked:
        if question.kind == "lookup":
            subject = re.fullmatch(r"What is the number of the (\w+ of \w+)\?", question.asked)[1]
            assert re.findall(rf"the {subject} is (\d+)\.", question.document) == [question.wanted]
            assert question.document.count(question.wanted) == 1, "another fact would be taken for the right one"
        else:
            a, b = re.fullmatch(r"What is (\d+) plus (\d+)\?", question.asked).groups()
            assert int(question.wanted) == int(a) + int(b)


@pytest.mark.parametrize("length", [200, 1000, 4000, 6000])
def test_a_document_is_as_long_as_it_says(length):
    (document,) = {question.document for question in accuracy.questions(by_words, [length], documents=1)}
    tokens = sum(len(line.split()) + 1 for line in document.splitlines())
    assert length - accuracy.RESERVED - 12 < tokens <= length - accuracy.RESERVED


@pytest.mark.parametrize(("length", "why"), [(100_000, "fewer than 100000"), (70, "No fact fits into 70 tokens")])
def test_a_length_that_no_document_has_is_refused(length, why):
    with pytest.raises(ValueError, match=why):
        accuracy.questions(by_words, [length], documents=1)


def test_equal_arguments_give_equal_questions():
    first, again, other = (accuracy.questions(by_words, [200], 2, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("said", "right"), [("It is 345.", True), ("345", True), ("It is 1345.", False), ("It is 45.", False), ("", False)]
)
def test_a_right_answer_has_the_whole_number(said, right):
    assert accuracy.is_right(accuracy.Question("lookup", 200, "", "", "345"), said) == right


def test_right_and_same_answers_are_counted(monkeypatch, tmp_path):
    @contextlib.contextmanager
    def server(name, *_, **__):
        yield name, 0.0

    def answers(url, _, asked):
        """SGLang is wrong in the first answer, and the plugin in the first two, in other words."""
        wrong = {"sglang": ["none"], "vtensor": ["nothing", "none"]}[url]
        return wrong + [question.wanted for question in asked[len(wrong) :]]

    monkeypatch.setattr(accuracy, "server", server)
    monkeypatch.setattr(accuracy, "answers", answers)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: by_words)
    monkeypatch.setattr(accuracy.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setenv("VTENSOR_COMMIT", "0123456789ab")
    accuracy.main(model="some", lengths="200", documents=2, kv_cache_dtype="fp8_e4m3")
    record = results.read("accuracy_fp8_e4m3_host")
    assert record["rows"] == [
        {"kind": "lookup", "tokens": 200, "questions": 6, "sglang": 5, "vtensor": 5, "same": 5},
        {"kind": "arithmetic", "tokens": 200, "questions": 4, "sglang": 4, "vtensor": 3, "same": 3},
    ]
    assert record["summary"] == {
        "accuracy_questions": 10,
        "accuracy_sglang": 0.9,
        "accuracy_vtensor": 0.8,
        "accuracy_same": 0.8,
    }
