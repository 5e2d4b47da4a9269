"""`gpuglass demo`: a simulated node, the real agent and a real Prometheus, on a machine without a GPU.

In flows the path of the simulated driver, out flow two addresses and a table until Ctrl-C. Everything that
runs is a child of the demo, everything it writes lies in one temporary folder, and both are gone afterwards.
"""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, Namespace
from pathlib import Path

from gpuglass.command import Command
from gpuglass.demo.settings import AGENT_PORT, PROMETHEUS_PORT, Settings, check_driver, choose_ports


def _run(arguments: Namespace) -> int:
    from gpuglass.demo import children
    from gpuglass.demo.run import Demo, play
    from gpuglass.demo.signals import Signals

    library = check_driver(arguments.nvml_library)
    agent, prometheus = choose_ports(arguments.agent_port, arguments.prometheus_port)
    settings = Settings(library, arguments.seconds, agent, prometheus, arguments.seed)
    started: list[children.Child] = []
    signals = Signals(lambda: children.kill(started))
    with signals.installed():
        folder = children.TemporaryFolder()
        keep = ""
        try:
            play(Demo(settings, folder.path, started), signals)
        except children.ChildFailed:
            keep = ".log"
            raise
        finally:
            children.stop(reversed(started))
            folder.remove(keep)
    return 0


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 1 to 86400")
    return value


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 65_535):
        raise argparse.ArgumentTypeError(f"{text!r} is no port from 1 to 65535")
    return int(text)


def _configure(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--nvml-library", metavar="PATH", type=Path, help="the simulated driver; `make demo` gives it"
    )
    parser.add_argument(
        "--seconds", metavar="N", type=_seconds, help="end after N seconds (default: at Ctrl-C)"
    )
    parser.add_argument(
        "--agent-port", metavar="PORT", type=_port, help=f"default: {AGENT_PORT} or the next free one"
    )
    parser.add_argument(
        "--prometheus-port",
        metavar="PORT",
        type=_port,
        help=f"default: {PROMETHEUS_PORT} or the next free one",
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=7, help="another seed, another day (default: 7)"
    )


COMMAND = Command(
    "show the pack on a simulated node with eight GPUs",
    _configure,
    _run,
    "Simulate a node with eight GPUs that serves language models, run the real agent and a real Prometheus\n"
    "on it, and show a table until Ctrl-C. Prometheus is taken from the PATH or fetched from the\n"
    "distribution; without it the agent runs alone. Nothing stays behind. The numbers are made up.",
    "  make demo                                        compiles the simulated driver and runs this\n"
    "  make demo SECONDS=30                             the same, ends by itself\n"
    '  gpuglass demo --nvml-library "$(python -m tests.fakes.nvml)" --prometheus-port 9191',
)
