"""The exporter-toolkit's web configuration file: TLS, response headers, basic authentication, rate limit.

`load_web_config` turns the file that users of Prometheus' own exporters know into a frozen `WebConfig`;
whatever this server cannot do exactly is refused in one line that names file and key, never ignored.
Certificates are read by `gpuglass.server.tls`, changes are followed by `gpuglass.server.reload`.

Where it differs from the toolkit (https://github.com/prometheus/exporter-toolkit, docs/web-configuration.md):

* `http2` is accepted and has no effect: this server speaks HTTP/1.1, which clients negotiate by ALPN.
* A `tls_server_config` with keys but without a certificate is an error, not plain HTTP.
* `RequireAnyClientCert` is refused, since Python's `ssl` cannot ask for a certificate without verifying it;
  `RequestClientCert`, which keeps nobody out, is the same as `NoClientCert`.
* Client verification needs `client_ca` or `client_ca_file`: the system's authorities never let a client in.
* Several `curve_preferences` need a Python whose `ssl` has `SSLContext.set_groups` (3.15).
* `rate_limit` does not apply to `/healthz` and `/readyz`.
"""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml

from gpuglass.server.tls_names import CIPHERS, CURVES, TLS13_CIPHERS

MAX_FILE_BYTES = 1 << 20
"""Size up to which the file, a certificate, a key or a bundle of authorities is read."""

MAX_BCRYPT_COST = 16
"""Cost 16 takes about four seconds of a CPU; each step above doubles it beyond the deadline of a request."""

_BCRYPT = re.compile(r"\$2[abxy]?\$([0-9]{2})\$[./A-Za-z0-9]{53}\Z")
_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_HEADER_VALUES: dict[str, frozenset[str]] = {
    "Content-Security-Policy": frozenset(),
    "Strict-Transport-Security": frozenset(),
    "X-Content-Type-Options": frozenset({"nosniff"}),
    "X-Frame-Options": frozenset({"deny", "sameorigin"}),
    "X-XSS-Protection": frozenset(),
}
"""Headers that may be set, with their allowed values where they are few."""


class WebConfigError(Exception):
    """The file, or a certificate that it names, cannot be used; the text is one line for the user."""


class ClientAuth(StrEnum):
    """Go's client authentication policies."""

    NONE = "NoClientCert"
    REQUEST = "RequestClientCert"
    REQUIRE_ANY = "RequireAnyClientCert"
    REQUIRE_ANY_OLD = "RequireClientCert"
    VERIFY_IF_GIVEN = "VerifyClientCertIfGiven"
    REQUIRE_AND_VERIFY = "RequireAndVerifyClientCert"

    @property
    def verifies(self) -> bool:
        """Whether certificates are checked against the client authorities."""
        return self in (ClientAuth.VERIFY_IF_GIVEN, ClientAuth.REQUIRE_AND_VERIFY)


class TLSVersion(StrEnum):
    """Protocol versions, oldest first."""

    TLS10 = "TLS10"
    TLS11 = "TLS11"
    TLS12 = "TLS12"
    TLS13 = "TLS13"


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A mapping of the file: its keys are the fields, and no others are allowed."""


class TLSConfig(_Section, frozen=True):
    """`tls_server_config`. Paths are relative to the directory of the web configuration file."""

    cert: str = ""
    key: str = ""
    client_ca: str = ""
    cert_file: str = ""
    key_file: str = ""
    client_auth_type: ClientAuth = ClientAuth.NONE
    client_ca_file: str = ""
    client_allowed_sans: tuple[str, ...] | None = None
    min_version: TLSVersion = TLSVersion.TLS12
    max_version: TLSVersion = TLSVersion.TLS13
    cipher_suites: tuple[str, ...] = ()
    prefer_server_cipher_suites: bool = True
    curve_preferences: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"TLSConfig(client_auth_type={self.client_auth_type.value})"  # an inline key is a secret


class HTTPConfig(_Section, frozen=True):
    """`http_server_config`."""

    http2: bool = True
    headers: dict[str, str] = {}


class RateLimit(_Section, frozen=True):
    """`rate_limit`: a token bucket of `burst` requests that gains one each `interval` (Go's notation)."""

    interval: Annotated[str, msgspec.Meta(max_length=64)] | int = 0
    burst: Annotated[int, msgspec.Meta(ge=0)] = 0

    @property
    def seconds(self) -> float:
        """The interval in seconds; 0 means no limit. Raises `ValueError`."""
        return go_duration(self.interval)


class WebConfig(_Section, frozen=True):
    """The whole file. An empty one asks for plain HTTP without authentication, as in the toolkit."""

    tls_server_config: TLSConfig | None = None
    http_server_config: HTTPConfig | None = None
    basic_auth_users: dict[str, str] | None = None
    rate_limit: RateLimit | None = None

    def __repr__(self) -> str:
        return f"WebConfig(tls={self.tls is not None}, users={len(self.users)})"  # hashes are secrets

    @property
    def tls(self) -> TLSConfig | None:
        """The TLS section, or None if it is absent or without keys: plain HTTP."""
        return None if self.tls_server_config == TLSConfig() else self.tls_server_config

    @property
    def users(self) -> dict[str, str]:
        """Bcrypt hashes by user name; empty means no authentication."""
        return self.basic_auth_users or {}

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """Headers to add to every answer."""
        http = self.http_server_config
        return tuple((name, value) for name, value in http.headers.items() if value) if http else ()


def load_web_config(path: Path) -> WebConfig:
    """Read and check the file, not the certificates that it names. Raises `WebConfigError`."""
    return parse_web_config(read_text(path, f"{path}"), path)


def parse_web_config(text: str, path: Path) -> WebConfig:
    """Check the text of a web configuration file; `path` is for messages only."""
    try:
        # A SafeLoader; its subclass only adds the refusal of duplicate keys.
        document = yaml.load(text, _UniqueKeys)
    except yaml.MarkedYAMLError as error:
        # The error's own text would quote lines of the file, which holds secrets.
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise WebConfigError(f"{path}: not valid YAML{line}: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError):
        raise WebConfigError(f"{path}: not valid YAML") from None
    try:
        config = msgspec.convert(document if document is not None else {}, WebConfig)
    except msgspec.ValidationError as error:
        raise WebConfigError(f"{path}: {error}") from None
    try:
        _check(config)
    except ValueError as error:
        raise WebConfigError(f"{path}: {error}") from None
    return config


def read_text(path: Path, what: str) -> str:
    """Read a small UTF-8 file. Raises `WebConfigError` that begins with `what`."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise WebConfigError(f"{what}: larger than {MAX_FILE_BYTES} bytes")
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise WebConfigError(f"{what}: not UTF-8 text") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise WebConfigError(f"{what}: cannot read: {reason[:1].lower()}{reason[1:]}") from None


def go_duration(value: str | int) -> float:
    """Seconds of a Go duration such as `1s` or `1m30s`; a bare number counts nanoseconds, as in Go."""
    if isinstance(value, int):
        seconds = value * 1e-9
    elif value == "0":
        seconds = 0.0
    else:
        parts = _DURATION_PART.findall(value)
        if not parts or "".join(number + unit for number, unit in parts) != value:
            raise ValueError(f"{value!r} is not a duration such as 1s")
        seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    if seconds < 0:
        raise ValueError(f"{value!r} is negative")
    return seconds


def bcrypt_cost(hashed: str) -> int | None:
    """The cost of a bcrypt hash, or None if it is none."""
    match = _BCRYPT.match(hashed)
    return int(match[1]) if match else None


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is given twice, as the toolkit's strict reading does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value[:64]!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _check(config: WebConfig) -> None:
    """Check what types alone do not. Raises `ValueError` that begins with the key."""
    for user, hashed in config.users.items():
        cost = bcrypt_cost(hashed)
        if not user or ":" in user or any(ord(c) < 32 for c in user):
            raise ValueError(f"basic_auth_users: {user[:64]!r} cannot be a user name of basic authentication")
        if cost is None or not 4 <= cost <= 31:
            raise ValueError(f"basic_auth_users.{user}: not a bcrypt hash; make one with htpasswd -nBC 10 ''")
        if cost > MAX_BCRYPT_COST:
            raise ValueError(
                f"basic_auth_users.{user}: bcrypt cost {cost} takes longer than a request may; "
                f"use at most {MAX_BCRYPT_COST}"
            )
    if config.http_server_config:
        for name, value in config.http_server_config.headers.items():
            key = f"http_server_config.headers.{name}"
            if name not in _HEADER_VALUES:
                raise ValueError(f"{key}: this header cannot be set, only {', '.join(_HEADER_VALUES)}")
            allowed = _HEADER_VALUES[name]
            if value and allowed and value not in allowed:
                raise ValueError(f"{key}: must be one of {', '.join(sorted(allowed))}")
            if not all(" " <= character <= "~" for character in value):
                raise ValueError(f"{key}: must be printable ASCII on one line")
    if config.rate_limit:
        try:
            seconds = config.rate_limit.seconds
        except ValueError as error:
            raise ValueError(f"rate_limit.interval: {error}") from None
        if seconds and not config.rate_limit.burst:
            raise ValueError("rate_limit.burst: must be at least 1, or no request would ever be served")
    if config.tls:
        try:
            _check_tls(config.tls)
        except ValueError as error:
            raise ValueError(f"tls_server_config.{error}") from None


def _check_tls(tls: TLSConfig) -> None:
    for inline, file in (("cert", "cert_file"), ("key", "key_file")):
        if not getattr(tls, inline) and not getattr(tls, file):
            raise ValueError(f"{file}: missing; give {file} or {inline}")
    for inline, file in (("cert", "cert_file"), ("key", "key_file"), ("client_ca", "client_ca_file")):
        if getattr(tls, inline) and getattr(tls, file):
            raise ValueError(f"{file}: cannot be given together with {inline}")
    policy = tls.client_auth_type
    authority = bool(tls.client_ca or tls.client_ca_file)
    if policy in (ClientAuth.REQUIRE_ANY, ClientAuth.REQUIRE_ANY_OLD):
        raise ValueError(
            f"client_auth_type: {policy.value} is not supported, because it keeps nobody out; "
            f"use {ClientAuth.REQUIRE_AND_VERIFY.value} with client_ca_file"
        )
    if authority and not policy.verifies:
        raise ValueError(
            f"client_auth_type: {policy.value} does not use the client authorities that are given; "
            f"use {ClientAuth.REQUIRE_AND_VERIFY.value}"
        )
    if policy.verifies and not authority:
        raise ValueError(f"client_ca_file: missing; {policy.value} needs client_ca_file or client_ca")
    if tls.client_allowed_sans is not None:
        if policy is not ClientAuth.REQUIRE_AND_VERIFY:
            raise ValueError(
                f"client_allowed_sans: needs client_auth_type {ClientAuth.REQUIRE_AND_VERIFY.value}"
            )
        if not tls.client_allowed_sans:
            raise ValueError("client_allowed_sans: an empty list lets nobody in; give a name or leave it out")
    versions = list(TLSVersion)
    if versions.index(tls.max_version) < versions.index(TLSVersion.TLS12):
        raise ValueError(f"max_version: {tls.max_version.value} is not supported, the least is TLS12")
    if versions.index(tls.min_version) > versions.index(tls.max_version):
        raise ValueError(f"min_version: {tls.min_version.value} is above max_version {tls.max_version.value}")
    for name in tls.cipher_suites:
        if name not in CIPHERS and name not in TLS13_CIPHERS:
            raise ValueError(f"cipher_suites: unknown or insecure cipher suite {name!r}")
    if (
        tls.cipher_suites
        and not set(tls.cipher_suites) & set(CIPHERS)
        and tls.max_version is TLSVersion.TLS12
    ):
        raise ValueError("cipher_suites: names no suite of TLS12, which max_version demands")
    for name in tls.curve_preferences:
        if name not in CURVES:
            raise ValueError(f"curve_preferences: unknown curve {name!r}, known are {', '.join(CURVES)}")
