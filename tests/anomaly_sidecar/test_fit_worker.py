"""The fits' worker end to end: a real Prometheus, the real command, a worker that is stopped and killed, and
days that pass in seconds."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.anomaly_sidecar.process import WAIT, Running, running_sidecar
from tests.anomaly_sidecar.shifted import shifted
from tests.support import history
from tests.support.ports import free_port
from tests.support.prometheus import running_prometheus

SERIES = 6
HOUR = 3600.0
JOBS = 'gpuglass_anomaly_worker_jobs_total{result="ok"}'
TAKEN = 'gpuglass_anomaly_fits_total{query="load",result="taken"}'


def worker_of(sidecar: Running) -> int:
    """The process number of its worker, as soon as there is one."""
    deadline = time.monotonic() + WAIT
    while True:
        assert time.monotonic() < deadline, "no worker"
        for children in Path(f"/proc/{sidecar.process.pid}/task").glob("*/children"):
            for child in children.read_text().split():
                if b"anomaly_sidecar.workers" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return int(child)
        time.sleep(0.02)


@pytest.mark.needs("debian-prometheus")
@pytest.mark.timeout(900)
def test_forecasts_go_on_while_the_worker_is_stopped_and_killed_and_are_fitted_daily(
    debian_prometheus: Path, debian_promtool: Path, tmp_path: Path
) -> None:
    now = time.time() // 300 * 300
    start = now - 32 * HOUR
    times = np.arange(start - 55 * HOUR, now, 300.0)
    labels = [{"service": f"s{number}"} for number in range(SERIES)]
    values = history.daily(SERIES, times, seed=5, noise=0.05)
    history.write(tmp_path, debian_promtool, "load", labels, times, values)
    port, config = free_port(), tmp_path / "anomaly.yaml"
    scrape = {
        "job_name": "anomaly",
        "honor_labels": True,
        "scrape_interval": "1s",
        "static_configs": [{"targets": [f"127.0.0.1:{port}"]}],
    }
    with (
        running_prometheus(debian_prometheus, [scrape], tmp_path, flags=(history.RETENTION,)) as server,
        shifted(server.url, start) as prometheus,
    ):
        document = {
            "server": {"listen": f"127.0.0.1:{port}"},
            "prometheus": {"url": prometheus.url, "timeout": "30s"},
            "detectors": [
                {
                    "name": "load",
                    "kind": "forecast",
                    "inputs": {"value": "load"},
                    "interval": "5m",
                    "offset": "0s",
                    "history": "54h",
                    "settings": {"decomposition": True},
                }
            ],
        }
        config.write_text(yaml.safe_dump(document))
        with running_sidecar(config, port) as sidecar:

            def pass_hours(hours: float) -> None:
                prometheus.now += hours * HOUR
                timeout = float(document["prometheus"]["timeout"].removesuffix("s"))  # type: ignore[index]
                document["prometheus"]["timeout"] = f"{timeout + 1:g}s"  # type: ignore[index]
                config.write_text(yaml.safe_dump(document))
                sidecar.process.send_signal(signal.SIGHUP)  # another server: its time is asked for
                last = prometheus.now
                sidecar.wait('gpuglass_anomaly_last_evaluation_timestamp_seconds{query="load"}', last)

            worker = worker_of(sidecar)
            os.kill(worker, signal.SIGSTOP)
            found = server.wait_for('gpuglass_forecast{horizon="30m", quantile="0.9"}', WAIT)
            assert sorted(sample.labels["service"] for sample in found) == [f"s{n}" for n in range(SERIES)]
            sidecar.wait("gpuglass_anomaly_worker_jobs_pending", SERIES)
            assert sidecar.samples(JOBS) == {JOBS: 0}
            os.kill(worker, signal.SIGKILL)
            assert "attempt 1 of 3" in sidecar.said("the worker died")
            sidecar.wait("gpuglass_anomaly_worker_restarts_total", 1)
            assert worker_of(sidecar) != worker
            sidecar.wait(JOBS, SERIES)
            assert sidecar.samples(TAKEN) == {TAKEN: 0}, "not before an hour has passed"
            assert not sidecar.samples("gpuglass_decomposition{")
            pass_hours(2)
            sidecar.wait(TAKEN, SERIES)
            parts = server.wait_for('gpuglass_decomposition{part="trend"}', WAIT)
            assert len(parts) == SERIES
            level = {labels[n]["service"]: float(values[-288:, n].mean()) for n in range(SERIES)}
            for sample in parts:
                assert sample.value == pytest.approx(level[sample.labels["service"]], rel=0.25)
            strong = server.wait_for('gpuglass_decomposition_strength_ratio{part="seasonal"} > 0.7', WAIT)
            assert len(strong) == SERIES
            pass_hours(24)
            sidecar.wait_until(JOBS, lambda found: found.get(JOBS, 0) >= 2 * SERIES)
            pass_hours(2)
            sidecar.wait_until(TAKEN, lambda found: found.get(TAKEN, 0) >= 2 * SERIES)
            assert sidecar.samples('gpuglass_anomaly_worker_jobs_total{result="failed"}').popitem()[1] == 0
        assert sidecar.process.returncode == 0
        assert not Path(f"/proc/{worker}").exists()
