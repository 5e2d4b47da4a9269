"""The fake GPU driver under NVIDIA's own Python binding: what it answers, when it fails, hangs and recovers.

In flow scenarios, out flow the binding's results, so that other tests may trust the fake.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pynvml as binding
import pytest

from gpuglass.demo import scenario as scenarios
from gpuglass.demo.scenario import A100, H200, RTX_4090, Scenario, ScenarioError
from tests.fakes.nvml import SOURCES, build

MIB = 1 << 20
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    """The library in this process; loaded once, each test opens its own scenario file."""
    return ctypes.CDLL(str(build()))


class Driver:
    """One scenario played by the library, with the binding initialised on it."""

    def __init__(self, library: ctypes.CDLL, path: Path) -> None:
        self.library = library
        self.path = path

    def play(self, scenario: Scenario) -> None:
        scenario.write(self.path)
        binding.nvmlInit()

    def change(self, scenario: Scenario) -> None:
        scenario.write(self.path)
        self.library.fakeNvmlReload()

    def gpu(self, index: int = 0) -> ctypes._Pointer[ctypes.Structure]:
        return binding.nvmlDeviceGetHandleByIndex(index)

    def now(self) -> float:
        return float(self.library.fakeNvmlTime())


@pytest.fixture
def driver(library: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    library.fakeNvmlTime.restype = ctypes.c_double
    library.fakeNvmlCalls.restype = ctypes.c_ulong
    path = tmp_path / "scenario"
    monkeypatch.setenv("FAKE_NVML_SCENARIO", str(path))
    monkeypatch.setattr(binding, "nvmlLib", library)
    monkeypatch.setattr(binding, "_nvmlGetFunctionPointer_cache", {})
    yield Driver(library, path)
    while library.fakeNvmlInits():
        library.nvmlShutdown()


def refuses(code: int, call: Callable[[], object]) -> None:
    with pytest.raises(binding.NVMLError) as error:
        call()
    assert error.value.value == code


def one(model: scenarios.Model = H200, count: int = 1) -> Scenario:
    return Scenario().gpus(count, model)


# Layout and build


STRUCTURES = {
    "nvmlMemory_t": binding.c_nvmlMemory_t,
    "nvmlMemory_v2_t": binding.c_nvmlMemory_v2_t,
    "nvmlBAR1Memory_t": binding.c_nvmlBAR1Memory_t,
    "nvmlUtilization_t": binding.c_nvmlUtilization_t,
    "nvmlPciInfo_t": binding.nvmlPciInfo_t,
    "nvmlValue_t": binding.c_nvmlValue_t,
    "nvmlSample_t": binding.c_nvmlSample_t,
    "nvmlFieldValue_t": binding.c_nvmlFieldValue_t,
    "nvmlProcessInfo_t": binding.c_nvmlProcessInfo_t,
    "nvmlProcessUtilizationSample_t": binding.c_nvmlProcessUtilizationSample_t,
    "nvmlProcessUtilizationInfo_v1_t": binding.c_nvmlProcessUtilizationInfo_v1_t,
    "nvmlProcessesUtilizationInfo_v1_t": binding.c_nvmlProcessesUtilizationInfo_v1_t,
    "nvmlDeviceAttributes_t": binding.c_nvmlDeviceAttributes,
    "nvmlEventData_t": binding.c_nvmlEventData_t,
    "nvmlTemperature_v1_t": binding.c_nvmlTemperature_v1_t,
    "nvmlGpmMetric_t": binding.c_nvmlGpmMetric_t,
    "nvmlGpmMetricsGet_t": binding.c_nvmlGpmMetricsGet_t,
    "nvmlGpmSupport_t": binding.c_nvmlGpmSupport_t,
}


class LayoutRow(ctypes.Structure):
    _fields_ = [
        ("structure", ctypes.c_char_p),
        ("field", ctypes.c_char_p),
        ("offset", ctypes.c_size_t),
        ("size", ctypes.c_size_t),
    ]


def test_structures_are_laid_out_as_the_binding_s(library: ctypes.CDLL) -> None:
    rows = (LayoutRow * 500).in_dll(library, "fakeNvmlLayout")
    seen: dict[str, set[str]] = {}
    for row in rows:
        if not row.structure:
            break
        structure, field = STRUCTURES[row.structure.decode()], row.field.decode()
        seen.setdefault(row.structure.decode(), set()).add(field)
        if not field:
            assert row.size == ctypes.sizeof(structure), structure
            continue
        theirs = getattr(structure, field)
        assert row.offset == theirs.offset, (structure, field)
        assert row.size in (theirs.size, 0), (structure, field)
    assert {name: fields - {""} for name, fields in seen.items()} == {
        name: {field[0] for field in structure._fields_} for name, structure in STRUCTURES.items()
    }


def test_writer_and_driver_know_the_same_keys(driver: Driver) -> None:
    header = (SOURCES / "scenario.h").read_text().partition("enum Kind")[0]
    declared = {line.split('"')[1] for line in header.splitlines() if line.startswith("    X(")}
    mib = {key for key in scenarios.GPU_KEYS if key.endswith("_mib")}
    assert declared == scenarios.GPU_KEYS - mib
    everything = Scenario().count(1)
    for key in scenarios.GPU_KEYS:
        everything.gpu(0, **{key: "hopper" if key == "arch" else "1" if key in scenarios.TEXT_KEYS else 1})
        everything.at(1).gpu(0, **{key: None if key != "arch" else "ampere"})
    for key in scenarios.LINK_KEYS:
        everything.nvlink(0, 3, **{key: 1})
    for event in scenarios.EVENTS:
        everything.at(99).event(0, event, 1)
    for name in scenarios.RETURN_NAMES:
        everything.fail(0, "nvmlDeviceGetBrand", name)
    for kind in scenarios.FIELD_TYPES:
        everything.field(0, 7, 1, type=kind)
    for location in scenarios.ECC_LOCATIONS:
        everything.ecc("*", "corrected", "volatile", 1, location=location)
    everything.mig(0, 1, **dict.fromkeys(scenarios.MIG_KEYS, 1))
    for state in reversed(scenarios.DRIVER_STATES):
        everything.driver(state=state)
    driver.play(everything.clear(0, "nvmlDeviceGetBrand"))
    assert binding.nvmlDeviceGetCount() == 1


def test_writer_refuses_what_the_driver_would_not_know() -> None:
    for mistake in (
        lambda s: s.gpu(0, utilisation=1),
        lambda s: s.gpu(64, util_gpu=1),
        lambda s: s.gpu("*", uuid="GPU-1"),
        lambda s: s.gpu(0, util_gpu="full"),
        lambda s: s.gpu(0, name="two\nlines"),
        lambda s: s.gpu(0, power_mw=float("nan")),
        lambda s: s.process(0, 1, type="daemon"),
        lambda s: s.fail(0, "powerUsage", "lost"),
        lambda s: s.fail(0, "*", "broken"),
        lambda s: s.event(0, "explosion"),
        lambda s: s.mig(0, 8),
        lambda s: s.at(-1),
    ):
        with pytest.raises(ScenarioError):
            mistake(Scenario())


def test_values_set_twice_for_one_time_count_once() -> None:
    scenario = Scenario().gpu(0, util_gpu=1).gpu(0, util_gpu=2)
    scenario.at(1.5).gpu(0, util_gpu=3)
    assert scenario.text() == "gpu.0.util_gpu = 2\n@1.5 gpu.0.util_gpu = 3\n"


# Identity and values


def test_identity(driver: Driver) -> None:
    driver.play(one(count=3).driver("570.1", cuda="12.8", nvml="12.570.1"))
    assert binding.nvmlSystemGetDriverVersion() == "570.1"
    assert binding.nvmlSystemGetNVMLVersion() == "12.570.1"
    assert binding.nvmlSystemGetCudaDriverVersion() == binding.nvmlSystemGetCudaDriverVersion_v2() == 12080
    assert binding.nvmlDeviceGetCount() == 3
    gpu = driver.gpu(2)
    assert binding.nvmlDeviceGetUUID(gpu) == scenarios.uuid_of(2)
    assert binding.nvmlDeviceGetName(gpu) == "NVIDIA H200"
    assert binding.nvmlDeviceGetSerial(gpu) == "1650000000002"
    assert binding.nvmlDeviceGetIndex(gpu) == binding.nvmlDeviceGetMinorNumber(gpu) == 2
    assert binding.nvmlDeviceGetPciInfo(gpu).busId == "00000000:03:00.0"
    assert binding.nvmlDeviceGetArchitecture(gpu) == binding.NVML_DEVICE_ARCH_HOPPER
    assert binding.nvmlDeviceGetBrand(gpu) == binding.NVML_BRAND_NVIDIA
    assert binding.nvmlDeviceGetCudaComputeCapability(gpu) == (9, 0)
    by_uuid = binding.nvmlDeviceGetHandleByUUID(scenarios.uuid_of(2))
    by_bus = binding.nvmlDeviceGetHandleByPciBusId("0000:03:00.0")
    assert binding.nvmlDeviceGetIndex(by_uuid) == binding.nvmlDeviceGetIndex(by_bus) == 2
    refuses(binding.NVML_ERROR_NOT_FOUND, lambda: binding.nvmlDeviceGetHandleByUUID("GPU-x"))
    refuses(binding.NVML_ERROR_INVALID_ARGUMENT, lambda: driver.gpu(3))


def test_memory_of_both_versions(driver: Driver) -> None:
    driver.play(Scenario().count(1).gpu(0, total_mib=1000, used_mib=300, reserved_mib=50))
    first = binding.nvmlDeviceGetMemoryInfo(driver.gpu())
    second = binding.nvmlDeviceGetMemoryInfo(driver.gpu(), binding.nvmlMemory_v2)
    assert (first.total, first.used, first.free) == (1000 * MIB, 350 * MIB, 650 * MIB)
    assert (second.total, second.used, second.reserved, second.free) == (
        1000 * MIB, 300 * MIB, 50 * MIB, 650 * MIB,
    )  # fmt: skip
    refuses(25, lambda: binding.nvmlDeviceGetMemoryInfo(driver.gpu(), 0x01000028))


def test_single_values(driver: Driver) -> None:
    s = one().gpu(0, util_gpu=71, util_mem=33, power_mw=512345, temp_gpu=66, clock_sm=1755, pstate=2)
    s.gpu(0, clocks_event_reasons=0x48, bar1_used_mib=7, pcie_replay=4, remapped_pending=1, retired_sbe=3)
    s.ecc(0, "uncorrected", "aggregate", 2).ecc(0, "uncorrected", "aggregate", 1, location="dram")
    s.nvlink(0, 3, state=0, replay=9).gpu(0, retired_dbe=0, retired_pending=0)
    driver.play(s)
    gpu = driver.gpu()
    rates = binding.nvmlDeviceGetUtilizationRates(gpu)
    assert (rates.gpu, rates.memory) == (71, 33)
    assert binding.nvmlDeviceGetPowerUsage(gpu) == 512345
    assert binding.nvmlDeviceGetEnforcedPowerLimit(gpu) == 700000
    assert binding.nvmlDeviceGetTemperature(gpu, 0) == binding.nvmlDeviceGetTemperatureV(gpu, 0) == 66
    assert binding.nvmlDeviceGetTemperatureThreshold(gpu, 1) == 92
    assert binding.nvmlDeviceGetClockInfo(gpu, binding.NVML_CLOCK_SM) == 1755
    assert binding.nvmlDeviceGetMaxClockInfo(gpu, binding.NVML_CLOCK_SM) == 1980
    assert binding.nvmlDeviceGetPerformanceState(gpu) == 2
    assert binding.nvmlDeviceGetCurrentClocksEventReasons(gpu) == 0x48
    assert binding.nvmlDeviceGetBAR1MemoryInfo(gpu).bar1Used == 7 * MIB
    assert binding.nvmlDeviceGetPcieReplayCounter(gpu) == 4
    assert binding.nvmlDeviceGetRemappedRows(gpu) == (0, 0, 1, 0)
    assert len(binding.nvmlDeviceGetRetiredPages(gpu, 0)) == 3
    assert binding.nvmlDeviceGetTotalEccErrors(gpu, 1, 1) == 2
    assert binding.nvmlDeviceGetMemoryErrorCounter(gpu, 1, 1, binding.NVML_MEMORY_LOCATION_DRAM) == 1
    assert binding.nvmlDeviceGetEccMode(gpu) == [1, 1]
    assert [binding.nvmlDeviceGetNvLinkState(gpu, link) for link in (2, 3)] == [1, 0]
    assert binding.nvmlDeviceGetNvLinkErrorCounter(gpu, 3, binding.NVML_NVLINK_ERROR_DL_REPLAY) == 9
    refuses(binding.NVML_ERROR_NOT_SUPPORTED, lambda: binding.nvmlDeviceGetNvLinkState(gpu, 18))


def test_what_a_gpu_lacks_is_not_supported(driver: Driver) -> None:
    driver.play(one(RTX_4090))
    gpu = driver.gpu()
    for call in (
        lambda: binding.nvmlDeviceGetMigMode(gpu),
        lambda: binding.nvmlDeviceGetEccMode(gpu),
        lambda: binding.nvmlDeviceGetTotalEccErrors(gpu, 0, 0),
        lambda: binding.nvmlDeviceGetRemappedRows(gpu),
        lambda: binding.nvmlDeviceGetSerial(gpu),
        lambda: binding.nvmlDeviceGetNvLinkState(gpu, 0),
    ):
        refuses(binding.NVML_ERROR_NOT_SUPPORTED, call)


def test_values_change_at_their_time(driver: Driver) -> None:
    s = one().clock(time.monotonic() - 100).gpu("*", util_gpu=1)
    s.gpu(0, util_gpu=2).at(99).gpu(0, util_gpu=3).at(1e6).gpu(0, util_gpu=4)
    driver.play(s)
    assert driver.now() == pytest.approx(100, abs=5)
    assert binding.nvmlDeviceGetUtilizationRates(driver.gpu()).gpu == 3


def test_energy_and_traffic_are_integrals(driver: Driver) -> None:
    s = one().clock(time.monotonic() - 100).gpu(0, power_mw=100_000, pcie_tx_rate=2e6, pcie_rx_bytes=77)
    s.at(10).gpu(0, power_mw=0, pcie_tx_rate=0)
    s.nvlink(0, tx_rate=1024).at(20).nvlink(0, tx_rate=0)
    driver.play(s)
    gpu = driver.gpu()
    assert binding.nvmlDeviceGetTotalEnergyConsumption(gpu) == pytest.approx(1_000_000, abs=2)
    fields = binding.nvmlDeviceGetFieldValues(gpu, [83, 197, 198, (138, 0), (138, 0xFFFFFFFF), (202, 4)])
    values = [f.value.ullVal for f in fields]
    assert values == pytest.approx([1_000_000, 20_000_000, 77, 20, 360, 20480], abs=2)
    assert {f.valueType for f in fields} == {binding.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG}


def test_pcie_throughput_takes_its_20_ms(driver: Driver) -> None:
    driver.play(one().gpu(0, pcie_rx_rate=5_000_000))
    began = time.monotonic()
    assert binding.nvmlDeviceGetPcieThroughput(driver.gpu(), binding.NVML_PCIE_UTIL_RX_BYTES) == 5000
    assert time.monotonic() - began >= 0.02


def test_field_values(driver: Driver) -> None:
    s = one().gpu(0, temp_mem=71, power_instant_mw=600_000, power_mw=500_000, recovery_action=2)
    s.field(0, 300, 5).field(0, 300, 6, scope=1).field(0, 301, 2**64 - 1).field(0, 302, -3, type="int")
    s.field(0, 303, 0.5).field(0, 230, error="not_supported").field(0, 304, 8, scope="all")
    s.field("*", 305, 1, scope=2).field(0, 305, error=15, scope=2)
    driver.play(s)
    wanted = [82, 186, 185, 300, (300, 1), 301, 302, 303, 230, (304, 0xFFFFFFFF), 304, (305, 2), 299]
    got = binding.nvmlDeviceGetFieldValues(driver.gpu(), wanted)
    assert [f.nvmlReturn for f in got] == [0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 3, 15, 3]
    assert [f.value.uiVal for f in got[:5]] == [71, 600_000, 500_000, 5, 6]
    assert (got[0].valueType, got[3].valueType) == (1, 3)
    assert got[5].value.ullVal == 2**64 - 1
    assert (got[6].valueType, got[6].value.siVal) == (5, -3)
    assert (got[7].valueType, got[7].value.dVal) == (0, 0.5)
    assert got[9].value.ullVal == 8
    assert abs(got[0].timestamp / 1e6 - time.time()) < 5


# Samples


def test_a_short_spike_is_in_the_sample_ring(driver: Driver) -> None:
    s = one().clock(time.monotonic() - 10).gpu(0, util_gpu=5)
    s.at(9.705).gpu(0, util_gpu=100).at(9.805).gpu(0, util_gpu=5)
    driver.play(s)
    gpu = driver.gpu()
    kind, ring = binding.nvmlDeviceGetSamples(gpu, binding.NVML_GPU_UTILIZATION_SAMPLES, 0)
    values = [sample.sampleValue.uiVal for sample in ring]
    stamps = [sample.timeStamp for sample in ring]
    assert kind == binding.NVML_VALUE_TYPE_UNSIGNED_INT
    assert len(ring) == 120
    assert values.count(100) == 5
    assert {later - earlier for earlier, later in pairwise(stamps)} <= {19999, 20000, 20001}
    assert abs(stamps[-1] / 1e6 - time.time()) < 5
    refuses(
        binding.NVML_ERROR_NOT_FOUND,
        lambda: binding.nvmlDeviceGetSamples(gpu, 1, stamps[-1] + 3_600_000_000),
    )
    time.sleep(0.05)
    _, fresh = binding.nvmlDeviceGetSamples(gpu, 1, stamps[-1])
    assert fresh[0].timeStamp > stamps[-1]


def test_the_ring_s_period_can_be_set(driver: Driver) -> None:
    driver.play(one().clock(time.monotonic() - 10).gpu(0, sample_period_ms=100, sample_count=7))
    assert len(binding.nvmlDeviceGetSamples(driver.gpu(), 1, 0)[1]) == 7


# Processes


def listed(gpu: object, kind: str = "Compute") -> dict[int, int | None]:
    call = getattr(binding, f"nvmlDeviceGet{kind}RunningProcesses_v3")
    return {process.pid: process.usedGpuMemory for process in call(gpu)}


def test_processes(driver: Driver) -> None:
    s = one(count=2).process(0, 10, mem_mib=100).process(0, 11, mem_mib=None).process(0, 12).gone(0, 12)
    s.process(0, 20, type="graphics", mem_mib=5).process(0, 30, type="mps", mem_mib=6)
    s.process(1, 10, mem_mib=1)
    driver.play(s)
    assert listed(driver.gpu()) == {10: 100 * MIB, 11: None}
    assert listed(driver.gpu(), "Graphics") == {20: 5 * MIB}
    assert listed(driver.gpu(), "MPSCompute") == {30: 6 * MIB}
    assert listed(driver.gpu(1)) == {10: MIB}
    assert {p.pid for p in binding.nvmlDeviceGetComputeRunningProcesses_v2(driver.gpu())} == {10, 11}


def test_many_processes(driver: Driver) -> None:
    s = one()
    for pid in range(1, 2049):
        s.process(0, pid, mem_mib=pid)
    driver.play(s)
    assert len(listed(driver.gpu())) == 2048


def test_processes_that_appear_between_size_and_read(driver: Driver) -> None:
    driver.play(one().process(0, 10).gpu(0, proc_grow=1))
    assert len(listed(driver.gpu())) == 2
    driver.change(one().process(0, 10).gpu(0, proc_grow=100))
    refuses(binding.NVML_ERROR_INSUFFICIENT_SIZE, lambda: listed(driver.gpu()))


def test_process_utilization(driver: Driver) -> None:
    s = one().clock(time.monotonic() - 50).process(0, 10, sm=40, memutil=7, enc=1, dec=2).process(0, 11)
    s.process(0, 12, sm=90).at(47).gone(0, 12)
    s.process(0, 13, sm=90).at(1).process(0, 13)
    driver.play(s)
    gpu = driver.gpu()
    found = {sample.pid: sample for sample in binding.nvmlDeviceGetProcessUtilization(gpu, 0)}
    assert set(found) == {10, 12}
    assert (found[10].smUtil, found[10].memUtil, found[10].encUtil, found[10].decUtil) == (40, 7, 1, 2)
    assert found[12].timeStamp < found[10].timeStamp
    newest = found[12].timeStamp
    assert {s.pid for s in binding.nvmlDeviceGetProcessUtilization(gpu, newest)} == {10}
    infos = binding.nvmlDeviceGetProcessesUtilizationInfo(gpu, 0)
    assert {info.pid: info.smUtil for info in infos} == {10: 40, 12: 90}
    driver.change(one().process(0, 10))
    refuses(binding.NVML_ERROR_NOT_FOUND, lambda: binding.nvmlDeviceGetProcessUtilization(gpu, 0))


def test_process_utilization_of_bad_drivers(driver: Driver) -> None:
    driver.play(one().process(0, 10, sm=40).gpu(0, proc_util_garbage=1))
    found = binding.nvmlDeviceGetProcessUtilization(driver.gpu(), 0)
    assert {sample.pid for sample in found} == {0, 10, 3735928559}
    assert max(sample.smUtil for sample in found) == 2**32 - 1
    driver.change(one().process(0, 10, sm=40).gpu(0, proc_util_zero=1))
    refuses(binding.NVML_SUCCESS, lambda: binding.nvmlDeviceGetProcessUtilization(driver.gpu(), 0))


# MIG


def test_mig(driver: Driver) -> None:
    s = one().gpu(0, mig_mode=1)
    s.mig(0, 0, gi=7, ci=0, total_mib=16384, used_mib=1000, sm=16, ce=1)
    s.mig(0, 2, uuid="MIG-b", gi=9, profile="3g.71gb", slices=3, ci_slices=3).mig(0, 3).mig_gone(0, 3)
    s.process(0, 10, mem_mib=900, gi=7, ci=0, sm=50).process(0, 11, mem_mib=90, gi=9, ci=0)
    driver.play(s)
    gpu = driver.gpu()
    assert binding.nvmlDeviceGetMigMode(gpu) == [1, 1]
    assert binding.nvmlDeviceGetMaxMigDeviceCount(gpu) == 7
    mig = binding.nvmlDeviceGetMigDeviceHandleByIndex(gpu, 0)
    for absent in (1, 3, 6):
        with pytest.raises(binding.NVMLError_NotFound):
            binding.nvmlDeviceGetMigDeviceHandleByIndex(gpu, absent)
    assert binding.nvmlDeviceGetUUID(mig) == scenarios.mig_uuid_of(0, 0)
    assert binding.nvmlDeviceGetName(mig) == "NVIDIA H200 MIG 1g.18gb"
    assert binding.nvmlDeviceGetGpuInstanceId(mig) == 7
    assert binding.nvmlDeviceGetComputeInstanceId(mig) == 0
    assert binding.nvmlDeviceIsMigDeviceHandle(mig).value == 1
    assert binding.nvmlDeviceIsMigDeviceHandle(gpu).value == 0
    parent = binding.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(mig)
    assert binding.nvmlDeviceGetUUID(parent) == scenarios.uuid_of(0)
    assert binding.nvmlDeviceGetMemoryInfo(mig, binding.nvmlMemory_v2).used == 1000 * MIB
    assert binding.nvmlDeviceGetAttributes_v2(mig).multiprocessorCount == 16
    assert binding.nvmlDeviceGetGpuInstanceId(binding.nvmlDeviceGetHandleByUUID("MIG-b")) == 9
    assert listed(mig) == {10: 900 * MIB}
    assert listed(gpu) == {10: 900 * MIB, 11: 90 * MIB}
    for call in (
        lambda: binding.nvmlDeviceGetUtilizationRates(gpu),
        lambda: binding.nvmlDeviceGetSamples(gpu, 1, 0),
        lambda: binding.nvmlDeviceGetProcessUtilization(gpu, 0),
        lambda: binding.nvmlDeviceGetPowerUsage(mig),
    ):
        refuses(binding.NVML_ERROR_NOT_SUPPORTED, call)
    driver.change(one().gpu(0, mig_mode=1).mig_gone(0, 0))
    refuses(binding.NVML_ERROR_NOT_FOUND, lambda: binding.nvmlDeviceGetUUID(mig))


# GPM


def metrics(first: object, second: object, *ids: int) -> list[tuple[int, float]]:
    get = binding.c_nvmlGpmMetricsGet_t(version=binding.NVML_GPM_METRICS_GET_VERSION, numMetrics=len(ids))
    get.sample1, get.sample2 = first, second
    for position, metric in enumerate(ids):
        get.metrics[position].metricId = metric
    binding.nvmlGpmMetricsGet(get)
    return [(m.nvmlReturn, m.value) for m in get.metrics[: len(ids)]]


def test_gpm_means_lie_between_the_samples(driver: Driver) -> None:
    start = time.monotonic()
    s = one().clock(start).gpm(0, {2: 0.0, 20: 10.5}).at(0.3).gpm(0, {2: 80.0})
    driver.play(s)
    gpu = driver.gpu()
    assert binding.nvmlGpmQueryDeviceSupport(gpu).isSupportedDevice == 1
    first, second = binding.nvmlGpmSampleAlloc(), binding.nvmlGpmSampleAlloc()
    before = driver.now()
    binding.nvmlGpmSampleGet(gpu, first)
    after = driver.now()
    refuses(binding.NVML_ERROR_INVALID_ARGUMENT, lambda: metrics(first, second, 2))
    time.sleep(max(0.0, start + 0.6 - time.monotonic()))
    late = driver.now()
    binding.nvmlGpmSampleGet(gpu, second)
    later = driver.now()
    (ok, busy), (_, rate), (missing, _) = metrics(first, second, 2, 20, 5)
    assert (ok, missing) == (0, binding.NVML_ERROR_NOT_SUPPORTED)
    least = 80 * (late - max(0.3, before)) / (late - before)
    most = 80 * (later - max(0.3, after)) / (later - after)
    assert least - 1e-6 <= busy <= most + 1e-6
    assert rate == pytest.approx(10.5)
    refuses(binding.NVML_ERROR_INVALID_ARGUMENT, lambda: metrics(second, first, 2))
    assert driver.library.fakeNvmlLiveGpmSamples() == 2
    for sample in (first, second):
        binding.nvmlGpmSampleFree(sample)
    assert driver.library.fakeNvmlLiveGpmSamples() == 0
    refuses(binding.NVML_ERROR_INVALID_ARGUMENT, lambda: binding.nvmlGpmSampleFree(first))


def test_gpm_of_a_mig_instance(driver: Driver) -> None:
    driver.play(one().gpu(0, mig_mode=1).mig(0, 1, gi=5).gpm(0, {2: 33.0}, mig=1))
    pair = [binding.nvmlGpmSampleAlloc() for _ in range(2)]
    binding.nvmlGpmMigSampleGet(driver.gpu(), 5, pair[0])
    time.sleep(0.11)
    binding.nvmlGpmMigSampleGet(driver.gpu(), 5, pair[1])
    assert metrics(*pair, 2) == [(0, pytest.approx(33.0))]
    refuses(binding.NVML_ERROR_NOT_FOUND, lambda: binding.nvmlGpmMigSampleGet(driver.gpu(), 6, pair[0]))
    for sample in pair:
        binding.nvmlGpmSampleFree(sample)


def test_gpus_without_gpm(driver: Driver) -> None:
    driver.play(one(A100))
    sample = binding.nvmlGpmSampleAlloc()
    assert binding.nvmlGpmQueryDeviceSupport(driver.gpu()).isSupportedDevice == 0
    refuses(binding.NVML_ERROR_NOT_SUPPORTED, lambda: binding.nvmlGpmSampleGet(driver.gpu(), sample))
    binding.nvmlGpmSampleFree(sample)


# Failures, hangs, reloads


def test_failures(driver: Driver) -> None:
    s = one(count=3).fail(0, "nvmlDeviceGetPowerUsage", "no_permission").fail(1, "*", "reset_required")
    s.fail(1, "nvmlDeviceGetName", "ok").gpu(2, util_gpu=1)
    driver.play(s)
    first, second, third = (driver.gpu(0), None, driver.gpu(2))
    refuses(binding.NVML_ERROR_NO_PERMISSION, lambda: binding.nvmlDeviceGetPowerUsage(first))
    assert binding.nvmlDeviceGetName(first)
    refuses(binding.NVML_ERROR_RESET_REQUIRED, lambda: driver.gpu(1))
    driver.change(one(count=3).clear(1))
    second = driver.gpu(1)
    assert binding.nvmlDeviceGetPowerUsage(second) == 70_000
    driver.change(one(count=3).gpu(2, lost=1))
    refuses(binding.NVML_ERROR_GPU_IS_LOST, lambda: binding.nvmlDeviceGetName(third))
    refuses(binding.NVML_ERROR_GPU_IS_LOST, lambda: driver.gpu(2))
    driver.change(one(count=2))
    refuses(binding.NVML_ERROR_GPU_IS_LOST, lambda: binding.nvmlDeviceGetName(third))


def test_a_failing_init(driver: Driver) -> None:
    one().fail(None, "nvmlInitWithFlags", "timeout").write(driver.path)
    refuses(binding.NVML_ERROR_TIMEOUT, binding.nvmlInit)
    for state, code in (("not_loaded", 9), ("version_mismatch", 18), ("reloading", 9)):
        one().driver(state=state).write(driver.path)
        refuses(code, binding.nvmlInit)
    assert driver.library.fakeNvmlInits() == 0
    driver.play(one())
    assert driver.library.fakeNvmlInits() == 1


def test_a_hang_blocks_one_gpu_until_it_is_cleared(driver: Driver) -> None:
    driver.play(one(count=2).hang(0, "nvmlDeviceGetPowerUsage", 60))
    hung, free = driver.gpu(0), driver.gpu(1)
    result: list[int] = []
    thread = threading.Thread(target=lambda: result.append(binding.nvmlDeviceGetPowerUsage(hung)))
    thread.start()
    assert binding.nvmlDeviceGetPowerUsage(free) == 70_000
    assert binding.nvmlDeviceGetName(hung)
    time.sleep(0.1)
    assert not result
    one(count=2).clear(0, "nvmlDeviceGetPowerUsage").write(driver.path)
    thread.join(20)
    assert result == [70_000]


def test_a_hang_ends_by_itself(driver: Driver) -> None:
    driver.play(one().hang("*", "*", 0.1))
    began = time.monotonic()
    driver.gpu()
    assert time.monotonic() - began >= 0.1


def test_handles_die_with_a_driver_reload(driver: Driver) -> None:
    driver.play(one())
    old = driver.gpu()
    driver.change(one().driver(state="reloading"))
    refuses(binding.NVML_ERROR_UNINITIALIZED, lambda: binding.nvmlDeviceGetName(old))
    driver.change(one().driver(generation=1))
    refuses(binding.NVML_ERROR_UNINITIALIZED, lambda: binding.nvmlDeviceGetName(old))
    refuses(binding.NVML_ERROR_UNINITIALIZED, driver.gpu)
    binding.nvmlShutdown()
    binding.nvmlInit()
    refuses(binding.NVML_ERROR_UNINITIALIZED, lambda: binding.nvmlDeviceGetName(old))
    assert binding.nvmlDeviceGetName(driver.gpu()) == "NVIDIA H200"


def test_calls_are_counted(driver: Driver) -> None:
    driver.play(one())
    gpu = driver.gpu()
    calls = driver.library.fakeNvmlCalls
    before, all_before = calls(b"nvmlDeviceGetName"), calls(b"*")
    binding.nvmlDeviceGetName(gpu)
    assert (calls(b"nvmlDeviceGetName") - before, calls(b"*") - all_before) == (1, 1)


def test_bad_handles(driver: Driver) -> None:
    driver.play(one())
    for bits in (0, 1, 0xFFFFFFFFFFFFFFFF):
        handle = ctypes.cast(bits, binding.c_nvmlDevice_t)
        refuses(binding.NVML_ERROR_INVALID_ARGUMENT, lambda h=handle: binding.nvmlDeviceGetName(h))
    binding.nvmlShutdown()
    refuses(binding.NVML_ERROR_UNINITIALIZED, driver.gpu)


# Events


def drain(event_set: object, timeout_ms: int = 0) -> list[tuple[int, int]]:
    found = []
    while True:
        try:
            data = binding.nvmlEventSetWait_v2(event_set, timeout_ms)
        except binding.NVMLError_Timeout:
            return found
        found.append((data.eventType, data.eventData))


XID = binding.nvmlEventTypeXidCriticalError


def test_events_come_once_to_those_who_asked(driver: Driver) -> None:
    start = time.monotonic()
    s = one(count=2).clock(start).event(0, "xid", 13)
    driver.play(s)
    sets = [binding.nvmlEventSetCreate() for _ in range(3)]
    binding.nvmlDeviceRegisterEvents(driver.gpu(), XID, sets[0])
    binding.nvmlDeviceRegisterEvents(driver.gpu(), binding.nvmlEventTypeDoubleBitEccError, sets[1])
    at = driver.now() + 0.15
    s.at(at).event(0, "xid", 79, gi=3).event(1, "xid", 48).event(0, "ecc_dbe")
    driver.change(s)
    data = binding.nvmlEventSetWait_v2(sets[0], 10_000)
    assert driver.now() >= at
    assert (data.eventType, data.eventData, data.gpuInstanceId) == (XID, 79, 3)
    assert binding.nvmlDeviceGetUUID(data.device) == scenarios.uuid_of(0)
    assert drain(sets[1]) == [(binding.nvmlEventTypeDoubleBitEccError, 0)]
    binding.nvmlDeviceRegisterEvents(driver.gpu(), XID, sets[2])
    driver.change(s.gpu(0, util_gpu=9))
    assert [drain(event_set) for event_set in sets] == [[], [], []]
    s.at(driver.now()).event(0, "xid", 79)
    driver.change(s)
    assert [drain(event_set) for event_set in sets] == [[(XID, 79)], [], [(XID, 79)]]
    assert driver.library.fakeNvmlLiveEventSets() == 3
    for event_set in sets:
        binding.nvmlEventSetFree(event_set)
    assert driver.library.fakeNvmlLiveEventSets() == 0


def test_an_event_set_can_die(driver: Driver) -> None:
    driver.play(one())
    event_set = binding.nvmlEventSetCreate()
    binding.nvmlDeviceRegisterEvents(driver.gpu(), XID, event_set)
    result: list[int] = []

    def wait() -> None:
        try:
            binding.nvmlEventSetWait_v2(event_set, 30_000)
        except binding.NVMLError as error:
            result.append(error.value)

    thread = threading.Thread(target=wait)
    thread.start()
    one().fail(None, "nvmlEventSetWait_v2", "unknown").write(driver.path)
    thread.join(20)
    assert result == [binding.NVML_ERROR_UNKNOWN]
    binding.nvmlEventSetFree(event_set)
    refuses(binding.NVML_ERROR_INVALID_ARGUMENT, lambda: binding.nvmlEventSetFree(event_set))


def test_unsupported_event_types_are_refused(driver: Driver) -> None:
    driver.play(one().gpu(0, event_types=1))
    event_set = binding.nvmlEventSetCreate()
    assert binding.nvmlDeviceGetSupportedEventTypes(driver.gpu()) == 1
    refuses(3, lambda: binding.nvmlDeviceRegisterEvents(driver.gpu(), XID, event_set))
    binding.nvmlEventSetFree(event_set)


# The file


BAD_LINES = (
    "gpu.0.utilisation = 1",
    "gpu.64.util_gpu = 1",
    "gpu.0.util_gpu = many",
    "gpu.0.util_gpu",
    "gpu.0.util_gpu =",
    "@x gpu.0.util_gpu = 1",
    "@-1 gpu.0.util_gpu = 1",
    "@5",
    "gpu.count = 65",
    "gpu.0.proc.1 = type=daemon",
    "gpu.*.proc.1 = type=compute",
    "gpu.0.event = explosion",
    "gpu.0.fail.nvmlNoSuch = lost",
    "gpu.0.fail.* = nonsense",
    "gpu.0.mig.0 = gi=1",
    "gpu.0.field.x = 1",
    "gpu.0.a.b.c.d.e.f.g.h = 1",
    "driver.state = odd",
    "gpu.0.name = " + "x" * 2000,
    "gpu.0.name = a\0b",
)


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_fails_init_and_is_named(
    driver: Driver, capfd: pytest.CaptureFixture[str], line: str
) -> None:
    driver.path.write_text(f"# a comment\n\ngpu.count = 1\n{line}\n")
    refuses(binding.NVML_ERROR_UNKNOWN, binding.nvmlInit)
    named = f"{driver.path}:{'1' if chr(0) in line else '4'}: "
    assert capfd.readouterr().err.startswith(named)


def test_more_than_2048_processes_are_refused(driver: Driver) -> None:
    s = one()
    for pid in range(1, 2050):
        s.process(0, pid)
    s.write(driver.path)
    refuses(binding.NVML_ERROR_UNKNOWN, binding.nvmlInit)


def test_a_missing_file_fails_init(driver: Driver, capfd: pytest.CaptureFixture[str]) -> None:
    refuses(binding.NVML_ERROR_UNKNOWN, binding.nvmlInit)
    assert "cannot read" in capfd.readouterr().err


def test_a_bad_rewrite_is_told_once_and_ignored(driver: Driver, capfd: pytest.CaptureFixture[str]) -> None:
    driver.play(one().gpu(0, util_gpu=7))
    driver.path.write_text("nonsense\n")
    for _ in range(3):
        driver.library.fakeNvmlReload()
    assert capfd.readouterr().err.count("\n") == 1
    assert binding.nvmlDeviceGetUtilizationRates(driver.gpu()).gpu == 7


def test_a_rewrite_keeps_the_clock(driver: Driver) -> None:
    driver.play(one())
    time.sleep(0.05)
    before = driver.now()
    driver.change(one().gpu(0, util_gpu=3))
    assert driver.now() >= before >= 0.05
    assert binding.nvmlDeviceGetUtilizationRates(driver.gpu()).gpu == 3


def test_readers_see_whole_states_while_the_file_is_rewritten(driver: Driver) -> None:
    def state(number: int) -> Scenario:
        values = one().gpu(0, used_mib=number, total_mib=1000 + number, reserved_mib=0)
        return values.process(0, 1, mem_mib=number)

    driver.play(state(0))
    gpu = driver.gpu()
    done = threading.Event()
    frees: set[int] = set()

    def read() -> None:
        while not done.is_set():
            memory = binding.nvmlDeviceGetMemoryInfo(gpu)
            frees.add(memory.total - memory.used)
            assert set(listed(gpu)) == {1}

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(1, 201):
        state(number).write(driver.path)
        driver.library.fakeNvmlReload()
    done.set()
    for reader in readers:
        reader.join(20)
    assert frees == {1000 * MIB}
    assert binding.nvmlDeviceGetMemoryInfo(gpu).used == 200 * MIB


# Other processes and other drivers


def run_python(code: str, library: Path, scenario: Path) -> str:
    folder = str(library.parent)
    environment = os.environ | {"LD_LIBRARY_PATH": folder, "FAKE_NVML_SCENARIO": str(scenario)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_binding_finds_the_library_on_the_loader_s_path(tmp_path: Path) -> None:
    path = one(count=4).write(tmp_path / "scenario")
    code = "import pynvml as n; n.nvmlInit(); print(n.nvmlDeviceGetCount())"
    assert run_python(code, build(), path) == "4"


def test_an_old_driver_lacks_the_new_functions(tmp_path: Path) -> None:
    path = one(A100).gpu(0, used_mib=5).process(0, 7, mem_mib=1).write(tmp_path / "scenario")
    code = """
import pynvml as n
n.nvmlInit()
g = n.nvmlDeviceGetHandleByIndex(0)
def lacks(call):
    try:
        call()
    except (n.NVMLError_FunctionNotFound, n.NVMLLibraryMismatchError):
        return True
print([lacks(c) for c in (
    lambda: n.nvmlDeviceGetComputeRunningProcesses_v3(g),
    lambda: n.nvmlDeviceGetMemoryInfo(g, n.nvmlMemory_v2),
    lambda: n.nvmlDeviceGetProcessesUtilizationInfo(g, 0),
    lambda: n.nvmlDeviceGetCurrentClocksEventReasons(g),
    lambda: n.nvmlDeviceGetTemperatureV(g, 0),
    n.nvmlGpmSampleAlloc,
)].count(True), n.nvmlDeviceGetComputeRunningProcesses_v2(g)[0].pid, n.nvmlDeviceGetMemoryInfo(g).used >> 20,
    n.nvmlDeviceGetCurrentClocksThrottleReasons(g), n.nvmlDeviceGetTemperature(g, 0))
"""
    assert run_python(code, build(old=True), path) == "6 7 605 1 32"


def test_the_build_is_cached_and_printed(tmp_path: Path) -> None:
    environment = os.environ | {"GPUGLASS_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "tests.fakes.nvml"]
    times = set()
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        path = Path(done.stdout.strip())
        assert path.name == "libnvidia-ml.so.1"
        assert path.is_relative_to(tmp_path)
        times.add(path.stat().st_mtime_ns)
    assert len(times) == 1


def test_no_compiler_is_one_clear_line(tmp_path: Path) -> None:
    environment = os.environ | {"CC": "no-such-compiler", "GPUGLASS_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "tests.fakes.nvml"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "install the package gcc" in done.stderr
    assert done.stderr.count("\n") == 1
