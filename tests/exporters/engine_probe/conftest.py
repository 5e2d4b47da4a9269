"""Servers that the integration tests share: each start of a real vLLM takes 25 to 80 s on two cores."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import vllm_environment
from tests.support.probe_receiver import ProbeReceiver, running_receiver
from tests.support.vllm import SMALL_POOL, RunningVllm, running_vllm
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


@pytest.fixture(scope="session")
def probe_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gpuglass-vllm of this checkout, installed into a folder for PYTHONPATH."""
    return vllm_environment.site_folder(tmp_path_factory.mktemp("probe"))


@pytest.fixture(scope="session")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of DeepSeek-V3's shape: two layers of 8 experts, 2 per token; blocks of 16 tokens.

    On a CPU, vLLM switches prefix caching and chunked prefill off for its kind of attention.
    """
    return make_model("tiny-deepseek-v3", tmp_path_factory.mktemp("deepseek"))


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of Qwen3-MoE's shape: two layers of 8 experts, 2 per token; blocks of 32 tokens or more."""
    return make_model("tiny-qwen3-moe", tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder with a short name: the path of a Unix socket has at most 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="gpuglass-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _kept_running(model: Path, args: Sequence[str], site: Path) -> Iterator[Callable[[], Probed]]:
    """Gives a function that starts the server at the first call, and anew when a test has ended it."""
    folder = Path(tempfile.mkdtemp(prefix="gpuglass-"))
    socket = folder / "agent.sock"
    running: list[RunningVllm] = []
    with ExitStack() as stack:

        def get() -> Probed:
            if not running or not running[-1].alive or not running[-1].is_healthy():
                stack.close()
                server = running_vllm(folder, model, args, site=site, socket=socket, env=TENANTS)
                running.append(stack.enter_context(server))
            return Probed(running[-1], socket)

        yield get
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def _small_pool(probe_site: Path, deepseek: Path) -> Iterator[Callable[[], Probed]]:
    with _kept_running(deepseek, (*SMALL_POOL, *MIDDLEWARE), probe_site) as get:
        yield get


@pytest.fixture(scope="session")
def _two_frontends(probe_site: Path, qwen: Path) -> Iterator[Callable[[], Probed]]:
    caching = ("--enable-prefix-caching", "--block-size", str(PAIR_BLOCK), "--num-gpu-blocks-override", "80")
    args = ("--api-server-count", "2", "--max-num-batched-tokens", "512", *caching, *MIDDLEWARE)
    with _kept_running(qwen, args, probe_site) as get:
        yield get


@contextmanager
def _heard(probed: Probed, connections: int) -> Iterator[ProbeReceiver]:
    with running_receiver(probed.socket) as heard:
        heard.wait(lambda: len(heard.senders()) >= connections, f"{connections} connections")
        heard.settle()
        heard.forget()
        yield heard
        assert not heard.faults


@pytest.fixture
def probed(_small_pool: Callable[[], Probed]) -> Probed:
    """The shared server whose KV pool has 129 blocks, running. Nobody listens to it yet."""
    return _small_pool()


@pytest.fixture
def receiver(probed: Probed) -> Iterator[ProbeReceiver]:
    """Listens to `probed`; all roles have connected, and what they had to say of the past is set aside."""
    with _heard(probed, 3) as heard:
        yield heard


@pytest.fixture
def pair(_two_frontends: Callable[[], Probed]) -> Probed:
    """The shared server with two API servers, prefix caching, chunked prefill. Nobody listens to it yet."""
    return _two_frontends()


@pytest.fixture
def pair_receiver(pair: Probed) -> Iterator[ProbeReceiver]:
    """Listens to `pair`, as `receiver` does."""
    with _heard(pair, 4) as heard:
        yield heard
