"""The page's routes: who may call them, how often the scheduler is asked, and what the page may do."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from sglang.srt.utils import auth
from starlette.testclient import TestClient

from sglang_vtensor import patches
from sglang_vtensor.srt import page
from sglang_vtensor.srt.elastic import MAP
from sglang_vtensor.srt.page import add_page


class Manager:
    """A tokenizer manager of two data-parallel ranks."""

    def __init__(self):
        self.asked = []
        self.looks = 0
        self.others = False  # whether somebody else asks before every question
        self.seconds = 0.0
        self.hangs = False
        self.wanted = False

    async def set_internal_state(self, request):
        self.asked.append(request.server_args)
        self.wanted = True
        return [True, True]

    async def get_internal_state(self):
        if self.others:
            self.got = await page.take_maps(Manager._states, self)
        return await page.take_maps(Manager._states, self)

    async def _states(self):
        self.looks += 1
        while self.hangs:
            await asyncio.sleep(0.01)
        drawn = {"map": {"first": [0]}, "history": {"age": []}, "why": None}
        told = {"page": json.dumps(drawn), "page_seconds": self.seconds} if self.wanted else {}
        self.wanted = False
        return [{"vtensor": {"dp_rank": rank, "pages_live": 5, **told}} for rank in (1, 0)]


@pytest.fixture
def manager():
    return Manager()


def client(manager, **keys):
    app = FastAPI()
    add_page(app, SimpleNamespace(tokenizer_manager=manager))
    if keys:
        auth.add_api_key_middleware(app, **keys)
    return TestClient(app)


@pytest.fixture
def hooked(monkeypatch):
    """SGLang's decision of who may do what, as it is in a server's process."""
    patch, original = patches.load(), auth.decide_request_auth
    monkeypatch.setattr(patch, "serves_page", True)
    monkeypatch.setattr(auth, "decide_request_auth", lambda **asked: patch.decide_request_auth(original, **asked))
    return patch


@pytest.mark.parametrize(
    ("keys", "given", "status"),
    [
        ({}, None, 200),
        ({"api_key": "user", "admin_api_key": None}, None, 401),
        ({"api_key": "user", "admin_api_key": None}, "user", 200),
        ({"api_key": "user", "admin_api_key": "admin"}, "user", 401),
        ({"api_key": "user", "admin_api_key": "admin"}, "admin", 200),
    ],
)
def test_the_page_needs_no_key_and_the_map_does(manager, hooked, keys, given, status):
    headers = {"Authorization": f"Bearer {given}"} if given else {}
    with client(manager, **keys) as server:
        assert server.get("/vtensor", headers=headers).status_code == 200
        assert server.get("/vtensor/map", headers=headers).status_code == status
        for method, path in (("POST", "/vtensor"), ("GET", "/vtensor/"), ("GET", "/vtensor/../v1/models")):
            answer = server.request(method, path, headers={}, follow_redirects=False)
            assert (answer.status_code == 401) == bool(keys), path
    assert manager.asked == ([{MAP: 1}] if status == 200 else [])


def test_where_there_is_no_page_the_key_is_wanted(manager, hooked, monkeypatch):
    monkeypatch.setattr(hooked, "serves_page", False)
    assert client(manager, api_key="user", admin_api_key=None).get("/vtensor").status_code == 401


def test_ranks_come_in_order_with_map_history_and_numbers(manager):
    with client(manager) as server:
        ranks = server.get("/vtensor/map").json()["ranks"]
    assert [rank["stats"]["dp_rank"] for rank in ranks] == [0, 1]
    assert ranks[0] == {
        "map": {"first": [0]},
        "history": {"age": []},
        "why": None,
        "stats": {"dp_rank": 0, "pages_live": 5},
    }


def test_many_who_look_ask_once(manager, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(page.time, "monotonic", lambda: now[0])
    with client(manager) as server:
        for _ in range(5):
            assert server.get("/vtensor/map").status_code == 200
        assert manager.looks == 1
        now[0] += page.ASK_SECONDS
        manager.seconds = 0.1
        assert server.get("/vtensor/map").status_code == 200
        now[0] += 49.0
        server.get("/vtensor/map")
        assert manager.looks == 2, "a map that takes long is made seldom"
        now[0] += 1.0
        server.get("/vtensor/map")
        assert manager.looks == 3


def test_a_rank_without_a_map_says_so_beside_the_others(manager):
    async def tells_none(request):
        return [True, True]

    manager.set_internal_state = tells_none
    with client(manager) as server:
        ranks = server.get("/vtensor/map").json()["ranks"]
    assert [(rank["map"], rank["stats"]["pages_live"]) for rank in ranks] == [(None, 5)] * 2
    assert all("told no map" in rank["why"] for rank in ranks)


def test_who_changes_something_sees_it(manager):
    app = FastAPI()
    maps = add_page(app, SimpleNamespace(tokenizer_manager=manager))
    with TestClient(app) as server:
        server.get("/vtensor/map")
        maps.stale()
        server.get("/vtensor/map")
    assert manager.looks == 2


def test_who_changes_something_while_a_map_is_made_sees_it(manager):
    async def look():
        maps = page.Maps(SimpleNamespace(tokenizer_manager=manager))
        manager.hangs = True
        first = asyncio.create_task(maps.newest())
        while not manager.looks:
            await asyncio.sleep(0)
        maps.stale()
        manager.hangs = False
        await first
        await maps.newest()

    asyncio.run(look())
    assert manager.looks == 2


def test_a_map_is_the_pages_whoever_asks_first(manager):
    """It tells the ids of requests, and `GET /server_info` wants another key."""
    manager.others = True
    with client(manager) as server:
        assert [rank["map"] for rank in server.get("/vtensor/map").json()["ranks"]] == [{"first": [0]}] * 2
    assert manager.got == [{"vtensor": {"dp_rank": rank, "pages_live": 5}} for rank in (1, 0)]


def test_a_scheduler_that_does_not_answer_is_told_of_and_asked_once(manager, monkeypatch):
    monkeypatch.setattr(page, "PATIENCE_SECONDS", 0.05)
    manager.hangs = True
    with client(manager) as server:
        for _ in range(3):
            answer = server.get("/vtensor/map")
            assert answer.status_code == 503
            assert "did not answer" in answer.json()["error"]
        assert manager.looks == 1
        manager.hangs = False
        monkeypatch.setattr(page, "PATIENCE_SECONDS", 10)
        assert server.get("/vtensor/map").status_code == 200


def test_the_page_is_one_file_and_runs_no_script_but_its_own(manager):
    answer = client(manager).get("/vtensor")
    policy = answer.headers["content-security-policy"]
    assert "script-src 'sha256-" in policy
    assert "unsafe-eval" not in policy
    seen = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attributes):
            seen.append(tag)
            for name, value in attributes:
                assert not name.startswith("on"), "a handler in markup would not run"
                assert name not in ("src", "srcset", "href") or value == "data:,", f"{tag} {name}={value}"

    Parser().feed(answer.text)
    assert seen.count("script") == 1
    assert not re.search(r"@import|url\(", answer.text)


def test_what_a_server_sends_becomes_no_markup(manager):
    """Ids of requests are their senders'."""
    text = client(manager).get("/vtensor").text
    markup = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|srcdoc|createContextualFragment"
    assert not re.search(markup, text)


def test_a_failure_is_not_kept(manager):
    failing = threading.Event()
    failing.set()
    good = manager.get_internal_state

    async def get_internal_state():
        if failing.is_set():
            raise RuntimeError("the scheduler is gone")
        return await good()

    manager.get_internal_state = get_internal_state
    with client(manager) as server:
        with pytest.raises(RuntimeError, match="is gone"):
            server.get("/vtensor/map")
        failing.clear()
        assert server.get("/vtensor/map").status_code == 200
