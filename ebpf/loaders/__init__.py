"""The two ways of the program into the kernel.

`core` hands an object that was compiled ahead to libbpf, `bcc` compiles the same source on the node. Both are
given open maps and the names of the programs that are wanted, and give back descriptors; all else (probes,
maps, reading) is common to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from gpuglass.errors import ConfigError

PROGRAM = Path(__file__).parents[1] / "program"
SOURCE = PROGRAM / "trace.c"

LoaderName = Literal["core", "bcc"]
RAW_TRACEPOINTS: Mapping[str, str] = {
    "thread_exit": "sched_process_exit",
    "program_exec": "sched_process_exec",
}
"""Programs that run at a tracepoint; all others are probes of functions."""


class LoaderError(ConfigError):
    """The program cannot be loaded here; one line that says why and what to do. Exit code 2."""


class Ring(Protocol):
    """The reading end of the events' ring."""

    def consume(self) -> int:
        """Hand all waiting events to the callback; gives their number."""

    def close(self) -> None:
        """Free it."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Programs in the kernel."""

    loader: LoaderName
    programs: Mapping[str, int]
    """Descriptors by name."""
    open_ring: Callable[[int, Callable[[bytes], None]], Ring]
    """From the ring's descriptor and what is to be called with each event."""


def load(
    choice: str, object_file: Path, maps: Mapping[str, int], wanted: frozenset[str], multi: bool
) -> Loaded:
    """Load by `choice` (auto, core or bcc); raises `LoaderError`.

    `auto` takes the object if there is one that libbpf can load, else bcc; the error names what both lack.
    With `multi` the probes' programs are loaded for `kernel.UPROBE_MULTI`."""
    from ebpf.loaders import bcc, core

    if choice == "core":
        return core.load(object_file, maps, wanted, multi)
    if choice == "bcc":
        return bcc.load(SOURCE, maps, wanted, multi)
    try:
        return core.load(object_file, maps, wanted, multi)
    except LoaderError as error:
        try:
            return bcc.load(SOURCE, maps, wanted, multi)
        except LoaderError as other:
            raise LoaderError(f"no loader works here: core: {error}; bcc: {other}") from None
