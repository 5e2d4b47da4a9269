"""A running vLLM server on a CPU for tests, with or without the engine probe, and offline runs.

In: a model folder (vllm_models.py), options, environment. Out: its address, log and processes by role. It
takes 25 to 80 s on two cores until it answers: share one among tests. With the probe, `site` is what
`vllm_environment.site_folder` made.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import vllm_environment
from tests.support.ports import free_port

START_SECONDS = 300
"""A slow machine whose files are not yet in memory included."""
STOP_SECONDS = 20
LOG_LINES = 40
"""How much of a log an error shows."""
MODEL = "tiny"
"""The name that servers give their model."""

KV_BLOCKS, BLOCK_TOKENS = 130, 16
SMALL_POOL = (
    *("--block-size", str(BLOCK_TOKENS), "--num-gpu-blocks-override", str(KV_BLOCKS)),
    *("--max-num-batched-tokens", "512"),
)
"""A KV cache that one prompt of 1,600 tokens nearly fills; for models with multi-head latent attention."""

_TITLES = {
    "frontend": re.compile(r"VLLM::APIServer|VLLM::ApiServer|vllm\.entrypoints"),
    "core": re.compile(r"VLLM::EngineCore"),
    "worker": re.compile(r"VLLM::Worker"),
}
"""What the command lines of a role's processes look like."""


def core() -> int:
    """The one processor core that servers of the tests use: the last one that this process may use.

    vLLM's processes wait for each other by yielding in a loop. On small machines that takes every core from
    those that watch it, and some kernels (Linux 6.18) leave what shares a core with such a loop waiting for
    seconds. Since they mostly take turns, one core makes them little slower.
    """
    return max(os.sched_getaffinity(0))


def _on_one_core(command: Sequence[str]) -> list[str]:
    return ["taskset", "--cpu-list", str(core()), *command]


def environment(
    site: Path | None = None, socket: Path | None = None, more: Mapping[str, str] | None = None
) -> dict[str, str]:
    """This environment without settings of a probe or of Python, for a vLLM that asks no network."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "VLLM_", "VIRTUAL_ENV"))
        and (not name.startswith("GPUGLASS_") or name == "GPUGLASS_TEST_SESSION")
    }
    quiet = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": str(core()),
    }
    probe = {"PYTHONPATH": str(site)} if site else {}
    told = {"GPUGLASS_SOCKET": str(socket)} if socket else {}
    return kept | quiet | probe | told | dict(more or {})


@dataclass
class RunningVllm:
    """A server that answers."""

    port: int
    process: subprocess.Popen[bytes]
    log_file: Path

    @property
    def log(self) -> str:
        """What it has written so far."""
        return self.log_file.read_text(errors="replace")

    @property
    def alive(self) -> bool:
        """Whether the process that was started still runs."""
        return self.process.poll() is None

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self.port}"

    def get(self, path: str, timeout: float = 10) -> str:
        """The body of a GET. Raises OSError if there is no good answer."""
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=timeout) as answer:
            body: bytes = answer.read()
        return body.decode()

    def is_healthy(self) -> bool:
        """Whether /health answers."""
        try:
            self.get("/health", timeout=5)
        except OSError:
            return False
        return True

    def value(self, name: str, **labels: str) -> float:
        """The sum of vLLM's own samples of that name (with `vllm:`) whose labels contain `labels`."""
        total = 0.0
        for line in self.get("/metrics").splitlines():
            found = re.match(r"([a-zA-Z_:]\w*(?::\w+)*)(?:\{(.*)\})? (\S+)$", line)
            if found and found[1] == name:
                present = dict(re.findall(r'(\w+)="([^"]*)"', found[2] or ""))
                if labels.items() <= present.items():
                    total += float(found[3])
        return total

    def pids(self, role: str) -> list[int]:
        """Living processes of a role: frontend (API servers), core or worker, oldest first."""
        return sorted(
            pid
            for pid, (group, command) in _processes().items()
            if group == self.process.pid and _TITLES[role].search(command)
        )

    def kill(self, pid: int) -> None:
        """kill -9 of one process."""
        os.kill(pid, signal.SIGKILL)

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 20) -> Any:
        """Wait until `condition` gives something true; fail with the log's end otherwise."""
        until = time.monotonic() + seconds
        while not (result := condition()):
            if time.monotonic() > until:
                raise AssertionError(f"{what} did not hold within {seconds:g} s; log:\n{self.tail()}")
            time.sleep(0.05)
        return result

    def tail(self) -> str:
        """The last lines of the log."""
        return "\n".join(self.log.splitlines()[-LOG_LINES:])

    def stop(self) -> None:
        """SIGTERM to the server; what is left of it after `STOP_SECONDS` is killed."""
        if self.alive:
            self.process.terminate()
        until = time.monotonic() + STOP_SECONDS
        while self._group() and time.monotonic() < until:
            self.process.poll()
            time.sleep(0.05)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _group(self) -> list[int]:
        return [pid for pid, (group, _) in _processes().items() if group == self.process.pid]


@contextmanager
def running_vllm(
    folder: Path,
    model: Path,
    args: Sequence[str] = (),
    *,
    site: Path | None = None,
    socket: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[RunningVllm]:
    """Run a server until the block ends; its log is `folder`/vllm.log.

    `site` brings the probe, `socket` says where its agent is; without them it is vLLM as it comes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [
        *(str(vllm_environment.python()), "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
        *("--served-model-name", MODEL, "--load-format", "dummy", "--enforce-eager"),
        *("--max-model-len", "2048", "--host", "127.0.0.1", "--port", str(port)),
        *args,
    ]
    log_file = folder / "vllm.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            _on_one_core(command),
            cwd=folder,
            env=environment(site, socket, env),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    server = RunningVllm(port, process, log_file)
    try:
        server.wait(lambda: not server.alive or server.is_healthy(), "/health", START_SECONDS)
        assert server.alive, f"vLLM ended with {process.poll()}:\n{server.tail()}"
        yield server
    finally:
        server.stop()


def run_offline(
    script: Path,
    request: Mapping[str, Any],
    *,
    folder: Path,
    site: Path | None = None,
    socket: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = START_SECONDS,
) -> Any:
    """Run a script in vLLM's environment, JSON on its input; its last line of output, read as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    log_file = folder / "offline.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            _on_one_core([str(vllm_environment.python()), str(script)]),
            cwd=folder,
            env=environment(site, socket, env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    try:
        out, _ = process.communicate(json.dumps(dict(request)).encode(), timeout)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    said = log_file.read_text(errors="replace").splitlines()[-LOG_LINES:]
    assert process.returncode == 0, "\n".join([f"{script.name} ended with {process.returncode}:", *said])
    return json.loads(out.splitlines()[-1])


def _processes() -> dict[int, tuple[int, str]]:
    """Process group and command line of all living processes, by pid."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if state not in "ZX":
                found[int(folder.name)] = (int(group), command)
    return found
