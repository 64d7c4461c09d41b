"""Asking a running server for its KV memory's statistics, and for more or less of it."""

from __future__ import annotations

from typing import Any

import requests


class NoAnswer(RuntimeError):
    """The server cannot be reached, refused, or does not run with --kv-backend vtensor. The message says why, in one
    sentence."""


def server_stats(url: str, *, key: str | None = None, timeout: float = 10.0) -> list[dict[str, Any]]:
    """The statistics of each data-parallel rank of the server at `url`, from `GET /server_info`. `key` is the server's
    API key, if it has one. Raises `NoAnswer`."""
    answer = _request("GET", url, "/server_info", key=key, timeout=timeout)
    try:
        stats = [state["vtensor"] for state in answer.json()["internal_states"] if "vtensor" in state]
    except (KeyError, TypeError, ValueError) as error:
        raise NoAnswer(f"what answers at {url} is no SGLang server: give another URL") from error
    if not stats:
        raise NoAnswer(f"the server at {url} runs SGLang's own KV cache: start it with --kv-backend vtensor")
    return stats


def pages_by_state(rank: dict[str, Any]) -> dict[str, int]:
    """Backed pages of a rank, each counted once: of `live` requests; of `cached` prefixes; `kept` ones, which hold the
    unfinished end of a cached text until somebody needs a page; and `free` ones. The padding page is in none."""
    pages = {state: rank[f"pages_{state}"] for state in ("live", "cached", "kept")}
    return pages | {"free": rank["pages_free"] - rank["pages_kept"]}


def sleep_state(rank: dict[str, Any]) -> str:
    if not rank["sleeping"]:
        return "awake"
    return "falling asleep" if rank["requests"] else "asleep"


def ask(url: str, what: str, body: dict[str, Any] | None = None, *, key: str | None = None) -> list[dict[str, Any]]:
    """`POST /vtensor/<what>`: what each data-parallel rank holds after it. `key` is the server's admin key, if it has
    one. Raises `NoAnswer`."""
    answer = _request("POST", url, f"/vtensor/{what}", key=key, timeout=60.0, body=body or {})
    if answer.status_code == 404:
        raise NoAnswer(f"the server at {url} runs SGLang's own KV cache: start it with --kv-backend vtensor")
    try:
        said = answer.json()
    except ValueError:
        said = {"error": answer.text[:200]}
    if answer.status_code != 200:
        raise NoAnswer(str(said.get("error", said)))
    ranks: list[dict[str, Any]] = said["ranks"]
    return ranks


def _request(
    method: str, url: str, path: str, *, key: str | None, timeout: float, body: dict[str, Any] | None = None
) -> requests.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = requests.request(method, url.rstrip("/") + path, json=body, headers=headers, timeout=timeout)
    except requests.Timeout as error:
        raise NoAnswer(f"the server at {url} did not answer within {timeout:g} s") from error
    except requests.RequestException as error:
        if isinstance(error, ValueError):
            raise NoAnswer(f"{url!r} is no URL of a server: give one such as http://127.0.0.1:30000") from error
        raise NoAnswer(f"no server answers at {url}: start one there, or give another URL") from error
    if answer.status_code in (401, 403):
        raise NoAnswer(f"the server at {url} wants another key: give its --admin-api-key (or --api-key) with --key")
    return answer
