"""`gpuglass config`: checks a configuration file, or prints the configuration that would be in force."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import msgspec
import yaml

from gpuglass import config
from gpuglass.command import Command


def _configure(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    check = actions.add_parser(
        "check", help="check a file and the GPUGLASS_* variables; exit code 2 if refused"
    )
    check.add_argument("file", type=Path)
    show = actions.add_parser(
        "show", help="print all keys with their values, and the variable that sets each"
    )
    show.add_argument("file", type=Path, nargs="?")


def _run(arguments: Namespace) -> int:
    loaded = config.load(arguments.file)
    if arguments.action == "check":
        print(f"{arguments.file}: ok")
    else:
        print(show(loaded), end="")
    return 0


def show(loaded: config.Config) -> str:
    """The configuration as YAML that can be used as a file, with the variable beside each key."""
    lines: list[str] = []
    open_sections: list[str] = []
    for key, _, _ in config.leaves():
        *sections, leaf = key.split(".")
        common = 0
        while common < min(len(sections), len(open_sections)) and sections[common] == open_sections[common]:
            common += 1
        for depth, section in enumerate(sections[common:], common):
            lines.append(f"{'  ' * depth}{section}:")
        open_sections = sections
        setting = f"{'  ' * len(sections)}{leaf}: {_yaml(config.value_of(loaded, key))}"
        lines.append(f"{setting:<58} # {config.variable(key)}")
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, config.Seconds):
        return f"{float(value)!r}".removesuffix(".0") + "s"
    if isinstance(value, tuple):
        return "[" + ", ".join(_yaml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_yaml(key)}: {_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, msgspec.Struct):
        return _yaml(msgspec.structs.asdict(value))
    if value is None:
        return "null"
    if isinstance(value, float):
        return str(yaml.safe_dump(value)).partition("\n")[0]  # 5e-05 without a point would be a text in YAML
    if isinstance(value, str):
        # Anything but plain ASCII is escaped, so that the text can be printed on any terminal.
        return str(yaml.safe_dump(str(value), default_style='"', width=float("inf"))).strip()
    return f"{value}"


COMMAND = Command(
    "check or print the configuration",
    _configure,
    _run,
    "Check a configuration file, or print what is in force from defaults, file and GPUGLASS_* variables.",
    "  gpuglass config check agent.yaml\n  GPUGLASS_GPU_INTERVAL=500ms gpuglass config show\n"
    "  gpuglass config show > agent.yaml",
)
