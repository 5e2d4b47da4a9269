"""The engines' part of `gpuglass doctor`: can engines be heard, who is, and what do they say they cannot see.

What is connected is known to the running agent only: its own /metrics is asked. `judge` turns the answer into
checks and is pure.
"""

from __future__ import annotations

import os
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from exporters.vllm.endpoint import Endpoint, answers
from exporters.vllm.sink import GpuClaim, Refusal
from gpuglass.config import Config, EnginesConfig
from gpuglass.doctor import http, listen
from gpuglass.doctor.check import Check, Status
from gpuglass.families import probe as families
from gpuglass_vllm.records import TRACER

SECONDS = 2.0
ANSWER_LIMIT = 16 << 20
SHOWN = 6
"""Hooks, reasons and processes that a finding names."""


@dataclass(frozen=True, slots=True)
class Socket:
    """What lies at the socket's path."""

    path: str
    is_default: bool
    state: str
    """answers, stale, absent, other (no socket), or denied (absent, and this user cannot make it)."""


def diagnose(config: Config) -> list[Check]:
    """The checks of the room; takes at most a few seconds."""
    if not config.engines.enabled:
        return [
            Check("engines.receiver", "record stream", Status.INFO, "switched off by engines.enabled: false")
        ]
    found = look_at(config.engines)
    checks = [socket_check(found), *allowed_check(config.engines)]
    if found.state != "answers":
        return checks
    try:
        samples = _ask(config)
    except http.NoAnswer as error:
        text = f"the agent's metrics cannot be read: {error}"
        return [*checks, Check("engines.senders", "engines heard", Status.INFO, text)]
    return checks + judge(samples, found.path)


def look_at(config: EnginesConfig) -> Socket:
    """See what lies at the socket's path, without changing anything."""
    endpoint = Endpoint(config)
    path = endpoint.path
    try:
        is_socket = stat.S_ISSOCK(path.lstat().st_mode)
    except OSError:
        state = "absent" if _can_make(path) else "denied"
    else:
        state = "other" if not is_socket else "answers" if answers(path) else "stale"
    return Socket(str(path), endpoint.is_default, state)


def _can_make(path: Path) -> bool:
    folder = next(parent for parent in path.parents if parent.exists())
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def socket_check(found: Socket) -> Check:
    """What the socket's state means."""
    name, title = "engines.receiver", "record stream"
    match found.state:
        case "answers":
            return Check(name, title, Status.OK, f"engines can connect to {found.path}")
        case "other":
            return Check(
                name,
                title,
                Status.FAIL,
                f"{found.path} is no socket",
                "remove it, or set engines.socket to another path",
            )
        case "denied":
            return Check(
                name,
                title,
                Status.WARN if found.is_default else Status.FAIL,
                f"this user cannot make {found.path}: no engine would be heard",
                f"install -d -o USER {Path(found.path).parent}, or set engines.socket",
            )
        case _:
            text = "nobody listens there now" if found.state == "stale" else "not there"
            return Check(name, title, Status.INFO, f"{found.path}: {text}; a running agent makes it")


def allowed_check(config: EnginesConfig) -> list[Check]:
    """Say so if any user of the machine may send."""
    is_open = config.socket_mode.bits & 0o002 and config.directory_mode.bits & 0o001
    if config.allow_uids or config.allow_namespaces or not is_open:
        return []
    return [
        Check(
            "engines.allowed",
            "who may send",
            Status.INFO,
            "any user of this machine whose process reaches the socket",
            "engines.allow_uids and engines.allow_namespaces say who may, directory_mode who reaches it",
        )
    ]


def _ask(config: Config) -> list[Sample]:
    """Samples of the running agent; raises `NoAnswer`."""
    url = listen.own_url(listen.address_of(config.server), bool(config.server.web_config_file))
    answer = http.get(url, "/metrics/slow", seconds=SECONDS, limit=ANSWER_LIMIT, verify=False)
    if answer.status != 200 or not answer.complete:
        raise http.NoAnswer(f"{url}/metrics/slow has status {answer.status}")
    try:
        text = answer.body.decode()
        return [sample for metric in text_string_to_metric_families(text) for sample in metric.samples]
    except ValueError:
        raise http.NoAnswer(f"{url}/metrics/slow is no exposition") from None


def judge(samples: Iterable[Sample], path: str) -> list[Check]:
    """What the agent's samples say about engines."""
    by_name: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_name[sample.name].append(sample)
    if families.UP.name not in by_name:
        text = "the agent that answers on server.listen has no receiver"
        return [Check("engines.senders", "engines heard", Status.INFO, text)]
    return [
        _senders(by_name[families.INFO.name], path),
        *_hooks(by_name[families.CAPABILITY.name]),
        *_claims(by_name[families.INFO.name]),
        *_refused(by_name[families.REFUSED.name]),
    ]


def _senders(infos: list[Sample], path: str) -> Check:
    name, title = "engines.senders", "engines heard"
    infos = [info for info in infos if info.labels["role"] != TRACER]
    if not infos:
        return Check(
            name,
            title,
            Status.INFO,
            "none is connected",
            f"pip install gpuglass-vllm beside vLLM, and start it with GPUGLASS_SOCKET={path}",
        )
    engines: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for info in infos:
        labels = info.labels
        engines[f"{labels['engine_name']} {labels['model_name']}"][labels["role"]] += 1
    lines = [
        f"{engine} ({', '.join(f'{count} {role}' for role, count in sorted(roles.items()))})"
        for engine, roles in sorted(engines.items())
    ]
    return Check(name, title, Status.OK, _some(lines))


def _hooks(capabilities: list[Sample]) -> list[Check]:
    if not capabilities:
        return []
    name, title = "engines.hooks", "what probes see"
    missing = sorted(
        {
            f"{sample.labels['hook']} ({sample.labels.get('reason') or 'no reason given'})"
            for sample in capabilities
            if sample.labels["state"] == "unavailable"
        }
    )
    active = len({s.labels["hook"] for s in capabilities if s.labels["state"] == "active"})
    if not missing:
        return [Check(name, title, Status.OK, f"{active} hooks active, none unavailable")]
    return [Check(name, title, Status.WARN, f"{active} hooks active; unavailable: {_some(missing)}")]


def _claims(infos: list[Sample]) -> list[Check]:
    refused = [info for info in infos if info.labels["gpu_claim"] == GpuClaim.REFUSED.value]
    unverified = [info for info in infos if info.labels["gpu_claim"] == GpuClaim.UNVERIFIED.value]
    name, title = "engines.gpus", "GPUs of engines"
    if refused:
        return [
            Check(
                name,
                title,
                Status.WARN,
                f"{len(refused)} workers name a GPU on which the driver does not list them",
            )
        ]
    if unverified:
        return [
            Check(
                name,
                title,
                Status.INFO,
                f"{len(unverified)} workers' GPUs are taken as they say: the driver's lists are not to be "
                "had, or pids are not the host's",
            )
        ]
    return []


def _refused(counts: list[Sample]) -> list[Check]:
    # What newer senders say beyond us is no fault of theirs.
    found = {
        sample.labels["reason"]: sample.value
        for sample in counts
        if sample.value > 0 and sample.labels["reason"] != Refusal.UNKNOWN_TYPE.value
    }
    if not found:
        return []
    text = _some([f"{reason} {count:.0f}" for reason, count in sorted(found.items())])
    mend = "the agent's log names pid and uid"
    return [Check("engines.refused", "refused", Status.WARN, f"since the agent started: {text}", mend)]


def _some(items: list[str]) -> str:
    rest = len(items) - SHOWN
    return ", ".join(items[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
