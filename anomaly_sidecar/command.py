"""`gpuglass anomaly`: runs the sidecar, checks its configuration, shows what it would have found and why."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from gpuglass.command import Command
from gpuglass.config import LogConfig, Seconds
from gpuglass.errors import ConfigError, UserError

if TYPE_CHECKING:
    from anomaly_sidecar.config import Config
    from anomaly_sidecar.interface import Query
    from anomaly_sidecar.replay import Replayed
    from anomaly_sidecar.sidecar import Made, Sidecar
    from anomaly_sidecar.workers import InlineWorkers, WorkerPool

STOP_SECONDS = 5.0


def _configure(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    run = actions.add_parser(
        "run", help="read Prometheus and serve scores until SIGTERM; SIGHUP loads the configuration again"
    )
    run.add_argument(
        "--config", metavar="FILE", type=Path, help="configuration (default: GPUGLASS_ANOMALY_CONFIG)"
    )
    run.add_argument("--prometheus", metavar="URL", help="overrides prometheus.url")
    run.add_argument("--listen", metavar="ADDRESS", help="overrides server.listen")
    run.add_argument("--preset", metavar="NAME", action="append", default=[], help="adds a preset")

    check = actions.add_parser("check", help="check a configuration; exit code 2 if it is refused")
    check.add_argument("file", type=Path)

    actions.add_parser("presets", help="list the ready queries")
    actions.add_parser("kinds", help="list the kinds of detectors and forecasts, with inputs and settings")

    backtest = actions.add_parser("backtest", help="draw what would have fired over a stretch of history")
    _source(backtest)
    backtest.add_argument(
        "--query", metavar="EXPR", help="PromQL, or the name of a query of --config", required=True
    )
    backtest.add_argument("--start", required=True, help="RFC 3339, Unix seconds, or 2d (ago)")
    backtest.add_argument("--end", default="0s", help="as --start (default: now)")
    backtest.add_argument("--for", dest="hold", default="5m", help="as in the alert rule (default: 5m)")
    backtest.add_argument("--threshold", type=float, default=1.0)
    backtest.add_argument("--json", action="store_true", help="print one JSON object")

    explain = actions.add_parser("explain", help="say which feature makes a score, and why")
    _source(explain)
    explain.add_argument("series", help="a selector such as 'up{job=\"x\"}', or any PromQL expression")
    explain.add_argument("--at", default="0s", help="RFC 3339, Unix seconds, or 2h (ago) (default: now)")


def _source(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="FILE", type=Path, help="configuration: server, floors, directions"
    )
    parser.add_argument("--prometheus", metavar="URL", help="overrides prometheus.url")
    parser.add_argument("--step", default="", help="between two evaluations (default: the query's, or 1m)")
    parser.add_argument("--learn", default="7d", help="history before --start to learn from (default: 7d)")
    parser.add_argument("--direction", choices=["both", "above", "below"])
    parser.add_argument("--min-deviation", type=float, help="smaller deviations are no anomaly")


def _run(arguments: Namespace) -> int:
    os.environ.update(
        {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    )
    try:
        import numpy  # noqa: F401
    except ImportError:
        raise UserError("gpuglass anomaly needs numpy: pip install 'gpuglass[anomaly]'") from None
    actions: dict[str, Callable[[Namespace], int]] = {
        "run": _serve,
        "check": _check,
        "presets": _presets,
        "kinds": _kinds,
        "backtest": _backtest,
        "explain": _explain,
    }
    return actions[arguments.action](arguments)


def _load(arguments: Namespace, file: Path | None) -> Config:
    from anomaly_sidecar import config
    from anomaly_sidecar.detectors import KINDS
    from anomaly_sidecar.presets import PRESETS
    from gpuglass.config import read_yaml_mapping

    document = read_yaml_mapping(file) if file is not None else {}
    for section, key, value in (
        ("prometheus", "url", getattr(arguments, "prometheus", None)),
        ("server", "listen", getattr(arguments, "listen", None)),
    ):
        if value:
            document[section] = {**(document.get(section) or {}), key: value}
    if extra := getattr(arguments, "preset", []):
        document["presets"] = list(dict.fromkeys([*(document.get("presets") or []), *extra]))
    return config.parse(document, str(file) if file else "configuration", KINDS, PRESETS)


def make_units(loaded: Config, workers: WorkerPool | InlineWorkers) -> list[Made]:
    """What to run for a configuration: a specification and a maker of analyzers for each entry."""
    from functools import partial

    from anomaly_sidecar import config
    from anomaly_sidecar.detectors import KINDS
    from anomaly_sidecar.replay import spec_of
    from anomaly_sidecar.scores import Scores
    from anomaly_sidecar.sidecar import Made
    from anomaly_sidecar.unit import Spec

    made: list[Made] = []
    for entry in loaded.queries:
        query = entry.query()
        made.append(Made(spec_of(query, loaded.state.ttl), partial(Scores, query), entry))
    for detector in loaded.detectors:
        kind = KINDS[detector.kind]
        settings = config.settings_of(detector, kind)
        roles = {role.name: detector.inputs[role.name] for role in kind.roles if role.name in detector.inputs}
        spec = Spec(
            name=detector.name,
            roles=roles,
            interval=detector.interval,
            offset=detector.offset,
            history=kind.history if detector.history is None else detector.history,
            history_step=max(kind.history_step, detector.interval),
            limit=detector.limit,
            ttl=loaded.state.ttl,
            by=detector.by,
            keep_name=False,
            identity=json.dumps([detector.kind, repr(settings)]),
        )
        made.append(Made(spec, partial(kind.create, detector.name, settings, workers), detector))
    return made


# run


class SystemClock:
    """The machine's clocks; `stop` ends the waiting."""

    def __init__(self) -> None:
        self._end = Event()

    def time(self) -> float:
        """See `Clock`."""
        return time.time()

    def monotonic(self) -> float:
        """See `Clock`."""
        return time.monotonic()

    def wait(self, seconds: float) -> bool:
        """See `Clock`."""
        return self._end.wait(seconds)

    def stop(self) -> None:
        """The sidecar is to end."""
        self._end.set()


def _serve(arguments: Namespace) -> int:
    import threading

    from anomaly_sidecar.sidecar import Sidecar
    from anomaly_sidecar.workers import InlineWorkers, WorkerPool
    from gpuglass import catalog
    from gpuglass.family import Owner
    from gpuglass.logs import LOG, configure
    from gpuglass.serving import make_server, start_server
    from gpuglass.store import Store

    file = arguments.config or (
        Path(os.environ["GPUGLASS_ANOMALY_CONFIG"]) if os.environ.get("GPUGLASS_ANOMALY_CONFIG") else None
    )
    loaded = _load_to_run(arguments, file)
    configure(loaded.log)
    # Blocked before any thread starts, and waited for below: a handler could run inside a lock that it needs.
    signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    store, clock = Store(catalog.owned_by(Owner.ANOMALY)), SystemClock()
    workers = WorkerPool(loaded.workers) if loaded.workers else InlineWorkers()
    sidecar = Sidecar(loaded, make_units(loaded, workers), workers, store, clock)
    metrics = make_server(loaded.server, store, readiness=sidecar.not_ready, title="GPUGlass anomaly sidecar")
    start_server(metrics)
    sidecar.open()
    loop = threading.Thread(target=_loop, args=(sidecar.run, clock), name="sidecar", daemon=True)
    loop.start()
    LOG.info("serving http://%s/metrics; reading %s", metrics.address, loaded.prometheus.url)
    while (received := signal.sigwait(signals)) == signal.SIGHUP:
        _reload(sidecar, workers, arguments, file)
    died = received == signal.SIGTERM and not loop.is_alive()
    clock.stop()
    loop.join(STOP_SECONDS + loaded.prometheus.timeout)
    metrics.stop(STOP_SECONDS)
    return int(died)


def _load_to_run(arguments: Namespace, file: Path | None) -> Config:
    loaded = _load(arguments, file)
    if not loaded.queries and not loaded.detectors:
        raise ConfigError("nothing to watch: name queries or presets in --config, or add --preset gpu")
    return loaded


def _reload(
    sidecar: Sidecar, workers: WorkerPool | InlineWorkers, arguments: Namespace, file: Path | None
) -> None:
    """Take the configuration as it is now on disk; keep the old one and say so if it is refused."""
    from anomaly_sidecar.config import check_reload
    from gpuglass.logs import LOG, configure

    try:
        loaded = _load_to_run(arguments, file)
        changed = check_reload(sidecar.latest, loaded)
    except UserError as error:
        sidecar.reloads.refused()
        LOG.error("configuration not taken, the old one stays: %s", error)
        return
    configure(loaded.log)
    sidecar.reload(loaded, make_units(loaded, workers))
    sidecar.reloads.taken()
    LOG.info("configuration taken; changed: %s", ", ".join(changed) or "nothing")


def _loop(run: Callable[[], None], clock: SystemClock) -> None:
    """The sidecar's thread. What ends it unexpectedly ends the process: an orchestrator starts it again."""
    from gpuglass.logs import LOG

    try:
        run()
    except Exception:
        LOG.exception("the sidecar failed")
        clock.stop()
        os.kill(os.getpid(), signal.SIGTERM)


# check, presets, kinds


def _check(arguments: Namespace) -> int:
    loaded = _load(arguments, arguments.file)
    print(f"{arguments.file}: ok, {len(loaded.queries)} queries, {len(loaded.detectors)} detectors")
    return 0


def _presets(arguments: Namespace) -> int:
    from anomaly_sidecar.presets import PRESETS

    for name, sections in PRESETS.items():
        print(name)
        for part in sections.values():
            for entry in part:
                text = entry.get("expr") or "; ".join(entry["inputs"].values())
                print(f"  {entry['name']:<20} {text}")
    return 0


def _kinds(arguments: Namespace) -> int:
    import msgspec

    from anomaly_sidecar.detectors import KINDS

    for kind in KINDS.values():
        print(f"{kind.name}: {kind.summary}")
        for role in kind.roles:
            print(f"  inputs.{role.name}{'' if role.required else ' (optional)'}: {role.help}")
        for info in msgspec.structs.fields(kind.settings):
            print(f"  settings.{info.name}: {info.default!r}")
    return 0


# backtest, explain


def _replayed(arguments: Namespace, expression: str, start: float, end: float) -> tuple[Query, Replayed]:
    import msgspec

    from anomaly_sidecar.config import QueryConfig
    from anomaly_sidecar.interface import Direction
    from anomaly_sidecar.reader import Reader, ReadError
    from anomaly_sidecar.replay import replay
    from gpuglass.logs import configure

    configure(LogConfig(level="error"))
    loaded = _load(arguments, arguments.config)
    entry = next((query for query in loaded.queries if expression in (query.name, query.expr)), None)
    if entry is None:
        try:
            entry = QueryConfig(name="backtest", expr=expression)
        except ValueError as error:
            raise ConfigError(f"--query: {error}") from None
    if arguments.direction:
        entry = msgspec.structs.replace(entry, direction=Direction(arguments.direction))
    if arguments.min_deviation is not None:
        entry = msgspec.structs.replace(entry, min_deviation=arguments.min_deviation)
    step = _duration("--step", arguments.step) if arguments.step else float(entry.interval)
    if not 1 <= step <= 3600:
        raise ConfigError(f"--step: must be between 1s and 1h, is {arguments.step}")
    learn = _duration("--learn", arguments.learn)
    if not start - learn < start < end or (end - start + learn) / step > 200_000:
        raise ConfigError("--start, --end, --learn: must be a stretch in the past of at most 200,000 steps")
    query = entry.query()
    reader = Reader(loaded.prometheus)
    try:
        found = replay(reader, query, start - learn, start, end, step)
    except ReadError as error:
        raise UserError(f"{loaded.prometheus.url}: {error}") from None
    if not found.labels or not len(found.times):
        raise UserError("no samples there: check the expression and the times")
    return query, found


def _duration(option: str, text: str) -> float:
    try:
        return float(Seconds.parse(text))
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None


def _time(option: str, text: str) -> float:
    """A time: RFC 3339, Unix seconds, or a duration ago."""
    try:
        return time.time() - float(Seconds.parse(text))
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        pass
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(
            f"{option}: must be like 2026-01-31T12:00:00Z, 1769860800 or 2d, is {text!r}"
        ) from None
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()


def _backtest(arguments: Namespace) -> int:
    from anomaly_sidecar import draw
    from anomaly_sidecar.replay import alerts

    start, end = _time("--start", arguments.start), _time("--end", arguments.end)
    query, found = _replayed(arguments, arguments.query, start, end)
    raised = list(alerts(found, arguments.threshold, _duration("--for", arguments.hold)))
    if arguments.json:
        print(json.dumps(draw.as_json(found, raised), indent=2))
    else:
        print(draw.backtest(query, found, raised, draw.Look.of(sys.stdout)), end="")
    return 0


def _explain(arguments: Namespace) -> int:
    from anomaly_sidecar import draw

    at = _time("--at", arguments.at)
    query, found = _replayed(arguments, arguments.series, at - 86400.0, at)
    print(draw.explain(query, found, draw.Look.of(sys.stdout)), end="")
    return 0


COMMAND = Command(
    "score the series in Prometheus for anomalies",
    _configure,
    _run,
    "Learn the series in a Prometheus-compatible server and serve scores (above 1: anomalous), forecasts and "
    "verdicts for it to scrape.",
    "  gpuglass anomaly run --prometheus http://prometheus:9090 --preset gpu --preset vllm\n"
    "  gpuglass anomaly run --config anomaly.yaml\n"
    "  gpuglass anomaly backtest --query 'sum(rate(vllm:generation_tokens_total[5m]))' --start 2d\n"
    "  gpuglass anomaly explain 'max by (gpu_uuid) (DCGM_FI_DEV_GPU_TEMP)' --at 1h",
)
