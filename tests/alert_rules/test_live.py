"""The whole way on real parts: an agent on a simulated driver, with an engine that talks to it, Prometheus
with the generated rules, Alertmanager with the shipped configuration, and the receivers that it notifies.

Time is compressed by settings: the same generator writes shorter windows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from alert_rules import files
from gpuglass.demo.scenario import A100, H200, Scenario, uuid_of
from gpuglass_vllm import records
from recording_rules.groups import Options
from recording_rules.settings import parse
from tests.alert_rules.test_alertmanager import on_loopback
from tests.exporters.vllm.receiver_rig import Raw
from tests.support import tools
from tests.support.agent import RunningAgent, running_agent
from tests.support.ahead import prepared, short_folder
from tests.support.alertmanager import Inbox, receiving, running_alertmanager
from tests.support.prometheus import Prometheus, running_prometheus

SECOND = 1_000_000_000
MODEL, TENANT, NODE = "deepseek-v3", "acme", "gpu-node-1"
COMPRESSED: Mapping[str, Any] = {
    "windows": {
        "interval": "1s",
        "slow_interval": "1s",
        "long_interval": "1s",
        "rate": "30s",
        "average": "10s",
        "jobs": "10s",
    },
    "slo": {
        # The short windows of page and ticket are the same: where evaluations come late, neither ends alone.
        "page_fast": {"long": "40s", "short": "20s"},
        "page_slow": {"long": "60s", "short": "30s"},
        "ticket_fast": {"long": "80s", "short": "20s"},
        "ticket_slow": {"long": "100s", "short": "30s"},
    },
    "alerts": {
        "memory": {"leak_window": "30s", "leak_for": "2s", "hog_for": "3s"},
        "latency": {"burn_for": "3s", "stalled_for": "30s"},
        "tenants": {"quota_for": "10s"},
        "health": {"lost_for": "3s"},
        "cost": {"cold_for": "8s", "load_window": "10s"},
    },
}
AGENT: Mapping[str, Mapping[str, Any]] = {
    # A lost GPU makes the agent load the driver again, and on a loaded machine every call is late: neither is
    # what this test is about.
    "gpu": {"interval": 0.5, "slow_interval": 1, "retry_interval": 300, "hang_timeout": 60},
    "engines": {"tenants": {"quotas": {TENANT: {"gpu_seconds_per_day": 6}}}},
    "prices": {"currency": "USD", "per_gpu_hour": {"NVIDIA H200": 3.5, "NVIDIA A100.*": 1.8}},
}
LEAK_MIB = 300
"""Growth of the leak in MiB per second; the card is full after three minutes."""

EXPECTED = {
    ("gpuglass-page", "GPULost", "health", "", NODE),
    ("gpuglass-page", "SLOFirstTokenBurn", "latency", MODEL, ""),
    ("gpuglass-cost", "GPUCold", "cost", "", NODE),
    ("gpuglass-cost", "TenantQuotaExceeded", "cost", "", ""),
    ("gpuglass-serving", "KVCacheHogged", "memory", MODEL, ""),
    ("gpuglass-serving", "GPUMemoryLeak", "memory", "", NODE),
}
"""Receiver, alert, and the labels of its group: category, model and node."""


def scenario() -> Scenario:
    """A GPU that works, one that is cold, one that is lost after some seconds, and one whose memory leaks."""
    cards = Scenario().gpus(4, H200).model(3, A100)
    for number in (0, 2):
        cards.gpu(number, power_mw=350_000, used_mib=60_000, util_gpu=60).gpm(number, {1: 60.0, 2: 50.0})
    cards.gpu(1, power_mw=90_000, used_mib=60_000, util_gpu=0).gpm(1, {1: 0.0, 2: 0.0})
    cards.at(15).gpu(2, lost=1)
    # It does nothing but draw power: no second signal calls it cold, and nothing explains that memory grows.
    cards.gpu(3, power_mw=350_000, util_gpu=0)
    for second in range(200):
        cards.at(second).gpu(3, used_mib=min(20_000 + LEAK_MIB * second, 79_000))
    return cards


class Engine:
    """A core and a worker of one engine: a tenant's request holds most of the KV cache, first tokens come
    late, and the tenant uses a GPU-second each second."""

    def __init__(self, socket: Path) -> None:
        self._core, self._worker = Raw(socket), Raw(socket)
        offset = time.time_ns() - time.monotonic_ns()
        for number, (raw, role) in enumerate(((self._core, "core"), (self._worker, "worker"))):
            raw.send(
                records.Hello(
                    version=records.VERSION,
                    sender=f"process-{number}",
                    instance="server-a",
                    role=role,
                    engine_name="vllm",
                    engine_version="0.32.0",
                    software="test/1",
                    model_name=MODEL,
                    rank=0 if role == "worker" else -1,
                    clock_offset_ns=offset,
                    pool=records.Pool(blocks=100, block_bytes=4096, block_tokens=16)
                    if role == "core"
                    else None,
                )
            )
        self._ticks = 0
        self._told = time.monotonic_ns()

    def tick(self) -> None:
        """Tell what happened since the last time."""
        self._ticks += 1
        now = time.monotonic_ns()
        passed, self._told = now - self._told, now
        request = f"request-{self._ticks}"
        self._core.send(
            records.PoolState(at=now, used_blocks=80, running=3, waiting=2),
            records.RequestProgress(
                at=now, request_id="hog", tenant=TENANT, running=True, blocks=60.0, peak_blocks=60.0
            ),
            records.RequestEnd(
                at=now,
                request_id=request,
                outcome="stop",
                tenant=TENANT,
                arrival_ns=now - 4 * SECOND,
                queue_ns=SECOND,
                prefill_ns=2 * SECOND,
                decode_ns=SECOND,
                prompt_tokens=100,
                output_tokens=20,
            ),
        )
        self._core.send(
            records.TenantSums(tenant=TENANT, prompt_tokens=100, output_tokens=20, requests={"stop": 1}),
            seq=self._ticks,
        )
        self._worker.send(
            records.GpuProgress(at=now, request_ids=[request], gpu_ns=[0.0], ended=[request]),
        )
        self._worker.send(records.TenantSums(tenant=TENANT, gpu_ns=float(passed)), seq=self._ticks)
        for raw in (self._core, self._worker):
            with suppress(BlockingIOError):
                raw.socket.recv(256, 0x40)  # MSG_DONTWAIT: acknowledgements are read, not waited for

    def close(self) -> None:
        """Leave."""
        self._core.close()
        self._worker.close()


@contextmanager
def talking(socket: Path) -> Iterator[None]:
    """An engine that tells twice a second."""
    over, failure = Event(), []

    def run() -> None:
        engine = Engine(socket)
        try:
            while not over.wait(0.5):
                engine.tick()
        except OSError as error:
            failure.append(error)
        finally:
            engine.close()

    thread = Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(30)
    assert not failure, failure


@contextmanager
def stack(
    folder: Path, prometheus: Path, alertmanager: Path
) -> Iterator[tuple[RunningAgent, Prometheus, Inbox]]:
    """All parts, wired."""
    with ExitStack() as parts:
        inbox = parts.enter_context(receiving())
        config = on_loopback(inbox, folder)
        # Tickets wait longer than pages: those that a page mutes are not sent.
        config["route"]["routes"][0]["group_wait"] = "5s"
        manager = parts.enter_context(running_alertmanager(alertmanager, config, folder / "alertmanager"))
        agent = parts.enter_context(running_agent(folder, scenario(), AGENT))
        parts.enter_context(talking(folder / "agent.sock"))
        settings = parse(COMPRESSED, "live")
        rules = files.rule_files(settings, Options(), "prometheus")
        for name, text in rules.items():
            (folder / name).write_text(text)
        target = {"targets": [agent.address], "labels": {"node": NODE}}
        scrapes = [
            {
                "job_name": f"gpuglass-{tier}",
                "metrics_path": f"/metrics/{tier}",
                "static_configs": [target],
                # A scrape that a loaded machine does not answer in time makes all series of a target stale.
                "scrape_interval": "3s",
                "scrape_timeout": "3s",
            }
            for tier in ("fast", "slow")
        ]
        alerting = {"alertmanagers": [{"static_configs": [{"targets": [manager.address]}]}]}
        more = {"rule_files": [str(folder / name) for name in rules], "alerting": alerting}
        server = parts.enter_context(running_prometheus(prometheus, scrapes, folder, config=more))
        yield agent, server, inbox


def told(inbox: Inbox) -> set[tuple[str, str, str, str, str]]:
    """Alerts that receivers were told of while they fired, with their groups."""
    return {
        (
            notification.receiver,
            alert["labels"]["alertname"],
            *(notification.body["groupLabels"].get(name, "") for name in ("category", "model_name", "node")),
        )
        for notification in inbox.all()
        for alert in notification.alerts
        if alert["status"] == "firing"
    }


@dataclass(frozen=True, slots=True)
class Seen:
    """What receivers were told, and what Prometheus shows as firing in the end."""

    inbox: Inbox
    told: set[tuple[str, str, str, str, str]]
    firing: set[str]


def _watch(ending: ExitStack) -> Seen:
    server, manager = tools.PROMETHEUS.program("prometheus"), tools.ALERTMANAGER.program("alertmanager")
    assert server and manager
    with stack(short_folder(ending), server, manager) as (_, prometheus, inbox):
        inbox.wait(lambda all: told(inbox) >= EXPECTED, f"all of {sorted(EXPECTED)}", 300)
        # What else could come has had as long as the longest wait of the rules once more.
        settled = time.time() + 15
        prometheus.wait_for(f"vector(time()) > {settled}", 120)
        firing = {s.labels["alertname"] for s in prometheus.query('ALERTS{alertstate="firing"}')}
        return Seen(inbox, told(inbox), firing)


WATCHED = prepared("seen", _watch)


@pytest.fixture(scope="module")
def seen() -> Iterator[Seen]:
    """A minute that mostly passes: it begins with the first test of all."""
    yield WATCHED.get()
    WATCHED.close()


@pytest.mark.needs("cc", "prometheus3", "alertmanager")
@pytest.mark.timeout(600)
def test_exactly_the_expected_notifications_arrive_in_their_groups(seen: Seen) -> None:
    assert seen.told == EXPECTED
    assert seen.firing <= {name for _, name, *_ in EXPECTED}
    notifications = seen.inbox.all()
    heard = [alert for n in notifications for alert in n.alerts]
    savings = {a["annotations"]["saving"] for a in heard if a["labels"]["alertname"] == "GPUCold"}
    assert "3.50 USD an hour for this GPU" in savings
    gpus = {a["labels"]["alertname"]: a["labels"]["gpu_uuid"] for a in heard if "gpu_uuid" in a["labels"]}
    assert gpus == {"GPUCold": uuid_of(1), "GPULost": uuid_of(2), "GPUMemoryLeak": uuid_of(3)}
    hogs = {a["labels"]["tenant"] for a in heard if a["labels"]["alertname"] == "KVCacheHogged"}
    assert hogs == {TENANT}
    pages = [n.body for n in notifications if n.receiver == "chat/gpuglass-page"]
    titles = {attachment["title"] for page in pages for attachment in page["attachments"]}
    assert f"[PAGE] SLOFirstTokenBurn · model {MODEL}" in titles
    assert f"[PAGE] GPULost · node {NODE}" in titles
