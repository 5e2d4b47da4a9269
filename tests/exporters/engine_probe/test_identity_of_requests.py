"""Tenants, trace context, marks and settings: who is believed."""

from __future__ import annotations

import asyncio
import io
import json
import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuglass_vllm import api_keys, context, frontend, marks, middleware, records, settings

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"


@pytest.mark.parametrize(
    ("header", "trace"),
    [
        (f"00-{TRACE}-{SPAN}-01", context.Trace(TRACE, SPAN, True)),
        (f" 00-{TRACE}-{SPAN}-00 ", context.Trace(TRACE, SPAN, False)),
        (f"00-{TRACE}-{SPAN}-03", context.Trace(TRACE, SPAN, True)),
        (f"cc-{TRACE}-{SPAN}-01-later", context.Trace(TRACE, SPAN, True)),
        (f"00-{TRACE}-{SPAN}-01-later", context.NO_TRACE),
        (f"ff-{TRACE}-{SPAN}-01", context.NO_TRACE),
        (f"00-{'0' * 32}-{SPAN}-01", context.NO_TRACE),
        (f"00-{TRACE}-{'0' * 16}-01", context.NO_TRACE),
        (f"00-{TRACE.upper()}-{SPAN}-01", context.NO_TRACE),
        (f"00-{TRACE}-{SPAN}", context.NO_TRACE),
        ("", context.NO_TRACE),
    ],
)
def test_traceparent(header: str, trace: context.Trace) -> None:
    assert context.parse_traceparent(header) == trace


@given(st.text(max_size=80))
def test_any_traceparent_is_read_without_error(header: str) -> None:
    trace = context.parse_traceparent(header)
    assert trace == context.NO_TRACE or len(trace.trace_id) == 32


def trust(**environment: str) -> middleware.Trust:
    return middleware.Trust(settings.read(environment))


HEADER = {"GPUGLASS_TENANT_HEADER": "X-Tenant"}
PROXY = {**HEADER, "GPUGLASS_TRUSTED_PROXIES": "10.0.0.0/8, 2001:db8::1"}


@pytest.mark.parametrize(
    ("environment", "headers", "client", "tenant"),
    [
        ({}, {b"x-tenant": b"acme"}, "10.1.2.3", records.NO_TENANT),
        (PROXY, {b"x-tenant": b"acme"}, "10.1.2.3", "acme"),
        (PROXY, {b"x-tenant": b"acme"}, "::ffff:10.1.2.3", "acme"),
        (PROXY, {b"x-tenant": b"acme"}, "2001:db8::1", "acme"),
        (PROXY, {b"x-tenant": b"acme"}, "192.0.2.1", "unverified"),
        (PROXY, {b"x-tenant": b"acme"}, "", "unverified"),
        (PROXY, {b"x-tenant": b"acme"}, "unix:", "unverified"),
        (PROXY, {}, "10.1.2.3", "unverified"),
        (PROXY, {b"x-tenant": b"x" * 65}, "10.1.2.3", "unverified"),
        (PROXY, {b"x-tenant": b" acme"}, "10.1.2.3", "unverified"),
        (PROXY, {b"x-tenant": b"a\x00b"}, "10.1.2.3", "unverified"),
        (PROXY, {b"x-tenant": "acmé".encode()}, "10.1.2.3", "unverified"),
        (HEADER, {b"x-tenant": b"acme"}, "127.0.0.1", "unverified"),
    ],
)
def test_a_tenant_header_is_believed_only_from_proxies(
    environment: dict[str, str], headers: dict[bytes, bytes], client: str, tenant: str
) -> None:
    assert trust(**environment).tenant(headers, client) == tenant


def test_a_shared_secret_vouches_for_the_header() -> None:
    judge = trust(**HEADER, GPUGLASS_PROXY_SECRET="s3cret")
    named = {b"x-tenant": b"acme"}
    assert judge.tenant({**named, b"x-gpuglass-secret": b"s3cret"}, "192.0.2.1") == "acme"
    assert judge.tenant({**named, b"x-gpuglass-secret": b"wrong"}, "192.0.2.1") == "unverified"
    assert judge.tenant(named, "192.0.2.1") == "unverified"


def test_api_keys_are_kept_as_hashes_and_reread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.json"
    monkeypatch.setattr("sys.stdin", io.StringIO("sk-long-random\n"))
    assert api_keys.main(["add", str(path), "acme"]) == 0
    assert "sk-long-random" not in path.read_text()
    assert not stat.S_IMODE(path.stat().st_mode) & 0o077
    judge = trust(GPUGLASS_API_KEYS=str(path))
    bearer = {b"authorization": b"Bearer sk-long-random"}
    assert judge.tenant(bearer, "") == "acme"
    assert judge.tenant({b"x-api-key": b"sk-long-random"}, "") == "acme"
    assert judge.tenant({b"authorization": b"Bearer other"}, "") == "unverified"
    assert judge.tenant({}, "") == "unverified"

    assert api_keys.main(["list", str(path)]) == 0
    assert capsys.readouterr().out.startswith("acme\t")
    keys = judge._keys
    assert keys is not None
    path.write_text("{broken")
    os.utime(path, ns=(1, 1))
    keys._next_look = 0.0
    assert judge.tenant(bearer, "") == "acme", "a broken file changes nothing"
    path.unlink()
    monkeypatch.setattr("sys.stdin", io.StringIO("sk-new\n"))
    assert api_keys.main(["add", str(path), "other"]) == 0
    keys._next_look = 0.0
    assert judge.tenant(bearer, "") == "unverified"
    assert api_keys.main(["remove", str(path), "acme"]) == 1
    assert "has no key of acme" in capsys.readouterr().err
    assert api_keys.main(["remove", str(path), "other"]) == 0
    assert json.loads(path.read_text())["keys"] == {}


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"salt": ""}', '{"salt": "a", "keys": []}', '{"salt": "a", "keys": {"x": 1}}']
)
def test_a_wrong_key_file_is_one_line(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text)
    assert api_keys.main(["list", str(path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {path}")


def test_only_our_own_mark_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "_current", settings.Settings(instance="abc"))
    given = {"gpuglass": ["", "evil", True], "kv_transfer_params": {"a": 1}}
    params = SimpleNamespace(extra_args=given)
    assert marks.get(params) == marks.NONE
    marks.put(params, marks.Mark("acme", True))
    assert marks.get(params) == marks.Mark("acme", True)
    assert params.extra_args["kv_transfer_params"] == {"a": 1}
    assert given["gpuglass"] == ["", "evil", True], "the client's own dictionary is left alone"
    pooling = SimpleNamespace(extra_kwargs=None)
    marks.put(pooling, marks.Mark("acme", False))
    assert marks.tenant_of(pooling) == "acme"
    for other in (None, SimpleNamespace(extra_args=None), SimpleNamespace(extra_args={"gpuglass": "abc"})):
        assert marks.get(other) == marks.NONE


def test_a_setting_that_cannot_be_read_is_left_at_its_default(caplog: pytest.LogCaptureFixture) -> None:
    read = settings.read(
        {
            "GPUGLASS_SOCKET": "/s",
            "GPUGLASS_EXPERTS_EVERY": "often",
            "GPUGLASS_TRUSTED_PROXIES": "10.0.0.0/99",
        }
    )
    assert (read.socket, read.experts_every, read.trusted_proxies) == ("/s", -1, ())
    assert "GPUGLASS_EXPERTS_EVERY=often is not used" in caplog.text
    assert "GPUGLASS_TRUSTED_PROXIES" in caplog.text


class Server:
    """An ASGI application that answers with a status and notes what the middleware knows."""

    def __init__(self, status: int, enters: bool = False, fails: bool = False) -> None:
        self.status, self.enters, self.fails = status, enters, fails
        self.call: context.Call | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.call = context.current.get()
        if self.call is not None and self.enters:
            self.call.started = True
        if self.fails:
            raise RuntimeError("the server's own")
        await send({"type": "http.response.start", "status": self.status})
        await send({"type": "http.response.body", "body": b"x"})


def serve(server: Server, path: str = "/v1/completions", method: str = "POST", **headers: str) -> list[Any]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "client": ("10.0.0.1", 1),
        "headers": [(name.replace("_", "-").encode(), text.encode()) for name, text in headers.items()],
    }
    asyncio.run(middleware.Middleware(server)(scope, receive, send))
    return sent


@pytest.fixture
def refusals(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    seen: list[tuple[str, str, str]] = []
    monkeypatch.setattr(
        frontend, "refused", lambda call, kind, now: seen.append((call.tenant, kind, call.trace.trace_id))
    )
    monkeypatch.setattr(settings, "_current", settings.read({"GPUGLASS_SOCKET": "/s", **PROXY}))
    monkeypatch.setattr(middleware.table, "_hooks", {})
    return seen


def test_the_middleware_passes_all_on_and_knows_the_caller(refusals: list[Any]) -> None:
    server = Server(200, enters=True)
    sent = serve(server, x_tenant="acme", traceparent=f"00-{TRACE}-{SPAN}-01", x_request_id="r1")
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert server.call is not None
    assert (server.call.tenant, server.call.trace.trace_id, server.call.external_id) == ("acme", TRACE, "r1")
    assert refusals == []


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "validation"), (404, "validation"), (429, "admission"), (503, "admission"), (408, "timeout"),
     (504, "timeout"), (500, "engine")],
)  # fmt: skip
def test_refusals_are_counted_by_status(refusals: list[Any], status: int, kind: str) -> None:
    serve(Server(status), x_tenant="acme", traceparent=f"00-{TRACE}-{SPAN}-01")
    assert refusals == [("acme", kind, TRACE)]


def test_what_entered_the_engine_or_asks_for_no_inference_is_no_refusal(refusals: list[Any]) -> None:
    serve(Server(500, enters=True))
    serve(Server(404), method="GET")
    serve(Server(400), path="/tokenize")
    serve(Server(200))
    assert refusals == []


def test_the_servers_error_passes_through(refusals: list[Any]) -> None:
    with pytest.raises(RuntimeError, match="the server's own"):
        serve(Server(200, fails=True))


def test_a_failing_middleware_serves_all_the_same(
    refusals: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "parse_traceparent", lambda header: 1 / 0)
    server = Server(200)
    assert len(serve(server)) == 2
    assert server.call is None
