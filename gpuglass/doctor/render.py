"""Checks as a screen or as JSON. Pure: the terminal's width, colours and encoding come in as a `Look`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import gpuglass
from gpuglass.doctor.check import GROUPS, Check, Status, summary

MAX_WIDTH = 100
MIN_WIDTH = 50

_SYMBOLS: Mapping[Status, str] = {Status.OK: "✓", Status.INFO: "·", Status.WARN: "!", Status.FAIL: "✗"}
_ASCII_SYMBOLS: Mapping[Status, str] = {
    Status.OK: "+",
    Status.INFO: "-",
    Status.WARN: "!",
    Status.FAIL: "x",
}
_ASCII = str.maketrans({"→": "->", "…": "...", "×": "x", "≥": ">=", "·": "-"})
_COLOURS: Mapping[Status, str] = {
    Status.OK: "32",
    Status.INFO: "2",
    Status.WARN: "33",
    Status.FAIL: "31",
}
_WORDS: Mapping[Status, tuple[str, str]] = {
    Status.OK: ("ok", "ok"),
    Status.INFO: ("note", "notes"),
    Status.WARN: ("warning", "warnings"),
    Status.FAIL: ("problem", "problems"),
}


@dataclass(frozen=True, slots=True)
class Look:
    """What the output can show."""

    width: int = MAX_WIDTH
    colour: bool = False
    unicode: bool = True


def look(columns: int, is_terminal: bool, encoding: str, environ: Mapping[str, str]) -> Look:
    """Colours only on a terminal and without NO_COLOR (no-color.org); symbols only in UTF-8."""
    return Look(
        width=max(MIN_WIDTH, min(MAX_WIDTH, columns)) if is_terminal else MAX_WIDTH,
        colour=is_terminal and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb",
        unicode=encoding.lower().replace("-", "").replace("_", "") == "utf8",
    )


def grouped(checks: Iterable[Check]) -> dict[str, list[Check]]:
    """Checks by group, known groups first; groups without checks are left out."""
    groups: dict[str, list[Check]] = {name: [] for name in GROUPS}
    for check in checks:
        groups.setdefault(check.group, []).append(check)
    return {name: members for name, members in groups.items() if members}


def screen(checks: Sequence[Check], style: Look) -> list[str]:
    """Lines for a person."""
    indent = 6 + max((len(check.title) for check in checks), default=0)
    lines: list[str] = []
    for name, members in grouped(checks).items():
        lines += [_paint(_plain(GROUPS.get(name, name.capitalize()), style), "1", style)]
        for check in members:
            lines += _lines(check, indent, style)
        lines.append("")
    return [*lines, _summary_line(checks, style)]


def _lines(check: Check, indent: int, style: Look) -> list[str]:
    symbol = (_SYMBOLS if style.unicode else _ASCII_SYMBOLS)[check.status]
    first, *more = _wrap(check.finding, style.width - indent, style)
    head = f"{check.title:<{indent - 6}}  {first}"
    lines = [f"  {_paint(symbol, _COLOURS[check.status], style)} {head}"]
    lines += [" " * indent + line for line in more]
    if check.mend:
        arrow = _plain("→ ", style)
        mend = _wrap(check.mend, style.width - indent - len(arrow), style)
        for number, line in enumerate(mend):
            lead = arrow if number == 0 else " " * len(arrow)
            lines.append(" " * indent + _paint(lead + line, "36", style))
    return lines


def _summary_line(checks: Sequence[Check], style: Look) -> str:
    parts = []
    for status, count in ((status, summary(checks)[status.value]) for status in Status):
        if count or status is Status.OK:
            words = f"{count} {_WORDS[status][count != 1]}"
            parts.append(_paint(words, _COLOURS[status], style))
    return ", ".join(parts)


def _wrap(text: str, width: int, style: Look) -> list[str]:
    return textwrap.wrap(_plain(text, style), max(20, width), break_on_hyphens=False) or [""]


def _plain(text: str, style: Look) -> str:
    return text if style.unicode else text.translate(_ASCII).encode("ascii", "replace").decode("ascii")


def _paint(text: str, code: str, style: Look) -> str:
    return f"\033[{code}m{text}\033[0m" if style.colour else text


def as_json(checks: Sequence[Check]) -> str:
    """All checks and the number by status."""
    document = {
        "version": gpuglass.__version__,
        "checks": [
            {
                "id": check.id,
                "group": check.group,
                "title": check.title,
                "status": check.status.value,
                "finding": check.finding,
                "mend": check.mend,
            }
            for members in grouped(checks).values()
            for check in members
        ],
        "summary": summary(checks),
    }
    return json.dumps(document, indent=2)
