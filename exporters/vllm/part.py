"""The engines' part of the agent: receiver and ledger at work, and the store fed.

The receiver's thread takes in what engines say; the publisher's thread makes the fast tier each second and
the slow tier each five seconds. Both hold the ledger's lock while they do, so what is published is exactly
what was acknowledged.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from exporters.vllm.ledger import Ledger, LedgerSettings
from exporters.vllm.peers import Peers
from exporters.vllm.probe_publish import probe_batch
from exporters.vllm.publish import fast_batch, slow_batch
from exporters.vllm.receiver import Receiver
from exporters.vllm.relay import Relay
from gpuglass.config import Config
from gpuglass.family import Batch
from gpuglass.gpu_processes import GpuProcesses
from gpuglass.logs import LOG
from gpuglass.part import Part, PartContext
from gpuglass.record_hub import EndedRequest, RecordHub
from gpuglass.store import Store

FAST_SECONDS = 1.0
SLOW_EVERY = 5
"""Fast rounds between two slow ones."""


class EnginesPart(Part):
    """Exports what the node's engines tell about requests, KV cache, tenants, experts and GPU time."""

    def __init__(
        self,
        config: Config,
        store: Store,
        gpu_processes: GpuProcesses,
        hub: RecordHub | None = None,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        hub = hub if hub is not None else RecordHub()
        self.ledger = Ledger(LedgerSettings.of(config.engines), hub.policy, clock=clock_ns)
        self._peers = Peers(config, gpu_processes)
        self._hub = hub
        self.receiver = Receiver(config.engines, Relay(self.ledger, hub), self._peers)
        self._store = store
        self._clock_ns = clock_ns
        self._fast, self._slow, self._probe = Batch(), Batch(), Batch()
        self._rounds = 0
        self._closing = threading.Event()
        self._publisher = threading.Thread(target=self._publish_loop, name="engine-publish", daemon=True)

    def start(self) -> None:
        """Listen and publish; raises `ConfigError` if the socket that the configuration names cannot be
        made."""
        if self._hub.is_heard(EndedRequest):
            self.ledger.told = self._hub.ended
        self.ledger.listening_since_ns = self._clock_ns()
        self.receiver.start()
        self._publisher.start()

    def reload(self, config: Config) -> None:
        """Take other limits, allow lists, quotas."""
        self.receiver.reload(config.engines)
        with self.ledger.lock:
            self.ledger.reconfigure(LedgerSettings.of(config.engines))

    def stop(self, timeout: float) -> bool:
        """Stop both threads."""
        self._closing.set()
        until = time.monotonic() + timeout
        clean = self.receiver.stop(timeout)
        if clean:
            with self.ledger.lock:
                self.ledger.finish()
        if self._publisher.ident is not None:
            self._publisher.join(max(0.0, until - time.monotonic()))
            clean = clean and not self._publisher.is_alive()
        return clean

    def not_ready(self) -> str | None:
        """A node without engines is ready."""
        return None

    def capabilities(self) -> Mapping[str, str]:
        """Whether engines can be heard here, and whether their processes can be looked up."""
        return {
            "engine_socket": "error" if self.receiver.down else "supported",
            "engine_pids": "supported" if self._peers.sees_pids else "unsupported",
        }

    def _publish_loop(self) -> None:
        while True:
            try:
                self.publish()
            except Exception:
                # Rather the samples of a second ago than no publisher.
                LOG.exception("publishing the engines' samples failed")
            if self._closing.wait(FAST_SECONDS):
                return

    def publish(self) -> None:
        """One round: the fast tier always, the slow one each `SLOW_EVERY` rounds."""
        slow = self._rounds % SLOW_EVERY == 0
        self._rounds += 1
        now_ns = self._clock_ns()
        with self.ledger.lock:
            self.ledger.tick(now_ns)
            self._fast = fast_batch(self.ledger, self._fast)
            if slow:
                self._slow = slow_batch(self.ledger, self._slow, now_ns)
                self._probe = probe_batch(self.receiver, self._probe)
        self._store.publish("engines.fast", self._fast)
        if slow:
            self._store.publish("engines.slow", self._slow)
            self._store.publish("engines.probe", self._probe)


def create(context: PartContext) -> Part | None:
    """Make the part; None if `engines.enabled` is false."""
    if not context.config.engines.enabled:
        return None
    part = EnginesPart(context.config, context.store, context.gpu_processes, context.records)
    context.add_capabilities(part.capabilities)
    return part
