"""Asking a running server for its KV memory's statistics."""

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
