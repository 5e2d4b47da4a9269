"""Families about the record stream itself (`exporters/vllm`): who sends, what it can see, what was received,
refused and dropped.

`sender` is the beginning of the random name of one process's life; it leaves when the process does. Counters
that a sender keeps (dropped, errors) carry it, so that neither a restart of the agent nor one of the engine
counts anything twice.
"""

from __future__ import annotations

from gpuglass.family import Family, Kind

WORKLOAD = ("workload_namespace", "workload_pod", "workload_container")
ENGINE = ("model_name", "engine", "server", *WORKLOAD)
SENDER = (*ENGINE, "role", "rank", "sender")
_OPTIONAL = frozenset({"server", "rank", *WORKLOAD})

_NOBODY = "No engine with such a process is connected."
_ALWAYS = "The receiver is off (engines.enabled) or the agent does not run."


def _of_sender(
    name: str, kind: Kind, unit: str, help: str, *labels: str, optional: frozenset[str] = frozenset()
) -> Family:
    return Family(
        f"gpuglass_probe_{name}",
        kind,
        help,
        (*SENDER, *labels),
        unit,
        absent=_NOBODY,
        optional=_OPTIONAL | optional,
    )


def _of_receiver(name: str, kind: Kind, unit: str, help: str, *labels: str) -> Family:
    return Family(f"gpuglass_receiver_{name}", kind, help, labels, unit, absent=_ALWAYS)


INFO = _of_sender(
    "info",
    Kind.INFO,
    "",
    "A connected process of an engine: what it runs, and what is thought of the GPU that it claims "
    "(gpu_claim: verified by the driver's list of processes, unverified where nobody can tell, pending, "
    "refused, none).",
    "engine_name",
    "engine_version",
    "software",
    "device_name",
    "gpu_uuid",
    "gpu_claim",
    optional=frozenset({"device_name", "gpu_uuid"}),
)
CAPABILITY = Family(
    "gpuglass_probe_capability",
    Kind.GAUGE,
    "Connected processes of an engine by hook of the probe and its state: active, unavailable (with the "
    "reason) or disabled.",
    (*ENGINE, "role", "hook", "state", "reason"),
    absent=_NOBODY,
    optional=frozenset({"server", "reason", *WORKLOAD}),
)
DROPPED = _of_sender(
    "dropped_events_total",
    Kind.COUNTER,
    "",
    "Events that a sender dropped because the agent was away or slow. Sums are never dropped.",
)
SEND_ERRORS = _of_sender("send_errors_total", Kind.COUNTER, "", "Errors of a sender while it sent.")
HOOK_ERRORS = _of_sender(
    "hook_errors_total",
    Kind.COUNTER,
    "",
    "Errors inside the probe that the engine did not notice, by hook; after three it is switched off.",
    "hook",
)
HOOK_SECONDS = _of_sender(
    "hook_seconds_total",
    Kind.COUNTER,
    "seconds",
    "Time that the probe took on the engine's own threads.",
)

UP = _of_receiver(
    "up",
    Kind.GAUGE,
    "",
    "1 while the socket that engines connect to is there; 0 with the reason while it cannot be made.",
    "reason",
)
SENDERS = _of_receiver(
    "senders",
    Kind.GAUGE,
    "",
    "Processes of engines that are connected, by role (unknown: no hello yet).",
    "role",
)
CONNECTIONS = _of_receiver("connections_total", Kind.COUNTER, "", "Connections accepted or refused.")
PACKETS = _of_receiver("packets_total", Kind.COUNTER, "", "Packets received.")
BYTES = _of_receiver("received_bytes_total", Kind.COUNTER, "bytes", "Bytes of the packets received.")
RECORDS = _of_receiver("records_total", Kind.COUNTER, "", "Records taken in, by type.", "type")
REFUSED = _of_receiver(
    "refused_total",
    Kind.COUNTER,
    "",
    "Connections, packets and records that were not taken in, by reason.",
    "reason",
)
REPEATED = _of_receiver(
    "repeated_packets_total",
    Kind.COUNTER,
    "",
    "Packets with sums that came a second time, were not counted again and were acknowledged again.",
)
PAUSES = _of_receiver(
    "pauses_total", Kind.COUNTER, "", "Times that a sender had to wait because it was over its rate."
)
UNSENT_ACKS = _of_receiver(
    "unsent_acks_total",
    Kind.COUNTER,
    "",
    "Acknowledgements that a sender's full socket did not take; a later one stands for them.",
)
LAG = Family(
    "gpuglass_receiver_lag_seconds",
    Kind.HISTOGRAM,
    "Age of pool, worker and probe states when the agent received them.",
    (),
    "seconds",
    absent=_ALWAYS,
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
