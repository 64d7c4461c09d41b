"""The whole server: command line, HTTP, processes, client; started once."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import psutil
import pytest
import requests
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from typer.testing import CliRunner

from sglang_vtensor import demo, patches
from sglang_vtensor.cli import app
from sglang_vtensor.server_client import server_stats
from sglang_vtensor.srt.elastic import SLEEP, WAKE
from sglang_vtensor.srt.metrics import COUNTERS, GAUGES
from tests.conversations import flush
from tests.waiting import wait_for


def test_the_chat_of_the_demo(server):
    rows = demo.chat(Console(quiet=True), server, 3, demo.GIBBERISH)
    assert all(row["cached"] > 0 for row in rows if row["turn"] > 1)
    assert all(row["in_place"] == row["new"] for row in rows if row["turn"] > 1), "each turn goes on in place"
    assert rows[1]["shared"] > 0, "the second user shares the system prompt"
    assert all(row["first"] > 0 for row in rows)
    demo.turns_table(rows)


def test_an_answer_of_the_demo_ends_with_its_first_sentence(server):
    """The tiny model says no sentences unless it is made to."""
    client = OpenAI(base_url=f"{server}/v1", api_key="none")
    create = client.chat.completions.create
    sentences = {"regex": "yes it is[.] no it is not[.] maybe"}
    client.chat.completions.create = lambda extra_body, **more: create(extra_body=extra_body | sentences, **more)
    history = [{"role": "user", "content": "is it fast"}]
    assert demo.ask(client, "default", history, 60)[:2] == ("yes it is.", False)
    text, cut, _, _ = demo.ask(client, "default", history, 2)
    assert cut, text


def test_what_prometheus_scrapes_is_what_the_server_says(server):
    quiet(server)
    deadline = time.monotonic() + 20
    while True:
        families = text_string_to_metric_families(requests.get(f"{server}/metrics", timeout=60).text)
        samples = {(s.name, s.labels.get("state", "")): s.value for family in families for s in family.samples}
        (rank,) = server_stats(server)
        wanted = {(name, ""): rank[gauge.values[""]] for name, gauge in GAUGES.items() if not gauge.label}
        wanted |= {("vtensor_pages", state): rank[key] for state, key in GAUGES["vtensor_pages"].values.items()}
        wanted |= {(f"{name}_total", ""): rank[key] for name, (key, _) in COUNTERS.items()}
        different = {key: (samples.get(key), value) for key, value in wanted.items() if samples.get(key) != value}
        # The worker may have been busy after the last update, by less than it takes to say so.
        different = {key: pair for key, pair in different.items() if "seconds" not in key[0] or pair[0] is None}
        if not different:
            break
        assert time.monotonic() < deadline, different
        time.sleep(0.5)
    assert samples["vtensor_pages_with_memory_total", ""] > 0


def test_parallel_samples_share_their_prompt(server):
    body = {
        "text": "what is a page and who owns it when two users ask about the same thing " * 5,
        "sampling_params": {"temperature": 0, "max_new_tokens": 12, "n": 3, "ignore_eos": True},
    }
    answers = requests.post(f"{server}/generate", json=body, timeout=60).json()
    assert len({answer["text"] for answer in answers}) == 1, "greedy samples differ"
    assert sum(answer["meta_info"]["cached_tokens"] > 0 for answer in answers) == 3


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["page", "segment"]}, "shared": {"type": "boolean"}},
    "required": ["name", "shared"],
    "additionalProperties": False,
}
JSON = r'\{\s*"name"\s*:\s*"(page|segment)"\s*,\s*"shared"\s*:\s*(true|false)\s*\}'


@pytest.mark.parametrize(
    ("grammar", "wanted"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}}, JSON),
        ({"regex": "(yes|no), (page|segment) [0-9]{2}"}, r"(yes|no), (page|segment) \d\d"),
        ({"ebnf": 'root ::= ("yes" | "no") " " ("page" | "segment")'}, r"(yes|no) (page|segment)"),
    ],
    ids=["json-schema", "regex", "ebnf"],
)
def test_a_grammar_is_kept_to_without_any_option(server, grammar, wanted):
    body = {"model": "default", "messages": [{"role": "user", "content": "what is a page"}], "max_tokens": 60} | grammar
    answer = requests.post(f"{server}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert re.fullmatch(wanted, choice["message"]["content"])
    assert choice["finish_reason"] == "stop"


def test_penalties_and_samples_need_no_compiler(server):
    """SGLang has compiled functions for these too."""
    params = {"temperature": 0.8, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "max_new_tokens": 8}
    answer = requests.post(f"{server}/generate", json={"text": "what is", "sampling_params": params}, timeout=60)
    assert answer.status_code == 200, answer.text


def test_bad_requests_are_answered_and_leave_nothing(server):
    long = {"input_ids": [7] * 5000, "sampling_params": {"max_new_tokens": 4}}
    answer = requests.post(f"{server}/generate", json=long, timeout=60)
    assert answer.status_code == 400
    assert "context" in answer.text
    assert requests.post(f"{server}/generate", data="{nonsense", timeout=60).status_code in (400, 422)
    assert requests.post(f"{server}/generate", json={"sampling_params": {}}, timeout=60).status_code in (400, 422)
    assert quiet(server)["requests"] == 0


def test_a_client_that_hangs_up_leaves_nothing(server):
    body = {
        "text": "tell me more about the tree",
        "stream": True,
        "sampling_params": {"max_new_tokens": 3000, "ignore_eos": True},
    }
    for _ in range(3):
        with requests.post(f"{server}/generate", json=body, stream=True, timeout=60) as answer:
            next(answer.iter_lines())
    stats = quiet(server)
    assert (stats["requests"], stats["pages_live"]) == (0, 0)


def test_many_clients_at_once(server):
    client = OpenAI(base_url=f"{server}/v1", api_key="none")

    def ask(n):
        messages = [{"role": "user", "content": "tell me more about the tree its nodes its leaves " * (n % 5 + 1)}]
        return client.chat.completions.create(model="default", messages=messages, max_tokens=10, temperature=0)

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(40)))
    assert len({answer.choices[0].message.content for answer in answers[::5]}) == 1, "one prompt, two answers"
    assert quiet(server)["pages_live"] == 0


def test_stats_on_the_command_line(server):
    shown = CliRunner().invoke(app, ["stats", "--url", server])
    assert shown.exit_code == 0
    assert "pages backed" in shown.output
    (rank,) = json.loads(CliRunner().invoke(app, ["stats", "--url", server, "--json"]).output)
    assert rank["pages_capacity"] * rank["page_tokens"] == 4096
    assert rank["pages_owned"] == rank["pages_live"] + rank["pages_cached"]
    nowhere = CliRunner().invoke(app, ["stats", "--url", f"http://127.0.0.1:{demo.free_port()}"])
    assert nowhere.exit_code == 1


def command(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_the_limit_on_the_command_line_and_over_http(server):
    quiet(server)
    stem = list(range(10, 210))
    for n in range(4):
        body = {"input_ids": [*stem, 300 + n, *range(20, 120)], "sampling_params": {"max_new_tokens": 4}}
        requests.post(f"{server}/generate", json=body, timeout=60).raise_for_status()
    (before,) = server_stats(server)
    assert before["pages_cached"] * before["page_bytes"] > 4 * before["page_bytes"]
    shown = command("limit", f"{4 * before['page_bytes']}B", "--url", server)
    assert shown.exit_code == 0, shown.output
    assert f"limit {4 * before['page_bytes'] / (1 << 20):,.1f} MiB" in shown.output
    deadline = time.monotonic() + 10
    while server_stats(server)[0]["pages_backed"] > 4:
        assert time.monotonic() < deadline, "the memory did not go back"
        time.sleep(0.05)
    long = {"input_ids": list(range(10, 400)), "sampling_params": {"max_new_tokens": 4}}
    refused = requests.post(f"{server}/generate", json=long, timeout=60)
    assert refused.status_code == 503
    assert "the server is limited to 3 (" in refused.text
    for bad, why in [("2", "did you mean 2GiB, or 2%?"), ("0", "two pages, wanted"), ("1TiB", "settled at start")]:
        shown = command("limit", bad, "--url", server)
        assert shown.exit_code == 1
        assert why in shown.stderr
    answer = requests.post(f"{server}/vtensor/limit", data='{"limit": Infinity}', timeout=60)
    assert answer.status_code == 400, answer.text
    assert command("limit", "1.0", "--url", server).exit_code == 0
    assert server_stats(server)[0]["limit_bytes"] == (before["pages_capacity"] + 1) * before["page_bytes"]
    assert requests.post(f"{server}/generate", json=long, timeout=60).status_code == 200


def test_sleep_and_wake_on_the_command_line(server):
    quiet(server)
    body = {"input_ids": list(range(10, 100)), "sampling_params": {"max_new_tokens": 8, "temperature": 0}}
    expected = requests.post(f"{server}/generate", json=body, timeout=60).json()["output_ids"]
    shown = command("sleep", "--url", server)
    assert shown.exit_code == 0, shown.output
    assert "asleep" in shown.output
    wait_for(lambda: server_stats(server)[0]["pages_backed"] == 1)
    for path in ("health", "health_generate"):
        health = requests.get(f"{server}/{path}", timeout=60)
        assert (health.status_code, health.json()["status"]) == (200, "asleep")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(requests.post, f"{server}/generate", json=body, timeout=60)
        time.sleep(1)
        assert not waiting.done(), "what arrives waits"
        assert requests.get(f"{server}/health", timeout=60).json()["status"] == "asleep"
        assert command("wake", "--url", server).exit_code == 0
        assert waiting.result().json()["output_ids"] == expected
    assert requests.get(f"{server}/health", timeout=60).content == b"", "SGLang's own check"
    nowhere = command("wake", "--url", f"http://127.0.0.1:{demo.free_port()}")
    assert nowhere.exit_code == 1
    assert "start one there" in nowhere.stderr


def test_grammars_are_compiled_and_refused_asleep_too(server):
    quiet(server)
    assert requests.post(f"{server}/vtensor/sleep", timeout=60).status_code == 200
    body = {"text": "what is a page", "sampling_params": {"max_new_tokens": 8}}

    def ask(regex):
        asked = {"rid": f"asleep-{regex}", **body, "sampling_params": {"max_new_tokens": 8, "regex": regex}}
        return requests.post(f"{server}/generate", json=asked, timeout=60)

    assert ask("(never closed").status_code == 400, "at once"
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        aborted, waiting = pool.submit(ask, "[ab]+"), pool.submit(ask, "[cd]+")

        def abort():
            """One of what has not arrived yet is not heard."""
            asked = requests.post(f"{server}/abort_request", json={"rid": "asleep-[ab]+"}, timeout=60)
            assert asked.status_code == 200
            return aborted.done()

        time.sleep(0.5)
        wait_for(abort)
        assert "abort" in aborted.result().text.lower(), "wherever it waited"
        assert not waiting.done()
        assert requests.post(f"{server}/vtensor/wake", timeout=60).status_code == 200
        assert re.fullmatch("[cd]+", waiting.result().json()["text"])
    assert quiet(server)["requests"] == 0


def test_sglangs_own_health_check_is_answered_asleep_too(server):
    """Told to sleep by SGLang's route, the server has a health check that asks for a token, which would wait."""
    quiet(server)
    for asleep in (True, False):
        asked = {"server_args": {SLEEP if asleep else WAKE: 1}}
        assert requests.post(f"{server}/set_internal_state", json=asked, timeout=60).json() == [True]
        for _ in range(2):
            assert requests.get(f"{server}/health", timeout=60).status_code == 200
        assert server_stats(server)[0]["sleeping"] == asleep
    assert quiet(server)["requests"] == 0


def test_top(server):
    quiet(server)
    nowhere = f"http://127.0.0.1:{demo.free_port()}"
    seen = []

    def nothing_changes_meanwhile():
        """The worker may give something back just then."""
        before = server_stats(server)[0]["backed_bytes"]
        told = json.loads(command("top", server, "--once", "--json", "--every", 0.2).output)
        (stats,) = server_stats(server)
        seen[:] = told[0]["ranks"][0], stats
        return stats["backed_bytes"] == before

    wait_for(nothing_changes_meanwhile)
    rank, stats = seen
    assert rank["memory_bytes"]["cached"] == stats["pages_cached"] * stats["page_bytes"]
    assert sum(rank["memory_bytes"][kind] for kind in ("live", "cached", "kept", "reserve")) == stats["backed_bytes"]
    assert 0 < rank["prefix_hit_rate"] < 1
    shown = command("top", server, nowhere, "--once", "--every", 0.2)
    assert shown.exit_code == 1, "one of them does not answer"
    assert "cached" in shown.output
    assert "no server answers" in shown.output
    assert command("top", server, "--json").exit_code == 2


def test_flush_gives_the_cache_up(server):
    assert flush(server).status_code == 200
    stats = server_stats(server)[0]
    assert (stats["pages_owned"], stats["tree_tokens"]) == (0, 0)


def test_a_demo_that_is_ended_takes_its_server_with_it(tmp_path):
    command = [sys.executable, "-m", "sglang_vtensor.cli", "demo"]
    demonstration = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"TMPDIR": str(tmp_path)})
    seen = []

    def server_is_there():
        for child in psutil.Process(demonstration.pid).children():
            with contextlib.suppress(psutil.Error):  # others come and go
                if "sglang.launch_server" in child.cmdline():
                    seen.append(child)
        return seen

    wait_for(server_is_there, 900)  # it may fetch a model first
    (server,) = seen
    demonstration.terminate()
    assert demonstration.wait(60) == 128 + signal.SIGTERM
    gone, alive = psutil.wait_procs([server], timeout=60)
    assert gone or alive[0].status() == psutil.STATUS_ZOMBIE, "ended, and nobody's to be waited for"
    assert list(tmp_path.iterdir()) == []


def test_check_on_the_command_line():
    shown = CliRunner().invoke(app, ["check"])
    assert shown.exit_code == 0, shown.output
    installed = version("sglang")
    assert f"{installed}, patch {patches.module_name(installed)}" in shown.output


def quiet(url):
    """The statistics once nothing runs any more."""
    seen = []

    def nothing_runs():
        with contextlib.suppress(requests.RequestException):
            seen[:] = server_stats(url)
        return seen and not seen[0]["requests"]

    wait_for(nothing_runs)
    return seen[0]
