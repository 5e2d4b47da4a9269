"""The demo's table: rows of GPUs in, text out, drawn anew each second or appended.

`cells` and `lines` are pure. `rich` draws on a terminal; without it, without a terminal or with TERM=dumb the
lines are printed one table after the other, less often.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol, TextIO

from gpuglass.demo.readings import Row

if TYPE_CHECKING:
    from rich.table import Table

APPENDED_EVERY = 5.0
"""Seconds between two tables that are appended."""

UNKNOWN = "-"
HEADINGS = ("GPU", "model", "busy", "SM active", "memory used", "power", "top process", "notes")
_RIGHT = frozenset({"busy", "SM active", "memory used", "power"})
_WIDTHS = {
    "GPU": 3,
    "model": 14,
    "busy": 5,
    "SM active": 9,
    "memory used": 13,
    "power": 9,
    "top process": 39,
    "notes": 26,
}
"""Columns do not move when their content changes."""

_SHRINK = (("notes", 16), ("top process", 24), ("model", 6), ("notes", 9), ("top process", 10))
"""What becomes shorter in a narrow terminal, and how far: names do, numbers stay whole."""

_GAP = 2

WAITING = "waiting for the first samples ..."


def cells(row: Row) -> tuple[str, ...]:
    """The texts of a row, in the order of `HEADINGS`."""
    return (
        row.device.removeprefix("nvidia"),
        row.model or UNKNOWN,
        _percent(row.busy),
        _percent(row.sm_active),
        _of(row.memory_used, row.memory_total, 1 << 30, "GiB", 1),
        _of(row.power, row.power_limit, 1, "W", 0),
        _process(row),
        _notes(row),
    )


def _percent(ratio: float | None) -> str:
    return UNKNOWN if ratio is None else f"{ratio * 100:.0f} %"


def _of(part: float | None, whole: float | None, unit: float, name: str, digits: int) -> str:
    if part is None:
        return UNKNOWN
    total = "" if whole is None else f"/{whole / unit:.0f}"
    return f"{part / unit:.{digits}f}{total} {name}"


def _process(row: Row) -> str:
    if row.top is None:
        return UNKNOWN
    where = f" ({row.top.namespace}/{row.top.pod})" if row.top.pod else ""
    return f"{row.top.name}{where}"


def _notes(row: Row) -> str:
    notes = [] if row.up else ["down"]
    notes += [f"XID {xid}, {ago:.0f} s ago" for xid, ago in sorted(row.xids, key=lambda item: item[1])]
    notes += [reason.replace("_", " ") for reason in row.throttled]
    return "; ".join(notes)


def fitted(width: int) -> dict[str, int]:
    """Column widths for a terminal; down to 78 characters they fit."""
    widths = dict(_WIDTHS)
    excess = sum(widths.values()) + _GAP * (len(widths) - 1) - width
    for heading, least in _SHRINK:
        less = max(0, min(excess, widths[heading] - least))
        widths[heading] -= less
        excess -= less
    return widths


def lines(rows: Sequence[Row]) -> list[str]:
    """The table as aligned lines; columns grow beyond their usual width only if they must."""
    table = [HEADINGS, *(cells(row) for row in rows)]
    widths = [
        max(0 if heading == "notes" else _WIDTHS[heading], *(len(line[column]) for line in table))
        for column, heading in enumerate(HEADINGS)
    ]
    return [(" " * _GAP).join(map(_padded, HEADINGS, line, widths)).rstrip() for line in table]


def _padded(heading: str, text: str, width: int) -> str:
    return text.rjust(width) if heading in _RIGHT else text.ljust(width)


class View(Protocol):
    """Shows the newest rows, of which there may be none yet."""

    def show(self, rows: Sequence[Row], elapsed: float) -> None: ...

    def close(self) -> None: ...


class Appended:
    """Prints a table each `APPENDED_EVERY` seconds."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._next = 0.0
        self._said_waiting = False

    def show(self, rows: Sequence[Row], elapsed: float) -> None:
        if not rows:
            if not self._said_waiting:
                print(WAITING, file=self._out, flush=True)
                self._said_waiting = True
            return
        if elapsed >= self._next:
            self._next = elapsed + APPENDED_EVERY - 0.5
            print(f"\nafter {elapsed:.0f} s", *lines(rows), sep="\n", file=self._out, flush=True)

    def close(self) -> None:
        """Nothing is held."""


class Live:
    """Draws over the table before. Needs `rich`, else raises ImportError."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive
        from rich.text import Text

        self._text = Text
        self._stack = ExitStack()
        console = Console(highlight=False)
        console.print()
        self._live = self._stack.enter_context(
            RichLive(console=console, auto_refresh=False, redirect_stderr=False)
        )

    def show(self, rows: Sequence[Row], elapsed: float) -> None:
        self._live.update(self._table(rows) if rows else self._text(WAITING, style="dim"), refresh=True)

    def _table(self, rows: Sequence[Row]) -> Table:
        from rich import box
        from rich.table import Table

        table = Table(
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, _GAP - 1, 0, 0),
            header_style="bold",
        )
        for heading, width in fitted(self._live.console.width).items():
            table.add_column(
                heading,
                justify="right" if heading in _RIGHT else "left",
                no_wrap=True,
                overflow="ellipsis",
                width=width,
            )
        for row in rows:
            texts = [
                self._text(text, style=_style(row, head))
                for head, text in zip(HEADINGS, cells(row), strict=True)
            ]
            table.add_row(*texts)
        return table

    def close(self) -> None:
        self._stack.close()


def _style(row: Row, heading: str) -> str:
    if heading == "notes":
        return "red" if row.xids or not row.up else "yellow"
    value = {"busy": row.busy, "SM active": row.sm_active}.get(heading)
    if value is None:
        return "yellow" if heading == "power" and "power_cap" in row.throttled else ""
    return "dim" if value < 0.01 else "cyan" if value < 0.5 else "green"


def choose(environ: Mapping[str, str], out: TextIO | None = None, live: Callable[[], View] = Live) -> View:
    """The view that suits where the output goes."""
    out = sys.stdout if out is None else out
    if not out.isatty() or environ.get("TERM", "dumb") == "dumb":
        return Appended(out)
    try:
        return live()
    except ImportError:
        print("for a table that stays in place: pip install 'gpuglass[demo]'", file=out)
        return Appended(out)
