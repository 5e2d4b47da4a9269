"""Servers that the integration tests share: each start of a real vLLM takes 25 to 80 s on two cores, so that
they are started ahead (tests/support/ahead.py)."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support import vllm_environment
from tests.support.ahead import Prepared, prepared, short_folder
from tests.support.probe_receiver import ProbeReceiver, running_receiver
from tests.support.vllm import SMALL_POOL, RunningVllm, core, running_vllm
from tests.support.vllm_models import make_model

MIDDLEWARE = ("--middleware", "gpuglass_vllm.middleware.Middleware")
TENANTS = {"GPUGLASS_TENANT_HEADER": "x-tenant", "GPUGLASS_TRUSTED_PROXIES": "127.0.0.1"}

PAIR_BLOCK = 32
"""Tokens of a block of the server with two API servers."""


@dataclass(frozen=True, slots=True)
class Probed:
    """A server with the probe, and the socket on which it looks for its agent."""

    server: RunningVllm
    socket: Path

    @property
    def address(self) -> str:
        """Host and port of the server."""
        return self.server.address


SITE = prepared("probe_site", lambda stack: vllm_environment.site_folder(short_folder(stack)))
DEEPSEEK = prepared("deepseek", lambda stack: make_model("tiny-deepseek-v3", short_folder(stack)))
QWEN = prepared("qwen", lambda stack: make_model("tiny-qwen3-moe", short_folder(stack)))


@pytest.fixture(scope="session")
def probe_site() -> Path:
    """gpuglass-vllm of this checkout, installed into a folder for PYTHONPATH."""
    return SITE.get()


@pytest.fixture(scope="session")
def deepseek() -> Path:
    """A model of DeepSeek-V3's shape: two layers of 8 experts, 2 per token; blocks of 16 tokens.

    On a CPU, vLLM switches prefix caching and chunked prefill off for its kind of attention.
    """
    return DEEPSEEK.get()


@pytest.fixture(scope="session")
def qwen() -> Path:
    """A model of Qwen3-MoE's shape: two layers of 8 experts, 2 per token; blocks of 32 tokens or more."""
    return QWEN.get()


@dataclass(slots=True)
class Kept:
    """A server that runs from the first wish on, and anew when a test has ended it.

    `turn` is held by who sends it requests, or stops it: a test, or what is made ahead.
    """

    model: Prepared[Path]
    args: Sequence[str]
    env: Mapping[str, str]
    folder: Path
    _stack: ExitStack
    _running: RunningVllm | None = None
    turn: threading.RLock = field(default_factory=threading.RLock)

    def get(self) -> Probed:
        """The server, which answers."""
        socket = self.folder / "agent.sock"
        if not self._running or not self._running.alive or not self._running.is_healthy():
            self._stack.close()
            server = running_vllm(
                self.folder, self.model.get(), self.args, site=SITE.get(), socket=socket, env=self.env
            )
            self._running = self._stack.enter_context(server)
        return Probed(self._running, socket)


def _kept(
    fixture: str, model: Prepared[Path], args: Sequence[str], env: Mapping[str, str] = TENANTS
) -> Prepared[Kept]:
    def make(stack: ExitStack) -> Kept:
        folder = short_folder(stack)
        kept = Kept(model, args, env, folder, stack.enter_context(ExitStack()))
        kept.get()
        return kept

    return prepared(fixture, make)


SMALL = _kept("_small_pool", DEEPSEEK, (*SMALL_POOL, *MIDDLEWARE))
_CACHING = ("--enable-prefix-caching", "--block-size", str(PAIR_BLOCK), "--num-gpu-blocks-override", "80")
_PAIR = _kept(
    "_two_frontends",
    QWEN,
    ("--api-server-count", "2", "--max-num-batched-tokens", "512", *_CACHING, *MIDDLEWARE),
)
_RANKS = _kept(
    "_two_ranks",
    QWEN,
    ("--tensor-parallel-size", "2", "--block-size", "32", "--num-gpu-blocks-override", "80", *MIDDLEWARE),
    TENANTS | {"VLLM_CPU_OMP_THREADS_BIND": f"{core()}|{core()}"},
)


@pytest.fixture(scope="session")
def _small_pool() -> Iterator[Kept]:
    yield SMALL.get()
    SMALL.close()


@pytest.fixture(scope="session")
def _two_frontends() -> Iterator[Kept]:
    yield _PAIR.get()
    _PAIR.close()


@pytest.fixture(scope="session")
def _two_ranks() -> Iterator[Kept]:
    yield _RANKS.get()
    _RANKS.close()


@contextmanager
def _heard(probed: Probed, connections: int) -> Iterator[ProbeReceiver]:
    with running_receiver(probed.socket) as heard:
        heard.wait(lambda: len(heard.senders()) >= connections, f"{connections} connections")
        heard.settle()
        heard.forget()
        yield heard
        assert not heard.faults


@pytest.fixture
def probed(_small_pool: Kept) -> Iterator[Probed]:
    """The shared server whose KV pool has 129 blocks, running. Nobody listens to it yet."""
    with _small_pool.turn:
        yield _small_pool.get()


@pytest.fixture
def receiver(probed: Probed) -> Iterator[ProbeReceiver]:
    """Listens to `probed`; all roles have connected, and what they had to say of the past is set aside."""
    with _heard(probed, 3) as heard:
        yield heard


@pytest.fixture
def pair(_two_frontends: Kept) -> Probed:
    """The shared server with two API servers, prefix caching, chunked prefill. Nobody listens to it yet."""
    return _two_frontends.get()


@pytest.fixture
def pair_receiver(pair: Probed) -> Iterator[ProbeReceiver]:
    """Listens to `pair`, as `receiver` does."""
    with _heard(pair, 4) as heard:
        yield heard


@pytest.fixture
def ranks(_two_ranks: Kept) -> Probed:
    """The server with two tensor-parallel ranks. Nobody listens to it yet."""
    return _two_ranks.get()


@pytest.fixture
def ranks_receiver(ranks: Probed) -> Iterator[ProbeReceiver]:
    """Listens to `ranks`, as `receiver` does."""
    with _heard(ranks, 4) as heard:
        yield heard
