"""A tracer in this process, once per loader, and processes that make CUDA calls for it to see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ebpf.layout import Kind, Layer
from ebpf.ledger import Sums
from ebpf.tracer import Tracer
from ebpf.view import Traced
from gpuglass import catalog
from gpuglass.config import Config, TracerConfig
from gpuglass.family import Owner
from gpuglass.store import Store
from tests.fakes.cuda import LIBRARY, RUNTIME, build

PLAYER = Path(__file__).with_name("player.py")


class Player:
    """One process that makes the calls that a test asks for."""

    def __init__(
        self, library: str, command: list[str] | None = None, env: dict[str, str] | None = None
    ) -> None:
        command = command or [sys.executable, "-I", str(PLAYER), library]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        self.pid = self.process.pid
        assert self.answer() == "ready"

    def answer(self) -> Any:
        """The next line that it says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the player ended"
        return json.loads(line)

    def tell(self, *words: Any) -> None:
        """Ask without waiting."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()

    def do(self, *words: Any) -> Any:
        """Ask and wait for the answer."""
        self.tell(*words)
        return self.answer()

    def out(self, name: str, *arguments: int) -> int:
        """A successful call's result."""
        code, result = self.do("out", name, *arguments)
        assert code == 0
        return int(result)

    def call(self, name: str, *arguments: int) -> None:
        """A successful call."""
        assert self.do("call", name, *arguments) == 0

    def end(self) -> None:
        """Let it end by itself."""
        with suppress(BrokenPipeError):
            self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait(30)
        self.process.stdout.close()  # type: ignore[union-attr]

    def kill(self) -> None:
        """End it in the middle of whatever it does."""
        self.process.kill()
        self.end()


@dataclass
class Rig:
    """A tracer and its players."""

    tracer: Tracer
    folder: Path
    store: Store
    players: list[Player] = field(default_factory=list)

    @property
    def library(self) -> str:
        """The fake libcuda."""
        return str(self.folder / LIBRARY)

    @property
    def runtime(self) -> str:
        """The fake libcudart."""
        return str(self.folder / RUNTIME)

    def player(self, library: str | None = None, **more: Any) -> Player:
        """A new process whose libraries are traced by the time it is given."""
        player = Player(self.library if library is None else library, **more)
        self.players.append(player)
        self.look(player)
        return player

    def look(self, player: Player) -> None:
        """Probe what it has loaded."""
        self.tracer.discovery.look(player.pid, time.monotonic())

    def lives(self, pid: int) -> list[Traced]:
        """All lives under a pid, oldest first."""
        self.tracer.read(time.monotonic())
        found = [traced for traced in self.tracer.traced.values() if traced.process.pid == pid]
        return sorted(found, key=lambda traced: traced.process.record.first_ns)

    def traced(self, pid: int) -> Traced:
        """The latest."""
        lives = self.lives(pid)
        assert lives, f"process {pid} is not in the ledger"
        return lives[-1]

    def sums(self, pid: int, kind: Kind, layer: Layer = Layer.DRIVER) -> Sums:
        """What a process did with one kind of memory."""
        return self.traced(pid).process.sums.get((layer, kind), Sums())

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 20) -> None:
        """Let the tracer work until something holds."""
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, what
            self.tracer._wait(0.02)
            self.tracer._look(time.monotonic())

    def losses(self) -> dict[str, int]:
        """What was lost so far, without what was held back."""
        return {
            name: count
            for name, count in self.tracer.ledger.losses().items()
            if count and not name.startswith("held_back") and name != "stack"
        }


@contextmanager
def running_rig(**settings: Any) -> Iterator[Rig]:
    """A tracer in this process; `settings` are the configuration's section tracer."""
    config = Config(tracer=TracerConfig(**{"socket": "", "budget": 0.0, "runtime": True, **settings}))
    store = Store(catalog.owned_by(Owner.TRACER))
    tracer = Tracer(config, store.publish)
    rig = Rig(tracer, build(), store)
    try:
        yield rig
    finally:
        tracer.close()
        for player in rig.players:
            if player.process.poll() is None:
                player.kill()


@pytest.fixture(scope="session", params=["core", "bcc"])
def session_rig(request: pytest.FixtureRequest, bpf_object: Path) -> Iterator[Rig]:
    with running_rig(loader=request.param, object=str(bpf_object), launches="all") as rig:
        yield rig


@pytest.fixture
def rig(session_rig: Rig) -> Iterator[Rig]:
    """A tracer with one of the loaders; nothing may get lost in a test."""
    before = session_rig.losses()
    yield session_rig
    for player in session_rig.players:
        if player.process.poll() is None:
            player.kill()
    session_rig.players.clear()
    assert session_rig.losses() == before


@pytest.fixture(scope="session")
def bpf_object() -> Path:
    """The object as `make bpf` builds it."""
    root = Path(__file__).parents[2]
    subprocess.run(["make", "-s", "bpf"], cwd=root, check=True)
    return root / f"ebpf/program/trace.{os.uname().machine}.o"
