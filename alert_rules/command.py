"""`gpuglass rules`: writes the rule files, checks them, prints what a scrape has to keep for them."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from gpuglass.command import Command
from gpuglass.errors import UserError


def _configure(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = actions.add_parser("build", help="write the rule files")
    build.add_argument("--out", metavar="DIR", type=Path, default=Path(), help="folder (default: here)")
    _common(build)
    build.add_argument(
        "--format",
        choices=("prometheus", "prometheusrule"),
        default="prometheus",
        help="rule files, or objects for the Prometheus operator",
    )
    check = actions.add_parser("check", help="exit code 1 if the committed files or the rules are at fault")
    check.add_argument("--config", metavar="FILE", type=Path, help="check rules with these settings, too")
    form = check.add_mutually_exclusive_group()
    form.add_argument("--write", action="store_true", help="write the committed files anew instead")
    form.add_argument("--check", action="store_true", help="as without it")
    keep = actions.add_parser("keep-list", help="print relabelling that keeps only the series that are read")
    keep.add_argument("--config", metavar="FILE", type=Path, help="settings of the rules, as for build")
    settings = actions.add_parser("settings", help="list all settings with unit, default and reason")
    settings.add_argument("--config", metavar="FILE", type=Path, help="show the values of this file")


def _common(parser: ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", type=Path, help="YAML with settings that differ")
    parser.add_argument(
        "--histograms",
        choices=("classic", "native"),
        default="classic",
        help="native: Prometheus 3 with convert_classic_histograms_to_nhcb, or native histograms scraped",
    )
    parser.add_argument(
        "--source",
        choices=("gpuglass", "dcgm", "auto"),
        default="auto",
        help="gpuglass: only this pack's exporters; dcgm: only dcgm-exporter and the engines' own metrics; "
        "auto: the pack's where they are (default)",
    )


def _run(arguments: Namespace) -> int:
    actions = {"build": _build, "check": _check, "keep-list": _keep_list, "settings": _settings}
    return actions[arguments.action](arguments)


def _build(arguments: Namespace) -> int:
    from alert_rules import files
    from recording_rules import settings
    from recording_rules.groups import Options

    loaded = settings.load(arguments.config)
    options = Options(histograms=arguments.histograms, source=arguments.source)
    written = files.rule_files(loaded, options, arguments.format)
    for name, text in written.items():
        path = arguments.out / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out {arguments.out}: cannot write {path}: {error.strerror}") from None
        print(path)
    return 0


def _check(arguments: Namespace) -> int:
    from alert_rules import files
    from recording_rules import settings

    if arguments.write:
        for path in files.write_committed():
            print(path)
        return 0
    found = [*files.faults(settings.load(arguments.config)), *files.stale()]
    for line in found:
        print(f"gpuglass: {line}", file=sys.stderr)
    return int(bool(found))


def _keep_list(arguments: Namespace) -> int:
    from alert_rules.keep_list import keep_list

    print(keep_list(), end="")
    return 0


def _settings(arguments: Namespace) -> int:
    from recording_rules.settings import load, table

    for row in table(load(arguments.config)):
        print(f"{row.key}: {row.value}" + (f"  # {row.why}" if row.why else ""))
    return 0


COMMAND = Command(
    "write and check recording and alerting rules",
    _configure,
    _run,
    "Write the recording and alerting rules for Prometheus or its operator, check them, and print the scrape "
    "relabelling that keeps exactly what rules, dashboards and detectors read.",
    "  gpuglass rules build --out /etc/prometheus/rules\n"
    "  gpuglass rules build --config rules.yaml --format prometheusrule --histograms native\n"
    "  gpuglass rules settings\n  gpuglass rules check --config rules.yaml\n"
    "  gpuglass rules keep-list > keep.yaml",
)
