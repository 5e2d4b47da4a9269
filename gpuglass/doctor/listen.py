"""Checks of our own address: free, taken by an agent, taken by something else, open to everyone.

In flows the server's configuration and a function that asks over HTTP; out flow checks. No credentials are
sent.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import gpuglass
from gpuglass.config import ServerConfig
from gpuglass.doctor.check import Check, Status, one_line
from gpuglass.doctor.http import Answer, NoAnswer, Url
from gpuglass.errors import ConfigError
from gpuglass.server import ListenError, WebConfigError
from gpuglass.server.address import Address, parse_listen
from gpuglass.server.web_config import ClientAuth, load_web_config

ALL_ADDRESSES = frozenset({"", "0.0.0.0", "::"})

Fetch = Callable[[Url, str], Answer]
"""GET of a path, without checking the certificate. Raises `NoAnswer`."""

_TITLE = "listen address"
IN_USE = os.strerror(errno.EADDRINUSE)
_WANT_CERTIFICATE = frozenset(
    {ClientAuth.REQUIRE_ANY, ClientAuth.REQUIRE_ANY_OLD, ClientAuth.REQUIRE_AND_VERIFY}
)
_VERSION = re.compile(rb'^gpuglass_agent_build_info\{[^}\n]*version="([^"\n]{1,64})"', re.MULTILINE)
_SERIES = re.compile(rb"^gpuglass_agent_series\{[^}\n]*\} ([0-9.e+]{1,24})", re.MULTILINE)


def address_of(server: ServerConfig) -> Address:
    """Where the agent listens; raises `ConfigError`."""
    try:
        return parse_listen(server.listen)
    except ListenError as error:
        raise ConfigError(f"server.{error}") from None


def own_url(address: Address, tls: bool = False) -> Url:
    """How this machine reaches its own agent."""
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)
    return Url("https" if tls else "http", host, address.port)


def checks(server: ServerConfig, fetch: Fetch, bindable: Callable[[Address], str]) -> list[Check]:
    """All checks of our address. `bindable` gives why an address cannot be bound, or nothing."""
    address = address_of(server)
    found: list[Check] = []
    tls = None
    if server.web_config_file:
        try:
            tls = load_web_config(Path(server.web_config_file)).tls
        except WebConfigError as error:
            mend = f"mend {server.web_config_file}, or set server.web_config_file to another file"
            found.append(
                Check("monitoring.web_config", "web config", Status.FAIL, str(error), mend),
            )
    elif address.host in ALL_ADDRESSES:
        found.append(
            Check(
                "monitoring.exposure",
                "exposure",
                Status.WARN,
                f"{server.listen} serves every network of this machine, without TLS and password",
                "server.web_config_file: FILE with TLS and passwords, or "
                f"server.listen: 127.0.0.1:{address.port}",
            )
        )
    if address.port == 0:
        return [Check("monitoring.listen", _TITLE, Status.OK, "any free port"), *found]
    wants_certificate = tls is not None and tls.client_auth_type in _WANT_CERTIFICATE
    return [_listen(address, own_url(address, tls is not None), fetch, bindable, wants_certificate), *found]


def _listen(
    address: Address,
    url: Url,
    fetch: Fetch,
    bindable: Callable[[Address], str],
    wants_certificate: bool,
) -> Check:
    name = "monitoring.listen"
    problem = bindable(address)
    if not problem:
        return Check(name, _TITLE, Status.INFO, f"{address} is free: no agent runs here", "gpuglass agent")
    if problem != IN_USE:
        mend = "server.listen: an address of this machine and a port above 1023"
        return Check(name, _TITLE, Status.FAIL, f"{address}: {problem[:1].lower()}{problem[1:]}", mend)
    try:
        ready = fetch(url, "/readyz")
    except NoAnswer as error:
        if wants_certificate:
            return Check(
                name,
                _TITLE,
                Status.INFO,
                f"{address}: something listens there that only answers to client certificates",
            )
        return _taken(address, f"something listens there that is no agent of this configuration: {error}")
    if ready.server != "gpuglass":
        what = f" ({one_line(ready.server, 40)})" if ready.server else ""
        return _taken(address, f"another program answers there{what}")
    if ready.status == 400 and url.scheme == "http":
        return Check(
            name,
            _TITLE,
            Status.WARN,
            f"{address}: an agent with TLS, which this configuration does not have",
            "gpuglass doctor --config FILE with the configuration of the running agent",
        )
    return _agent(address, ready, url, fetch)


def _taken(address: Address, finding: str) -> Check:
    return Check(
        "monitoring.listen",
        _TITLE,
        Status.FAIL,
        f"{address}: {finding}",
        f"find it with ss -ltnp 'sport = :{address.port}', or set server.listen to another port",
    )


def _agent(address: Address, ready: Answer, url: Url, fetch: Fetch) -> Check:
    name = "monitoring.listen"
    try:
        metrics = fetch(url, "/metrics/slow")
    except NoAnswer as error:
        return Check(
            name,
            _TITLE,
            Status.FAIL,
            f"{address}: an agent listens, but gives no metrics: {error}",
            "restart the agent, and read its log",
        )
    version, series = _VERSION.search(metrics.body), _SERIES.findall(metrics.body)
    running = version[1].decode("utf-8", "replace") if version is not None else ""
    agent = f"{address}: agent {running}".rstrip()
    if series:
        agent += f", {sum(int(float(number)) for number in series)} series"
    elif metrics.status == 401:
        agent += ", asks for a password"
    if ready.status != 200:
        reason = one_line(ready.body.decode("utf-8", "replace"), 200)
        mend = "mend what the GPU checks above name" if "GPU" in reason or "NVML" in reason else ""
        return Check(name, _TITLE, Status.WARN, f"{agent}, not ready: {reason}", mend)
    if running and running != gpuglass.__version__:
        return Check(
            name,
            _TITLE,
            Status.WARN,
            f"{agent}; {gpuglass.__version__} is installed",
            "restart the agent to run the installed version",
        )
    return Check(name, _TITLE, Status.OK, agent)


def why_not_bindable(address: Address) -> str:
    """Bind without listening and let go at once: the kernel's reason against it, or nothing."""
    try:
        found = socket.getaddrinfo(
            address.host or "::", address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        with socket.socket(found[0][0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if found[0][0] == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address.host not in ("", "::")))
            probe.bind(found[0][4])
    except socket.gaierror:
        return "the name cannot be resolved"
    except OSError as error:
        # A kernel without IPv6 has no "::", and then the agent takes 0.0.0.0.
        if address.host == "" and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            return why_not_bindable(Address("0.0.0.0", address.port))
        return os.strerror(error.errno) if error.errno else str(error)
    return ""
