"""The tracer's part of `gpuglass doctor`: is a CUDA tracer heard, and what is thought of processes.

The running agent's own /metrics is asked; `judge` turns the answer into checks and is pure.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from gpuglass.config import Config
from gpuglass.doctor import http, listen
from gpuglass.doctor.check import Check, Status
from gpuglass.families import cuda as families

SECONDS = 2.0
ANSWER_LIMIT = 16 << 20
SHOWN = 4
"""Suspected processes that a finding names."""


def diagnose(config: Config) -> list[Check]:
    """The checks; takes at most a few seconds. None where no agent answers: its own check says so."""
    if not config.engines.enabled:
        return []
    url = listen.own_url(listen.address_of(config.server), bool(config.server.web_config_file))
    try:
        answer = http.get(url, "/metrics/slow", seconds=SECONDS, limit=ANSWER_LIMIT, verify=False)
    except http.NoAnswer:
        return []
    if answer.status != 200 or not answer.complete:
        return []
    try:
        text = answer.body.decode()
        samples = [sample for metric in text_string_to_metric_families(text) for sample in metric.samples]
    except ValueError:
        return []
    return judge(samples)


def judge(samples: Iterable[Sample]) -> list[Check]:
    """What the agent's samples say about tracers."""
    by_name: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_name[sample.name].append(sample)
    if families.TRACERS.name not in by_name:
        return []
    name, title = "bpf.tracer", "CUDA tracer"
    if not by_name[families.TRACERS.name][0].value:
        text = "the agent hears none: leaks and failed allocations of CUDA memory are not seen"
        mend = "gpuglass cuda-tracer (as root); its user has to be in engines.tracer_uids"
        return [Check(name, title, Status.INFO, text, mend)]
    states = Counter(sample.labels["state"] for sample in by_name[families.LEAK_STATE.name])
    shown = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    checks = [Check(name, title, Status.OK, f"the agent hears one; {shown or 'no process yet'}")]
    suspected = [s.labels for s in by_name[families.LEAK_SUSPECTED.name] if s.value]
    if suspected:
        text = ", ".join(f"{s['process']} (pid {s['pid']}, {s['kind']})" for s in suspected[:SHOWN])
        rest = len(suspected) - SHOWN
        text += f" and {rest} more" if rest > 0 else ""
        mend = f"{families.LEAK_STACK.name} names the stacks"
        checks.append(Check("bpf.leaks", "leaks of CUDA memory", Status.WARN, text, mend))
    if states["blind"]:
        text = f"{states['blind']} ledgers contradict the driver or missed calls: no verdict on them"
        checks.append(Check("bpf.ledger", "ledger", Status.WARN, text))
    return checks
