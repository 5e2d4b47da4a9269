"""What a subcommand of `gpuglass` is. Rooms register theirs as entry points of the group
`gpuglass.commands`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: one line about it, its arguments, what it does.

    `configure` adds arguments, `run` gives the exit code; both import heavy modules only when called.
    """

    summary: str
    configure: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]
    description: str = ""
    examples: str = ""
