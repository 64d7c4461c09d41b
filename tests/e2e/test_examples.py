"""The examples run as their first lines say, on the host backend and with the tiny model of the package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_vtensor.demo import free_port
from tests.harness import ON_GPU
from tests.strange_server import stranger

ROOT = Path(__file__).parents[2]
SECONDS = 1200


def ended(*command, said=b""):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    if not ON_GPU:
        environment["SGLANG_PLATFORM"] = "vtensor_host"
    done = subprocess.run(
        command, cwd=ROOT, env=environment, input=said, capture_output=True, timeout=SECONDS, check=False
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def run(*command, said=b""):
    code, shown, told = ended(*command, said=said)
    assert code == 0, shown[-2000:] + told[-3000:]
    return shown


def test_chat():
    questions = b"what is a page\nwho owns it\nsay it again\n\nthis is not asked\n"
    shown = run(sys.executable, "examples/chat.py", "--max-tokens", "12", said=questions)
    turns = re.findall(r"\[(\d+) of (\d+) prompt tokens were in memory\]", shown)
    cached, prompts = zip(*((int(cached), int(prompt)) for cached, prompt in turns), strict=True)
    assert len(turns) == 3
    for turn in (1, 2):
        # The last token of an answer is never computed: the next turn may compute it, and what stands behind it.
        assert cached[turn] >= prompts[turn - 1], "a turn finds the whole prompt of the turn before"


def test_a_chat_goes_on_behind_what_it_cannot_read():
    """The tiny model reads 4,096 tokens."""
    long = "what is a page " * 250
    questions = [long] * 4 + ["what is a page " * 1100, "wer ist das\udcfc", "who owns it"]
    shown = run(
        sys.executable,
        "examples/chat.py",
        "--max-tokens",
        "12",
        said="\n".join(questions).encode(errors="surrogateescape"),
    )
    said = [line for line in shown.splitlines() if line.startswith("[")]
    answered = [line for line in said if "prompt tokens were in memory" in line]
    assert len(answered) == 5, "four long ones and the last one"
    at = said.index("[the conversation was too long for the model: the oldest turns are forgotten, 2 of them]")
    assert said[at + 1 :] == [
        answered[3],
        said[-3],
        "[this line is not UTF-8, from its byte 0xfc on: give it again in UTF-8]",
        answered[4],
    ]
    assert re.match(r"\[this question cannot be answered: .*context length", said[-3])
    prompts = [int(re.search(r"of (\d+) prompt", line)[1]) for line in answered]
    assert prompts[3] < prompts[4] < 4096, "a question that is too long takes no turn with it"


@pytest.mark.parametrize(("example", "option"), [("chat", "--max-tokens"), ("samples", "--samples")])
def test_nothing_is_not_asked_for(example, option):
    code, shown, told = ended(sys.executable, f"examples/{example}.py", option, "0")
    assert (code, shown) == (2, "")
    assert told.endswith(f"error: {option} is 0: give 1 or more\n")


def test_samples():
    shown = run(sys.executable, "examples/samples.py", "--samples", "6", "--max-tokens", "12")
    assert shown.count("\n- ") + shown.startswith("- ") == 6
    ((served, asked),) = re.findall(r"(\d+) of (\d+) prompt tokens were not computed again", shown)
    (prompt,) = re.findall(r"6 samples of (\d+) prompt tokens", shown)
    assert int(served) >= 5 * (int(prompt) - 1), "one sample computes the prompt"
    ((pages, apart),) = re.findall(r"took (\d+) new pages.*\n.*take (\d+) pages", shown)
    assert int(pages) < int(apart) / 3
    assert int(asked) >= 6 * int(prompt)


def test_one_sample():
    shown = run(sys.executable, "examples/samples.py", "--samples", "1", "--max-tokens", "4")
    assert re.search(r"^- .*\n1 samples of \d+ prompt tokens", shown)


@pytest.mark.skipif(ON_GPU, reason="tests/gpu has the device, and its own tests of two servers")
def test_two_servers(monkeypatch):
    monkeypatch.setenv("PORT", str(free_port()))
    shown = run("bash", "examples/two_servers.sh")
    assert shown.count("has 1 neighbour") == 2, "each server knows of the other one"
    assert shown.count("answered") == 4
    assert ": asleep, " in shown


@pytest.mark.parametrize("behind", [0, 1])
def test_two_servers_take_no_other_server_for_their_own(monkeypatch, behind):
    """Neither one at the first port, nor at the second."""
    with stranger() as (port, asked):
        monkeypatch.setenv("PORT", str(port - behind))
        code, shown, told = ended("bash", "examples/two_servers.sh")
    assert (code, shown, asked) == (1, "", [])
    assert re.fullmatch(rf"port {port} cannot be had: .*Address already in use.* or give another PORT\n", told)


@pytest.mark.parametrize("port", ["65535", "0", "http"])
def test_two_servers_need_two_ports(monkeypatch, port):
    monkeypatch.setenv("PORT", port)
    code, shown, told = ended("bash", "examples/two_servers.sh")
    assert (code, shown) == (1, "")
    assert told.startswith(f"PORT is {port}: give a number from 1 to 65534")
