"""Metrics: what is written, and that the dashboard shows what there is."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

from prometheus_client import CollectorRegistry

from sglang_vtensor.srt.metrics import COUNTERS, GAUGES, Metrics

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"


def test_gauges_are_set_and_counters_grow(monkeypatch):
    keys = [key for gauge in GAUGES.values() for key in gauge.values.values()] + [key for key, _ in COUNTERS.values()]
    stats = {key: float(n) for n, key in enumerate(dict.fromkeys(keys))}
    registry, labels = CollectorRegistry(), {"model_name": "m", "tp_rank": "0"}
    metrics = Metrics(labels, lambda: stats, registry=registry)

    def told(name, **more):
        return registry.get_sample_value(name, labels | more)

    now = [100.0]
    monkeypatch.setattr("sglang_vtensor.srt.metrics.time", SimpleNamespace(monotonic=lambda: now[0]))
    metrics.update()
    assert told("vtensor_pages", state="live") == stats["pages_live"]
    assert told("vtensor_pages_limit") == stats["pages_limit"]
    assert all(told(f"{name}_total") == stats[key] for name, (key, _) in COUNTERS.items())
    stats = {key: value + 2 for key, value in stats.items()}
    now[0] += 0.9
    metrics.update()
    assert told("vtensor_pages_created_total") == stats["pages_created"] - 2, "once a second is enough"
    now[0] += 0.1
    metrics.update()
    assert told("vtensor_pages_created_total") == stats["pages_created"]
    assert told("vtensor_bytes", kind="backed") == stats["backed_bytes"]


def test_the_dashboard_shows_every_metric_and_no_other():
    dashboard = json.loads(DASHBOARD.read_text())
    shown = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            shown |= set(re.findall(r"vtensor_\w+", target["expr"]))
    assert shown == set(GAUGES) | {f"{name}_total" for name in COUNTERS}
