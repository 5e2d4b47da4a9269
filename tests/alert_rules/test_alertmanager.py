"""The Alertmanager fragment: its tools take it, each severity and category goes where it should, alerts that
say the same are muted, and messages name what an operator has to know."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpuglass.demo import distribution
from tests.support.alertmanager import Alertmanager, Inbox, receiving, running_alertmanager

pytestmark = pytest.mark.needs("debian-prometheus")

FOLDER = Path(__file__).parents[2] / "alert_rules" / "alertmanager"
CONFIG = FOLDER / "alertmanager.yml"
RECEIVERS = {
    ("critical", "latency"): "gpuglass-page",
    ("critical", "memory"): "gpuglass-page",
    ("critical", "cost"): "gpuglass-page",
    ("critical", "health"): "gpuglass-page",
    ("critical", "self"): "gpuglass-page",
    ("warning", "latency"): "gpuglass-serving",
    ("warning", "memory"): "gpuglass-serving",
    ("warning", "cost"): "gpuglass-cost",
    ("warning", "health"): "gpuglass-hardware",
    ("warning", "self"): "gpuglass-platform",
}


def amtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [distribution.find("amtool"), *map(str, arguments)], capture_output=True, text=True, timeout=60
    )


def test_amtool_takes_configuration_and_templates() -> None:
    done = amtool("check-config", CONFIG)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 templates" in done.stdout


def test_amtool_refuses_a_broken_template(tmp_path: Path) -> None:
    (tmp_path / "alertmanager.yml").write_text(CONFIG.read_text())
    (tmp_path / "gpuglass.tmpl").write_text(
        (FOLDER / "gpuglass.tmpl").read_text().replace("{{ end }}", "", 1)
    )
    assert amtool("check-config", tmp_path / "alertmanager.yml").returncode == 1


@pytest.mark.parametrize(("severity", "category"), RECEIVERS)
def test_each_severity_and_category_has_its_receiver(severity: str, category: str) -> None:
    done = amtool(
        "config", "routes", "test", f"--config.file={CONFIG}", f"severity={severity}", f"category={category}"
    )
    assert done.stdout.strip() == RECEIVERS[severity, category]


@pytest.mark.parametrize(
    "labels", [("severity=critical",), ("severity=none", "category=cost"), ("category=storage",)]
)
def test_alerts_of_others_do_not_page(labels: tuple[str, ...]) -> None:
    done = amtool("config", "routes", "test", f"--config.file={CONFIG}", *labels)
    assert done.stdout.strip() == "gpuglass-platform"


# With a real Alertmanager


def on_loopback(inbox: Inbox, folder: Path) -> dict[str, Any]:
    """The shipped configuration with receivers on loopback and without waits: each receiver gets the raw
    notification at /NAME, and the message for a chat at /chat/NAME."""
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    config["templates"] = [str(FOLDER / "gpuglass.tmpl")]
    for receiver in config["receivers"]:
        name = receiver["name"]
        chat = deepcopy(receiver["slack_configs"][0])
        del chat["api_url_file"]
        receiver["slack_configs"] = [{**chat, "api_url": f"{inbox.url}/chat/{name}"}]
        receiver["webhook_configs"] = [{"url": f"{inbox.url}/{name}", "send_resolved": True}]
    _shorten(config["route"])
    return config


def _shorten(route: dict[str, Any]) -> None:
    for key in ("group_wait", "group_interval"):
        if key in route:
            route[key] = "1s"
    for inner in route.get("routes", []):
        _shorten(inner)


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    with receiving() as running:
        yield running


@pytest.fixture
def alertmanager(inbox: Inbox, tmp_path: Path) -> Iterator[Alertmanager]:
    program = distribution.find("alertmanager")
    with running_alertmanager(program, on_loopback(inbox, tmp_path), tmp_path / "alertmanager") as running:
        yield running


def alert(name: str, severity: str, category: str, **labels: str) -> dict[str, Any]:
    return {
        "labels": {"alertname": name, "severity": severity, "category": category, **labels},
        "annotations": {"summary": f"{name} is there.", "description": "Because."},
    }


def named(notifications: list[Any], receiver: str) -> set[str]:
    """Names of the alerts that a receiver was told of."""
    return {a["labels"]["alertname"] for n in notifications if n.receiver == receiver for a in n.alerts}


def test_what_fires_on_one_model_and_node_is_one_notification(
    alertmanager: Alertmanager, inbox: Inbox
) -> None:
    here = {"model_name": "deepseek", "node": "a"}
    alertmanager.post(
        [
            alert("KVCacheSaturated", "warning", "memory", **here),
            alert("PreemptionStorm", "warning", "memory", **here, engine="1"),
            alert("PreemptionStorm", "warning", "memory", model_name="qwen", node="a"),
        ]
    )
    groups = inbox.wait(
        lambda all: len(raw := [n for n in all if n.receiver == "gpuglass-serving"]) >= 2 and raw,
        "both notifications",
    )
    got = sorted((n.body["groupLabels"]["model_name"], len(n.alerts)) for n in groups)
    assert got == [("deepseek", 2), ("qwen", 1)]


MUTED = [
    ("GPULost", "health", {"gpu_uuid": "GPU-1", "node": "a"}, "GPUCold", "cost", {"gpu_uuid": "GPU-1"}, True),
    (
        "GPULost",
        "health",
        {"gpu_uuid": "GPU-1", "node": "a"},
        "GPUCold",
        "cost",
        {"gpu_uuid": "GPU-2"},
        False,
    ),
    ("GPULost", "health", {"gpu_uuid": "GPU-1"}, "SLOFirstTokenBurn", "latency", {"model_name": "m"}, False),
    ("GPULost", "health", {"gpu_uuid": "GPU-1"}, "GPULost", "health", {"gpu_uuid": "GPU-1"}, False),
    ("NodeDown", "node", {"node": "a"}, "GPUThrottled", "health", {"node": "a", "gpu_uuid": "GPU-1"}, True),
    ("NodeDown", "node", {"node": "a"}, "GPUThrottled", "health", {"node": "b", "gpu_uuid": "GPU-1"}, False),
    ("NodeDown", "node", {}, "SLOErrorsBurn", "latency", {"model_name": "m"}, False),
    ("KubeNodeNotReady", "node", {"node": "a"}, "GPUGlassAgentDown", "self", {"node": "a"}, True),
    ("GPUGlassAgentDown", "self", {"node": "a"}, "KVCacheSaturated", "memory", {"node": "a"}, True),
    ("GPUGlassAgentDown", "self", {}, "KVCacheSaturated", "memory", {"model_name": "m"}, False),
]


@pytest.mark.parametrize(("source", "group", "its", "target", "category", "labels", "muted"), MUTED)
def test_inhibition(
    alertmanager: Alertmanager,
    source: str,
    group: str,
    its: Mapping[str, str],
    target: str,
    category: str,
    labels: Mapping[str, str],
    muted: bool,
) -> None:
    alertmanager.post([alert(source, "critical", group, **its), alert(target, "warning", category, **labels)])
    # The API tells of inhibition once the alert's group was flushed; a notification comes at the same time.
    (state,) = (
        a["status"]
        for a in _settled(alertmanager, inbox_size=2)
        if a["labels"]["alertname"] == target and a["labels"]["severity"] == "warning"
    )
    assert bool(state["inhibitedBy"]) is muted
    assert state["state"] == ("suppressed" if muted else "active")


def _settled(alertmanager: Alertmanager, inbox_size: int) -> list[Mapping[str, Any]]:
    import time

    until = time.monotonic() + 60
    while time.monotonic() < until:
        found = alertmanager.alerts()
        if len(found) == inbox_size and all(a["status"]["state"] != "unprocessed" for a in found):
            return found
        time.sleep(0.1)
    raise AssertionError(f"unsettled: {alertmanager.alerts()}")


def test_a_page_mutes_the_ticket_of_the_same_thing_and_no_other(alertmanager: Alertmanager) -> None:
    alertmanager.post(
        [
            alert("SLOFirstTokenBurn", "critical", "latency", model_name="m"),
            alert("SLOFirstTokenBurn", "warning", "latency", model_name="m"),
            alert("SLOFirstTokenBurn", "warning", "latency", model_name="other"),
            alert("SLOErrorsBurn", "warning", "latency", model_name="m"),
        ]
    )
    states = {
        (a["labels"]["alertname"], a["labels"]["severity"], a["labels"]["model_name"]): a["status"]["state"]
        for a in _settled(alertmanager, 4)
    }
    assert [key for key, state in states.items() if state == "suppressed"] == [
        ("SLOFirstTokenBurn", "warning", "m")
    ]


def test_a_message_names_gpu_pod_tenant_requests_and_saving(alertmanager: Alertmanager, inbox: Inbox) -> None:
    full = alert(
        "GPUCold",
        "warning",
        "cost",
        node="a",
        device="nvidia0",
        gpu_uuid="GPU-1",
        workload_namespace="prod",
        workload_pod="notebook-0",
        tenant="acme",
    )
    full["annotations"] |= {
        "saving": "2.90 USD an hour",
        "traces_url": "https://grafana/explore",
        "dashboard_url": "https://grafana/d/gpuglass-gpu",
        "runbook_url": "https://runbooks/GPUCold.md",
    }
    alertmanager.post([full])
    chat = inbox.wait(
        lambda all: next((n.body for n in all if n.receiver == "chat/gpuglass-cost"), None), "the message"
    )
    (attachment,) = chat["attachments"]
    assert attachment["title"] == "[ticket] GPUCold · node a · tenant acme"
    assert attachment["title_link"] == "https://grafana/d/gpuglass-gpu"
    assert attachment["text"].strip().splitlines() == [
        "GPUCold is there.",
        "Because.",
        "GPU: a/nvidia0 (GPU-1)",
        "Pod: prod/notebook-0",
        "Tenant: acme",
        "Saving: 2.90 USD an hour",
        "Requests: https://grafana/explore",
        "Dashboard: https://grafana/d/gpuglass-gpu",
        "Runbook: https://runbooks/GPUCold.md",
    ]


def test_a_message_without_these_has_no_empty_lines_for_them_and_a_resolved_one_says_so(
    alertmanager: Alertmanager, inbox: Inbox
) -> None:
    bare = alert("SLOErrorsBurn", "critical", "latency", model_name="m")
    alertmanager.post([bare])
    chats = "chat/gpuglass-page"
    first = inbox.wait(lambda all: [n.body for n in all if n.receiver == chats], "the message")[0]
    (attachment,) = first["attachments"]
    assert attachment["title"] == "[PAGE] SLOErrorsBurn · model m"
    assert attachment["text"].strip().splitlines() == ["SLOErrorsBurn is there.", "Because.", "Model: m"]
    alertmanager.post([{**bare, "endsAt": "2020-01-01T00:00:00Z", "startsAt": "2019-01-01T00:00:00Z"}])
    second = inbox.wait(
        lambda all: len(got := [n.body for n in all if n.receiver == chats]) > 1 and got, "its end"
    )[1]
    (attachment,) = second["attachments"]
    assert attachment["title"] == "[resolved] SLOErrorsBurn · model m"
    assert attachment["text"].strip() == "Over: SLOErrorsBurn is there."
