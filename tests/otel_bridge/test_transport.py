"""Both ways to a collector, against real servers of gRPC and HTTP: what came of a request, TLS, headers."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from gpuglass.config import Config, EnginesConfig, TracesConfig, TracesTlsConfig
from gpuglass.doctor.check import Status
from gpuglass.errors import ConfigError
from otel_bridge import diagnose
from otel_bridge.identity import child
from otel_bridge.model import Context, Event, Kind, Link, Span, Trace
from otel_bridge.otlp import encode
from otel_bridge.transport import Headers, Transport, make, read_headers
from tests.otel_bridge.conftest import Certificates
from tests.otel_bridge.sink import Sink, grpc_sink, http_sink
from tests.support.jaeger import Jaeger
from tests.support.ports import free_port

BODY = encode([Trace((), [Span("queue", Context(b"t" * 16, b"s" * 8), b"", 1, 2)])])
SECONDS = 60.0
PROTOCOLS = ("grpc", "http")


@pytest.fixture(params=PROTOCOLS)
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def sink(protocol: str) -> Iterator[Sink]:
    """A collector in the clear."""
    with (grpc_sink if protocol == "grpc" else http_sink)() as running:
        yield running


def transport(url: str, protocol: str, **more: Any) -> Transport:
    return make(TracesConfig(endpoint=url, protocol=protocol, **more))  # type: ignore[arg-type]


@pytest.mark.parametrize("compression", ["gzip", "none"])
def test_spans_arrive(sink: Sink, protocol: str, compression: str) -> None:
    way = transport(sink.url, protocol, compression=compression)
    assert [way.send(BODY, SECONDS).result for _ in range(3)] == ["ok"] * 3
    assert [span.name for span in sink.spans] == ["queue"] * 3
    told = sink.headers[0].get("grpc-encoding" if protocol == "grpc" else "content-encoding")
    if protocol == "http":
        assert told == (None if compression == "none" else "gzip")
        assert sink.headers[0]["path"] == "/v1/traces"
    way.abort()


def test_a_url_with_a_path_keeps_it() -> None:
    with http_sink() as sink:
        transport(f"{sink.url}/otlp/traces?x=1", "http").send(BODY, SECONDS)
        assert sink.headers[0]["path"] == "/otlp/traces?x=1"


def test_a_part_that_was_refused_is_told(sink: Sink, protocol: str) -> None:
    sink.refused_spans = 3
    reply = transport(sink.url, protocol).send(BODY, SECONDS)
    assert (reply.result, reply.refused, reply.why) == ("partial", 3, "no room")


_RETRY_INFO = (("grpc-status-details-bin", b"type.googleapis.com/google.rpc.RetryInfo"),)


@pytest.mark.parametrize(
    "fault, result",
    [
        ((grpc.StatusCode.UNAVAILABLE, "later"), "retry"),
        ((grpc.StatusCode.DATA_LOSS, "later"), "retry"),
        ((grpc.StatusCode.RESOURCE_EXHAUSTED, "too large"), "refused"),
        ((grpc.StatusCode.RESOURCE_EXHAUSTED, "slower", _RETRY_INFO), "retry"),
        ((grpc.StatusCode.UNAUTHENTICATED, "who are you"), "refused"),
        ((grpc.StatusCode.INVALID_ARGUMENT, "what"), "refused"),
    ],
)
def test_grpc_codes_say_whether_to_try_again(fault: tuple[Any, ...], result: str) -> None:
    with grpc_sink() as sink:
        sink.answer = lambda: fault
        reply = transport(sink.url, "grpc").send(BODY, SECONDS)
        assert reply.result == result and fault[1] in reply.why
        assert sink.spans == []


@pytest.mark.parametrize(
    "status, headers, result, after",
    [
        (503, {"Retry-After": "7"}, "retry", 7.0),
        (429, {}, "retry", 0.0),
        (502, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, "retry", 0.0),
        (401, {}, "refused", 0.0),
        (500, {}, "refused", 0.0),
    ],
)
def test_http_status_says_whether_to_try_again(
    status: int, headers: dict[str, str], result: str, after: float
) -> None:
    with http_sink() as sink:
        sink.answer = lambda: (status, headers)
        way = transport(sink.url, "http")
        reply = way.send(BODY, SECONDS)
        assert (reply.result, reply.after) == (result, after) and str(status) in reply.why
        sink.answer = lambda: None
        assert way.send(BODY, SECONDS).result == "ok", "the connection can be used again"


def test_nobody_there_is_tried_again(protocol: str) -> None:
    reply = transport(f"http://127.0.0.1:{free_port()}", protocol).send(BODY, SECONDS)
    assert reply.result == "retry" and reply.why


def test_a_server_that_comes_back_is_found() -> None:
    with grpc_sink() as sink:
        way = transport(sink.url, "grpc")
        assert way.send(BODY, SECONDS).result == "ok"
        port = int(sink.url.rpartition(":")[2])
    assert way.send(BODY, SECONDS).result == "retry"
    with grpc_sink(port=port):
        until = time.monotonic() + SECONDS
        while (reply := way.send(BODY, SECONDS)).result != "ok":
            assert time.monotonic() < until, reply
            time.sleep(0.05)


def test_a_kept_connection_that_the_server_closed_is_made_anew() -> None:
    with http_sink() as sink:
        sink.hangs_up = True
        way = transport(sink.url, "http")
        assert [way.send(BODY, SECONDS).result for _ in range(3)] == ["ok"] * 3
        assert len(sink.spans) == 3


def test_a_server_that_does_not_answer_costs_the_timeout(sink: Sink, protocol: str) -> None:
    release = threading.Event()
    sink.answer = lambda: release.wait(SECONDS) and None
    try:
        assert transport(sink.url, protocol).send(BODY, 0.2).result == "retry"
    finally:
        release.set()


def test_what_is_under_way_can_be_ended(sink: Sink, protocol: str) -> None:
    arrived, release = threading.Event(), threading.Event()

    def hang() -> None:
        arrived.set()
        release.wait(SECONDS)

    sink.answer = hang
    way = transport(sink.url, protocol)
    replies: list[str] = []
    thread = threading.Thread(target=lambda: replies.append(way.send(BODY, 600).result))
    thread.start()
    try:
        assert arrived.wait(SECONDS)
        way.abort()
        thread.join(SECONDS)
        assert replies == ["retry"]
    finally:
        release.set()


# TLS


def secure(protocol: str, certificates: Certificates) -> Any:
    if protocol == "grpc":
        return grpc_sink(certificates.key.read_bytes(), certificates.certificate.read_bytes())
    return http_sink((str(certificates.certificate), str(certificates.key)))


def test_tls_with_a_certificate_that_is_believed(protocol: str, certificates: Certificates) -> None:
    tls = TracesTlsConfig(ca_file=str(certificates.certificate))
    with secure(protocol, certificates) as sink:
        way = transport(sink.url, protocol, tls=tls)
        assert way.send(BODY, SECONDS).result == "ok" and len(sink.spans) == 1
        way.abort()


def test_tls_with_one_that_is_not_sends_nothing(protocol: str, certificates: Certificates) -> None:
    with secure(protocol, certificates) as sink:
        way = transport(sink.url, protocol)
        reply = way.send(BODY, SECONDS)
        assert reply.result == "retry" and "certificate" in reply.why.lower(), reply
        assert sink.requests == []
        way.abort()


def test_tls_to_a_server_without_it_sends_nothing(sink: Sink, protocol: str) -> None:
    way = transport(sink.url.replace("http://", "https://"), protocol)
    assert way.send(BODY, SECONDS).result == "retry" and sink.requests == []
    way.abort()


@pytest.mark.parametrize("key", ["ca_file", "cert_file"])
def test_a_file_that_is_not_there_is_named(protocol: str, key: str) -> None:
    given = {key: "/no/such/file", **({"key_file": "/no/such/file"} if key == "cert_file" else {})}
    with pytest.raises(ConfigError, match=r"traces\.tls\.\w+: /no/such/file: cannot read it"):
        transport("https://localhost:1", protocol, tls=TracesTlsConfig(**given))


def test_a_file_without_certificates_is_named(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("no certificate")
    with pytest.raises(ConfigError, match=r"traces\.tls\.ca_file: .*no certificates"):
        transport("https://localhost:1", "http", tls=TracesTlsConfig(ca_file=str(tmp_path / "ca.crt")))


# Headers


def test_headers_from_the_file_are_sent_and_read_anew(sink: Sink, protocol: str, tmp_path: Path) -> None:
    file = tmp_path / "headers"
    file.write_text("# credentials\nAuthorization: Bearer one\n\nX-Scope-OrgID:team\n")
    way = transport(sink.url, protocol, headers_file=str(file))
    way.send(BODY, SECONDS)
    new = tmp_path / "new"
    new.write_text("authorization: Bearer two\n")
    new.replace(file)
    way.send(BODY, SECONDS)
    assert [h.get("authorization") for h in sink.headers] == ["Bearer one", "Bearer two"]
    assert [h.get("x-scope-orgid") for h in sink.headers] == ["team", None]


def test_a_headers_file_that_becomes_wrong_leaves_the_headers(tmp_path: Path) -> None:
    file = tmp_path / "headers"
    file.write_text("a: 1\n")
    headers = Headers(str(file))
    file.write_text("nonsense\n")
    os.utime(file, ns=(1, 1))
    assert headers.current() == (("a", "1"),)
    file.unlink()
    assert headers.current() == (("a", "1"),)


@pytest.mark.parametrize(
    "content, problem",
    [("a: 1\nsecret-token\n", "line 2"), ("a b: 1\n", "line 1"), ("a: ü\n", "line 1"), (": 1\n", "line 1")],
)
def test_a_wrong_line_is_named_and_not_shown(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "headers").write_text(content)
    with pytest.raises(ConfigError, match=problem) as raised:
        read_headers(tmp_path / "headers")
    assert "secret-token" not in str(raised.value)


def test_a_headers_file_that_is_not_there_is_named(protocol: str) -> None:
    with pytest.raises(ConfigError, match=r"traces\.headers_file: /no/such/file: cannot read it"):
        transport("http://localhost:1", protocol, headers_file="/no/such/file")


# Doctor


def doctor(url: str, protocol: str = "grpc", **more: Any) -> tuple[Status, str]:
    config = Config(traces=TracesConfig(endpoint=url, protocol=protocol, **more))  # type: ignore[arg-type]
    (check,) = diagnose.diagnose(config)
    return check.status, check.finding


def test_the_doctor_tries_the_collector(sink: Sink, protocol: str) -> None:
    assert doctor(sink.url, protocol)[0] is Status.OK
    assert sink.spans == [], "nothing is left behind"


def test_the_doctor_says_what_is_wrong(protocol: str, tmp_path: Path) -> None:
    status, finding = doctor(f"http://127.0.0.1:{free_port()}", protocol)
    assert status is Status.FAIL and "does not answer" in finding
    status, finding = doctor("http://localhost:1", protocol, headers_file=str(tmp_path / "none"))
    assert status is Status.FAIL and "headers_file" in finding


def test_the_doctor_sees_the_wrong_protocol() -> None:
    with http_sink() as sink:
        assert doctor(sink.url, "grpc")[0] is Status.FAIL
        sink.answer = lambda: (404, {})
        status, finding = doctor(sink.url, "http")
        assert status is Status.FAIL and "404" in finding


def test_the_doctor_needs_an_endpoint_and_engines() -> None:
    (check,) = diagnose.diagnose(Config())
    assert check.status is Status.INFO
    off = Config(traces=TracesConfig(endpoint="http://localhost:1"), engines=EnginesConfig(enabled=False))
    (check,) = diagnose.diagnose(off)
    assert check.status is Status.WARN


def test_a_port_that_accepts_and_says_nothing_does_not_hang_the_doctor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(diagnose, "SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        status, _ = doctor(f"http://127.0.0.1:{server.getsockname()[1]}", "http")
    assert status is Status.FAIL


# A real collector


@pytest.mark.needs("jaeger")
def test_jaeger_keeps_all_that_a_span_says(jaeger: Jaeger, protocol: str) -> None:
    trace = ("a" if protocol == "grpc" else "b") * 32
    now = time.time_ns()
    root = Context(bytes.fromhex(trace), b"r" * 8)
    link = Link(Context(b"o" * 16, b"l" * 8), (("gpuglass.tokens", 7), ("gpuglass.gpu.seconds", 0.5)))
    spans = [
        Span(
            "chat tiny",
            root,
            b"",
            now,
            now + 5000,
            (("gen_ai.response.finish_reasons", ("stop",)),),
            (Event("gpuglass.preempted", now + 2000, (("gpuglass.preemption.cause", "kv_full"),)),),
            kind=Kind.SERVER,
            error="timeout",
        ),
        Span("engine.step", child(root, 1), root.span_id, now + 1000, now + 4000, links=(link,)),
    ]
    url = jaeger.grpc if protocol == "grpc" else jaeger.http
    way = transport(url, protocol)
    assert way.send(encode([Trace((("service.name", protocol),), spans)]), SECONDS).result == "ok"
    way.abort()
    found, step = jaeger.wait_for(trace, lambda spans: len(spans) == 2)
    assert (found.name, found.parent, found.begin_ns, found.end_ns) == ("chat tiny", "", now, now + 5000)
    assert found.error and found.resource["service.name"] == protocol
    assert found.attributes["gen_ai.response.finish_reasons"] == ["stop"]
    assert found.events == [("gpuglass.preempted", now + 2000, {"gpuglass.preemption.cause": "kv_full"})]
    assert step.parent == found.span_id and not step.error
    ((trace_id, span_id, told),) = step.links
    assert (trace_id, span_id) == ((b"o" * 16).hex(), (b"l" * 8).hex())
    assert told == {"gpuglass.tokens": 7, "gpuglass.gpu.seconds": 0.5}
