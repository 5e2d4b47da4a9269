"""What the demo's command line gives, checked: the simulated driver is one, the ports are free.

In flow the options, out flow a path and two ports, or one line that says what is wrong with which option.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gpuglass.demo import ports
from gpuglass.errors import ConfigError

AGENT_PORT = 9955
PROMETHEUS_PORT = 9090

_MARK = b"FAKE_NVML_SCENARIO"
"""The variable that the simulated driver reads: its name is in the library."""


@dataclass(frozen=True, slots=True)
class Port:
    """A server's port, and what to say of it beside the address."""

    number: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class Settings:
    """One run's settings."""

    nvml_library: Path
    seconds: float | None
    """How long the table is shown; None: until a signal."""
    agent: Port
    prometheus: Port
    seed: int


def check_driver(library: Path | None) -> Path:
    """The absolute path of the simulated driver. Raises ConfigError."""
    if library is None:
        raise ConfigError("demo runs by `make demo` in a checkout, which compiles the simulated GPU driver")
    try:
        simulated = _MARK in library.read_bytes()
    except OSError as error:
        raise ConfigError(f"--nvml-library {library}: {error.strerror}; `make demo` compiles it") from None
    if not simulated:
        raise ConfigError(f"--nvml-library {library}: not the simulated driver; `make demo` compiles it")
    return library.absolute()


def choose_ports(agent: int | None, prometheus: int | None) -> tuple[Port, Port]:
    """Ports of agent and Prometheus, as asked or near the documented ones. Raises ConfigError."""
    for_prometheus = () if agent is not None or prometheus is None else (prometheus,)
    first = _choose("--agent-port", AGENT_PORT, agent, for_prometheus)
    return first, _choose("--prometheus-port", PROMETHEUS_PORT, prometheus, (first.number,))


def _choose(option: str, documented: int, asked: int | None, avoid: tuple[int, ...]) -> Port:
    number = ports.choose(option, documented, asked, avoid)
    return Port(number, "" if number in (documented, asked) else f"  ({documented} is in use)")
