"""PCIe and NVLink: bytes, errors, state.

PCIe bytes come from the card's own counters, else from GPM's rates, else from the driver's 20 ms measurement,
which blocks its caller and therefore has a thread of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

import pynvml

from exporters.gpu.collectors.activity import Activity
from exporters.gpu.device import Gpu
from exporters.gpu.observe import (
    RETRY_UNSUPPORTED,
    DriverDown,
    Field,
    FieldReader,
    GpuDown,
    Observations,
    State,
)
from gpuglass.families import gpu as families
from gpuglass.family import Family, Tier

TX = Field(pynvml.NVML_FI_DEV_PCIE_COUNT_TX_BYTES, "pcie_bytes")
RX = Field(pynvml.NVML_FI_DEV_PCIE_COUNT_RX_BYTES, "pcie_bytes")


_WIDE = frozenset({pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG, pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG})
"""Value types of counters that do not wrap within the life of a machine."""


class Throughput(threading.Thread):
    """Adds up the driver's 20 ms measurements of PCIe traffic: an estimate for cards that count no bytes."""

    def __init__(self, gpu: Gpu, interval: float) -> None:
        super().__init__(name=f"pcie-{gpu.device}", daemon=True)
        self._gpu = gpu
        self._interval = interval
        self._closing = threading.Event()
        self.bytes: tuple[float, float] | None = None
        self.state: State | None = None

    def run(self) -> None:
        """Measure until closed or refused."""
        see = Observations()
        sent, received, last = 0.0, 0.0, time.monotonic()
        while not self._closing.wait(self._interval):
            try:
                tx = see.read(
                    "pcie",
                    pynvml.nvmlDeviceGetPcieThroughput,
                    self._gpu.handle,
                    pynvml.NVML_PCIE_UTIL_TX_BYTES,
                )
                rx = see.read(
                    "pcie",
                    pynvml.nvmlDeviceGetPcieThroughput,
                    self._gpu.handle,
                    pynvml.NVML_PCIE_UTIL_RX_BYTES,
                )
            except (GpuDown, DriverDown):
                return
            self.state = see.states.get("pcie")
            now = time.monotonic()
            elapsed, last = now - last, now
            if tx is None or rx is None:
                if self.state is not State.ERROR:
                    return
                continue
            sent, received = sent + tx * 1000 * elapsed, received + rx * 1000 * elapsed
            self.bytes = (sent, received)

    def close(self) -> None:
        """Let the thread end after its present measurement."""
        self._closing.set()


class Pcie:
    """Bytes, replays and the state of the PCIe link."""

    name = "pcie"
    tier = Tier.SLOW

    def __init__(self, gpu: Gpu, activity: Activity, interval: float) -> None:
        self._gpu = gpu
        self._activity = activity
        self._interval = interval
        self._counters = FieldReader((TX, RX))
        self._throughput: Throughput | None = None

    def collect(self, see: Observations, now: float) -> None:
        """Note bytes from the best source that there is, and the link."""
        handle = self._gpu.handle
        sent, received = self._counters.read(see, handle)
        if sent is not None and received is not None and _WIDE.issuperset(self._counters.kinds):
            self._bytes(see, (sent, received), "counter")
        elif see.states.get("gpm_pcie") is State.SUPPORTED:
            self._bytes(see, self._activity.pcie_bytes, "gpm")
        elif see.states.get("gpm") is not State.SUPPORTED or "gpm_pcie" in see.states:
            self._measured(see)  # else GPM has had no window yet: the next run knows
        see.add(
            families.PCIE_REPLAYS, see.read("pcie_replays", pynvml.nvmlDeviceGetPcieReplayCounter, handle)
        )
        for kind, generation, width in (
            ("current", pynvml.nvmlDeviceGetCurrPcieLinkGeneration, pynvml.nvmlDeviceGetCurrPcieLinkWidth),
            ("max", pynvml.nvmlDeviceGetMaxPcieLinkGeneration, pynvml.nvmlDeviceGetMaxPcieLinkWidth),
        ):
            see.add(families.PCIE_LINK_GENERATION, see.read("pcie_link", generation, handle), kind)
            see.add(families.PCIE_LINK_WIDTH, see.read("pcie_link", width, handle), kind)

    def _bytes(self, see: Observations, sent_received: tuple[float, float], source: str) -> None:
        see.add(families.PCIE_TX, round(sent_received[0]), source)
        see.add(families.PCIE_RX, round(sent_received[1]), source)

    def _measured(self, see: Observations) -> None:
        if self._throughput is None:
            self._throughput = Throughput(self._gpu, self._interval)
            self._throughput.start()
        if self._throughput.bytes is not None:
            self._bytes(see, self._throughput.bytes, "throughput")
        if self._throughput.state is not None:
            see.states["pcie_throughput"] = self._throughput.state

    def close(self) -> threading.Thread | None:
        """Ask the measuring thread to end after its present call."""
        if self._throughput is not None:
            self._throughput.close()
        return self._throughput


_KIB = 1024
_LINK_FIELDS: Mapping[int, tuple[Family, str, int]] = {
    pynvml.NVML_FI_DEV_NVLINK_GET_STATE: (families.NVLINK_UP, "", 1),
    pynvml.NVML_FI_DEV_NVLINK_COUNT_XMIT_BYTES: (families.NVLINK_TX, "", 1),
    pynvml.NVML_FI_DEV_NVLINK_COUNT_RCV_BYTES: (families.NVLINK_RX, "", 1),
    pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX: (families.NVLINK_TX, "", _KIB),
    pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX: (families.NVLINK_RX, "", _KIB),
    pynvml.NVML_FI_DEV_NVLINK_COUNT_LINK_RECOVERY_EVENTS: (families.NVLINK_ERRORS, "recovery", 1),
    pynvml.NVML_FI_DEV_NVLINK_COUNT_LINK_RECOVERY_FAILED_EVENTS: (
        families.NVLINK_ERRORS,
        "recovery_failed",
        1,
    ),
    pynvml.NVML_FI_DEV_NVLINK_COUNT_RCV_ERRORS: (families.NVLINK_ERRORS, "receive", 1),
    pynvml.NVML_FI_DEV_NVLINK_COUNT_SYMBOL_ERRORS: (families.NVLINK_ERRORS, "symbol", 1),
    pynvml.NVML_FI_DEV_NVLINK_ERROR_DL_REPLAY: (families.NVLINK_ERRORS, "replay", 1),
    pynvml.NVML_FI_DEV_NVLINK_ERROR_DL_RECOVERY: (families.NVLINK_ERRORS, "recovery", 1),
    pynvml.NVML_FI_DEV_NVLINK_ERROR_DL_CRC: (families.NVLINK_ERRORS, "crc", 1),
}
"""Family, type of error and scale to the unit of each per-link field. NVLink 5 first: it counts exact
bytes."""


def _capability(field: int) -> str:
    if field == pynvml.NVML_FI_DEV_NVLINK_GET_STATE:
        return "nvlink_state"
    kind = "errors" if _LINK_FIELDS[field][0] is families.NVLINK_ERRORS else "bytes"
    generation = "nvlink5" if field >= pynvml.NVML_FI_DEV_NVLINK_COUNT_XMIT_PACKETS else "nvlink"
    return f"{generation}_{kind}"


class NvLink:
    """State, payload bytes and errors of each NVLink."""

    name = "nvlink"
    tier = Tier.SLOW

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._links: tuple[int, ...] = ()
        self._reader = FieldReader(())
        self._discover_at = 0.0

    def collect(self, see: Observations, now: float) -> None:
        """Note the links that the card has; which links and counters it has is asked now and then."""
        if now >= self._discover_at:
            self._discover(see)
            self._discover_at = now + RETRY_UNSUPPORTED
        has_state = False
        for field, value in zip(self._reader.fields, self._reader.read(see, self._gpu.handle), strict=True):
            if value is not None:
                family, kind, scale = _LINK_FIELDS[field.id]
                has_state = has_state or family is families.NVLINK_UP
                labels = (str(field.scope), kind) if kind else (str(field.scope),)
                see.add(family, value * scale, *labels)
        if not has_state:  # drivers that give the state by a call per link only
            for link in self._links:
                state = see.read("nvlink", pynvml.nvmlDeviceGetNvLinkState, self._gpu.handle, link)
                see.add(families.NVLINK_UP, None if state is None else int(bool(state)), str(link))

    def _discover(self, see: Observations) -> None:
        links = []
        for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
            if see.read("nvlink", pynvml.nvmlDeviceGetNvLinkState, self._gpu.handle, link) is None:
                break  # links are numbered without gaps
            links.append(link)
        if links:
            see.succeeded("nvlink")  # asking for one link too many is how their number is found
        self._links = tuple(links)
        asked = FieldReader(
            [Field(field, _capability(field), link) for link in links for field in _LINK_FIELDS]
        )
        answered: dict[tuple[int, Family, str], Field] = {}
        for field, value in zip(asked.fields, asked.read(see, self._gpu.handle), strict=True):
            if value is not None:
                family, kind, _ = _LINK_FIELDS[field.id]
                # Counters of NVLink 5 and of older links can both answer: the first listed stands.
                answered.setdefault((field.scope, family, kind), field)
        self._reader = FieldReader(tuple(answered.values()))

    def close(self) -> None:
        """Nothing is held."""
