"""Asking a running server for its KV memory's statistics, and for more or less of it."""

from __future__ import annotations

from typing import Any

import requests


class NoStatistics(RuntimeError):
    """The server cannot be reached, or does not run with --kv-backend vtensor."""


def server_stats(url: str, *, timeout: float = 10.0) -> list[dict[str, Any]]:
    """The statistics of each data-parallel rank of the server at `url`, from `GET /server_info`."""
    try:
        answer = requests.get(f"{url.rstrip('/')}/server_info", timeout=timeout)
        answer.raise_for_status()
        states = answer.json()["internal_states"]
    except (requests.RequestException, KeyError, ValueError) as error:
        raise NoStatistics(f"no answer from {url}: {error}. Is an SGLang server running there?") from error
    stats = [state["vtensor"] for state in states if "vtensor" in state]
    if not stats:
        raise NoStatistics(f"the server at {url} runs SGLang's own KV cache: start it with --kv-backend vtensor")
    return stats


class NotDone(RuntimeError):
    """The server refused, or cannot be reached. The message says why."""


def ask(url: str, what: str, body: dict[str, Any] | None = None, *, key: str | None = None) -> list[dict[str, Any]]:
    """`POST /vtensor/<what>`: what each data-parallel rank holds after it. `key` is the server's admin key, if it has
    one. Raises `NotDone`."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = requests.post(f"{url.rstrip('/')}/vtensor/{what}", json=body or {}, headers=headers, timeout=60)
    except requests.RequestException as error:
        raise NotDone(f"no answer from {url}: {error}. Is an SGLang server running there?") from error
    if answer.status_code in (401, 403):
        raise NotDone(f"{url} wants another key: give its --admin-api-key (or --api-key) with --key")
    if answer.status_code == 404:
        raise NotDone(f"the server at {url} runs SGLang's own KV cache: start it with --kv-backend vtensor")
    try:
        said = answer.json()
    except ValueError:
        said = {"error": answer.text[:200]}
    if answer.status_code != 200:
        raise NotDone(str(said.get("error", said)))
    ranks: list[dict[str, Any]] = said["ranks"]
    return ranks
