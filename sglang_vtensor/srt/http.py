"""Routes of the HTTP server under `/vtensor`, guarded as SGLang's other administrative ones; and its health check.

    POST /vtensor/limit   {"limit": "20GiB"}    a size, or a share of the KV capacity: of each data-parallel rank
    POST /vtensor/sleep                         gives back everything but the weights, when what runs has ended
    POST /vtensor/wake

Each answers with what every rank then holds (`vtensor_state`); 400 says what was wrong. Where no key is wanted, 403
answers the browser of somebody who looks at a page of another host (`only_from_here`).

    GET /vtensor, /vtensor/map                  a page that shows the memory, and what it is drawn from (`page`)

    GET /health, /health_generate               SGLang's own check; a server that sleeps, or that is paused with its
                                                memory released, answers at once, and says so
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fastapi import Depends, HTTPException
from fastapi.routing import APIRoute
from sglang.srt.managers.io_struct import SetInternalStateReq
from sglang.srt.utils.auth import AuthLevel, auth_level
from starlette.requests import Request  # not for types alone: FastAPI reads the annotations
from starlette.responses import JSONResponse, Response

from sglang_vtensor.srt.elastic import LIMIT, SLEEP, WAKE
from sglang_vtensor.srt.options import Refused, parse_share_or_bytes
from sglang_vtensor.srt.page import add_page

if TYPE_CHECKING:
    from fastapi import FastAPI

#: A sleeping scheduler has nothing else to do; one that does not answer in this time gets SGLang's own check.
HEALTH_SECONDS = 5.0
#: Names of this machine: its own pages may use any of them.
LOOPBACK = {"localhost", "127.0.0.1", "::1"}
SLEEPING_IS_HEALTHY = "healthy: what runs comes to its end, and what arrives waits until POST /vtensor/wake"
RELEASED_IS_HEALTHY = "healthy: memory is released, and what arrives waits until POST /resume_memory_occupation"


def only_from_here(request: Request) -> None:
    """Any web page can have the browser that shows it send requests to servers which that browser reaches. A browser
    says of which page they are. Raises `HTTPException` for one of another host."""
    origin, host = request.headers.get("origin"), request.headers.get("host", "")
    if origin is None:
        return
    try:
        names = {urlsplit(origin).hostname, urlsplit(f"//{host}").hostname}
    except ValueError:
        names = {None}
    if None in names or (len(names) > 1 and not names <= LOOPBACK):
        raise HTTPException(
            403,
            f"a page of {origin} asks {host}, which wants no key: open the page of this server under the same host "
            "name, or start the server with --admin-api-key",
        )


def add_routes(app: FastAPI, state: Any, *, keyed: bool) -> None:
    """Add them to SGLang's application, once; `state` has its tokenizer manager when the first request comes. `keyed`
    says that the server wants a key, which no other page knows."""
    if any(getattr(route, "path", None) == "/vtensor/limit" for route in app.routes):
        return
    guards = [] if keyed else [Depends(only_from_here)]
    maps = add_page(app, state, guards)
    #: How often it was told to sleep, and how often when it was last seen awake. While these are equal, a health check
    #: does not ask the scheduler if it sleeps: that would be a waste.
    sleeps = sleeps_awake = 0
    #: The question of a health check, which outlives the check: to SGLang, who asks next gets the answer of a question
    #: that was given up. Beside it, how often the server had been told to sleep before it was asked.
    asking: tuple[asyncio.Task[list[dict[str, Any]]], int] | None = None

    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def limit(request: Request) -> JSONResponse:
        manager = state.tokenizer_manager
        try:
            ranks = await _ranks(manager)
            nbytes = limit_bytes((await _body(request)).get("limit"), ranks)
        except Refused as error:
            return JSONResponse({"error": str(error)}, 400)
        return await ask(manager, {LIMIT: nbytes})

    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def sleep() -> JSONResponse:
        nonlocal sleeps
        answer = await ask(state.tokenizer_manager, {SLEEP: 1})
        sleeps += 1
        return answer

    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def wake() -> JSONResponse:
        return await ask(state.tokenizer_manager, {WAKE: 1})

    async def ask(manager: Any, asked: dict[str, int]) -> JSONResponse:
        done = await manager.set_internal_state(SetInternalStateReq(server_args=asked))
        maps.stale()
        if not all(done):
            return JSONResponse({"error": "refused by the scheduler: its log says why"}, 400)
        return JSONResponse({"ranks": [vtensor_state(rank) for rank in await _ranks(manager)]})

    def unless_asleep(check: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def health(request: Request) -> Response:
            nonlocal sleeps_awake, asking
            manager = state.tokenizer_manager
            # SGLang's own check is a request, and in a paused engine it waits until that goes on.
            if (sleeps != sleeps_awake or manager.is_pause) and not manager.gracefully_exit:
                if asking is None or asking[0].done():
                    asking = asyncio.create_task(_ranks(manager)), sleeps
                task, before = asking
                answered, _ = await asyncio.wait({task}, timeout=HEALTH_SECONDS)
                if answered:
                    ranks = task.result()
                    if all(rank["released"] for rank in ranks):
                        return JSONResponse({"status": "released", "message": RELEASED_IS_HEALTHY})
                    if all(rank["sleeping"] for rank in ranks):
                        status = "falling asleep" if any(rank["requests"] for rank in ranks) else "asleep"
                        return JSONResponse({"status": status, "message": SLEEPING_IS_HEALTHY})
                    sleeps_awake = before  # somebody woke it
            return await check(request)

        return health

    for function in (limit, sleep, wake):
        app.add_api_route(f"/vtensor/{function.__name__}", function, methods=["POST"], dependencies=guards)
    for route in list(app.routes):
        if not isinstance(route, APIRoute):
            continue
        if route.path in ("/health", "/health_generate"):
            app.add_api_route(route.path, unless_asleep(route.endpoint), methods=["GET"])
        elif route.path == "/set_internal_state":  # what the three routes do can be asked there too
            app.add_api_route(route.path, route.endpoint, methods=list(route.methods or ()), dependencies=guards)
        else:
            continue
        app.routes.insert(0, app.routes.pop())  # the first route of a path is the one that is taken


async def _body(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body() or b"{}")
    except (ValueError, RecursionError) as error:
        raise Refused(f'the body is no JSON ({error}): give {{"limit": "20GiB"}}') from error
    return body if isinstance(body, dict) else {}


async def _ranks(manager: Any) -> list[dict[str, Any]]:
    ranks = [state["vtensor"] for state in await manager.get_internal_state()]
    return sorted(ranks, key=lambda rank: rank["dp_rank"])  # they come as they answer


def limit_bytes(given: Any, ranks: list[dict[str, Any]]) -> int:
    """The limit in bytes, the same for every rank. Raises `Refused` for one that cannot be."""
    size = parse_share_or_bytes(given, "limit")
    page = ranks[0]["page_bytes"]
    capacity = min(rank["capacity_bytes"] for rank in ranks)
    pages = capacity // page
    share = int(size * pages) * page if size != 1 else capacity
    nbytes = share if isinstance(size, float) else size
    if nbytes < 2 * page:
        raise Refused(
            f"limit {given!r} is {nbytes} bytes: at least {2 * page}, two pages, wanted; to give back everything, "
            "use sleep"
        )
    if nbytes // page > pages:
        raise Refused(
            f"limit {given!r} is {nbytes} bytes, and the capacity is {pages * page}, which was settled at "
            "start, by --mem-fraction-static or --max-total-tokens"
        )
    return nbytes


def vtensor_state(rank: dict[str, Any]) -> dict[str, Any]:
    """What an operator asks after a change: bytes, and a word where memory goes back only as requests end."""
    page = rank["page_bytes"]
    state = {
        "limit_bytes": rank["limit_bytes"],
        "sleeping": bool(rank["sleeping"]),
        "backed_bytes": rank["backed_bytes"],
        "live_bytes": rank["live_bytes"],
        "cached_bytes": rank["cached_bytes"],
        "requests": rank["requests"],
    }
    allowed = page if rank["sleeping"] else rank["limit_bytes"]
    if state["live_bytes"] + page > allowed:
        state["note"] = f"running requests hold {state['live_bytes']} bytes: memory goes back as they end"
    return state
