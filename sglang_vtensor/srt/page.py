"""The page that shows the memory, and what it is drawn from.

    GET /vtensor        one HTML file without data; anybody gets it, as a browser cannot send a key with an address
    GET /vtensor/map    for each data-parallel rank its statistics, the map of its frames, and its last ten minutes;
                        guarded as the routes that change something, for it tells the ids of requests

However many look, the schedulers are asked once in `ASK_SECONDS`, and less often where a map takes long. They tell
their maps with their state, which `GET /server_info` shows to anybody with a key; `take_maps` is between.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import orjson
from sglang.srt.managers.io_struct import SetInternalStateReq
from sglang.srt.utils.auth import AuthLevel, auth_level
from starlette.responses import JSONResponse, Response

from sglang_vtensor.srt.elastic import MAP

if TYPE_CHECKING:
    from fastapi import FastAPI

#: Minimum time between two maps, and the share of a scheduling thread's time that maps may take.
ASK_SECONDS, SHARE = 1.0, 0.002
#: A scheduler answers between two batches; one that takes longer is told of, and its answer is awaited by the next
#: request.
PATIENCE_SECONDS = 5.0
#: What stands in the place of a map that a rank did not tell, as text, and the time for it.
_UNTOLD = '{"map":null,"history":null,"why":"The scheduler told no map: it is asked again."}', 0.0


async def take_maps(original: Callable[..., Awaitable[list[dict[str, Any]]]], manager: Any) -> list[dict[str, Any]]:
    """Of the states that the schedulers tell, whoever asked: their maps are kept for the page, by rank, and not told to
    others."""
    states = await original(manager)
    for told in (state.get("vtensor", {}) for state in states):
        if "page" in told:
            _maps(manager)[told["dp_rank"]] = told.pop("page"), told.pop("page_seconds")
    return states


def _maps(manager: Any) -> dict[int, tuple[str, float]]:
    """The newest map of each rank, as text, and the seconds of its scheduling thread that making it took."""
    kept: dict[int, tuple[str, float]] = vars(manager).setdefault("vtensor_maps", {})
    return kept


def add_page(app: FastAPI, state: Any, guards: Sequence[Any] = ()) -> Maps:
    """Add both routes; `state` has SGLang's tokenizer manager when the first request comes. `guards` are dependencies
    of the second one. Returns the maps, which who changes something makes `stale`."""
    maps = Maps(state)

    async def page() -> Response:
        text, policy = _page()
        return Response(text, media_type="text/html", headers={"Content-Security-Policy": policy} | _HEADERS)

    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def memory_map() -> Response:
        answer = await maps.newest()
        if answer is None:
            return JSONResponse({"error": f"the scheduler did not answer within {PATIENCE_SECONDS:g} s"}, 503)
        return Response(answer, media_type="application/json", headers={"Cache-Control": "no-store"})

    app.add_api_route("/vtensor", page, methods=["GET"])
    app.add_api_route("/vtensor/map", memory_map, methods=["GET"], dependencies=list(guards))
    return maps


_HEADERS = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


@cache
def _page() -> tuple[str, str]:
    """The page, and a policy under which its own script runs and no other, whatever a request's id may hold. It may
    ask any server, as the servers of a GPU have addresses of their own."""
    text = (files("sglang_vtensor") / "page.html").read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src http: https:; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


class Maps:
    """The newest map, which all who look share."""

    def __init__(self, state: Any) -> None:
        self._state = state
        self._due = 0.0
        self._changes = 0
        #: It outlives who asked: to SGLang, who asks next gets the answer of a question that was given up.
        self._asking: asyncio.Task[bytes] | None = None

    def stale(self) -> None:
        """Something was changed: who asks next is to see it, also if a map from before is yet to come."""
        self._due = 0.0
        self._changes += 1

    async def newest(self) -> bytes | None:
        """The map as JSON; None where the schedulers take too long."""
        if self._asking is None or (self._asking.done() and time.monotonic() >= self._due):
            self._asking = asyncio.create_task(self._ask())
        asking = self._asking
        answered, _ = await asyncio.wait({asking}, timeout=PATIENCE_SECONDS)
        return asking.result() if answered else None

    async def _ask(self) -> bytes:
        manager = self._state.tokenizer_manager
        maps, changes = _maps(manager), self._changes
        maps.clear()
        await manager.set_internal_state(SetInternalStateReq(server_args={MAP: 1}))
        # Who asks between the two gets the state first, and its map is kept too.
        ranks = [state["vtensor"] for state in await manager.get_internal_state()]
        ranks.sort(key=lambda rank: rank["dp_rank"])  # they come as they answer
        seconds = max((seconds for _, seconds in maps.values()), default=0.0)
        if changes == self._changes:
            self._due = time.monotonic() + max(ASK_SECONDS, seconds / SHARE)
        told = (
            b'{"stats":' + orjson.dumps(rank) + b"," + maps.get(rank["dp_rank"], _UNTOLD)[0].encode()[1:]
            for rank in ranks
        )
        return b'{"ranks":[' + b",".join(told) + b"]}"
