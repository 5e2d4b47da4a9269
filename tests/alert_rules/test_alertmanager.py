"""The Alertmanager fragment: its tools take it, each severity and category goes where it should, alerts that
say the same are muted, and messages name what an operator has to know."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpuglass.demo import distribution
from tests.support import tools
from tests.support.alertmanager import Alertmanager, Inbox, receiving, running_alertmanager

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


Amtool = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.needs(name)) for name in ("debian-prometheus", "alertmanager")
    ]
)
def amtool(request: pytest.FixtureRequest) -> Amtool:
    """The distribution's amtool, and a current one."""
    debian = request.param == "debian-prometheus"
    program = distribution.find("amtool") if debian else tools.ALERTMANAGER.program("amtool")

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(program), *map(str, arguments)], capture_output=True, text=True, timeout=60
        )

    return run


def test_amtool_takes_configuration_and_templates(amtool: Amtool) -> None:
    done = amtool("check-config", CONFIG)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 templates" in done.stdout


def test_amtool_refuses_a_broken_template(amtool: Amtool, tmp_path: Path) -> None:
    (tmp_path / "alertmanager.yml").write_text(CONFIG.read_text())
    (tmp_path / "gpuglass.tmpl").write_text(
        (FOLDER / "gpuglass.tmpl").read_text().replace("{{ end }}", "", 1)
    )
    assert amtool("check-config", tmp_path / "alertmanager.yml").returncode == 1


@pytest.mark.parametrize(("severity", "category"), RECEIVERS)
def test_each_severity_and_category_has_its_receiver(amtool: Amtool, severity: str, category: str) -> None:
    done = amtool(
        "config", "routes", "test", f"--config.file={CONFIG}", f"severity={severity}", f"category={category}"
    )
    assert done.stdout.strip() == RECEIVERS[severity, category]


@pytest.mark.parametrize(
    "labels", [("severity=critical",), ("severity=none", "category=cost"), ("category=storage",)]
)
def test_alerts_of_others_do_not_page(amtool: Amtool, labels: tuple[str, ...]) -> None:
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
def alertmanager(alertmanager_program: Path, inbox: Inbox, tmp_path: Path) -> Iterator[Alertmanager]:
    with running_alertmanager(
        alertmanager_program, on_loopback(inbox, tmp_path), tmp_path / "alertmanager"
    ) as running:
        yield running


def alert(name: str, severity: str, category: str, **labels: str) -> dict[str, Any]:
    return {
        "labels": {"alertname": name, "severity": severity, "category": category, **labels},
        "annotations": {"summary": f"{name} is there.", "description": "Because."},
    }


def named(notifications: list[Any], receiver: str) -> set[str]:
    """Names of the alerts that a receiver was told of."""
    return {a["labels"]["alertname"] for n in notifications if n.receiver == receiver for a in n.alerts}


@pytest.mark.needs("alertmanager")
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
    ("GPULost", "health", {"gpu_uuid": "GPU-1"}, "GPUCold", "cost", {"gpu_uuid": "GPU-2"}, False),
    ("GPULost", "health", {"gpu_uuid": "GPU-1"}, "SLOFirstTokenBurn", "latency", {"model_name": "m"}, False),
    ("NodeDown", "node", {"node": "a"}, "GPUThrottled", "health", {"node": "a", "gpu_uuid": "GPU-1"}, True),
    ("NodeDown", "node", {"node": "a"}, "GPUThrottled", "health", {"node": "b", "gpu_uuid": "GPU-1"}, False),
    ("NodeDown", "node", {}, "SLOErrorsBurn", "latency", {"model_name": "m"}, False),
    ("KubeNodeNotReady", "node", {"node": "a"}, "GPUGlassAgentDown", "self", {"node": "a"}, True),
    ("GPUGlassAgentDown", "self", {"node": "a"}, "KVCacheSaturated", "memory", {"node": "a"}, True),
    ("GPUGlassAgentDown", "self", {"node": "a"}, "GPUGlassDropping", "self", {"node": "a"}, False),
    ("GPUGlassAgentDown", "self", {}, "KVCacheSaturated", "memory", {"model_name": "m"}, False),
    ("SLOErrorsBurn", "latency", {"model_name": "m"}, "SLOErrorsBurn", "latency", {"model_name": "m"}, True),
    ("SLOErrorsBurn", "latency", {"model_name": "m"}, "SLOErrorsBurn", "latency", {"model_name": "n"}, False),
    ("SLOErrorsBurn", "latency", {"model_name": "m"}, "QueueSLO", "latency", {"model_name": "m"}, False),
]
"""A critical alert, a warning, and whether the first mutes the second."""


@pytest.mark.needs("alertmanager")
def test_a_cause_mutes_what_follows_from_it_and_nothing_else(alertmanager: Alertmanager) -> None:
    def of_case(number: int, labels: Mapping[str, str]) -> dict[str, str]:
        return {name: f"{value} of {number}" for name, value in labels.items()}

    numbered = list(enumerate(MUTED))
    alertmanager.post(
        [alert(name, "critical", kind, **of_case(n, labels)) for n, (name, kind, labels, *_) in numbered]
    )
    alertmanager.post(
        [
            alert(name, "warning", kind, case=str(n), **of_case(n, labels))
            for n, (*_, name, kind, labels, _) in numbered
        ]
    )
    expected = {str(number) for number, case in numbered if case[-1]}
    seen: set[str] = set()

    def muted() -> set[str]:
        found = [a for a in alertmanager.alerts() if "case" in a["labels"]]
        assert len(found) == len(MUTED)
        return {a["labels"]["case"] for a in found if a["status"]["state"] == "suppressed"}

    # The inhibitor hears of the sources a moment after the API has taken them.
    until = time.monotonic() + 60
    while not expected <= (seen := muted()) and time.monotonic() < until:
        time.sleep(0.1)
    assert seen == expected


@pytest.mark.needs("alertmanager")
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


@pytest.mark.needs("alertmanager")
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
