"""Checks of inference engines: vLLM servers and workers found in /proc, and whether their /metrics answer.

Command lines may hold secrets. Of them only the program, the port and the last part of the model's name are
kept, and those pass a strict pattern; nothing else reaches a finding.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from gpuglass.doctor.check import Check, Status
from gpuglass.doctor.http import Answer, NoAnswer, Url
from gpuglass.procfs import ProcFs

DEFAULT_PORT = 8000
MAX_PROCESSES = 20_000
MAX_SERVERS = 8
"""Servers that are asked and shown, a second each at worst."""

Fetch = Callable[[Url], Answer]
"""GET /metrics of a server on loopback. Raises `NoAnswer`."""

_COMMAND_LINE_LIMIT = 65536
_ENTRYPOINT = re.compile(r"vllm\.entrypoints\.[a-z_.]*(api_server|cli\.main)\Z")
_PYTHON = re.compile(r"python[0-9.]*\Z")
_TITLE = re.compile(r"VLLM::([A-Za-z]{1,32})")
_MODEL = re.compile(r"[A-Za-z0-9][\w.\-]{0,79}\Z", re.ASCII)
_LOOPBACK = frozenset({"", "0.0.0.0", "127.0.0.1", "localhost", "::", "::1"})


@dataclass(frozen=True, slots=True)
class Server:
    """A vLLM API server. Holds nothing of its command line that could be a secret."""

    pid: int
    port: int
    model: str = ""
    on_loopback: bool = True
    tls: bool = False
    own_network: bool = True
    """False if it lives in another network namespace, where our loopback is not its."""

    @property
    def name(self) -> str:
        """For a finding."""
        return f"vllm {self.model}".strip() + f" (pid {self.pid}, port {self.port})"


@dataclass(frozen=True, slots=True)
class Engines:
    """What /proc shows: API servers, and other processes of vLLM by kind."""

    servers: tuple[Server, ...]
    others: Counter[str]


def find(proc: ProcFs) -> Engines:
    """Look through the command lines of all processes."""
    own_network = _network(proc, "self")
    servers: list[Server] = []
    others: Counter[str] = Counter()
    for pid in _pids(proc):
        arguments = command_line(proc.read(pid, "cmdline", _COMMAND_LINE_LIMIT) or b"")
        if not arguments:
            continue
        if title := _TITLE.match(arguments[0]):
            others[title[1]] += 1
            continue
        if (server := parse_server(pid, arguments)) is not None:
            elsewhere = bool(own_network) and _network(proc, pid) not in ("", own_network)
            servers.append(replace(server, own_network=not elsewhere))
    return Engines(tuple(servers), others)


def command_line(raw: bytes) -> list[str]:
    """Arguments in /proc/PID/cmdline; a process that set its own title has one."""
    return raw.decode("utf-8", "replace").rstrip("\0 ").split("\0") if raw.strip(b"\0 ") else []


def parse_server(pid: int, arguments: Sequence[str]) -> Server | None:
    """The server that a command line starts, or None: `vllm serve …`, `python -m vllm.entrypoints.…`."""
    rest = _after_program(arguments)
    if rest is None:
        return None
    host = _option(rest, "host")
    model = _option(rest, "model")
    if not model and rest and not rest[0].startswith("-"):
        model = rest[0]  # only right behind `serve`: further on it may be the value of an option
    port = _option(rest, "port")
    return Server(
        pid,
        int(port) if re.fullmatch(r"[0-9]{1,5}", port) else DEFAULT_PORT,
        model_name(model),
        host in _LOOPBACK,
        any(argument.split("=")[0].replace("_", "-") == "--ssl-certfile" for argument in rest),
    )


def model_name(model: str) -> str:
    """Last part of a model's name, path or URL; empty if it looks like anything else."""
    last = model.rstrip("/").rpartition("/")[2]
    return last if _MODEL.match(last) else ""


def _after_program(arguments: Sequence[str]) -> Sequence[str] | None:
    """What follows the program's name and its word `serve`."""
    rest = list(arguments)
    if _PYTHON.match(os.path.basename(rest[0])):
        rest = rest[1:]
        while rest and rest[0].startswith("-") and rest[0] != "-m":
            rest = rest[1:]
        if rest[:1] == ["-m"]:
            rest = rest[1:]
            if rest and _ENTRYPOINT.match(rest[0]) and rest[0].endswith("api_server"):
                return rest[1:]
            if rest and _ENTRYPOINT.match(rest[0]):
                rest[0] = "vllm"
    if rest and os.path.basename(rest[0]) == "vllm" and rest[1:2] == ["serve"]:
        return rest[2:]
    return None


def _option(arguments: Sequence[str], name: str) -> str:
    """Value of `--name value` or `--name=value`; the last counts."""
    value = ""
    for index, argument in enumerate(arguments):
        if argument == f"--{name}" and index + 1 < len(arguments):
            value = arguments[index + 1]
        elif argument.startswith(f"--{name}="):
            value = argument.partition("=")[2]
    return value


def _pids(proc: ProcFs) -> Iterator[int]:
    try:
        names = os.listdir(proc.root)
    except OSError:
        return
    yield from sorted(int(name) for name in names if name.isascii() and name.isdigit())[:MAX_PROCESSES]


def _network(proc: ProcFs, pid: int | str) -> str:
    try:
        return os.readlink(proc.root / str(pid) / "ns" / "net")
    except OSError:
        return ""


def checks(engines: Engines, fetch: Fetch) -> list[Check]:
    """One check per server, and one for the processes that have no command line to read."""
    shown = [_server(server, number, fetch) for number, server in enumerate(engines.servers[:MAX_SERVERS])]
    hidden = len(engines.servers) - len(shown)
    if hidden > 0:
        shown.append(
            Check("engines.more", "vLLM", Status.INFO, f"{hidden} more servers are not asked from here")
        )
    kinds = ", ".join(f"{count} × {kind}" for kind, count in sorted(engines.others.items()))
    if kinds:
        unknown = "" if engines.servers else ": the server's own command line is not seen, nor its port"
        shown.append(Check("engines.processes", "vLLM processes", Status.OK, f"{kinds}{unknown}"))
    if not shown:
        shown.append(Check("engines.none", "vLLM", Status.INFO, "no vLLM process is seen here"))
    return shown


def _server(server: Server, number: int, fetch: Fetch) -> Check:
    name, title = f"engines.server_{number}", "vLLM"
    if not server.own_network:
        return Check(
            name,
            title,
            Status.INFO,
            f"{server.name}: in another network namespace, not asked; scrape it at its pod's address",
        )
    if not server.on_loopback:
        return Check(name, title, Status.INFO, f"{server.name}: listens on another address, not asked")
    url = Url("https" if server.tls else "http", "127.0.0.1", server.port)
    try:
        answer = fetch(url)
    except NoAnswer as error:
        return Check(
            name,
            title,
            Status.WARN,
            f"{server.name}: {error}",
            f"wait until the model is loaded, then: curl {url}/metrics",
        )
    if answer.status != 200:
        return Check(
            name,
            title,
            Status.WARN,
            f"{server.name}: /metrics answers with status {answer.status}",
            f"curl -i {url}/metrics",
        )
    series = sum(1 for line in answer.body.splitlines() if line.startswith(b"vllm:"))
    if not series:
        return Check(
            name,
            title,
            Status.WARN,
            f"{server.name}: /metrics has no series of vLLM",
            "start vLLM without --disable-log-stats",
        )
    more = "" if answer.complete else "more than "
    return Check(name, title, Status.OK, f"{server.name}: /metrics answers, {more}{series} series")
