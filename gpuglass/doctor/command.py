"""`gpuglass doctor`: reads the machine, collects the checks of all groups and rooms, prints them."""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path

from gpuglass.command import Command
from gpuglass.config import Config, load
from gpuglass.doctor import bpf, engines, http, listen, processes, prometheus
from gpuglass.doctor.bounded import TookTooLong, bounded, leave
from gpuglass.doctor.check import Check, Status, exit_code
from gpuglass.doctor.render import as_json, look, screen
from gpuglass.errors import ConfigError
from gpuglass.procfs import ProcFs
from gpuglass.server.address import Address

ROOM_SECONDS = 20.0
"""How long a room's checks may take; they bound their own calls more tightly."""
_ANSWER_LIMIT = 16 << 20

_DESCRIPTION = """\
Say what can be observed on this machine, and what to do about the rest. Nothing is changed, attached or left
running, and no question waits longer than seconds for its answer.

Each check ends as ok; info: not there, and not asked for; warn: works with less; fail: asked for and broken.

exit code:
  0  no check failed
  1  at least one did:
     - the driver or a GPU does not work, or a call into it does not return
     - the driver's library is missing where the machine has a GPU of NVIDIA, or where the container
       (NVIDIA_VISIBLE_DEVICES) or gpu.nvml_library asks for one
     - the listen address or the web configuration file cannot be used
     - with --prometheus: it does not answer, or does not scrape the agent
  2  wrong usage or configuration"""

Diagnose = Callable[[Config], list[Check]]
"""What an entry point of the group `gpuglass.diagnoses` is."""


def _configure(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="FILE", type=Path, help="configuration file (default: GPUGLASS_CONFIG)"
    )
    parser.add_argument("--prometheus", metavar="URL", help="look at this Prometheus as well")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(arguments: Namespace) -> int:
    config = load(arguments.config)
    url = _prometheus_url(arguments.prometheus) if arguments.prometheus is not None else None
    listen.address_of(config.server)
    checks = examine(config, url)
    if arguments.json:
        print(as_json(checks))
    else:
        is_terminal = sys.stdout.isatty()
        style = look(
            shutil.get_terminal_size().columns, is_terminal, sys.stdout.encoding or "ascii", os.environ
        )
        print("\n".join(screen(checks, style)))
    return leave(exit_code(checks))


def _prometheus_url(text: str) -> http.Url:
    try:
        return http.parse_url(text)
    except http.UrlError as error:
        raise ConfigError(f"--prometheus: {error}") from None


def examine(config: Config, url: http.Url | None) -> list[Check]:
    """All checks of this machine, and of the Prometheus at `url`."""
    proc = ProcFs(config.proc)
    checks = of_rooms(config)
    checks += processes.checks(proc, config.kubernetes, os.environ)
    checks += bpf.checks(Path("/"), proc, _kernel())
    checks += engines.checks(
        engines.find(proc), lambda at: http.get(at, "/metrics", seconds=1, limit=8 << 20, verify=False)
    )
    checks += listen.checks(
        config.server,
        lambda at, path: http.get(at, path, seconds=2, limit=_ANSWER_LIMIT, verify=False),
        _why_not_bindable,
    )
    if url is not None:
        agent = listen.own_url(listen.address_of(config.server))
        checks += prometheus.checks(
            url,
            lambda path: http.get(url, path, seconds=3, limit=_ANSWER_LIMIT),
            str(agent).partition("://")[2],
        )
    return checks


def _why_not_bindable(address: Address) -> str:
    try:
        return bounded("bind", 3, partial(listen.why_not_bindable, address))
    except TookTooLong:
        return "the name is not resolved within 3 s"


def of_rooms(config: Config) -> list[Check]:
    """The checks that rooms registered; one that breaks is a failed check itself."""
    checks: list[Check] = []
    for entry in sorted(entry_points(group="gpuglass.diagnoses"), key=lambda entry: entry.name):
        try:
            diagnose: Diagnose = entry.load()
            checks += bounded(entry.name, ROOM_SECONDS, partial(diagnose, config))
        except Exception as error:
            checks.append(
                Check(
                    f"{entry.name}.diagnosis",
                    "diagnosis",
                    Status.FAIL,
                    f"cannot be made: {type(error).__name__}: {error}",
                    "pip install --force-reinstall gpuglass; if it stays, report this line",
                )
            )
    return checks


def _kernel() -> bpf.Kernel:
    try:
        spec = importlib.util.find_spec("bcc")
    except (ImportError, ValueError):
        spec = None
    return bpf.Kernel(
        release=platform.release(),
        memlock=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        other_bcc=bpf.unrelated_bcc(list(spec.submodule_search_locations or ())) if spec else "",
    )


COMMAND = Command(
    "what can be observed on this machine",
    _configure,
    _run,
    _DESCRIPTION,
    "  gpuglass doctor\n  gpuglass doctor --prometheus http://127.0.0.1:9090\n"
    "  gpuglass doctor --config /etc/gpuglass/agent.yaml --json",
)
