"""What `ebpf_gpu.py` works with: processes to trace, the tracer as a command, the agent's receiver with the
verdict. In: what to do. Out: metrics of the tracer, and what the verdict said."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PORT = 19956
BEGAN = time.monotonic()
STRETCH = 12
"""Seconds that one second of a process is told to the verdict as."""
SETTLED = 1.5
"""Seconds after which the tracer has read and published, three times its interval."""


def say(*words: object) -> None:
    """A line of progress, with the time since the script began."""
    print(f"[{time.monotonic() - BEGAN:6.1f} s]", *words, file=sys.stderr, flush=True)


class NotSeenError(Exception):
    """What was waited for did not happen."""


class Child:
    """A process that does what it is told, line by line."""

    def __init__(self, device: str, kind: str = "torch", **environment: str) -> None:
        reading, writing = os.pipe()
        script = str(Path(__file__).with_name("_ebpf_gpu_children.py"))
        self.process = subprocess.Popen(
            [sys.executable, script, str(writing), device, kind],
            stdin=subprocess.PIPE,
            stdout=2,
            text=True,
            pass_fds=[writing],
            env={**os.environ, **environment},
            start_new_session=True,
        )
        os.close(writing)
        self._answers = os.fdopen(reading)
        self.pid = self.process.pid
        self.answer()

    def tell(self, *words: Any) -> None:
        """Begin one of its functions."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """What the function gave; waits for it."""
        line = self._answers.readline()
        if not line:
            raise RuntimeError(f"the traced process ended with {self.process.wait(10)}")
        return json.loads(line)

    def do(self, *words: Any) -> Any:
        """Call one of its functions."""
        self.tell(*words)
        return self.answer()

    def end(self) -> None:
        """End it and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait(30)


class Tracer:
    """The command."""

    def __init__(self, socket: str, **settings: str) -> None:
        self.log = Path(tempfile.mkdtemp()) / "tracer.log"
        self.settings = settings
        settings = {
            "LISTEN": f"127.0.0.1:{PORT}",
            "SOCKET": socket,
            "LOADER": "core",
            "INTERVAL": "0.5s",
            "RECONCILE_INTERVAL": "0.5s",
            "BUDGET": "0",  # ten times as many readings as usual cost more than a percent themselves
            **settings,
        }
        path = [str(ROOT), str(ROOT / "exporters" / "engine_probe"), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            **{f"GPUGLASS_TRACER_{name}": value for name, value in settings.items()},
        }
        # Not by `gpuglass`, whose entry points are not installed where the repository was only copied.
        code = (
            "import sys, argparse\nfrom ebpf.command import COMMAND\np = argparse.ArgumentParser()\n"
            "COMMAND.configure(p)\nsys.exit(COMMAND.run(p.parse_args([])))"
        )
        with self.log.open("w") as log:
            self.process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=log)
        self.wait(self._is_up, "the tracer serves")

    def _is_up(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"the tracer ended: {self.log.read_text()[-1000:].strip()}")
        try:
            return bool(self.samples("gpuglass_tracer_state"))
        except OSError:
            return False

    def samples(self, name: str, **labels: str) -> list[float]:
        """Values of the samples with these labels."""
        from prometheus_client.parser import text_string_to_metric_families

        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return [
            sample.value
            for metric in text_string_to_metric_families(text)
            for sample in metric.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]

    def live(self, pid: int) -> float:
        """Bytes of GPU memory by the ledger, once it has read again."""
        time.sleep(SETTLED)
        return sum(
            sum(self.samples("gpuglass_cuda_live_bytes", pid=str(pid), kind=kind))
            for kind in ("device", "virtual")
        )

    def lost(self) -> float:
        """Calls and bytes that were not booked."""
        return sum(
            sum(self.samples("gpuglass_tracer_lost_total", what=what))
            for what in ("call", "live", "totals", "result")
        )

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 30) -> Any:
        """Wait until something holds."""
        until = time.monotonic() + seconds
        while not (result := condition()):
            if time.monotonic() > until:
                raise NotSeenError(f"{what}: did not happen; {self.log.read_text()[-2000:]}")
            time.sleep(0.1)
        return result

    def stop(self) -> None:
        """End it."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(15)


class Agent:
    """The receiver of the agent and the verdict, in this process; time passes `STRETCH` times as fast."""

    def __init__(self, socket: str) -> None:
        from ebpf.verdict.leak import State
        from ebpf.verdict.process import Processes
        from exporters.vllm.part import EnginesPart
        from gpuglass import catalog
        from gpuglass.config import Config, EnginesConfig
        from gpuglass.family import Owner
        from gpuglass.gpu_processes import GpuProcesses
        from gpuglass.record_hub import RecordHub
        from gpuglass.store import Store
        from gpuglass_vllm import records

        self._suspected, self._records = State.SUSPECTED, records
        self._processes = Processes()
        self.failures = 0
        """Allocations that failed for lack of memory, as the tracer told them."""
        self.first: dict[int, int] = {}
        """When each process was first told of, and when it was first suspected; nanoseconds."""
        self.suspected: dict[int, int] = {}
        hub = RecordHub()
        hub.listen((records.CudaProcess, records.CudaEvent), self)
        config = Config(engines=EnginesConfig(socket=socket))
        self._part = EnginesPart(config, Store(catalog.owned_by(Owner.AGENT)), GpuProcesses(), hub)
        self._part.start()

    def arrived(self, speaker: Any) -> None:
        """The tracer's, nobody else's."""

    def gone(self, speaker: Any) -> None:
        """Nothing is kept of it."""

    def heard(self, speaker: Any, record: Any, now_ns: int) -> None:
        """One record of the tracer."""
        import msgspec

        if isinstance(record, self._records.CudaEvent):
            self.failures += record.code == 2  # CUDA_ERROR_OUT_OF_MEMORY
            return
        first = self.first.setdefault(record.pid, record.at)
        later = msgspec.structs.replace(record, at=first + STRETCH * (record.at - first))
        watch = self._processes.take(later)
        if watch is None or record.pid in self.suspected:
            return
        if any(verdict.state is self._suspected for _, verdict in watch.verdicts()):
            self.suspected[record.pid] = record.at

    def stop(self) -> None:
        """End it."""
        self._part.stop(5)
