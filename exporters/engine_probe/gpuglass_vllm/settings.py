"""Settings of the probe, read from the environment once per process: the probe has no configuration file.

Only `GPUGLASS_SOCKET` is needed. A value that cannot be read is reported once and its default used: a typo
here must not keep an engine from starting.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

logger = logging.getLogger("gpuglass_vllm")

INSTANCE = "GPUGLASS_INSTANCE"
"""Set by the first process of a server and inherited: it ties the processes together and marks what our own
frontend put into a request. Set it by hand only where processes of one engine are started apart."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What the environment says."""

    socket: str = ""
    """GPUGLASS_SOCKET: the agent's socket; without it nothing is hooked."""
    server: str = ""
    """GPUGLASS_SERVER: a name that tells servers of one model on one node apart."""
    instance: str = ""
    disabled: frozenset[str] = frozenset()
    """GPUGLASS_DISABLE: hooks that stay off, by name (core.kv, worker.experts, …) or by role."""
    fault: frozenset[str] = frozenset()
    """GPUGLASS_FAULT: hooks that raise whenever they are called, or `all`: for tests of harmlessness."""
    tenant_header: str = ""
    """GPUGLASS_TENANT_HEADER: the header that names the tenant, lower case."""
    trusted_proxies: tuple[Network, ...] = ()
    """GPUGLASS_TRUSTED_PROXIES: addresses and networks whose tenant header is believed, by commas."""
    proxy_secret: str = field(default="", repr=False)
    """GPUGLASS_PROXY_SECRET: a tenant header beside `x-gpuglass-secret` with this value is believed."""
    api_keys: str = ""
    """GPUGLASS_API_KEYS: file of key hashes and tenants, see `python -m gpuglass_vllm.api_keys --help`."""
    experts_every: int = -1
    """GPUGLASS_EXPERTS_EVERY: one step in so many has its experts counted; 0: none; -1: the default."""

    steps_every: int = 100
    """GPUGLASS_STEPS_EVERY: one step in so many is told one by one, beside the slowest and those in which
    requests begin; 0: none."""
    kernels_every: int = 0
    """GPUGLASS_KERNELS_EVERY: seconds between steps whose kernels are profiled, at least 10; 0: none. Such a
    step takes some milliseconds longer."""

    @property
    def names_tenants(self) -> bool:
        """Whether requests are expected to belong to a tenant."""
        return bool(self.tenant_header or self.api_keys)


def read(environment: Mapping[str, str]) -> Settings:
    """Settings from environment variables; what cannot be read is logged and left at its default."""

    def value(name: str, parse: Callable[[str], T], default: T) -> T:
        text = environment.get(f"GPUGLASS_{name}", "").strip()
        if not text:
            return default
        try:
            return parse(text)
        except ValueError as error:
            logger.warning("GPUGLASS_%s=%s is not used: %s", name, text, error)
            return default

    return Settings(
        socket=value("SOCKET", str, ""),
        server=value("SERVER", lambda text: text[:64], ""),
        instance=environment.get(INSTANCE, "")[:64],
        disabled=value("DISABLE", _names, frozenset()),
        fault=value("FAULT", _names, frozenset()),
        tenant_header=value("TENANT_HEADER", str.lower, ""),
        trusted_proxies=value("TRUSTED_PROXIES", _networks, ()),
        proxy_secret=environment.get("GPUGLASS_PROXY_SECRET", ""),
        api_keys=value("API_KEYS", str, ""),
        experts_every=value("EXPERTS_EVERY", _count, -1),
        steps_every=value("STEPS_EVERY", _count, 100),
        kernels_every=value("KERNELS_EVERY", _pause, 0),
    )


def _names(text: str) -> frozenset[str]:
    return frozenset(name.strip() for name in text.split(",") if name.strip())


def _networks(text: str) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(part.strip(), strict=False) for part in text.split(",") if part.strip())


def _count(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 1_000_000:
        raise ValueError("a number of steps from 0 to 1000000 is expected")
    return number


def _pause(text: str) -> int:
    number = int(text)
    if number and not 10 <= number <= 86_400:
        raise ValueError("0, or seconds from 10 to 86400, are expected")
    return number


_current: Settings | None = None


def current() -> Settings:
    """Settings of this process, and of the children that inherit its environment."""
    global _current
    if _current is None:
        if os.environ.get("GPUGLASS_SOCKET"):
            os.environ.setdefault(INSTANCE, secrets.token_hex(8))
        _current = read(os.environ)
    return _current
