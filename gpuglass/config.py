"""Configuration: one YAML file, `GPUGLASS_*` variables over it, defaults below.

`load` reads both and gives a frozen `Config`, or raises `ConfigError` with one line that names the file or
variable, the key and what is wrong with it. Each leaf key has a variable: `gpu.process.limit` is
`GPUGLASS_GPU_PROCESS_LIMIT`. Secrets never stand here, only the names of files that hold them.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

import msgspec
import yaml

from gpuglass.errors import ConfigError

MAX_FILE_BYTES = 1 << 20

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)\Z")
_DURATION_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Seconds(float):
    """A duration in seconds, written as a number of seconds or as 500ms, 1s, 2m, 1h, 7d."""

    @classmethod
    def parse(cls, value: object) -> Seconds:
        """Read a duration; raises ValueError."""
        if isinstance(value, str) and (match := _DURATION.match(value.strip())):
            return cls(float(match[1]) * _DURATION_SECONDS[match[2]])
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return cls(value)
        raise ValueError(f"expected a duration such as 500ms, 1s or 2m, got {_shown(value)}")


class Mode(str):
    """Access rights of a file in octal, as chmod takes them: "0750"."""

    @classmethod
    def parse(cls, value: object) -> Mode:
        """Read a mode; raises ValueError."""
        # A number is refused: 0750 without quotes is 488 by the time we see it, and 750 would be 1356.
        if isinstance(value, str) and _MODE.match(value.strip()):
            return cls(value.strip())
        raise ValueError(f'expected a mode in quotes such as "0750", got {_shown(value)}')

    @property
    def bits(self) -> int:
        """As chmod(2) takes it."""
        return int(self, 8)


_MODE = re.compile(r"0?[0-7]{3}\Z")


def _within(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{key}: must be between {low:g}s and {high:g}s, is {value:g}s")


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of the configuration: keys that are not declared are refused."""


Count = Annotated[int, msgspec.Meta(ge=1, le=100_000)]
Uid = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 2)]

MAX_SENDERS = 4096
"""Most connections that the receiver can be told to take: each costs a file descriptor."""


class LogConfig(_Section, frozen=True):
    """What is written to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


class ServerConfig(_Section, frozen=True):
    """The /metrics server. All keys need a restart; the web configuration file's content is re-read by
    itself."""

    listen: str = "127.0.0.1:9955"
    """Address and port; `0.0.0.0:9955` or `[::]:9955` serve other machines, which should mean a
    web_config_file."""
    web_config_file: str = ""
    """TLS and basic authentication in the exporter-toolkit's format."""
    max_connections: Count = 64
    max_scrapes: Count = 8
    """Scrapes rendered at the same time; more get status 503."""
    request_timeout: Seconds = Seconds(10)
    idle_timeout: Seconds = Seconds(75)
    """How long a kept connection may be silent; longer than the scrape interval."""

    def __post_init__(self) -> None:
        _within("request_timeout", self.request_timeout, 0.1, 300)
        _within("idle_timeout", self.idle_timeout, 1, 3600)


class ProcessConfig(_Section, frozen=True):
    """Processes on a GPU."""

    pid_label: bool = False
    """Give each process a series of its own with its pid. Off, processes of one name and workload share
    one."""
    limit: Count = 64
    """Process series per GPU; further ones are summed into process="other"."""


class KubernetesConfig(_Section, frozen=True):
    """Where the node says which pod a container belongs to. Absent paths are no error."""

    pod_resources_socket: str = "/var/lib/kubelet/pod-resources/kubelet.sock"
    container_logs: str = "/var/log/containers"
    """Only names of links are read: they name pod, namespace and container."""
    pod_logs: str = "/var/log/pods"
    resources: tuple[str, ...] = ("nvidia.com/gpu", "nvidia.com/mig-*")
    """Patterns of the resource names that are GPUs."""
    refresh: Seconds = Seconds(10)

    def __post_init__(self) -> None:
        _within("refresh", self.refresh, 1, 600)


class GpuConfig(_Section, frozen=True):
    """The GPU exporter."""

    enabled: bool = True
    interval: Seconds = Seconds(1)
    """How often the fast tier is sampled, 0.1 to 60 s."""
    slow_interval: Seconds = Seconds(10)
    """How often the slow tier is sampled; at least `interval`."""
    hang_timeout: Seconds = Seconds(5)
    """A GPU whose driver call takes longer is shown as down, reason hung."""
    retry_interval: Seconds = Seconds(10)
    """How often a missing or lost driver or GPU is tried again."""
    nvml_library: str = ""
    """Path of libnvidia-ml.so.1; empty: where the loader finds it."""
    xid_events: bool = True
    process: ProcessConfig = ProcessConfig()

    def __post_init__(self) -> None:
        _within("interval", self.interval, 0.1, 60)
        _within("slow_interval", self.slow_interval, 0.1, 300)
        _within("hang_timeout", self.hang_timeout, 0.5, 300)
        _within("retry_interval", self.retry_interval, 0.1, 3600)
        if self.slow_interval < self.interval:
            raise ValueError(
                f"slow_interval: {self.slow_interval:g}s is less than interval, {self.interval:g}s"
            )


class LimitsConfig(_Section, frozen=True):
    """What the receiver takes of senders, however many and hostile they are."""

    senders: Count = 256
    """Connections at a time; an engine has one per API server, engine core and worker."""
    senders_per_user: Count = 128
    """Connections of one user (uid)."""
    records_per_second: Count = 10_000
    """Of each sender, with bursts of two seconds' worth. A faster one is read later, not refused."""
    kilobytes_per_second: Count = 4096
    """As above, in 1024 bytes."""

    def __post_init__(self) -> None:
        if self.senders > MAX_SENDERS:
            raise ValueError(f"senders: at most {MAX_SENDERS}, is {self.senders}")


class TenantQuota(_Section, frozen=True):
    """What a tenant may use. Not enforced: exported beside the use, for rules, alerts and dashboards."""

    gpu_seconds_per_day: float | None = None
    kv_share: float | None = None
    """Share of an engine's KV cache, 0 to 1."""

    def __post_init__(self) -> None:
        if self.gpu_seconds_per_day is not None and not 0 <= self.gpu_seconds_per_day < 1e12:
            raise ValueError(
                f"gpu_seconds_per_day: must be 0 or more seconds, is {self.gpu_seconds_per_day:g}"
            )
        if self.kv_share is not None and not 0 <= self.kv_share <= 1:
            raise ValueError(f"kv_share: must be between 0 and 1, is {self.kv_share:g}")


class TenantsConfig(_Section, frozen=True):
    """Tenants, as the engines' middleware names them."""

    limit: Count = 100
    """Tenants with series of their own, first come; further ones are summed into tenant="other". Those with
    a quota come first."""
    quotas: dict[str, TenantQuota] = {}
    """By tenant's name."""

    def __post_init__(self) -> None:
        if len(self.quotas) > self.limit:
            raise ValueError(f"quotas: {len(self.quotas)} tenants are more than limit, {self.limit}")
        for name in self.quotas:
            if not 0 < len(name) <= 64 or not name.isprintable():
                raise ValueError(
                    f"quotas: a tenant's name has 1 to 64 printable characters, not {_shown(name)}"
                )


class ExpertsConfig(_Section, frozen=True):
    """Experts of mixture-of-experts models."""

    window: Seconds = Seconds(60)
    """Over which load and hottest expert are computed."""
    matrix: bool = False
    """Export the selections of each expert of each layer: thousands of series per engine."""

    def __post_init__(self) -> None:
        _within("window", self.window, 10, 3600)


class EnginesConfig(_Section, frozen=True):
    """Receiver of what engines (vLLM with gpuglass-vllm, and others) tell about requests, tenants and
    experts."""

    enabled: bool = True
    socket: str = ""
    """Path of the Unix socket. Empty: /run/gpuglass/agent.sock, and where that cannot be made the agent runs
    without it and says so; a path that is given must work."""
    socket_mode: Mode = Mode("0666")
    """Who may connect is decided by the folder, which is what pods mount, and by `allow_uids`."""
    directory_mode: Mode = Mode("0755")
    """Of the socket's folder, when the agent makes it."""
    owner: str = ""
    """User, by name or number, who gets folder and socket; needs root."""
    group: str = ""
    allow_uids: tuple[Uid, ...] = ()
    """Users who may send, as the kernel tells them; empty: all who can connect."""
    allow_namespaces: tuple[str, ...] = ()
    """Patterns of the Kubernetes namespaces whose pods may send; empty: all, and processes outside pods."""
    tracer_uids: tuple[Uid, ...] = (0,)
    """Users whose CUDA memory tracers are believed; they must see the host's pids."""
    requests: Count = 10_000
    """Open requests remembered per engine."""
    limits: LimitsConfig = LimitsConfig()
    tenants: TenantsConfig = TenantsConfig()
    experts: ExpertsConfig = ExpertsConfig()

    def __post_init__(self) -> None:
        # sockaddr_un has 108 bytes (unix(7)), the last of which is NUL.
        if len(os.fsencode(self.socket)) > 107:
            raise ValueError(f"socket: a socket's path has at most 107 bytes, {_shown(self.socket)} has more")
        if self.socket and not self.socket.startswith("/"):
            raise ValueError(f"socket: must be an absolute path, is {_shown(self.socket)}")


MAX_PRICES = 100
"""Patterns of priced GPU models."""


class PricesConfig(_Section, frozen=True):
    """What an hour of a GPU costs. Exported beside the models, for rules, alerts and dashboards; give every
    agent the same."""

    currency: str = "USD"
    example: bool = False
    """true says that the prices are placeholders, and an alert asks for real ones."""
    per_gpu_hour: dict[str, float] = {}
    """Price of an hour by pattern of the model's name (gpuglass_gpu_info): a regular expression that has to
    match the whole name; the first one that does counts. A name without special characters is exported by
    every agent, whether it has such a card or not."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z]{1,16}", self.currency):
            raise ValueError(f"currency: must be 1 to 16 letters such as USD, is {_shown(self.currency)}")
        if len(self.per_gpu_hour) > MAX_PRICES:
            raise ValueError(f"per_gpu_hour: {len(self.per_gpu_hour)} patterns are more than {MAX_PRICES}")
        for pattern, price in self.per_gpu_hour.items():
            if not 0 < len(pattern) <= 128 or not pattern.isprintable():
                raise ValueError(
                    f"per_gpu_hour: a pattern has 1 to 128 printable characters, not {_shown(pattern)}"
                )
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(
                    f"per_gpu_hour: {_shown(pattern)} is no regular expression: {error}"
                ) from None
            if not 0 <= price < 1e6:  # NaN compares false
                raise ValueError(
                    f"per_gpu_hour: the price of {_shown(pattern)} must be from 0 to below 1000000, "
                    f"is {price:g}"
                )


class TracerConfig(_Section, frozen=True):
    """The CUDA memory tracer, a process of its own: `gpuglass cuda-tracer`. The agent takes nothing of it."""

    listen: str = "127.0.0.1:9956"
    loader: Literal["auto", "core", "bcc"] = "auto"
    """core: the prebuilt object through libbpf; bcc: compiles on the node; auto: core, else bcc."""
    object: str = ""
    """The prebuilt object; empty: the one that `make bpf` puts beside the source."""
    allow: tuple[str, ...] = ("x86_64 *",)
    """Patterns of `ARCHITECTURE KERNEL` on which it may run. arm64 compiles and was tried on no machine:
    probes of another vendor crashed GPU nodes of that architecture."""
    budget: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.01
    """Share of a core that tracing may take per traced process; above it all probes go. 0: no limit."""
    runtime: bool = False
    """Trace libcudart, too, as a ledger of its own. All that it shows passes through libcuda as well."""
    tensors: bool = False
    """Trace what PyTorch's allocator gives out, by the static probes that it brings (needs Linux 6.6): live
    tensors against reserved memory, for processes without the engine probe. It is called for every tensor."""
    contexts: bool = True
    """Trace which context is current, which tells the GPU of an allocation where a process uses several."""
    launches: Literal["off", "graphs", "all"] = "off"
    """Count launches of graphs, or of kernels as well; about a microsecond each."""
    namespaces: tuple[str, ...] = ()
    """Patterns of the Kubernetes namespaces to trace; empty: all, and processes outside of pods."""
    large_bytes: Annotated[int, msgspec.Meta(ge=1, le=1 << 50)] = 64 << 20
    """Allocations of this size on are told to the agent one by one."""
    samples_per_second: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 10
    """Other allocations that are told, at most."""
    live_entries: Annotated[int, msgspec.Meta(ge=1024, le=1 << 22)] = 1 << 18
    """Live allocations that are kept, of all processes; each takes about 120 bytes in the kernel."""
    processes: Count = 64
    """Processes with series of their own; further ones are summed into process="other"."""
    interval: Seconds = Seconds(5)
    """How often the kernel's sums are read."""
    reconcile_interval: Seconds = Seconds(15)
    """How often the ledger is compared with the driver's figures and told to the agent."""
    socket: str = "/run/gpuglass/agent.sock"
    """The agent's socket; empty: tell no agent."""

    def __post_init__(self) -> None:
        _within("interval", self.interval, 0.1, 300)
        _within("reconcile_interval", self.reconcile_interval, 0.1, 600)


class TracesTlsConfig(_Section, frozen=True):
    """TLS to the collector, where the endpoint is https://."""

    ca_file: str = ""
    """Certificates that are believed; empty: those of the system."""
    cert_file: str = ""
    """Certificate and key of the agent, where the collector asks for them."""
    key_file: str = ""

    def __post_init__(self) -> None:
        if bool(self.cert_file) != bool(self.key_file):
            given, lacking = ("cert_file", "key_file") if self.cert_file else ("key_file", "cert_file")
            raise ValueError(f"{given}: {lacking} has to be given, too")


class TailConfig(_Section, frozen=True):
    """Which requests are kept though nobody sampled them, once it is known how they went."""

    per_minute: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 60
    """Traces kept so, of all engines together; 0: none."""
    failed: bool = True
    """Failed and rejected ones."""
    aborted: bool = True
    preempted: bool = True
    slowest: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 5
    """The slowest ones of each minute."""


class TracesConfig(_Section, frozen=True):
    """Spans of requests, sent to an OpenTelemetry collector, Tempo or Jaeger by OTLP."""

    endpoint: str = ""
    """Such as http://127.0.0.1:4317, or https://… for TLS; empty: no traces. With `protocol: http` a URL
    without a path gets /v1/traces."""
    protocol: Literal["grpc", "http"] = "grpc"
    tls: TracesTlsConfig = TracesTlsConfig()
    headers_file: str = ""
    """File with a line `name: value` for each header that is sent along, such as credentials; read anew
    when it changes."""
    compression: Literal["gzip", "none"] = "gzip"
    timeout: Seconds = Seconds(10)
    """Of one request to the collector."""
    ratio: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.01
    """Share of the requests without a caller's trace context that are kept."""
    ignore_unsampled: bool = False
    """Keep requests by ratio and tail rules though their caller said not sampled: their trace is one of its
    own, with a link to the caller's."""
    tail: TailConfig = TailConfig()
    steps: Annotated[int, msgspec.Meta(ge=0, le=64)] = 8
    """Engine steps shown per request: its first one, the slowest, the others spread over its life."""
    queue: Count = 4096
    """Ended requests that wait for the collector; of more the oldest are dropped and counted."""
    service_name: str = "vllm"
    """service.name of engines that GPUGLASS_SERVER gives no name."""
    resource: dict[str, str] = {}
    """Further attributes of the resource, such as deployment.environment.name."""

    def __post_init__(self) -> None:
        _within("timeout", self.timeout, 0.1, 60)
        if self.endpoint:
            try:
                url = urlsplit(self.endpoint)
                good = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
            except ValueError:
                good = False
            if not good:
                raise ValueError(
                    f"endpoint: expected a URL such as http://127.0.0.1:4317, got {_shown(self.endpoint)}"
                )
        if len(self.resource) > 64:
            raise ValueError(f"resource: {len(self.resource)} attributes are more than 64")


class Config(_Section, frozen=True):
    """The whole configuration of the agent."""

    log: LogConfig = LogConfig()
    server: ServerConfig = ServerConfig()
    gpu: GpuConfig = GpuConfig()
    engines: EnginesConfig = EnginesConfig()
    kubernetes: KubernetesConfig = KubernetesConfig()
    prices: PricesConfig = PricesConfig()
    tracer: TracerConfig = TracerConfig()
    traces: TracesConfig = TracesConfig()
    proc: str = "/proc"
    """Where the host's /proc is seen."""


NEEDS_RESTART = (
    *("server.", "proc", "kubernetes.", "gpu.enabled", "gpu.nvml_library", "gpu.xid_events"),
    *("engines.enabled", "engines.socket", "engines.directory_mode", "engines.owner", "engines.group"),
    *("traces.endpoint", "traces.protocol", "traces.tls.", "traces.headers_file", "traces.compression"),
    *("traces.timeout", "traces.queue", "traces.service_name", "traces.resource"),
)
"""Keys, or beginnings of keys, that cannot change while the agent runs."""

FOREIGN_VARIABLES = frozenset(
    {
        "GPUGLASS_ANOMALY_CONFIG",
        "GPUGLASS_CONFIG",
        "GPUGLASS_CACHE",
        "GPUGLASS_SOCKET",
        "GPUGLASS_REQUIRE",
        "GPUGLASS_BUDGETS",
        "GPUGLASS_TEST_SESSION",
    }
)
_SERVICE_LINK = re.compile(
    r"GPUGLASS(_[A-Z0-9_]+)?_(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT(_\d+_(TCP|UDP|SCTP)(_.*)?)?)\Z"
)
"""Variables that Kubernetes sets in each pod when a Service is called gpuglass."""


def leaves(section: type[msgspec.Struct] = Config, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """All keys with their type and default, depth first: ("gpu.interval", Seconds, 1.0), …"""
    for info in msgspec.structs.fields(section):
        if isinstance(info.type, type) and issubclass(info.type, msgspec.Struct):
            yield from leaves(info.type, f"{prefix}{info.name}.")
        else:
            yield prefix + info.name, info.type, info.default


def variable(key: str) -> str:
    """Name of the variable that sets a key."""
    return "GPUGLASS_" + key.upper().replace(".", "_")


def load(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> Config:
    """Read the configuration; raises `ConfigError`.

    Without `path` the file named by `GPUGLASS_CONFIG` is read, if any.
    """
    if path is None and environ.get("GPUGLASS_CONFIG"):
        path = Path(environ["GPUGLASS_CONFIG"])
    document = read_yaml_mapping(path) if path is not None else {}
    _drop_empty_sections(document)
    origins = _overlay(document, environ)
    try:
        return msgspec.convert(document, Config, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise _explain(str(error), document, str(path) if path else "configuration", origins) from None


def changed_keys(old: Config, new: Config) -> list[str]:
    """Keys whose values differ."""
    return [key for key, _, _ in leaves() if value_of(old, key) != value_of(new, key)]


def value_of(config: Config, key: str) -> Any:
    """Value of a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def check_reload(old: Config, new: Config) -> list[str]:
    """Keys that changed and can be taken at once; raises `ConfigError` if one of them needs a restart."""
    changed = changed_keys(old, new)
    for key in changed:
        if key.startswith(NEEDS_RESTART):
            raise ConfigError(
                f"{key}: cannot change while the agent runs; restart it to apply {value_of(new, key)!r}"
            )
    return changed


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, of which YAML silently takes the last."""


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(
                None, None, f"key {_shown(key)} is not a word", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"{_one_line(key)} is given twice", key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What PyYAML raises for bad text. Those that are not its own come from values that do not fit a tag (`!!bool
x`) and from dates and numbers that do not exist (2026-99-99)."""


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """A YAML file whose top is a mapping with unique string keys (empty file: no keys); raises
    `ConfigError`."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read it: {error.strerror}") from None
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES // 1024} KiB")
    try:
        document = yaml.load(raw, _Loader)
    except _YAML_ERRORS as error:
        raise ConfigError(f"{path}: {_yaml_problem(error)}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: the top must be a mapping of keys, is a {type(document).__name__}")
    return document


def _yaml_problem(error: Exception) -> str:
    if not isinstance(error, yaml.YAMLError):
        return "not valid YAML" + (f": {_one_line(str(error))}" if isinstance(error, ValueError) else "")
    mark = getattr(error, "problem_mark", None)
    problem = _one_line(getattr(error, "problem", None) or str(error).partition("\n")[0])
    return f"line {mark.line + 1}: {problem}" if mark is not None else problem


def _one_line(text: str) -> str:
    """Text from a file or variable, fit for a one-line message."""
    return " ".join(text.split())[:200]


def _shown(value: object) -> str:
    """A value from a file or variable, fit for a one-line message: long and nested ones are shortened."""
    return _REPR.repr(value)


_REPR = reprlib.Repr()
_REPR.maxstring = 80
_REPR.maxlevel = 2


def _overlay(document: dict[str, Any], environ: Mapping[str, str]) -> dict[str, str]:
    """Write the variables into the document; gives the variable that each key came from."""
    known = {variable(key): (key, kind) for key, kind, _ in leaves()}
    origins: dict[str, str] = {}
    for name in sorted(environ):
        if not name.startswith("GPUGLASS_") or name in FOREIGN_VARIABLES or _SERVICE_LINK.match(name):
            continue
        if name not in known:
            raise ConfigError(f"{name}: no such setting{_did_you_mean(name, known, 0.8)}")
        key, kind = known[name]
        *sections, leaf = key.split(".")
        into = document
        for section in sections:
            inner = into.setdefault(section, {})
            if not isinstance(inner, dict):
                break  # the file is wrong there; the conversion will say so
            into = inner
        else:
            into[leaf] = _from_text(environ[name], kind)
            origins[key] = name
    return origins


def _from_text(text: str, kind: Any) -> Any:
    """A variable's text as the document would hold it."""
    if kind in (str, Mode) or get_origin(kind) is Literal:
        return text
    if get_origin(kind) is tuple and get_args(kind)[0] is str:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if get_origin(kind) is tuple:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        # What is no number, or an endless one, stays text: the conversion refuses it by name.
        is_number = re.compile(r"[0-9]{1,18}\Z").match
        return tuple(int(part) if is_number(part) else part for part in parts)
    try:
        return yaml.safe_load(text) if text.strip() else text
    except _YAML_ERRORS:
        return text


def _decode(kind: type, value: Any) -> Any:
    if kind in (Seconds, Mode):
        return kind.parse(value)
    raise NotImplementedError(kind)


_AT = re.compile(r" - at `\$\.?(.*)`\Z")
_ELEMENT = re.compile(r"([a-z_.]+)\[(\d+)\]\Z")
_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)


def _explain(message: str, document: Any, source: str, origins: Mapping[str, str]) -> ConfigError:
    """Turn msgspec's message into one line: file or variable, key, what is wrong with it."""
    at = _AT.search(message)
    path = at[1] if at else ""
    text = message[: at.start()] if at else message
    if unknown := _UNKNOWN_FIELD.match(text):
        name = _one_line(unknown[1])
        key = f"{path}.{name}" if path else name
        return ConfigError(f"{source}: {key}: no such key{_did_you_mean(key, dict.fromkeys(_all_keys()))}")
    if named := re.match(r"([a-z_]+): (.*)", text):  # a __post_init__ names the key in its section
        path, text = f"{path}.{named[1]}" if path else named[1], named[2]
    elif (kind := {key: kind for key, kind, _ in leaves()}.get(path)) is not None:
        text = _expectation(kind, text) + f", is {_shown(_value_at(document, path))}"
    elif element := _ELEMENT.match(path):
        text = _expectation(_element_kind(element[1]), text)
        value = _value_at(document, element[1])
        if isinstance(value, list | tuple):
            text += f", is {_shown(value[int(element[2])])}"
    text = text.replace("Expected `object`", "expected keys below it").replace("`", "")
    where = origins.get(path) or origins.get(path.partition("[")[0])
    where = where or (f"{source}: {path}" if path else source)
    return ConfigError(f"{where}: {text[:1].lower()}{text[1:]}")


def _expectation(kind: Any, text: str) -> str:
    if get_origin(kind) is Literal:
        return f"must be one of {', '.join(get_args(kind))}"
    if kind == Count:
        return "must be a whole number from 1 to 100000"
    if kind == Uid:
        return "must be a user's number (uid)"
    if kind is bool:
        return "must be true or false"
    if kind is str:
        return "must be a text"
    return text.split(", got")[0]


def _element_kind(key: str) -> Any:
    """Type of the elements of a key that holds a list."""
    kind = next((kind for name, kind, _ in leaves() if name == key), None)
    return get_args(kind)[0] if get_origin(kind) is tuple else None


def _value_at(document: Any, path: str) -> Any:
    for name in path.split("."):
        document = document[name]
    return document


def _drop_empty_sections(document: dict[str, Any]) -> None:
    """A section whose keys are all commented out reads as null: it is an empty section."""
    sections = {key.rpartition(".")[0] for key, _, _ in leaves()} - {""}
    mappings = {key for key, kind, _ in leaves() if get_origin(kind) is dict}
    for section in sorted(sections | mappings):
        *above, name = section.split(".")
        into: Any = document
        for outer in above:
            into = into.get(outer) if isinstance(into, dict) else None
        if isinstance(into, dict) and name in into and into[name] is None:
            del into[name]


def _all_keys() -> list[str]:
    keys = [key for key, _, _ in leaves()]
    return keys + sorted({key.rsplit(".", n)[0] for key in keys for n in range(1, key.count(".") + 1)})


def _did_you_mean(name: str, known: Mapping[str, object], likeness: float = 0.6) -> str:
    close = difflib.get_close_matches(name, list(known), 1, likeness)
    return f"; did you mean {close[0]}?" if close else "; `gpuglass config show` lists them"
