"""The `gpuglass` command: finds the subcommands that are installed, parses arguments, turns errors into one
line."""

from __future__ import annotations

import argparse
import errno
import functools
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import entry_points

import gpuglass
from gpuglass.command import Command
from gpuglass.errors import UserError

_EXAMPLES = """\
examples:
  gpuglass doctor                      what can be observed on this machine
  gpuglass agent                       serve the metrics on http://127.0.0.1:9955/metrics
  gpuglass agent --config agent.yaml   the same with a configuration file
  gpuglass metrics --markdown          the catalog of metric families
"""


def commands(only: str = "") -> dict[str, Command]:
    """Installed subcommands by name. If there is one called `only`, just that one: each of the others would
    load a part of the pack that the process does not need."""
    found: dict[str, Command] = {}
    entries = sorted(entry_points(group="gpuglass.commands"), key=lambda entry: entry.name)
    for entry in [entry for entry in entries if entry.name == only] or entries:
        command = entry.load()
        if isinstance(command, Command):
            found[entry.name] = command
    return found


class _Listing(argparse.RawDescriptionHelpFormatter):
    """A line for each command; argparse itself forgets that their names are indented."""

    def __init__(self, prog: str, names: Collection[str]) -> None:
        super().__init__(prog, max_help_position=30)
        self._action_max_length = 4 + max(map(len, names), default=0)


def parser(available: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The whole argument parser."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        prog="gpuglass",
        description="GPU inference made visible for Prometheus, Alertmanager and Grafana.",
        epilog=_EXAMPLES,
        formatter_class=functools.partial(_Listing, names=available),
    )
    top.add_argument("--version", action="version", version=f"gpuglass {gpuglass.__version__}")
    subparsers = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in available.items():
        sub = subparsers.add_parser(
            name,
            help=command.summary,
            description=command.description or command.summary,
            epilog=command.examples and f"examples:\n{command.examples}",
            formatter_class=raw,
        )
        command.configure(sub)
        sub.set_defaults(run=command.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 130 interrupted."""
    try:
        try:
            words = sys.argv[1:] if argv is None else argv
            arguments = parser(commands(words[0] if words else "")).parse_args(words)
            code: int = arguments.run(arguments)
        finally:
            sys.stdout.flush()  # here and not at exit, where a closed pipe could not be caught any more
    except UserError as error:
        print(f"gpuglass: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC) or error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        if error.errno == errno.EPIPE:  # the reader has gone (`gpuglass metrics | head`): no error
            return 0
        print(f"gpuglass: cannot write the output: {error.strerror}", file=sys.stderr)
        return 1
    return code
