"""Configuration of the sidecar: one YAML file, read with the tools of the agent's.

`load` gives a frozen `Config`, or raises `ConfigError` with one line that names the file, the key and the
mend. Secrets never stand here, only the names of files that hold them; those are read again for each
request.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec

from anomaly_sidecar.interface import Direction, Kind, Query
from gpuglass.config import LogConfig, Seconds, ServerConfig, read_yaml_mapping
from gpuglass.errors import ConfigError

MAX_QUERIES = 200
DEFAULT_LISTEN = "127.0.0.1:9957"

_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}\Z")
_HEADER = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,63}\Z")
_RAW_COUNTER = re.compile(r"[a-zA-Z_:][\w:]*_(total|bucket|sum|count)(\{[^}]*\})?\Z")

Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
Share = Annotated[float, msgspec.Meta(ge=0, le=100)]


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of the configuration: keys that are not declared are refused."""


def _within(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{key}: must be between {low:g}s and {high:g}s, is {value:g}s")


def _named(value: str) -> None:
    if not _NAME.match(value):
        raise ValueError("name: must be lower-case letters, digits and _, starting with a letter, at most 63")


class PrometheusConfig(_Section, frozen=True):
    """Any server with Prometheus' query API: Prometheus, Mimir, Thanos, VictoriaMetrics."""

    url: str = "http://127.0.0.1:9090"
    """With the prefix before /api/v1, if there is one (Mimir: …/prometheus)."""
    headers: dict[str, str] = {}
    """Sent with each request, such as X-Scope-OrgID."""
    header_files: dict[str, str] = {}
    """As headers, but each value is read from a file: for secrets."""
    bearer_token_file: str = ""
    username: str = ""
    password_file: str = ""
    ca_file: str = ""
    """Certificates of authorities to trust instead of the system's."""
    cert_file: str = ""
    key_file: str = ""
    timeout: Seconds = Seconds(30)
    """For one request, from connecting to the last byte."""
    concurrency: Count = 4
    """Requests at a time."""
    max_points: Count = 11_000
    """Points per series that the server allows in one range query."""
    max_samples: Count = 500_000
    """Samples asked for in one range query: bounds the memory of both sides."""

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            good = False
        if not good:
            raise ValueError("url: must be a URL such as http://127.0.0.1:9090")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("url: must not hold a password or query; use username and password_file")
        for name, value in (self.headers | self.header_files).items():
            if not _HEADER.match(name) or not value.isprintable():
                raise ValueError(f"headers: {name!r} is not a header with one printable line")
            if (
                name.lower() in ("authorization", "host", "content-length", "content-type")
                and name in self.headers
            ):
                raise ValueError(
                    f"headers: {name} cannot be set here; see bearer_token_file and header_files"
                )
        if self.bearer_token_file and self.username:
            raise ValueError("username: give either a user or bearer_token_file")
        if bool(self.username) != bool(self.password_file):
            raise ValueError("password_file: username and password_file go together")
        if bool(self.cert_file) != bool(self.key_file):
            raise ValueError("key_file: cert_file and key_file go together")
        _within("timeout", self.timeout, 0.5, 600)
        if self.concurrency > 64:
            raise ValueError(f"concurrency: at most 64, is {self.concurrency}")


class StateConfig(_Section, frozen=True):
    """Where the learned state is kept over restarts."""

    folder: str = ""
    """Empty: nothing is kept, and a start reads the whole history again."""
    interval: Seconds = Seconds(300)
    ttl: Seconds = Seconds(86400)
    """A series that was not seen for so long is forgotten; its absence counts while the server answers."""

    def __post_init__(self) -> None:
        _within("interval", self.interval, 1, 86400)
        _within("ttl", self.ttl, 60, 90 * 86400)


class _Timing(_Section, frozen=True, kw_only=True):
    name: str
    interval: Seconds = Seconds(60)
    """Between two evaluations; their times are multiples of it."""
    offset: Seconds = Seconds(30)
    """Evaluated so long ago: late samples have arrived by then. Two scrape intervals."""
    limit: Count = 20_000
    """Series; further ones are refused and counted."""

    def _check(self) -> None:
        _named(self.name)
        _within("interval", self.interval, 1, 3600)
        _within("offset", self.offset, 0, 3600)


class QueryConfig(_Timing, frozen=True, kw_only=True):
    """Series that are scored."""

    expr: str
    history: Seconds = Seconds(7 * 86400)
    """Read at the first start."""
    history_step: Seconds = Seconds(300)
    direction: Direction = Direction.BOTH
    min_deviation: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Smaller deviations are no anomaly, in the series' unit."""
    min_relative_deviation: Share = 0.02
    """The same, as a share of the expected value."""
    valid: tuple[float | None, float | None] = (None, None)
    """Values outside of [lowest, highest] are gaps."""
    bands: bool = False
    """Publish the expected value and bands, three more series each."""

    def __post_init__(self) -> None:
        self._check()
        check_expression("expr", self.expr)
        _within("history", self.history, 0, 90 * 86400)
        _within("history_step", self.history_step, self.interval, 3600)
        low, high = self.valid
        if low is not None and high is not None and low >= high:
            raise ValueError(f"valid: {low:g} is not below {high:g}")

    def query(self) -> Query:
        """As the scores take it."""
        low, high = self.valid
        return Query(
            name=self.name,
            expression=self.expr,
            interval=self.interval,
            offset=self.offset,
            history=self.history,
            history_step=self.history_step,
            direction=self.direction,
            min_deviation=self.min_deviation,
            min_relative_deviation=self.min_relative_deviation,
            valid_min=float("-inf") if low is None else low,
            valid_max=float("inf") if high is None else high,
            bands=self.bands,
            limit=self.limit,
        )


class DetectorConfig(_Timing, frozen=True, kw_only=True):
    """A detector or forecast of a kind that `gpuglass anomaly kinds` lists."""

    kind: str
    inputs: dict[str, str]
    """An expression by role."""
    by: tuple[str, ...] = ()
    """Labels by which the inputs are joined; empty: all."""
    history: Seconds | None = None
    """Default: what the kind can use."""
    settings: dict[str, Any] = {}

    def __post_init__(self) -> None:
        self._check()
        for role, expression in self.inputs.items():
            check_expression(f"inputs.{role}", expression, raw_counters=True)


class Config(_Section, frozen=True):
    """The whole configuration of the sidecar."""

    log: LogConfig = LogConfig()
    server: ServerConfig = ServerConfig(listen=DEFAULT_LISTEN)
    prometheus: PrometheusConfig = PrometheusConfig()
    state: StateConfig = StateConfig()
    presets: tuple[str, ...] = ()
    """Ready queries and detectors: `gpuglass anomaly presets` lists them."""
    queries: tuple[QueryConfig, ...] = ()
    detectors: tuple[DetectorConfig, ...] = ()
    workers: Annotated[int, msgspec.Meta(ge=0, le=16)] = 1
    """Processes for fits; 0: they run in the main process, which then pauses."""


def check_expression(key: str, text: str, raw_counters: bool = False) -> None:
    """Refuse what cannot be meant; raises ValueError. Whether PromQL understands it, the server says."""
    if not text.strip() or len(text) > 8192:
        raise ValueError(f"{key}: must be a PromQL expression of at most 8192 characters")
    if not raw_counters and _RAW_COUNTER.match(text.strip()):
        raise ValueError(f"{key}: {text.strip()[:80]} is a counter, which only grows; use rate(…[5m])")


def check_reload(old: Config, new: Config) -> list[str]:
    """Names of the sections, queries and detectors that differ; raises `ConfigError` for what cannot change
    while the sidecar runs."""
    for key, before, after in (
        ("server", old.server, new.server),
        ("workers", old.workers, new.workers),
        ("state.folder", old.state.folder, new.state.folder),
        ("prometheus.concurrency", old.prometheus.concurrency, new.prometheus.concurrency),
    ):
        if before != after:
            raise ConfigError(f"{key}: cannot change while the sidecar runs; restart it")
    sections = ("log", "prometheus", "state")
    changed = [name for name in sections if getattr(old, name) != getattr(new, name)]
    entries = [{entry.name: entry for entry in (*of.queries, *of.detectors)} for of in (old, new)]
    names = list(dict.fromkeys([*entries[0], *entries[1]]))
    return changed + [name for name in names if entries[0].get(name) != entries[1].get(name)]


def load(path: Path | None, kinds: Mapping[str, Kind], presets: Mapping[str, Mapping[str, Any]]) -> Config:
    """Read the file (None: all defaults), add its presets; raises `ConfigError`."""
    document = read_yaml_mapping(path) if path is not None else {}
    return parse(document, str(path) if path else "configuration", kinds, presets)


def parse(
    document: Mapping[str, Any],
    source: str,
    kinds: Mapping[str, Kind],
    presets: Mapping[str, Mapping[str, Any]],
) -> Config:
    """As `load`, of a document."""
    document = dict(document)
    server = document.get("server")
    if server is None or isinstance(server, dict):
        document["server"] = {"listen": DEFAULT_LISTEN} | (server or {})
    names = document.get("presets") or []
    for part in ("queries", "detectors"):
        own = document.get(part) or []
        document[part] = own
        if isinstance(own, list) and isinstance(names, list):
            taken = {entry.get("name") for entry in own if isinstance(entry, dict)}
            for name in names:
                if not isinstance(name, str) or name not in presets:
                    known = ", ".join(sorted(presets))
                    raise ConfigError(f"{source}: presets: there is no {str(name)[:40]!r}; there are {known}")
                # An entry of the file replaces the preset's of the same name.
                document[part] += [e for e in presets[name].get(part, ()) if e["name"] not in taken]
    try:
        config = msgspec.convert(document, Config, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {_explain(str(error), document)}") from None
    _check_all(config, source, kinds)
    return config


def _check_all(config: Config, source: str, kinds: Mapping[str, Kind]) -> None:
    entries = [*config.queries, *config.detectors]
    if len(entries) > MAX_QUERIES:
        raise ConfigError(f"{source}: at most {MAX_QUERIES} queries and detectors, there are {len(entries)}")
    seen: set[str] = set()
    for entry in entries:
        if entry.name in seen:
            raise ConfigError(f"{source}: the name {entry.name} is given twice")
        seen.add(entry.name)
    for detector in config.detectors:
        where = f"{source}: detectors: {detector.name}"
        kind = kinds.get(detector.kind)
        if kind is None:
            raise ConfigError(f"{where}: there is no kind {detector.kind!r}; there are {', '.join(kinds)}")
        roles = {role.name for role in kind.roles}
        if unknown := sorted(detector.inputs.keys() - roles):
            raise ConfigError(f"{where}: inputs: {unknown[0]} is none of {', '.join(sorted(roles))}")
        if lacking := [
            role.name for role in kind.roles if role.required and role.name not in detector.inputs
        ]:
            raise ConfigError(f"{where}: inputs: {lacking[0]} is missing")
        settings_of(detector, kind, where)


def settings_of(detector: DetectorConfig, kind: Kind, where: str = "") -> msgspec.Struct:
    """A detector's settings; raises `ConfigError`."""
    try:
        return msgspec.convert(detector.settings, kind.settings, dec_hook=_decode)
    except msgspec.ValidationError as error:
        text = _explain(str(error), detector.settings)
        raise ConfigError(f"{where or detector.name}: settings: {text}") from None


def _decode(kind: type, value: Any) -> Any:
    if kind is Seconds:
        return Seconds.parse(value)
    raise NotImplementedError(kind)


_AT = re.compile(r" - at `(key in )?\$\.?(.*)`\Z")


def _explain(message: str, document: Any) -> str:
    """msgspec's message as "key: what is wrong", with an entry's name for its number."""
    at = _AT.search(message)
    path, text = (at[2], message[: at.start()]) if at else ("", message)
    text = text.replace("Object contains unknown field", "there is no key").replace("`", "")
    text = text.replace("Object missing required field", "lacks the key")
    if entry := re.match(r"(queries|detectors)\[(\d+)\]\.?(.*)", path):
        item = document[entry[1]][int(entry[2])]
        name = item.get("name") if isinstance(item, dict) else None
        path = f"{entry[1]}: {name or 'number ' + str(int(entry[2]) + 1)}" + (
            f": {entry[3]}" if entry[3] else ""
        )
    text = " ".join(text.split())[:300]
    return f"{path}: {text[:1].lower()}{text[1:]}" if path else text
