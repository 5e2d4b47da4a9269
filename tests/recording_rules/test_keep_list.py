"""The keep-list changes no result: two Prometheus scrape the same exporters, one keeps what the list says."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from alert_rules import files, keep_list
from gpuglass import catalog
from gpuglass.families import gpu
from gpuglass.family import Family, Kind
from recording_rules import foreign
from recording_rules.options import DEFAULT
from recording_rules.settings import parse
from tests.support.prometheus import Prometheus, running_prometheus

SECONDS = {"interval": 1, "slow_interval": 1, "long_interval": 1, "rate": 6, "average": 4, "jobs": 6}
VALUES = {
    "state": ("running", "waiting"),
    "kind": ("prompt", "cached", "output"),
    "outcome": ("stop", "error"),
    "part": ("prefill", "decode", "padding"),
    "holder": ("1",),
    "pipe": ("tensor",),
    "sensor": ("gpu", "memory"),
    "model": ("NVIDIA H100 80GB HBM3",),
    "gpu_uuid": ("GPU-0",),
    "model_name": ("deepseek",),
    "finished_reason": ("stop",),
    "request_type": ("max", "scheduled", "waiting"),
    "priority": ("",),
    "pp_rank": ("0",),
    "UUID": ("GPU-9",),
    "example": ("false",),
}
"""What labels are; all others have one value."""


def lines(seconds: float) -> Iterator[str]:
    """Every family of the catalog and every metric of other exporters that the rules know, as of now."""
    for metric in (*catalog.BY_NAME.values(), *foreign.BY_NAME.values()):
        names = [
            name for name in metric.labels if name not in ("server", "exported_pod", "exported_namespace")
        ]
        for values in itertools.product(*(VALUES.get(name, (f"some-{name}",)) for name in names)):
            labels = ",".join(f'{n}="{v}"' for n, v in zip(names, values, strict=True))
            comma = "," if labels else ""
            if _is_histogram(metric):
                for le, share in (("0.1", 0.25), ("1.0", 0.5), ("30.0", 0.75), ("+Inf", 1)):
                    yield f'{metric.name}_bucket{{{labels}{comma}le="{le}"}} {40 * share * seconds:.3f}'
                yield f"{metric.name}_count{{{labels}}} {40 * seconds:.3f}"
                yield f"{metric.name}_sum{{{labels}}} {40 * seconds:.3f}"
            elif metric.name.endswith("_total"):
                yield f"{metric.name}{{{labels}}} {0.2 * seconds:.3f}"
            else:
                yield f"{metric.name}{{{labels}}} 1"


def _is_histogram(metric: Family | foreign.Foreign) -> bool:
    return metric.kind is Kind.HISTOGRAM if isinstance(metric, Family) else metric.histogram


@contextmanager
def exporter() -> Iterator[str]:
    """Serves them on a port; gives its address."""
    begun = time.monotonic()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = ("\n".join(lines(time.monotonic() - begun)) + "\n").encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def recorded(server: Prometheus) -> set[tuple[tuple[str, str], ...]]:
    """Label sets of all that rules have made and that is there now; of alerts their names."""
    own = {tuple(sorted(s.labels.items())) for s in server.query('{__name__=~"[a-z]+:.+|gpuglass_advice"}')}
    records = {labels for labels in own if not dict(labels)["__name__"].startswith(("vllm:", "sglang:"))}
    return records | {(("alert", s.labels["alertname"]),) for s in server.query("ALERTS")}


@pytest.mark.needs("debian-prometheus")
def test_the_keep_list_changes_no_result(debian_prometheus: Path, tmp_path: Path) -> None:
    settings = parse({"windows": SECONDS, "cost": {"min_tokens_per_second": 0}}, "test")
    texts = files.rule_files(settings, DEFAULT, "prometheus")
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    config = {"rule_files": [str(tmp_path / name) for name in texts]}
    every = yaml.safe_load(keep_list.keep_list())
    # All exporters are one here: what any list keeps.
    names = "|".join(rule["metric_relabel_configs"][0]["regex"] for rule in every.values())
    keep = [{"source_labels": ["__name__"], "regex": names, "action": "keep"}]
    with exporter() as address:
        job = {"job_name": "all", "scrape_interval": "1s", "static_configs": [{"targets": [address]}]}
        for folder in ("whole", "kept"):
            (tmp_path / folder).mkdir()
        with (
            running_prometheus(debian_prometheus, [job], tmp_path / "whole", config=config) as whole,
            running_prometheus(
                debian_prometheus,
                [{**job, "metric_relabel_configs": keep}],
                tmp_path / "kept",
                config=config,
            ) as kept,
        ):
            # The last links of the chain: quantiles, burn rates, cost of tokens and of tenants.
            for last in (
                "model:slo_burn:ratio",
                "model:cost_per_1k_tokens:ratio",
                "tenant:cost_per_hour:sum",
            ):
                for server in (whole, kept):
                    server.wait_for(last, 180)
            end = time.monotonic() + 120
            while (all_of_it := recorded(whole)) != (some := recorded(kept)) and time.monotonic() < end:
                time.sleep(0.5)
            assert all_of_it == some
            assert len({dict(labels).get("__name__") for labels in some}) > 100
            dropped = gpu.CLOCK_MAX.name
            assert whole.query(dropped) and not kept.query(dropped)
            count = 'count({__name__=~".+", job="all"})'
            assert kept.query(count)[0].value < 0.8 * whole.query(count)[0].value
