"""A running Jaeger 2 for tests: takes OTLP over gRPC and HTTP, keeps traces in memory, answers queries.

In: the program (`tests.support.tools.JAEGER`). Out: its endpoints, and traces as plain spans with times in
Unix nanoseconds.
"""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.ports import free_port
from tests.support.servers import serving

START_SECONDS = 60
STOP_SECONDS = 2
"""It would wait longer for clients; nothing of it is kept."""


@dataclass(frozen=True, slots=True)
class JaegerSpan:
    """A span as Jaeger keeps it."""

    name: str
    trace_id: str
    span_id: str
    parent: str
    """Empty: a root."""
    begin_ns: int
    end_ns: int
    attributes: dict[str, Any]
    resource: dict[str, Any]
    events: list[tuple[str, int, dict[str, Any]]]
    links: list[tuple[str, str, dict[str, Any]]]
    """Trace, span, attributes."""
    kind: str
    error: bool


@dataclass(frozen=True, slots=True)
class Jaeger:
    """A running server."""

    grpc: str
    """URLs of the endpoints."""
    http: str
    query: str
    log: Path

    def trace(self, trace_id: str) -> list[JaegerSpan]:
        """All spans of a trace, by begin; none if it is not known."""
        try:
            with urllib.request.urlopen(f"{self.query}/api/v3/traces/{trace_id}", timeout=30) as answer:
                return _spans(json.load(answer)["result"])
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return []
            raise

    def wait_for(
        self,
        trace_id: str,
        condition: Callable[[list[JaegerSpan]], Any] = bool,
        seconds: float = 30,
    ) -> list[JaegerSpan]:
        """The spans of a trace once they fulfil a condition."""
        until = time.monotonic() + seconds
        while not condition(spans := self.trace(trace_id)):
            if time.monotonic() > until:
                raise AssertionError(f"trace {trace_id} has {[span.name for span in spans]} only")
            time.sleep(0.1)
        return spans


@contextmanager
def running_jaeger(program: Path, folder: Path, grpc_port: int | None = None) -> Iterator[Jaeger]:
    """Run a Jaeger until the block ends."""
    grpc, http, query, health = (grpc_port or free_port(), free_port(), free_port(), free_port())
    here = "127.0.0.1"
    config = {
        "service": {
            "extensions": ["jaeger_storage", "jaeger_query", "healthcheckv2"],
            "pipelines": {"traces": {"receivers": ["otlp"], "exporters": ["jaeger_storage_exporter"]}},
            "telemetry": {"metrics": {"level": "none"}, "logs": {"level": "warn"}},
        },
        "extensions": {
            "jaeger_query": {
                "storage": {"traces": "memory"},
                "http": {"endpoint": f"{here}:{query}"},
                "grpc": {"endpoint": f"{here}:0"},
            },
            "jaeger_storage": {"backends": {"memory": {"memory": {"max_traces": 50_000}}}},
            "healthcheckv2": {"use_v2": True, "http": {"endpoint": f"{here}:{health}"}},
        },
        "receivers": {
            "otlp": {
                "protocols": {
                    "grpc": {"endpoint": f"{here}:{grpc}"},
                    "http": {"endpoint": f"{here}:{http}"},
                }
            }
        },
        "exporters": {"jaeger_storage_exporter": {"trace_storage": "memory"}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    config_file, log = folder / "jaeger.yaml", folder / "jaeger.log"
    config_file.write_text(json.dumps(config))  # JSON is YAML
    with serving(
        *("Jaeger", [str(program), "--config", str(config_file)], log, f"http://{here}:{health}/status"),
        *(START_SECONDS, STOP_SECONDS),
        cwd=folder,
        error=AssertionError,
    ):
        yield Jaeger(f"http://{here}:{grpc}", f"http://{here}:{http}", f"http://{here}:{query}", log)


def _spans(result: dict[str, Any]) -> list[JaegerSpan]:
    found = []
    for of_resource in result["resourceSpans"]:
        resource = _attributes(of_resource["resource"])
        for scope in of_resource["scopeSpans"]:
            found += [_span(span, resource) for span in scope["spans"]]
    return sorted(found, key=lambda span: (span.begin_ns, -span.end_ns))


def _span(span: dict[str, Any], resource: dict[str, Any]) -> JaegerSpan:
    return JaegerSpan(
        span["name"],
        _hex(span["traceId"], 32),
        _hex(span["spanId"], 16),
        _hex(span.get("parentSpanId", ""), 16),
        int(span["startTimeUnixNano"]),
        int(span["endTimeUnixNano"]),
        _attributes(span),
        resource,
        [(e["name"], int(e["timeUnixNano"]), _attributes(e)) for e in span.get("events", ())],
        [
            (_hex(link["traceId"], 32), _hex(link["spanId"], 16), _attributes(link))
            for link in span.get("links", ())
        ],
        str(span.get("kind", "")),
        span.get("status", {}).get("code") in (2, "STATUS_CODE_ERROR"),
    )


def _hex(text: str, length: int) -> str:
    """An id as hex digits; JSON of protobuf may have it in base64."""
    if not text or len(text) == length:
        return text
    return base64.b64decode(text).hex()


def _attributes(of: dict[str, Any]) -> dict[str, Any]:
    return {pair["key"]: _value(pair["value"]) for pair in of.get("attributes", ())}


def _value(value: dict[str, Any]) -> Any:
    ((kind, content),) = value.items()
    if kind == "intValue":
        return int(content)
    if kind == "arrayValue":
        return [_value(item) for item in content.get("values", ())]
    return content
