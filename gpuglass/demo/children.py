"""Programs that the demo starts, and their end.

In flows a command, out flows a running `Child` whose output goes to a file. A child has a session of its own,
so that a Ctrl-C at the terminal reaches only the demo, and the kernel kills it when the demo dies without
having stopped it. `TemporaryFolder` goes away in the same two ways.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from gpuglass.errors import UserError

STOP_SECONDS = 10.0
"""How long children may take to end by themselves."""

LAST_LINES = 8
"""Lines of a log that are shown when its child has died."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class ChildFailed(UserError):
    """A child ended by itself or does not work; the text says so, with its last log lines."""

    def __init__(self, child: Child, what: str) -> None:
        said = "".join(f"\n  {line}" for line in child.last_lines())
        super().__init__(f"{child.name} {what}; its last lines{said or ': none'}\nall of them: {child.log}")


class Child:
    """A running program."""

    def __init__(
        self, name: str, command: Sequence[str | Path], log: Path, environ: Mapping[str, str] = os.environ
    ) -> None:
        """Start it. Raises OSError. Call from the main thread: the kernel ties the child to this thread."""
        self.name = name
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=log.parent,
                env=dict(environ),
                start_new_session=True,
                preexec_fn=_dies_with_us(),
            )

    def check(self) -> None:
        """Raises ChildFailed if it has ended."""
        code = self.process.poll()
        if code is not None:
            how = (
                f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            )
            raise ChildFailed(self, how)

    def wait_until(self, ready: Callable[[], bool], seconds: float, pause: Callable[[float], None]) -> bool:
        """Ask `ready` every tenth of a second; False if that took too long. Raises ChildFailed."""
        deadline = time.monotonic() + seconds
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                return False
            pause(0.1)
        return True

    def last_lines(self) -> list[str]:
        """The end of its log."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 8192))
            return file.read().decode("utf-8", "replace").splitlines()[-LAST_LINES:]

    def kill(self) -> None:
        """End it and what it started, at once."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)


def kill(children: Iterable[Child]) -> None:
    """End all children at once."""
    for child in children:
        child.kill()


def stop(children: Iterable[Child], seconds: float = STOP_SECONDS) -> None:
    """Let all children end, and kill those that do not."""
    running = [child for child in children if child.process.poll() is None]
    for child in running:
        child.process.terminate()
    deadline = time.monotonic() + seconds
    for child in running:
        try:
            child.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.process.wait()


def _dies_with_us() -> Callable[[], None]:
    libc, parent = ctypes.CDLL(None), os.getpid()

    def in_child() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return in_child


class TemporaryFolder:
    """A folder that is removed in the end, also when the demo is killed.

    A shell waits for the end of its standard input, which comes with our end however that happens, and
    removes the folder then.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="gpuglass-demo-"))
        # The second is for the children, which are killed at the same moment and may still write.
        script = 'read -r _; sleep 1; rm -rf -- "$1"'
        self._remover = subprocess.Popen(
            ["/bin/sh", "-c", script, "sh", str(self.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={"PATH": "/usr/bin:/bin"},
            start_new_session=True,
        )

    def remove(self, keep: str = "") -> None:
        """Remove the folder, but not the files whose names end with `keep`."""
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif not (keep and path.name.endswith(keep)):
                path.unlink(missing_ok=True)
        if not keep:
            shutil.rmtree(self.path, ignore_errors=True)
        if self._remover.poll() is None:
            os.killpg(self._remover.pid, signal.SIGKILL)
        self._remover.wait()
        if self._remover.stdin is not None:
            self._remover.stdin.close()
