"""Metrics of the KV memory for Prometheus, beside SGLang's own, where `--enable-metrics` asks for them.

Each rank writes its own, at most once a second; SGLang's HTTP process collects them from all processes.
`docs/grafana.json` shows them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

#: The least time between two updates.
INTERVAL_SECONDS = 1.0


class Gauge(NamedTuple):
    """Values that go up and down: the label's values, each with the statistic that it shows."""

    help: str
    label: str
    values: dict[str, str]


#: `Runtime.stats` as gauges: pages by state, bytes by what they are for.
GAUGES = {
    "vtensor_pages": Gauge(
        "Pages by state; kept ones are among the free ones, and hold the unfinished end of a cached text; stuck ones "
        "are those that the driver did not take back.",
        "state",
        {
            "live": "pages_live",
            "cached": "pages_cached",
            "free": "pages_free",
            "kept": "pages_kept",
            "stuck": "pages_stuck",
        },
    ),
    "vtensor_bytes": Gauge(
        "Device memory: of all pages (backed), and of those that requests, cached prefixes and kept ends use (owned); "
        "of both, what layers take that see a window, and what states take.",
        "kind",
        {
            "backed": "backed_bytes",
            "owned": "owned_bytes",
            "windows_backed": "windows_backed_bytes",
            "windows_owned": "windows_owned_bytes",
            "states_backed": "states_backed_bytes",
            "states_owned": "states_owned_bytes",
        },
    ),
    "vtensor_pages_limit": Gauge("Pages that requests and cached prefixes may own.", "", {"": "pages_limit"}),
}
#: `Runtime.stats` as counters.
COUNTERS = {
    "vtensor_pages_allocated": ("pages_allocated", "Pages handed to requests."),
    "vtensor_pages_with_memory": ("pages_with_memory", "Of these, those whose place had memory already."),
    "vtensor_pages_created_at_once": ("pages_created_at_once", "Of these, those created at that moment."),
    "vtensor_contexts": ("contexts", "Contexts that ended."),
    "vtensor_context_runs": ("context_runs", "Runs of addresses that these had."),
    "vtensor_broken_runs": ("broken_runs", "Runs beyond the first one of what contexts had of their own."),
    "vtensor_pages_created": ("pages_created", "Pages that the driver created."),
    "vtensor_pages_released": ("pages_released", "Pages given back to the driver."),
    "vtensor_scheduling_seconds": (
        "scheduling_seconds",
        "What memory took of the scheduling thread: waits, votes and grouping too.",
    ),
    "vtensor_worker_seconds": ("worker_seconds", "What the worker was busy for."),
    "vtensor_worker_driver_seconds": ("worker_driver_seconds", "Of these, within calls of the driver."),
    "vtensor_prefix_tokens": ("prefix_tokens_served", "Prompt tokens that were not computed again."),
    "vtensor_prompt_tokens": ("prompt_tokens", "Prompt tokens of requests that began, computed or not."),
    "vtensor_partial_copies": ("partial_copies", "Starts of pages that were copied instead of computed."),
    "vtensor_partial_tokens": ("partial_tokens", "Tokens that were copied so."),
    "vtensor_tails_continued": ("tails_continued", "Unfinished pages that their next turn went on in."),
    "vtensor_awaited_prefixes": ("awaited_prefixes", "Requests that waited for a prefix that another was computing."),
    "vtensor_decode_steps_shared": (
        "decode_steps_shared",
        "Decode steps of the kernel that reads shared prefixes once.",
    ),
    "vtensor_decode_steps_plain": (
        "decode_steps_plain",
        "Decode steps of the other kernel, as that one would not be faster.",
    ),
    "vtensor_shared_bytes_saved": ("shared_bytes_saved", "Bytes of K and V that were read once instead of again."),
    "vtensor_grouping_seconds": ("grouping_seconds", "Of the scheduling thread, what following who shares what took."),
    "vtensor_shortages": ("shortages", "How often the driver began to refuse memory."),
    "vtensor_worker_failures": ("worker_failures", "Calls of the driver that failed in the worker."),
}


class Metrics:
    """Writes a rank's statistics. `labels` tell ranks and models apart; without `registry`, to prometheus_client's."""

    def __init__(
        self, labels: dict[str, str], stats: Callable[[], dict[str, Any]], *, registry: CollectorRegistry | None = None
    ) -> None:
        # Imported here: it looks at the environment for the directory of many processes, which SGLang sets at start.
        import prometheus_client

        registry = registry or prometheus_client.REGISTRY
        self._stats = stats
        self._labels = labels
        self._due = 0.0
        self._told = dict.fromkeys(COUNTERS, 0.0)
        names = list(labels)
        self._gauges = {
            name: prometheus_client.Gauge(
                name,
                gauge.help,
                names + [gauge.label] * bool(gauge.label),
                registry=registry,
                multiprocess_mode="mostrecent",
            )
            for name, gauge in GAUGES.items()
        }
        self._counters = {
            name: prometheus_client.Counter(name, help_, names, registry=registry).labels(**labels)
            for name, (_, help_) in COUNTERS.items()
        }

    def update(self) -> None:
        """Write what changed, unless that was done a moment ago."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + INTERVAL_SECONDS
        stats = self._stats()
        for name, gauge in GAUGES.items():
            for value, key in gauge.values.items():
                labels = self._labels | ({gauge.label: value} if gauge.label else {})
                self._gauges[name].labels(**labels).set(stats[key])
        for name, (key, _) in COUNTERS.items():
            self._counters[name].inc(stats[key] - self._told[name])
            self._told[name] = stats[key]
