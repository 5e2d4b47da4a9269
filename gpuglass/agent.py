"""`gpuglass agent`: the unprivileged process on each node that serves /metrics.

It loads the configuration, makes the parts that the rooms registered, serves what they publish, takes a new
configuration on SIGHUP, and ends on SIGTERM or SIGINT within a bounded time even when a part is stuck in a
driver.
"""

from __future__ import annotations

import os
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path

from gpuglass import catalog
from gpuglass.command import Command
from gpuglass.config import Config, check_reload, load
from gpuglass.errors import UserError
from gpuglass.family import Owner, Tier
from gpuglass.logs import LOG, configure
from gpuglass.part import Part, PartContext
from gpuglass.self_metrics import ReloadState, SelfMetrics
from gpuglass.serving import make_server, start_server
from gpuglass.store import Store

STOP_TIMEOUT = 5.0


class Agent:
    """The running agent: store, parts, server."""

    def __init__(self, config: Config, config_file: Path | None = None) -> None:
        self.config = config
        self._config_file = config_file
        self.store = Store(catalog.owned_by(Owner.AGENT))
        self._capabilities: list[Callable[[], Mapping[str, str]]] = []
        self.reloads = ReloadState()
        self.parts = self._make_parts()
        self.server = make_server(config.server, self.store, readiness=self.not_ready, title="GPUGlass agent")
        self.store.add_live(
            "agent",
            SelfMetrics(
                self.server.stats,
                self.store.series,
                self.reloads,
                self._capabilities,
                bool(config.server.web_config_file),
            ).fill,
            Tier.SLOW,
        )

    def _make_parts(self) -> dict[str, Part]:
        parts: dict[str, Part] = {}
        context = PartContext(self.config, self.store, self._capabilities.append)
        for entry in sorted(entry_points(group="gpuglass.agent_parts"), key=lambda entry: entry.name):
            part = entry.load()(context)
            if part is not None:
                parts[entry.name] = part
        return parts

    def not_ready(self) -> str | None:
        """The first part's reason, in one line."""
        return next((reason for part in self.parts.values() if (reason := part.not_ready())), None)

    def start(self) -> None:
        """Serve first, then let the parts work: a busy port is found before anything else happens."""
        start_server(self.server)
        for part in self.parts.values():
            part.start()

    def reload(self) -> None:
        """Take the configuration as it is now on disk; keep the old one and say so if it is refused."""
        try:
            new = load(self._config_file)
            changed = check_reload(self.config, new)
        except UserError as error:
            self.reloads.refused()
            LOG.error("configuration not taken, the old one stays: %s", error)
            return
        configure(new.log)
        for part in self.parts.values():
            part.reload(new)
        self.config = new
        self.reloads.taken()
        LOG.info("configuration taken; changed: %s", ", ".join(changed) or "nothing")

    def stop(self) -> bool:
        """Stop everything; False if a thread is stuck and was left behind."""
        clean = self.server.stop(STOP_TIMEOUT / 2)
        for part in self.parts.values():
            clean = part.stop(STOP_TIMEOUT / 2) and clean
        return clean


def run(agent: Agent) -> bool:
    """Run until SIGTERM or SIGINT; gives whether everything stopped cleanly."""
    signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    # Blocked in all threads and waited for here: a handler could run inside a lock that it needs.
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    agent.start()
    LOG.info("serving http://%s/metrics", agent.server.address)
    while signal.sigwait(signals) == signal.SIGHUP:
        agent.reload()
    return agent.stop()


def _configure(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="FILE", type=Path, help="configuration file (default: GPUGLASS_CONFIG)"
    )
    parser.add_argument("--listen", metavar="ADDRESS", help="address and port; overrides server.listen")


def _run(arguments: Namespace) -> int:
    if arguments.listen:
        os.environ["GPUGLASS_SERVER_LISTEN"] = arguments.listen
    config = load(arguments.config)
    configure(config.log)
    clean = run(Agent(config, arguments.config))
    if not clean:
        # A thread inside the driver cannot be ended, and the interpreter would wait for what it holds.
        LOG.warning("a call into a driver did not return; leaving without it")
        sys.stderr.flush()
        os._exit(0)
    return 0


COMMAND = Command(
    "serve the metrics of this node",
    _configure,
    _run,
    "Serve the metrics of this node for Prometheus until SIGTERM. SIGHUP loads the configuration again.",
    "  gpuglass agent\n  gpuglass agent --config /etc/gpuglass/agent.yaml\n"
    "  GPUGLASS_GPU_INTERVAL=500ms gpuglass agent --listen 0.0.0.0:9955",
)
