"""What a check of the doctor says: how things stand, and the mend if there is one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

TEXT_LIMIT = 500
"""Characters of a finding or a mend: parts of them come from other programs."""

GROUPS: Mapping[str, str] = {
    "gpu": "GPU",
    "processes": "Processes and pods",
    "bpf": "BPF (only the CUDA tracer needs it)",
    "engines": "Engines",
    "traces": "Traces",
    "monitoring": "Monitoring",
}
"""Groups by the first word of a check's id, in the order in which they are shown; others follow."""

_ID = re.compile(r"[a-z]+(\.[a-z0-9_]+)+\Z")


class Status(StrEnum):
    """How a check ended. Only `fail` makes the doctor exit with 1."""

    OK = "ok"
    INFO = "info"
    """Not there, and nobody asked for it."""
    WARN = "warn"
    """Works, but less is seen than could be, or in a way that will disappoint."""
    FAIL = "fail"
    """Asked for and broken."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor. The id is `<group>.<name>`; finding and mend become single printable lines."""

    id: str
    title: str
    status: Status
    finding: str
    mend: str = ""
    """The exact command or setting; empty when there is nothing to do."""

    def __post_init__(self) -> None:
        if not _ID.match(self.id):
            raise ValueError(f"{self.id!r}: a check's id is group.name in lower case")
        if self.status is Status.OK and self.mend:
            raise ValueError(f"{self.id}: is ok and has a mend")
        object.__setattr__(self, "finding", one_line(self.finding))
        object.__setattr__(self, "mend", one_line(self.mend))

    @property
    def group(self) -> str:
        """First word of the id."""
        return self.id.partition(".")[0]


def one_line(text: str, limit: int = TEXT_LIMIT) -> str:
    """Text of another program made fit for a terminal: one line, printable, not endless."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text[: 4 * limit]).split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def summary(checks: Iterable[Check]) -> dict[str, int]:
    """Number of checks by status; every status is there."""
    counts = {status.value: 0 for status in Status}
    for check in checks:
        counts[check.status.value] += 1
    return counts


def exit_code(checks: Iterable[Check]) -> int:
    """1 if something that was asked for is broken."""
    return int(any(check.status is Status.FAIL for check in checks))
