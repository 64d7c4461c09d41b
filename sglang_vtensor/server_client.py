"""Asking a running server for its KV memory's statistics, and for more or less of it."""

from __future__ import annotations

from typing import Any

import requests


class NoAnswer(RuntimeError):
    """The server cannot be reached, refused, or does not run with --kv-backend vtensor. The message says why, in one
    sentence."""


class Told(dict[str, Any]):
    """The statistics of a rank. Raises `NoAnswer` for a key that the server does not have, being of another version."""

    url = ""

    @classmethod
    def by(cls, url: str, told: Any) -> Told:
        rank = cls(told)
        rank.url = url
        return rank

    def __missing__(self, key: str) -> Any:
        raise NoAnswer(f"the server at {self.url} runs another version of sglang-vtensor: it does not tell {key}")


def server_stats(url: str, *, key: str | None = None, timeout: float = 10.0) -> list[Told]:
    """The statistics of each data-parallel rank of the server at `url`, from `GET /server_info`. `key` is the server's
    API key, if it has one. Raises `NoAnswer`."""
    answer = _request("GET", url, "/server_info", key=key, timeout=timeout)
    try:
        told = [state["vtensor"] for state in answer.json()["internal_states"] if "vtensor" in state]
        stats = [Told.by(url, rank) for rank in told]
    except (KeyError, TypeError, ValueError) as error:
        raise _no_sglang(url) from error
    if not stats:
        raise NoAnswer(f"the server at {url} runs SGLang's own KV cache: start it with --kv-backend vtensor")
    return sorted(stats, key=lambda rank: rank["dp_rank"])  # they come as they answer


def pages_by_state(rank: dict[str, Any]) -> dict[str, int]:
    """Backed pages of a rank, each counted once: of `live` requests; of `cached` prefixes; `kept` ones, which hold the
    unfinished end of a cached text until somebody needs a page; and `free` ones. The padding page is in none."""
    pages = {state: rank[f"pages_{state}"] for state in ("live", "cached", "kept")}
    return pages | {"free": rank["pages_free"] - rank["pages_kept"]}


def sleep_state(rank: dict[str, Any]) -> str:
    if not rank["sleeping"]:
        return "awake"
    return "falling asleep" if rank["requests"] else "asleep"


def ask(url: str, what: str, body: dict[str, Any] | None = None, *, key: str | None = None) -> list[Told]:
    """`POST /vtensor/<what>`: what each data-parallel rank holds after it. `key` is the server's admin key, if it has
    one. Raises `NoAnswer`."""
    answer = _request("POST", url, f"/vtensor/{what}", key=key, timeout=60.0, body=body or {})
    if answer.status_code == 404:
        raise NoAnswer(
            f"the server at {url} has no /vtensor/{what}: start it with --kv-backend vtensor, and without "
            "--tokenizer-worker-num"
        )
    try:
        said = answer.json()
        if answer.status_code == 200 and said["ranks"]:
            return [Told.by(url, rank) for rank in said["ranks"]]
        error = said["error"]
    except (KeyError, TypeError, ValueError):
        error = answer.text
    if answer.status_code == 200:
        raise _no_sglang(url)
    said = " ".join(str(error).split())[:200]
    raise NoAnswer(said if answer.status_code == 400 else f"the server at {url} answers {answer.status_code}: {said}")


def _no_sglang(url: str) -> NoAnswer:
    return NoAnswer(f"what answers at {url} is no SGLang server: give another URL")


def _request(
    method: str, url: str, path: str, *, key: str | None, timeout: float, body: dict[str, Any] | None = None
) -> requests.Response:
    if key and not (key.isascii() and key.isprintable()):
        raise NoAnswer("the key has characters that no header can have: give one of the server's with --key")
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
        wanted = "--api-key" if method == "GET" else "--admin-api-key, or its --api-key where it has no other"
        raise NoAnswer(f"the server at {url} wants another key: give its {wanted}, with --key")
    return answer
