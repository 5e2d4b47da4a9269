"""The trace bridge's part of `gpuglass doctor`: does the collector answer.

An empty OTLP request is sent, as the agent would send its spans: address, protocol, TLS and headers are tried
at once. `judge` turns the reply into a check and is pure.
"""

from __future__ import annotations

from gpuglass.config import Config, TracesConfig
from gpuglass.doctor.check import Check, Status
from gpuglass.errors import ConfigError
from otel_bridge.transport import Reply, make

SECONDS = 3.0
NAME, TITLE = "traces.collector", "trace collector"


def diagnose(config: Config) -> list[Check]:
    """The checks; takes at most a few seconds."""
    traces = config.traces
    if not traces.endpoint:
        text = "no traces are exported"
        mend = "set traces.endpoint to an OTLP collector, Tempo or Jaeger"
        return [Check(NAME, TITLE, Status.INFO, text, mend)]
    if not config.engines.enabled:
        text = "traces.endpoint is set, but engines.enabled is false: there is nothing to export"
        return [Check(NAME, TITLE, Status.WARN, text, "set engines.enabled to true")]
    try:
        transport = make(traces)
    except ConfigError as error:
        return [Check(NAME, TITLE, Status.FAIL, str(error))]
    try:
        return [judge(traces, transport.send(b"", SECONDS))]
    except ImportError as error:
        return [Check(NAME, TITLE, Status.FAIL, f"no package {error.name}", "pip install 'gpuglass[traces]'")]
    finally:
        transport.abort()


def judge(traces: TracesConfig, reply: Reply) -> Check:
    """What the reply to an empty request says."""
    where = f"{traces.endpoint} ({traces.protocol})"
    if reply.result in ("ok", "partial"):
        return Check(NAME, TITLE, Status.OK, f"{where} takes spans")
    if reply.result == "refused":
        other = "http" if traces.protocol == "grpc" else "grpc"
        mend = f"see its log; traces.headers_file holds credentials, traces.protocol may have to be {other}"
        return Check(NAME, TITLE, Status.FAIL, f"{where} refuses spans: {reply.why}", mend)
    mend = "start it, or mend traces.endpoint, traces.protocol, traces.tls; spans are dropped meanwhile"
    return Check(NAME, TITLE, Status.FAIL, f"{where} does not answer: {reply.why}", mend)
