"""ASGI middleware for `vllm serve --middleware gpuglass_vllm.middleware.Middleware`: whose request is it?

It reads headers only. The tenant comes from an API key (`GPUGLASS_API_KEYS`) or from a header
(`GPUGLASS_TENANT_HEADER`) that is believed only from a trusted proxy (`GPUGLASS_TRUSTED_PROXIES`, or a shared
secret in `x-gpuglass-secret`); otherwise the request is `unverified`. Trace context and request id are noted
as they come. Requests that never reach the engine are counted as refused, by their status.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from gpuglass_vllm import context, frontend, records, settings
from gpuglass_vllm.api_keys import KeyFile
from gpuglass_vllm.hooks import table

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

SECRET_HEADER = b"x-gpuglass-secret"
_TENANT = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,62}[\x21-\x7e])?\Z")
"""Printable ASCII, no blanks at the ends, at most 64 characters."""
_NOT_INFERENCE = re.compile(
    r"/(tokenize|detokenize|health|ping|metrics|version|load|v1/(load|unload)_lora_adapter|v1/models|sleep|"
    r"wake_up|pause|resume|reset_\w+|(start|stop)_profile|collective_rpc|server_info|scale_elastic_ep)\b"
)


class Trust:
    """Decides which tenant a request belongs to."""

    def __init__(self, current: settings.Settings) -> None:
        self._settings = current
        self._header = current.tenant_header.encode("latin-1", "ignore")
        self._secret = current.proxy_secret.encode()
        self._keys = KeyFile(current.api_keys) if current.api_keys else None

    def tenant(self, headers: dict[bytes, bytes], client: str) -> str:
        """Tenant of a request with these headers (names in lower case) from this address."""
        if not self._settings.names_tenants:
            return records.NO_TENANT
        if self._keys is not None:
            tenant = self._keys.tenant(_api_key(headers))
            if tenant is not None:
                return tenant
        claim = headers.get(self._header, b"").decode("latin-1") if self._header else ""
        if _TENANT.match(claim) and claim != records.UNVERIFIED and self._trusted(headers, client):
            return claim
        return records.UNVERIFIED

    def _trusted(self, headers: dict[bytes, bytes], client: str) -> bool:
        if self._secret and hmac.compare_digest(headers.get(SECRET_HEADER, b""), self._secret):
            return True
        try:
            address = ipaddress.ip_address(client)
        except ValueError:
            return False
        mapped = getattr(address, "ipv4_mapped", None)
        return any((mapped or address) in network for network in self._settings.trusted_proxies)


def _api_key(headers: dict[bytes, bytes]) -> str:
    scheme, _, credentials = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    if scheme.lower() == "bearer":
        return credentials.strip()
    return headers.get(b"x-api-key", b"").decode("latin-1")


def error_type(status: int) -> str:
    """Bounded reason of a refusal, from its HTTP status."""
    if status in (408, 504):
        return "timeout"
    if status in (429, 503):
        return "admission"
    return "validation" if status < 500 else "engine"


class Middleware:
    """Pure ASGI: it never reads or changes a body, and passes everything on whatever happens to itself."""

    def __init__(self, app: App) -> None:
        self.app = app
        self._hook = table.hook("frontend.middleware")
        current = settings.current()
        if current.socket:
            self._hook.activate()
        self._trust = Trust(current)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        call = self._hook.run(self._begin, scope) if scope.get("type") == "http" else None
        if call is None:
            await self.app(scope, receive, send)
            return
        status = 0

        async def watch(message: Message) -> None:
            nonlocal status
            if message.get("type") == "http.response.start":
                status = message.get("status", 0)
            await send(message)

        token = context.current.set(call)
        try:
            await self.app(scope, receive, watch)
        finally:
            context.current.reset(token)
            self._hook.run(self._end, call, scope, status)

    def _begin(self, scope: Scope) -> context.Call:
        headers = {name.lower(): value for name, value in reversed(scope.get("headers") or [])}
        client = scope.get("client")
        return context.Call(
            tenant=self._trust.tenant(headers, str(client[0]) if client else ""),
            trace=context.parse_traceparent(headers.get(b"traceparent", b"").decode("latin-1")),
            external_id=headers.get(b"x-request-id", b"").decode("latin-1")[: records.MAX_ID],
        )

    def _end(self, call: context.Call, scope: Scope, status: int) -> None:
        if (
            isinstance(status, int)
            and status >= 400
            and scope.get("method") == "POST"
            and not _NOT_INFERENCE.match(str(scope.get("path", "")))
            and not (call.started or call.refused)
        ):
            frontend.refused(call, error_type(status), time.monotonic_ns())
