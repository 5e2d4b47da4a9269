"""A real vLLM serves as well with the probe as without it, whatever goes wrong in the probe or around it."""

from __future__ import annotations

import errno
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from gpuglass_vllm import records
from tests.exporters.engine_probe.conftest import DEEPSEEK, MIDDLEWARE, SITE, TENANTS, Probed
from tests.support.ahead import prepared, short_folder
from tests.support.load import complete, complete_all, tokens
from tests.support.probe_receiver import ProbeReceiver, running_receiver
from tests.support.vllm import SMALL_POOL, RunningVllm, running_vllm

pytestmark = [pytest.mark.needs("vllm"), pytest.mark.timeout(600)]

DISK_MEGABYTES = 256


def _fill(folder: Path) -> None:
    with (folder / "ballast").open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError as error:
                assert error.errno == errno.ENOSPC


FAULTY = (
    *("frontend.requests", "frontend.answers", "frontend.refusals", "frontend.middleware"),
    *("core.kv", "core.requests", "core.steps", "core.tokens", "core.outcomes", "core.preemptions"),
    *("worker.experts", "worker.work_model", "worker.padding"),
)
"""All but those without which a role installs nothing, so that these are reached; offline, all raise."""


@dataclass(frozen=True, slots=True)
class Faulty:
    """A server with a probe whose hooks raise; its files are on an empty file system of its own."""

    server: RunningVllm
    socket: Path
    disk: Path


def _make_faulty(stack: ExitStack) -> Faulty:
    disk = short_folder(stack) / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={DISK_MEGABYTES}m", "gpuglass-test", str(disk)]
    subprocess.run(["mount", *options], check=True)
    stack.callback(subprocess.run, ["umount", "--lazy", str(disk)], check=True)
    socket = disk / "agent.sock"
    env = {"GPUGLASS_FAULT": ",".join(FAULTY), "TMPDIR": str(disk), "HOME": str(disk)}
    args = (*SMALL_POOL, *MIDDLEWARE)
    server = running_vllm(disk, DEEPSEEK.get(), args, site=SITE.get(), socket=socket, env=env | TENANTS)
    return Faulty(stack.enter_context(server), socket, disk)


FAULTY_SERVER = prepared("faulty", _make_faulty)


@pytest.fixture
def faulty() -> Iterator[Faulty]:
    """Nobody listens to it yet. Only one test can have it."""
    yield FAULTY_SERVER.get()
    FAULTY_SERVER.close()


@pytest.mark.needs("root")
def test_hooks_raise_and_the_disk_is_full(faulty: Faulty) -> None:
    server = faulty.server
    with running_receiver(faulty.socket) as heard:
        heard.wait(lambda: len(heard.senders()) >= 3, "all roles")
        for _ in range(4):  # after three errors a hook is off
            assert complete(server.address, tokens(20, 1), 3).output_tokens == 3
            assert complete(server.address, tokens(20, 1), 1_000_000).status == 400
        complete(server.address, tokens(20, 2), 1000, hang_up_after=3)
        _fill(faulty.disk)
        requests = [
            # Together they need more blocks than there are: some are preempted.
            {"prompt": tokens(10 + n % 90, n), "max_tokens": 1 + n % 40, "stream": n % 3 == 0}
            for n in range(120)
        ]
        replies = complete_all(server.address, requests)
        assert [(r.status, r.error, r.output_tokens) for r in replies] == [
            (200, "", 1 + n % 40) for n in range(120)
        ]
        assert server.is_healthy()
        heard.settle()

        def states() -> dict[str, str]:
            hellos = heard.senders().values()
            return {c.hook: c.state for hello in hellos for c in hello.capabilities if c.hook in FAULTY}

        # Each request meets these; some others are reached only through them.
        met = {
            *("frontend.requests", "frontend.answers", "frontend.middleware"),
            *("core.requests", "core.steps", "core.tokens", "core.outcomes", "worker.padding"),
        }
        heard.wait(
            lambda: {hook for hook, state in states().items() if state == "disabled"} >= met,
            lambda: f"hooks off: {states()}",
        )
        raised: dict[str, int] = {}
        for state in heard.of(records.ProbeState):
            raised.update(state.hook_errors)
        assert {hook: raised.get(hook) for hook in met} == dict.fromkeys(met, 3), raised


def test_10_000_queued_requests_and_a_receiver_that_reads_nothing(probed: Probed) -> None:
    """The socket fills, events are dropped and counted, no request fails; in the end the sums are whole."""
    heard = ProbeReceiver()
    with running_receiver(probed.socket, into=heard):
        heard.wait(lambda: len(heard.senders()) >= 3, "all roles")
        heard.settle()
        heard.forget()
    with running_receiver(probed.socket, reads=False):
        time.sleep(6)  # all roles have tried again by now
        many = [
            {
                "prompt": [[part, n % 251, n // 251, 7] for n in range(500)],
                "max_tokens": 1 + part % 3,
                "headers": {"x-tenant": f"crowd-{part % 2}"},
            }
            for part in range(20)
        ]
        replies = complete_all(probed.address, many, at_once=20)
        assert [(r.status, r.error) for r in replies] == [(200, "")] * 20
        assert [r.output_tokens for r in replies] == [500 * (1 + part % 3) for part in range(20)]
        assert all(r.finish_reasons == ("length",) * 500 for r in replies)
    with running_receiver(probed.socket, into=heard):
        heard.wait(lambda: heard.of(records.TenantSums, "core"), "sums", 20)
        heard.settle()
    assert not heard.faults
    for tenant in range(2):
        total = heard.tenant(f"crowd-{tenant}")
        assert total["requests"] == {"length": 5000}
        assert total["prompt_tokens"] == 4 * 5000
        assert total["output_tokens"] == sum(r.output_tokens for r in replies[tenant::2])
    attributed = sum(step.attributed_ns for step in heard.of(records.StepSums))
    assert sum(heard.tenant(f"crowd-{n}")["gpu_ns"] for n in range(2)) == pytest.approx(attributed)
    # 20,000 events of the frontend and 10,000 of the core do not fit into their queues of 4,096.
    dropped = {
        role: max(state.dropped for state in heard.of(records.ProbeState, role))
        for role in ("frontend", "core")
    }
    assert dropped["frontend"] >= 20_000 - 4096 - 1000 and dropped["core"] >= 10_000 - 4096 - 1000
    assert not any(state.hook_errors for state in heard.of(records.ProbeState))
