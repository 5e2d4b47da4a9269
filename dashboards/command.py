"""`gpuglass dashboards`: writes the dashboards, checks the committed ones, draws previews from live data."""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path

from gpuglass.command import Command
from gpuglass.errors import ConfigError, UserError

_EXAMPLES = """\
  gpuglass dashboards build --out DIR                           one JSON file per dashboard
  gpuglass dashboards build --out DIR --traces jaeger           traces are in Jaeger, not in Tempo
  gpuglass dashboards build --out DIR --format configmap        for the sidecar of Grafana's charts
  gpuglass dashboards check                                     what is wrong with the finished ones
  gpuglass dashboards preview --prometheus http://127.0.0.1:9090 --out DIR --only gpuglass-cost
"""


def _configure(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="build|check|preview", required=True)
    build = actions.add_parser("build", help="write the dashboards")
    build.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write to; it is made"
    )
    build.add_argument(
        "--datasource-uid", default="", metavar="UID", help="Prometheus data source chosen at first"
    )
    build.add_argument("--format", choices=["json", "configmap"], default="json", help="default: json")
    build.add_argument("--namespace", default="", help="namespace of the ConfigMaps")
    check = actions.add_parser("check", help="exit with 1 if a dashboard is out of date or wrong")
    check.add_argument(
        "--dir", type=Path, metavar="DIR", help="folder of the JSON files; default: the installed ones"
    )
    form = check.add_mutually_exclusive_group()
    form.add_argument("--check", action="store_true", help="change nothing; the default")
    form.add_argument("--write", action="store_true", help="write what is out of date first")
    for parsed in (build, check):
        parsed.add_argument("--traces", choices=["tempo", "jaeger"], default="tempo", help="default: tempo")
        parsed.add_argument(
            "--histograms",
            choices=["classic", "native"],
            default="classic",
            help="how Prometheus stores histograms; default: classic",
        )
    preview = actions.add_parser(
        "preview",
        help="draw the dashboards from a Prometheus",
        description=(
            "Draw each dashboard from live data into a PNG. It is a sketch of what Grafana shows, by "
            "matplotlib: places, queries and values are true, looks are not."
        ),
    )
    preview.add_argument("--prometheus", required=True, metavar="URL")
    preview.add_argument("--out", type=Path, required=True, metavar="DIR")
    preview.add_argument("--only", action="append", default=[], metavar="UID", help="only these dashboards")
    preview.add_argument("--at", type=float, metavar="UNIX_TIME", help="end of the time range; default: now")
    preview.add_argument(
        "--var",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="choice of a variable, a pattern; default: all",
    )


def _run(arguments: Namespace) -> int:
    try:
        import grafanalib  # noqa: F401
    except ImportError:
        raise UserError("grafanalib is not installed: pip install 'gpuglass[dashboards]'") from None
    return {"build": _build, "check": _check, "preview": _preview}[arguments.action](arguments)


def _build(arguments: Namespace) -> int:
    from dashboards.board import Options
    from dashboards.build import configmaps, files

    if arguments.namespace and arguments.format != "configmap":
        raise ConfigError(
            f"--namespace {arguments.namespace}: JSON files have no namespace; add --format configmap"
        )
    options = Options(arguments.traces, arguments.datasource_uid, arguments.histograms)
    made = configmaps(options, arguments.namespace) if arguments.format == "configmap" else files(options)
    _write(arguments.out, "--out", made)
    print(f"{len(made)} dashboards written to {arguments.out}", file=sys.stderr)
    return 0


def _write(folder: Path, setting: str, made: Mapping[str, str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in made.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{setting} {folder}: cannot write there: {error.strerror}") from None


def _check(arguments: Namespace) -> int:
    from dashboards.board import Options
    from dashboards.build import files
    from dashboards.check import check
    from dashboards.read import GENERATED

    options, folder = Options(arguments.traces, "", arguments.histograms), arguments.dir or GENERATED
    if arguments.write:
        _write(folder, "--dir", files(options))
    faults = check(folder, options)
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


def _preview(arguments: Namespace) -> int:
    from dashboards.board import Options, as_json
    from dashboards.build import boards
    from dashboards.evaluate import Client, Range, defaults_of, seconds
    from dashboards.preview import draw

    chosen = {}
    for setting in arguments.var:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise ConfigError(f"--var {setting}: write it as NAME=VALUE, as in --var model_name=deepseek.*")
        chosen[name] = value
    known = {board.uid: board for board in boards(Options())}
    for uid in arguments.only:
        if uid not in known:
            raise ConfigError(f"--only {uid}: no such dashboard; there are {', '.join(known)}")
    end = arguments.at or time.time()
    client = Client(arguments.prometheus.rstrip("/"))
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {arguments.out}: cannot make it: {error.strerror}") from None
    for uid in arguments.only or known:
        data = as_json(known[uid], Options())
        unknown = chosen.keys() - {entry["name"] for entry in data["templating"]["list"]}
        if unknown:
            raise ConfigError(f"--var {sorted(unknown)[0]}: {uid} has no such variable")
        span = Range(end - seconds(known[uid].start.removeprefix("now-")), end)
        path = arguments.out / f"{uid}.png"
        draw(data, client, span, defaults_of(data) | chosen, path)
        print(f"{path}", file=sys.stderr)
    return 0


COMMAND = Command(
    "write, check and preview the Grafana dashboards",
    _configure,
    _run,
    "Write the Grafana dashboards of the pack, check the finished ones, or draw previews of them from live"
    " data. The finished ones lie in dashboards/generated; building anew is needed for another kind of trace"
    " store or histogram.",
    _EXAMPLES,
)
