"""The command against real parts: Prometheus with a history, which scrapes what the sidecar says of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml

from anomaly_sidecar.presets import PRESETS
from tests.anomaly_sidecar.process import running_sidecar
from tests.support import history
from tests.support.ports import free_port
from tests.support.prometheus import Prometheus, promtool_check_metrics, running_prometheus

pytestmark = pytest.mark.timeout(300)
"""Seconds: they take a tenth of it, where nothing else runs."""

NAME = "test_load"
NOON = 1_764_158_400.0
LABELS = [
    {"job": "engines", "instance": f"10.0.0.{number}:8000", "gpu_uuid": f"GPU-{number}"}
    for number in range(4)
]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("GPUGLASS_")}


def gpuglass(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gpuglass", "anomaly", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=250)


@contextmanager
def sidecar(config: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "gpuglass", "anomaly", "run", "--config", str(config)]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks with three days of four series; the last has been far too high for ten minutes."""
    from gpuglass.demo import distribution

    folder = tmp_path_factory.mktemp("history")
    now = time.time()
    times = np.arange((now - 3 * 86_400) // 60 * 60, now, 60.0)
    # The same hours whenever it runs, and no shape of a week, which three days do not foretell: only the last
    # minutes are to be unusual.
    values = history.daily(len(LABELS), times - times[-1] + NOON, seed=3, noise=0.03, week=0)
    values[times > now - 600, 3] *= 3  # after half an hour it is the new normal
    history.write(folder, distribution.find("promtool"), NAME, LABELS, times, values)
    return folder


@contextmanager
def prometheus_on(stored: Path, program: Path, folder: Path, port: int) -> Iterator[Prometheus]:
    subprocess.run(["cp", "-r", str(stored / "data"), str(folder / "data")], check=True)
    scrape = {
        "job_name": "anomaly",
        "honor_labels": True,
        "static_configs": [{"targets": [f"127.0.0.1:{port}"]}],
    }
    # The last sample counts for an hour: blocks cannot reach into the time of what is scraped.
    flags = (history.RETENTION, "--query.lookback-delta=1h")
    with running_prometheus(program, [scrape], folder, flags=flags) as server:
        yield server


@pytest.mark.needs("debian-prometheus")
def test_prometheus_gets_scores_with_the_labels_of_the_series(
    stored: Path, prometheus: Path, tmp_path: Path
) -> None:
    port = free_port()
    with prometheus_on(stored, prometheus, tmp_path, port) as server:
        config = tmp_path / "anomaly.yaml"
        document = {
            "server": {"listen": f"127.0.0.1:{port}"},
            "prometheus": {"url": server.url},
            "state": {"folder": str(tmp_path / "state"), "interval": "1s"},
            "queries": [
                {
                    "name": "load",
                    "expr": NAME,
                    "history": "3d",
                    "interval": "10s",
                    "offset": "0s",
                    "bands": True,
                }
            ],
        }
        config.write_text(yaml.safe_dump(document))
        with sidecar(config):
            server.wait_for("gpuglass_anomaly_score", 200)
            (bad,) = server.wait_for("gpuglass_anomaly_score > 1", 200)
            assert bad.labels["gpu_uuid"] == "GPU-3"
            assert bad.labels["job"] == "engines"
            assert bad.labels["query"] == "load"
            assert bad.labels["metric"] == NAME
            assert len(server.query("gpuglass_anomaly_ready == 1")) == 4
            joined = f"{NAME} > on (gpu_uuid) gpuglass_anomaly_upper"
            assert [sample.labels["gpu_uuid"] for sample in server.query(joined)] == ["GPU-3"]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                assert promtool_check_metrics(answer.read().decode()) == []
        assert (tmp_path / "state/load.state").is_file()
        with sidecar(config) as process:
            assert process.stderr is not None
            said = next(line for line in process.stderr if "restored" in line)
            assert "4 series restored" in said
            process.kill()  # a state is written each second: this may well be in the middle of one
        with sidecar(config) as process:
            assert process.stderr is not None
            assert "4 series restored" in next(line for line in process.stderr if "load: " in line)


@pytest.mark.needs("debian-prometheus")
def test_demand_and_replicas_of_vllm_by_the_preset_alone(
    debian_prometheus: Path, debian_promtool: Path, tmp_path: Path
) -> None:
    """Two servers that run 4 requests each while 3 wait, and give 100 tokens per second."""
    now = time.time()
    times = np.arange((now - 4 * 3600) // 60 * 60, now + 60, 60.0)
    names = [{"model_name": "m", "engine": "0", "job": "vllm", "instance": f"pod-{n}"} for n in range(2)]
    for metric, values in (
        ("vllm:num_requests_running", np.full((len(times), 2), 4.0)),
        ("vllm:num_requests_waiting", np.full((len(times), 2), 3.0)),
        ("vllm:generation_tokens_total", np.repeat((times - times[0])[:, None], 2, axis=1) * 100.0),
    ):
        history.write(tmp_path, debian_promtool, metric, names, times, values)
    port, config = free_port(), tmp_path / "anomaly.yaml"
    flags = (history.RETENTION, "--query.lookback-delta=1h")
    with running_prometheus(debian_prometheus, [], tmp_path, flags=flags) as server:
        document = {
            "server": {"listen": f"127.0.0.1:{port}"},
            "prometheus": {"url": server.url},
            "presets": ["vllm"],
        }
        config.write_text(yaml.safe_dump(document))
        with running_sidecar(config, port) as sidecar:
            labels = 'query="vllm_demand_forecast"', 'horizon="30m"', 'quantile="0.5"', 'model_name="m"'
            sidecar.wait("gpuglass_forecast{", 14.0, *labels)
            for basis in ("now", "all"):  # 14 open requests, 4 on each
                sidecar.wait("gpuglass_replicas_needed{", 4.0, f'basis="{basis}"', 'query="vllm_replicas"')
            (capacity,) = sidecar.samples("gpuglass_replica_capacity{").values()
            assert capacity == pytest.approx(100, rel=0.01)


@pytest.mark.needs("debian-prometheus")
def test_backtest_and_explain_show_what_fired_and_why(
    stored: Path, debian_prometheus: Path, tmp_path: Path
) -> None:
    with prometheus_on(stored, debian_prometheus, tmp_path, free_port()) as server:
        at = ("--prometheus", server.url, "--learn", "2d")
        drawn = gpuglass("backtest", "--query", NAME, "--start", "6h", *at)
        assert drawn.returncode == 0, drawn.stderr
        first = drawn.stdout.split("\n\n")[1]
        assert 'gpu_uuid="GPU-3"' in first
        assert "▲" in first
        assert "\x1b" not in drawn.stdout
        found = json.loads(gpuglass("backtest", "--query", NAME, "--start", "6h", "--json", *at).stdout)
        assert {alert["labels"]["gpu_uuid"] for alert in found["alerts"]} == {"GPU-3"}
        assert found["alerts"][0]["value"] > 1.5 * found["alerts"][0]["expected"]
        why = gpuglass("explain", f'{NAME}{{gpu_uuid="GPU-3"}}', *at)
        assert why.returncode == 0, why.stderr
        assert "seasonal" in why.stdout
        assert "direction both" in why.stdout
        assert "score" in why.stdout
        assert gpuglass("backtest", "--query", f"{NAME}{{", "--start", "6h", *at).returncode == 1
        nothing = gpuglass("backtest", "--query", "no_such_series", "--start", "6h", *at)
        assert (nothing.returncode, "no samples there" in nothing.stderr) == (1, True)
        below = gpuglass("backtest", "--query", NAME, "--start", "6h", "--direction", "below", "--json", *at)
        # Not what rose. Of the others' noise three days tell too little to be sure of.
        assert "GPU-3" not in {alert["labels"]["gpu_uuid"] for alert in json.loads(below.stdout)["alerts"]}


def test_usage_errors_have_code_2_and_name_the_mend(tmp_path: Path) -> None:
    for arguments, said in (
        (("run",), "nothing to watch"),
        (("run", "--preset", "nothing"), "presets: there is no 'nothing'"),
        (("backtest", "--query", "up", "--start", "yesterday"), "--start: must be like 2026"),
        (("backtest", "--query", "x_total", "--start", "1h"), "use rate"),
        (("backtest", "--query", "up", "--start", "1h", "--step", "1ms"), "--step: must be between"),
    ):
        done = gpuglass(*arguments)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
    dead = gpuglass("explain", "up", "--prometheus", "http://127.0.0.1:1")
    assert (dead.returncode, "cannot connect" in dead.stderr) == (1, True)


def test_presets_and_kinds_are_listed() -> None:
    assert "vllm_tokens" in gpuglass("presets").stdout
    assert gpuglass("kinds").returncode == 0
    (file := Path(os.devnull)).exists()
    assert gpuglass("check", str(file)).stdout.startswith(f"{file}: ok")


@pytest.mark.needs("debian-prometheus")
def test_prometheus_understands_every_expression_of_the_presets(prometheus: Path, tmp_path: Path) -> None:
    expressions = [
        expression
        for preset in PRESETS.values()
        for entry in (*preset.get("queries", ()), *preset.get("detectors", ()))
        for expression in ([entry["expr"]] if "expr" in entry else entry["inputs"].values())
    ]
    with running_prometheus(prometheus, [], tmp_path) as server:
        for expression in expressions:
            assert server.query(expression) == []
