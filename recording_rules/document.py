"""Writes the generated tables into README files: between the marks of a table, everything else stays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from gpuglass.errors import UserError
from recording_rules import records
from recording_rules.settings import Settings, table


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    titles = list(head)
    lines = [titles, ["---"] * len(titles), *(list(row) for row in rows)]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |\n"
        for line in lines
    )


def record_table() -> str:
    """All records."""
    rows = (
        (f"`{r.name}`", ", ".join(f"`{label}`" for label in r.labels), r.unit, r.help)
        for r in records.BY_NAME.values()
    )
    return markdown(("record", "labels", "unit", "what it says"), rows)


def settings_table() -> str:
    """All settings with their defaults."""
    rows = ((f"`{r.key}`", f"`{r.value}`" if r.value else "", r.unit, r.why) for r in table(Settings()))
    return markdown(("setting", "default", "unit", "why"), rows)


TABLES: Mapping[str, Callable[[], str]] = {"records": record_table, "settings": settings_table}


def updated(path: Path, tables: Mapping[str, Callable[[], str]]) -> str:
    """The file's text with its tables written anew. Raises `UserError` where a mark is missing."""
    text = path.read_text(encoding="utf-8")
    for name, write in tables.items():
        begin, end = f"<!-- {name}: written by `gpuglass rules check --write` -->", f"<!-- end of {name} -->"
        head, found, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not found or not closed:
            raise UserError(f"{path}: has no lines {begin!r} and {end!r} to write between")
        text = f"{head}{begin}\n\n{write()}\n{end}{tail}"
    return text
