"""`GET /vtensor` in a real browser, on a real server whose load changes."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import time

import pytest
import requests

from sglang_vtensor.server_client import pages_by_state, server_stats
from tests.browser import Browser, find
from tests.conversations import flush
from tests.waiting import SECONDS

#: An id that becomes an alert, or a title, if it is taken for markup.
EVIL = '<img src=x onerror="document.title=1">&lt;script&gt;"\'</td><script>document.title=2</script>'
KEY = "sesame"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    path = find()
    assert path is not None, "no Chromium here: `make browser` installs one where it is root of a Debian"
    browser = Browser(path, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(server, chromium):
    chromium.open(f"{server}/vtensor")
    chromium.wait("document.querySelectorAll('[data-stat]').length > 40")
    return chromium


@pytest.fixture(autouse=True)
def nothing_goes_wrong(page):
    yield
    # The scheduler may be late where a machine has other work. The page says so, and asks again.
    assert [problem for problem in page.problems if "status of 503" not in problem] == []
    assert page.run("document.title") == "KV memory", "an id of a request became markup"


def ask(server, tokens, new, rid=None):
    body = {"input_ids": tokens, "sampling_params": {"max_new_tokens": new, "temperature": 0, "ignore_eos": True}}
    answer = requests.post(f"{server}/generate", json=body | ({"rid": rid} if rid else {}), timeout=90)
    return answer.json()


@contextlib.contextmanager
def running(server, *asked):
    """These requests run meanwhile: `(rid, tokens)` of each. They are aborted at the end."""
    threads = [threading.Thread(target=ask, args=(server, tokens, 1500, rid)) for rid, tokens in asked]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        requests.post(f"{server}/abort_request", json={"abort_all": True}, timeout=60)
        for thread in threads:
            thread.join()


def shown(page):
    """Every number of the page: those of its lists, those of its first lines, and the squares of the map by state."""
    script = """JSON.stringify({
        stats: Object.fromEntries([...document.querySelectorAll('[data-stat]')].map(c => [c.dataset.stat, Number(c.textContent)])),
        first: Object.fromEntries([...document.querySelectorAll('[data-number]')].map(c => [c.dataset.number, Number(c.dataset.value)])),
        cells: Object.fromEntries([...document.querySelectorAll('[data-cells]')].map(c => [c.dataset.cells, Number(c.dataset.value)])),
        prefixes: [...document.querySelectorAll('.prefixes tbody tr')].map(row => ({tokens: Number(row.dataset.tokens),
            branches: Number(row.dataset.branches), saved_bytes: Number(row.dataset.saved)}))})"""  # noqa: E501
    return json.loads(page.run(script))


#: What goes on although nothing runs.
MOVING = {"scheduling_seconds", "worker_seconds", "worker_driver_seconds", "device_free_bytes"}


def equal(page, server, seconds=SECONDS):
    """Until the page tells what `/server_info` does, number by number. Returns both."""
    end = time.monotonic() + seconds
    while True:
        (rank,) = server_stats(server)
        seen = shown(page)
        wanted = {key: value for key, value in rank.items() if isinstance(value, int | float) and key not in MOVING}
        different = {key: (seen["stats"].get(key), value) for key, value in wanted.items()}
        different = {key: pair for key, pair in different.items() if pair[0] != pair[1]}
        if not different:
            break
        assert time.monotonic() < end, different
        time.sleep(0.3)
    assert seen["stats"].keys() == wanted.keys() | MOVING
    assert all(seen["stats"][key] == value for key, value in seen["first"].items() if key not in MOVING)
    states = pages_by_state(rank)
    assert {key: seen["cells"][key] for key in states} == states, "squares of the map"
    assert seen["cells"]["given_back"] == rank["pages_capacity"] + 1 - rank["pages_backed"]
    assert [row for row in seen["prefixes"] if row["branches"] > 1] == rank["shared_prefixes"]
    return seen, rank


STEM = list(range(10, 138))

#: Of a canvas: the pixel at a place of its picture.
PIXEL = """(canvas, x, y) => [...canvas.getContext('2d').getImageData(x, y, 1, 1).data]"""


def test_the_page_tells_what_server_info_tells_as_the_load_changes(page, server):
    before, _ = equal(page, server)
    for n in range(3):
        ask(server, [*STEM, 200 + n, *range(20 + n, 60 + n)], 9)
    after, rank = equal(page, server)
    # The batch in flight as a request ends computes one token more, which nobody is given.
    assert 27 <= after["stats"]["generated_tokens"] - before["stats"]["generated_tokens"] <= 30
    assert (
        after["cells"]["cached"] == before["cells"]["cached"] + rank["pages_cached"] - before["stats"]["pages_cached"]
    )
    assert after["cells"]["cached"] > before["cells"]["cached"]
    assert len(after["prefixes"]) == len(rank["shared_prefixes"]) == 1
    hits = "[...document.querySelectorAll('.numbers div')].find(d => d.textContent.includes('prompts cached'))"
    share = 100 * rank["prefix_tokens_served"] / rank["prompt_tokens"]
    assert page.run(f"{hits}.firstChild.textContent") == f"{share:.1f} %"
    assert flush(server).status_code == 200
    flushed, _ = equal(page, server)
    assert (flushed["cells"]["cached"], flushed["prefixes"]) == (0, [])


def test_running_requests_are_named_and_who_reads_a_prefix_is_told(page, server):
    ask(server, [*STEM, 7, 8, 9], 1)
    with running(server, (EVIL, [*STEM, *range(50, 90)]), ("other", [*STEM, *range(90, 140)])):
        page.wait("document.querySelectorAll('.requests tbody tr').length === 2")
        ids = page.run("[...document.querySelectorAll('.requests tbody tr')].map(row => row.cells[0].textContent)")
        assert sorted(ids) == sorted([EVIL[:48], "other"])
        assert page.run("document.querySelectorAll('main img, main script').length") == 0
        page.wait(
            "[...document.querySelectorAll('.prefixes tbody tr')].some(row => row.dataset.tokens === '128' && "
            "row.cells[3].textContent.includes('other') && row.cells[3].textContent.includes('<img src=x'))"
        )
        # The pointer goes over the last square of the map that a request has, and the page tells its runs.
        where = """(() => {
            const rank = document.querySelector('.rank'), canvas = rank.querySelector('.cells');
            const context = canvas.getContext('2d'), box = canvas.getBoundingClientRect(), step = 16;
            for (let y = 5; y < canvas.height; y += step)
                for (let x = 8; x < canvas.width; x += step) {
                    const [red, green, blue, alpha] = context.getImageData(x, y, 1, 1).data;
                    if (alpha && green > red + 40 && green > blue + 20) return [box.x + x, box.y + y];
                }
        })()"""
        marks = "[...document.querySelector('.over').getContext('2d').getImageData(0, 0, 400, 8).data]"
        assert set(page.run(marks)) == {0}, "nothing is marked"
        page.point(*page.wait(where))
        page.wait(f"new Set({marks}.filter((_, i) => i % 4 === 3)).size === 2")  # all is darker but for what is marked
        told = page.wait("document.getElementById('tip').textContent")
        assert "request" in told
        assert "runs of frames" in told
        assert "128 tokens" not in told
        assert "read by 1 more" in told
        assert "its own" in told
        page.point(1, 1)
        rate = "[...document.querySelectorAll('.numbers div')].find(d => d.textContent.includes('tokens/s'))"
        page.wait(f"Number({rate}.firstChild.textContent.replace(',', '')) > 0")
    page.wait("document.querySelectorAll('.requests tbody tr').length === 0")


def test_limit_sleep_and_wake_are_buttons(page, server):
    (rank,) = server_stats(server)
    field = "document.querySelector('.limit').value"
    page.run(f"{field} = '2'")
    page.click(".set")
    page.wait("document.querySelector('section .message').textContent.includes('did you mean 2GiB, or 2%?')")
    page.problems.clear()  # the console says 400
    page.run(f"{field} = '50%'")
    page.click(".set")
    limit = "Number(document.querySelector('[data-stat=pages_limit]').textContent)"
    page.wait(f"{limit} < {rank['pages_capacity']}")
    equal(page, server)
    page.run(f"{field} = 'all'")
    page.click(".set")
    page.wait(f"{limit} === {rank['pages_capacity']}")
    button = "document.querySelector('.sleep')"
    assert page.run(f"({button}.click(), {button}.textContent)") == "Sleep: sure?"
    page.wait(f"{button}.textContent === 'Sleep'")  # a click some seconds later is another first one
    assert not server_stats(server)[0]["sleeping"], "asked twice"
    page.run(f"({button}.click(), {button}.click())")
    page.wait("document.querySelector('.state').textContent === 'asleep'")
    asleep, rank = equal(page, server)
    assert rank["sleeping"] == 1
    assert asleep["cells"]["given_back"] == rank["pages_capacity"]
    page.click(".wake")
    page.wait("document.querySelector('.state').textContent === 'awake'")
    woken, rank = equal(page, server)
    assert woken["stats"]["limit_bytes"] == (rank["pages_capacity"] + 1) * rank["page_bytes"]


def one_rank(pages, stats):
    """What a server with so many pages, each a run of its own, tells; every third is a request's."""
    owner = [4 + (n % 3 if n % 3 < 2 else 2 + n // 3 % 400) for n in range(pages)]
    nodes = {"parent": [-1] * 400, "tokens": [128 * (n + 1) for n in range(400)], "age": [n * 1.5 for n in range(400)]}
    drawn = {"frames": 8 * pages, "lane_frames": 256, "first": [2 * n for n in range(pages)], "count": [1] * pages}
    drawn |= {"owner": owner, "nodes": nodes, "shared": [], "seconds": 0.002}
    drawn |= {"sides": [[0, 2 * pages]], "requests": {"id": ["a", "b"], "tokens": [9, 9], "node": [3, -1]}}
    ages = [2.0 * n for n in range(300)][::-1]
    each = {"generated_tokens": 100, "prompt_tokens": 40, "prefix_tokens_served": 10}
    each |= {"pages_live": 1, "pages_cached": 2, "pages_backed": 4}
    told = stats | {"pages_capacity": pages - 1, "pages_backed": pages}
    return {
        "map": drawn,
        "stats": told,
        "history": {"age": ages, **{name: [n * more for n in range(300)] for name, more in each.items()}},
    }


@pytest.fixture
def big(server):
    """What looks like a server with 10,000 pages and a key, at an address of its own."""
    (stats,) = server_stats(server)
    body = json.dumps({"ranks": [one_rank(10000, dict(stats))]}).encode()
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_OPTIONS(self):
            self.answer(b"")

        def do_GET(self):
            asked.append((self.path, self.headers.get("Authorization")))
            allowed = self.headers.get("Authorization") == f"Bearer {KEY}"
            self.answer(*((body,) if allowed else (b"{}", 401)))

        def answer(self, content, status=200):
            self.send_response(status)
            for name in ("Origin", "Headers"):
                self.send_header(f"Access-Control-Allow-{name}", "*")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}", asked
        listening.shutdown()
        thread.join()


def test_other_servers_are_on_the_same_page_and_10000_frames_are_fluid(page, server, big):
    url, asked = big
    # The address of its page, as it stands in a browser's bar.
    page.run(f"document.querySelector('#add input').value = {f'{url}/vtensor?server={server}'!r}")
    page.run("document.querySelector('#add').requestSubmit()")
    second = "document.querySelectorAll('section')[1]"
    page.wait(f"{second}.querySelector('.message').textContent.includes('wants its key')")
    assert page.run(f"{second}.querySelector('.set').disabled"), "no button without a key"
    page.problems.clear()  # the console says 401
    page.run(f"(() => {{const k = {second}.querySelector('.key'); k.value = {KEY!r}; k.onchange()}})()")
    page.wait(f"{second}.querySelectorAll('[data-stat]').length > 40")
    assert page.run("new URL(location.href).searchParams.getAll('server')") == [url]
    page.problems.clear()
    assert {path for path, _ in asked} == {"/vtensor/map"}
    first = "document.querySelectorAll('section')[0]"
    assert page.run(f"{first}.querySelector('.key').value") == "", "a key is for its own server"
    assert page.run(f"{second}.querySelector('.sides').hidden") is False
    drawn = page.run("""(() => {
        const view = servers[1].ranks[0], told = view.told, all = [];
        for (let i = 0; i < 20; i++) {
            const start = performance.now();
            view.show(told);
            all.push(performance.now() - start);
        }
        return Math.min(...all);
    })()""")
    print(f"10,000 frames are decoded and drawn in {drawn:.1f} ms")
    assert drawn < 200, "of each second"
    # What is drawn: colours of prefixes by age and by depth, the other side, and ten minutes as lines.
    node = f"""(number => {{
        const view = servers[1].ranks[0], run = view.squares.findIndex(([, , owner]) => owner === view.map.ownerOfNode(number));
        const x = view.starts[run] % view.columns * view.step, y = Math.floor(view.starts[run] / view.columns) * view.step;
        return ({PIXEL})({second}.querySelector('.cells'), x + view.step - 3, y + 1);
    }})"""  # noqa: E501
    new, old = (page.run(f"{node}({number})") for number in (2, 390))
    assert sum(new[:3]) > sum(old[:3]) + 100, "what was matched lately is brighter"
    page.run(f"(() => {{{second}.querySelector('.by').value = 'depth'; servers[1].ranks[0].draw()}})()")
    short, long = (page.run(f"{node}({number})") for number in (2, 390))
    assert short != new
    assert long[0] < short[0], "a long prefix is less red"
    cells = "servers[1].ranks[0].squares.reduce((sum, run) => sum + run[1], 0)"
    assert page.run(cells) == 10_000
    page.run(f"(() => {{{second}.querySelector('.side').value = '1'; servers[1].ranks[0].draw()}})()")
    assert page.run(cells) == 20_000, "the frames of the second side"
    number = f"[...{second}.querySelectorAll('.numbers div')].find(d => d.textContent.includes('tokens/s'))"
    assert page.run(f"{number}.firstChild.textContent") == "50"
    told = page.run(
        "(({generated, prompt, hits}) => [generated, prompt, hits])(rates(servers[1].ranks[0].told.history))"
    )
    assert [set(values) for values in told] == [{50}, {20}, {0.25}]
    for chart in range(3):
        line = f"""(() => {{
            const canvas = {second}.querySelectorAll('.charts canvas')[{chart}], context = canvas.getContext('2d');
            const data = context.getImageData(canvas.width / 2, 8, 1, canvas.height - 16).data;
            return [...data].filter((value, i) => i % 4 < 3 && value > 150).length;
        }})()"""
        assert page.run(line) > 0, f"chart {chart} has no line in its middle"
    # The server begins anew with one side, while the second one is shown.
    page.run(f"{second}.querySelector('.side').value = '1'")
    # It is looked at in the same breath: the page asks the server every second.
    shown = page.run(f"""(() => {{
        const told = servers[1].ranks[0].told, at = {second}, titles = at.getElementsByTagName('h3');
        told.map.sides = [];
        servers[1].show([told, told]);
        return [at.querySelector('.side').value, at.querySelector('.state').textContent,
                [...titles].map(h => h.hidden), titles[0].textContent];
    }})()""")
    assert shown == ["0", "awake", [False, False], "data-parallel rank 0"]
    # What the page cannot show is said so, and the buttons of a server that answers work.
    said, disabled = page.run(f"""(() => {{
        servers[1].show([{{stats: servers[1].ranks[0].stats, map: {{}}}}]);
        return [{second}.querySelector('.message').textContent, {second}.querySelector('.set').disabled];
    }})()""")
    assert said.startswith("This page cannot show")
    assert disabled is False
    page.problems.clear()  # the console says why
    page.run(f"(() => {{const k = {second}.querySelector('.key'); k.value = 'ключ'; k.onchange()}})()")
    page.wait(f"{second}.querySelector('.message').textContent.includes('no header can have')")
    for bad in ("javascript:document.title=3", "", "ftp://127.0.0.1"):
        page.run(f"document.querySelector('#add input').value = {bad!r}")
        page.run("document.querySelector('#add').requestSubmit()")
        assert "is no URL of a server" in page.run("document.getElementById('message').textContent")
    assert page.run("document.querySelectorAll('section').length") == 2
    page.run(f"{second}.querySelector('.remove').click()")
    assert page.run("document.querySelectorAll('section').length") == 1
    assert page.run("location.search") == ""
    equal(page, server)
