"""The routes under /vtensor: who may call them, and what they refuse."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse
from sglang.srt.utils.auth import add_api_key_middleware
from starlette.testclient import TestClient

from sglang_vtensor.srt import http, page
from sglang_vtensor.srt.elastic import LIMIT, SLEEP, WAKE
from sglang_vtensor.srt.http import add_routes
from tests.waiting import wait_for

PAGE = 1 << 20


class Manager:
    """A tokenizer manager of two data-parallel ranks, which notes what it is asked."""

    def __init__(self):
        self.asked = []
        self.does = True
        self.sleeping = self.is_pause = False
        self.released = []
        self.requests = 1
        self.looks = 0
        self.answers, self.answered, self.given_up = True, threading.Event(), False
        self.gracefully_exit = False

    async def get_internal_state(self):
        self.looks += 1
        if not self.answers:
            try:
                while not self.answered.is_set():
                    await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                self.given_up = True
                raise
        rank = {"page_bytes": PAGE, "capacity_bytes": 100 * PAGE, "limit_bytes": 50 * PAGE}
        rank |= {"sleeping": int(self.sleeping or bool(self.released)), "requests": self.requests}
        rank |= {"released": self.released}
        rank |= {"backed_bytes": 8 * PAGE, "live_bytes": 3 * PAGE, "cached_bytes": 4 * PAGE, "dp_rank": 0}
        return [{"vtensor": rank | {"live_bytes": 60 * PAGE, "dp_rank": 1}}, {"vtensor": rank}]  # as they answer

    async def set_internal_state(self, request):
        self.asked.append(request.server_args)
        if self.does and SLEEP in request.server_args:
            self.sleeping = True
        return [self.does, True]


@pytest.fixture
def manager():
    return Manager()


def client(manager, **keys):
    app = FastAPI()

    @app.get("/health")
    @app.get("/health_generate")
    async def check(request: Request):
        return PlainTextResponse("SGLang's own check")

    @app.post("/set_internal_state")
    async def set_internal_state():
        return PlainTextResponse("SGLang's own")

    for _ in range(2):
        add_routes(app, SimpleNamespace(tokenizer_manager=manager), keyed=bool(keys))
    assert sum(route.path == "/vtensor/limit" for route in app.routes) == 1
    if keys:
        add_api_key_middleware(app, **keys)
    return TestClient(app)


@pytest.mark.parametrize(
    ("keys", "given", "status"),
    [
        ({}, None, 200),
        ({"api_key": "user", "admin_api_key": "admin"}, None, 401),
        ({"api_key": "user", "admin_api_key": "admin"}, "user", 401),
        ({"api_key": "user", "admin_api_key": "admin"}, "admin", 200),
        ({"api_key": "user", "admin_api_key": None}, "user", 200),
        ({"api_key": "user", "admin_api_key": None}, None, 401),
    ],
)
def test_the_admin_key_guards_them(manager, keys, given, status):
    headers = {"Authorization": f"Bearer {given}"} if given else {}
    for route, body in (("limit", {"limit": "20MiB"}), ("sleep", {}), ("wake", {})):
        assert client(manager, **keys).post(f"/vtensor/{route}", json=body, headers=headers).status_code == status
    assert manager.asked == ([{LIMIT: 20 * PAGE}, {SLEEP: 1}, {WAKE: 1}] if status == 200 else [])


def test_whoever_looks_sees_what_was_just_changed(manager, monkeypatch):
    told = []

    async def newest(maps):
        told.append(maps._due)
        maps._due = 1e9
        return b"{}"

    monkeypatch.setattr(page.Maps, "newest", newest)
    server = client(manager)
    for change in (lambda: None, lambda: server.post("/vtensor/limit", json={"limit": "20MiB"}), lambda: None):
        change()
        server.get("/vtensor/map")
    assert told == [0.0, 0.0, 1e9]


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("gpu7:30000", "http://gpu7:30000", 200),
        ("gpu7:30000", "http://gpu7:30001", 200),  # the page of another server of this machine
        ("127.0.0.1:30000", "http://localhost:30001", 200),
        ("[::1]:30000", "http://127.0.0.1:30001", 200),
        ("gpu7:30000", "https://news.example", 403),
        ("127.0.0.1:30000", "https://127.0.0.1.example", 403),
        ("gpu7:30000", "null", 403),
        ("gpu7:30000", "http://localhost:30000", 403),
        ("gpu7:30000", "http://[bad", 403),
        ("[::1", "http://[::1]", 403),
        ("", "null", 403),
    ],
)
def test_without_a_key_no_page_of_another_host_commands(manager, host, origin, status):
    headers = {"Host": host, "Origin": origin}
    for route, body in (("limit", {"limit": "20MiB"}), ("sleep", {}), ("wake", {})):
        answer = client(manager).post(f"/vtensor/{route}", json=body, headers=headers)
        assert answer.status_code == status, answer.text
        assert status == 200 or f"a page of {origin} asks {host}" in answer.text
    assert manager.asked == ([{LIMIT: 20 * PAGE}, {SLEEP: 1}, {WAKE: 1}] if status == 200 else [])
    if status == 403:
        assert client(manager).get("/vtensor/map", headers=headers).status_code == 403
        assert client(manager).post("/set_internal_state", json={}, headers=headers).status_code == 403
    assert client(manager).post("/set_internal_state", json={}).text == "SGLang's own", "a program says no origin"
    keyed = client(manager, api_key="user", admin_api_key="admin")
    headers["Authorization"] = "Bearer admin"
    assert keyed.post("/vtensor/wake", headers=headers).status_code == 200, "who has the key may, from anywhere"


@pytest.mark.parametrize(
    ("given", "nbytes"),
    [("20MiB", 20 * PAGE), (f"{2 * PAGE}B", 2 * PAGE), ("0.5", 50 * PAGE), (0.5, 50 * PAGE)]
    + [(given, 100 * PAGE) for given in ("1.0", 1.0, 1, "100%", "all", "100MiB")],
)
def test_sizes_and_shares(manager, given, nbytes):
    answer = client(manager).post("/vtensor/limit", json={"limit": given})
    assert answer.status_code == 200, answer.text
    assert manager.asked == [{LIMIT: nbytes}]
    first, second = answer.json()["ranks"]
    assert (first["live_bytes"], first["cached_bytes"]) == (3 * PAGE, 4 * PAGE)
    assert "note" not in first
    assert second["note"] == f"running requests hold {60 * PAGE} bytes: memory goes back as they end"


@pytest.mark.parametrize(
    ("body", "why"),
    [(f'{{"limit": {given}}}', "give a share such as") for given in ('"5 parsecs"', '"-1"', -1, "null", "true", "[1]")]
    + [(f'{{"limit": {given}}}', "give a share such as") for given in ("Infinity", "NaN", "1e400", "9" * 1000, '"nan"')]
    + [("{}", "give a share such as"), ("[]", "give a share such as")]
    + [(f'{{"limit": {given}}}', "two pages, wanted") for given in ("0", '"0"', "1e-9", f'"{PAGE}B"')]
    + [(f'{{"limit": {given}}}', "settled at start") for given in ('"101MiB"', '"1TiB"')]
    + [('{"limit": 2}', "did you mean 2GiB, or 2%?"), (f'{{"limit": {20 * PAGE}}}', f"did you mean {20 * PAGE}B?")]
    + [('{"limit": ' + "9" * 5000 + "}", "the body is no JSON"), ("[" * 99999, "the body is no JSON")],
    ids=lambda value: value[:30],
)
def test_what_is_no_limit_is_refused(manager, body, why):
    answer = client(manager).post("/vtensor/limit", content=body)
    assert answer.status_code == 400
    assert why in answer.json()["error"]
    assert manager.asked == []


def test_what_the_scheduler_refuses_is_told(manager):
    manager.does = False
    answer = client(manager).post("/vtensor/wake")
    assert answer.status_code == 400
    assert "its log says why" in answer.json()["error"]


@pytest.fixture(params=["/health", "/health_generate"])
def path(request):
    return request.param


def test_the_health_of_a_server_that_was_never_asleep_is_sglangs_affair(manager, path):
    assert client(manager, api_key="user", admin_api_key=None).get(path).text == "SGLang's own check"
    assert manager.looks == 0, "the scheduler is not asked"


def test_a_sleeping_server_is_healthy_and_says_so(manager, path):
    server = client(manager)
    assert server.post("/vtensor/sleep").status_code == 200
    answer = server.get(path)
    assert (answer.status_code, answer.json()["status"]) == (200, "falling asleep")
    manager.requests = 0
    answer = server.get(path)
    assert (answer.status_code, answer.json()["status"]) == (200, "asleep")
    assert answer.json()["message"].startswith("healthy: ")
    manager.gracefully_exit = True
    assert server.get(path).text == "SGLang's own check", "which says 503"


def test_a_paused_server_whose_memory_is_released_is_healthy_and_says_so(manager, path):
    """SGLang's check would wait until it is continued, and say 503 after 20 seconds."""
    server = client(manager)
    manager.is_pause, manager.released = True, ["kv_cache"]
    answer = server.get(path)
    assert (answer.status_code, answer.json()["status"]) == (200, "released")
    assert answer.json()["message"].startswith("healthy: ")
    manager.released = []
    assert server.get(path).text == "SGLang's own check"
    manager.is_pause = False
    looks = manager.looks
    assert server.get(path).text == "SGLang's own check"
    assert manager.looks == looks, "the scheduler is not asked"


def test_a_server_that_woke_by_whatever_way_is_asked_no_more(manager, path):
    server = client(manager)
    server.post("/vtensor/sleep")
    manager.sleeping = False
    assert server.get(path).text == "SGLang's own check"
    looks = manager.looks
    assert server.get(path).text == "SGLang's own check"
    assert manager.looks == looks


def test_who_is_told_to_sleep_while_a_check_asks_is_seen_asleep_by_the_next_one(manager, path):
    server, look = client(manager), manager.get_internal_state
    server.post("/vtensor/sleep")
    manager.sleeping = False
    (sleep,) = (route.endpoint for route in server.app.routes if getattr(route, "path", None) == "/vtensor/sleep")

    async def awake_and_then_told():
        states = await look()
        manager.get_internal_state = look
        await sleep()
        return states

    manager.get_internal_state = awake_and_then_told
    assert server.get(path).text == "SGLang's own check"
    assert server.get(path).json()["status"] == "falling asleep"


def test_a_sleeping_scheduler_that_does_not_answer_gets_sglangs_check(manager, path, monkeypatch):
    monkeypatch.setattr(http, "HEALTH_SECONDS", 0.01)
    with client(manager) as server:
        server.post("/vtensor/sleep")
        looks = manager.looks
        manager.answers = False
        for _ in range(3):
            assert server.get(path).text == "SGLang's own check"
        assert manager.looks == looks + 1, "a question that is not answered yet is not asked again, nor given up"
        manager.answers = True
        manager.answered.set()
        wait_for(lambda: server.get(path).text != "SGLang's own check")
        assert not manager.given_up
