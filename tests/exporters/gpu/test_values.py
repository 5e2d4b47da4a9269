"""What the exporter says of a healthy GPU, compared with the scenario that the driver played."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from gpuglass.demo.scenario import A100, H200, RTX_4090, Scenario, uuid_of
from tests.support.node import Node, running_node

MIB = 2**20


def one_gpu(model=H200) -> Scenario:
    return Scenario().gpus(1, model)


def up(node: Node, gpus: int = 1) -> None:
    node.wait(
        lambda: len([s for s in node.samples("gpuglass_gpu_up") if s.value == 1]) == gpus, what="GPUs up"
    )


def test_identity_stands_in_the_info_family_and_nowhere_else(tmp_path: Path) -> None:
    with running_node(tmp_path, one_gpu().driver("580.65.06", cuda="13.0")) as node:
        up(node)
        (info,) = node.samples("gpuglass_gpu_info")
        assert info.labels == {
            "device": "nvidia0",
            "gpu_uuid": uuid_of(0),
            "model": "NVIDIA H200",
            "pci_bus_id": "00000000:01:00.0",
            "architecture": "hopper",
            "compute_capability": "9.0",
            "driver_version": "580.65.06",
            "cuda_version": "13.0",
            "mig_mode": "disabled",
        }
        assert not [s for s in node.samples() if "model" in s.labels and s.name != "gpuglass_gpu_info"]


def test_device_is_named_by_minor_number_not_by_index(tmp_path: Path) -> None:
    with running_node(tmp_path, Scenario().gpus(2).gpu(0, minor=5).gpu(1, minor=3)) as node:
        up(node, 2)
        assert node.value("gpuglass_gpu_up", device="nvidia5", gpu_uuid=uuid_of(0)) == 1
        assert node.value("gpuglass_gpu_up", device="nvidia3", gpu_uuid=uuid_of(1)) == 1


def test_memory_parts_add_up_to_the_total(tmp_path: Path) -> None:
    with running_node(tmp_path, one_gpu().gpu(0, used_mib=100_000, reserved_mib=600)) as node:
        node.wait_value("gpuglass_gpu_memory_used_bytes", 100_000 * MIB)
        parts = [
            node.value(f"gpuglass_gpu_memory_{part}_bytes") or 0 for part in ("used", "free", "reserved")
        ]
        assert sum(parts) == node.value("gpuglass_gpu_memory_total_bytes") == 143771 * MIB
        assert parts[2] == 600 * MIB


def test_busy_is_the_mean_and_the_peak_of_the_drivers_samples(tmp_path: Path) -> None:
    # 20 ms samples: of each second, 200 ms are at 100 %; a single look could miss them or see nothing else.
    scenario = one_gpu().gpu(0, util_gpu=10)
    for second in range(30):
        scenario.at(second + 0.5).gpu(0, util_gpu=100)
        scenario.at(second + 0.7).gpu(0, util_gpu=10)
    with running_node(tmp_path, scenario, interval=1.0, slow_interval=1.0) as node:
        up(node)
        time.sleep(2.5)  # the first samples go back to before the scenario began
        node.wait(lambda: node.value("gpuglass_gpu_busy_peak_ratio") == 1.0, what="a peak")
        # Of a look that came late, because much else runs, the mean is of more or less than a period.
        mean = pytest.approx(0.28, abs=0.05)
        node.wait(lambda: node.value("gpuglass_gpu_busy_ratio", source="samples") == mean, what="the mean")


def test_an_idle_gpu_is_zero_and_not_absent(tmp_path: Path) -> None:
    with running_node(tmp_path, one_gpu().gpm(0, {1: 0, 2: 0, 3: 0, 10: 0})) as node:
        node.wait_value("gpuglass_gpu_sm_active_ratio", 0)
        assert node.value("gpuglass_gpu_busy_ratio") == 0
        assert node.value("gpuglass_gpu_graphics_active_ratio") == 0


def test_gpm_gives_sm_activity_occupancy_pipes_and_memory_bandwidth(tmp_path: Path) -> None:
    values = {1: 91.0, 2: 49.123456, 3: 20.5, 4: 3.0, 5: 30.0, 6: 0.0, 7: 29.0, 8: 0.0, 9: 1.0, 10: 40.25}
    with running_node(tmp_path, one_gpu().gpm(0, {**values, 11: 0.5, 12: 12.0, 13: 2.0})) as node:
        node.wait_value("gpuglass_gpu_sm_active_ratio", 0.4912)
        assert node.value("gpuglass_gpu_sm_occupancy_ratio") == 0.205
        assert node.value("gpuglass_gpu_dram_active_ratio") == 0.4025
        pipes = {s.labels["pipe"]: s.value for s in node.samples("gpuglass_gpu_pipe_active_ratio")}
        assert pipes == {
            "integer": 0.03, "tensor": 0.3, "tensor_dfma": 0, "tensor_hmma": 0.29, "tensor_dmma": 0,
            "tensor_imma": 0.01, "fp64": 0.005, "fp32": 0.12, "fp16": 0.02,
        }  # fmt: skip


def test_a_gpm_metric_that_the_card_lacks_costs_that_metric_only(tmp_path: Path) -> None:
    with running_node(tmp_path, one_gpu().gpm(0, {1: 10, 2: 20, 3: None, 10: 5})) as node:
        node.wait_value("gpuglass_gpu_sm_active_ratio", 0.2)
        assert node.value("gpuglass_gpu_sm_occupancy_ratio") is None
        node.wait_value("gpuglass_gpu_capability", 1, field="sm_occupancy", state="unsupported")
        assert node.value("gpuglass_gpu_capability", field="sm_active", state="supported") == 1


def test_a_card_without_gpm_says_so_and_shows_no_zero(tmp_path: Path) -> None:
    with running_node(tmp_path, one_gpu(A100).gpu(0, util_gpu=60)) as node:
        node.wait_value("gpuglass_gpu_busy_ratio", 0.6)
        node.wait_value("gpuglass_gpu_capability", 1, field="gpm", state="unsupported")
        for name in ("sm_active_ratio", "sm_occupancy_ratio", "dram_active_ratio", "pipe_active_ratio"):
            assert node.samples(f"gpuglass_gpu_{name}") == []


def test_memory_controller_busy_is_not_memory_used(tmp_path: Path) -> None:
    with running_node(tmp_path, one_gpu().gpu(0, util_mem=37, used_mib=10)) as node:
        node.wait_value("gpuglass_gpu_memory_controller_busy_ratio", 0.37)
        assert node.value("gpuglass_gpu_memory_used_bytes") == 10 * MIB


def test_pcie_bytes_come_from_the_cards_counters(tmp_path: Path) -> None:
    with running_node(tmp_path, one_gpu().gpu(0, pcie_tx_bytes=123456789012, pcie_rx_bytes=5)) as node:
        node.wait_value("gpuglass_gpu_pcie_transmit_bytes_total", 123456789012, source="counter")
        assert node.value("gpuglass_gpu_pcie_receive_bytes_total") == 5


def test_without_counters_pcie_bytes_are_added_up_from_gpm(tmp_path: Path) -> None:
    scenario = one_gpu().gpm(0, {1: 5, 2: 5, 20: 100.0, 21: 200.0})
    scenario.field(0, 197, None, error="not_supported").field(0, 198, None, error="not_supported")
    with running_node(tmp_path, scenario) as node:
        first = node.wait(
            lambda: node.value("gpuglass_gpu_pcie_receive_bytes_total", source="gpm"), what="bytes"
        )
        node.wait(lambda: (node.value("gpuglass_gpu_pcie_receive_bytes_total") or 0) > first + 50 * MIB)
        sent = node.value("gpuglass_gpu_pcie_transmit_bytes_total") or 0
        assert node.value("gpuglass_gpu_pcie_receive_bytes_total") == pytest.approx(2 * sent, rel=0.01)


def test_counters_of_32_bits_are_not_believed(tmp_path: Path) -> None:
    scenario = one_gpu().gpm(0, {1: 5, 2: 5, 20: 100.0, 21: 200.0})
    scenario.field(0, 197, 123456, type="uint").field(0, 198, 123456, type="uint")
    with running_node(tmp_path, scenario) as node:
        node.wait(
            lambda: node.value("gpuglass_gpu_pcie_receive_bytes_total", source="gpm"), what="bytes from GPM"
        )
        assert node.samples("gpuglass_gpu_pcie_receive_bytes_total", source="counter") == []


def test_as_a_last_resort_pcie_traffic_is_measured_in_a_thread_of_its_own(tmp_path: Path) -> None:
    scenario = one_gpu(RTX_4090).gpu(0, pcie_tx_rate=1_000_000_000, pcie_rx_rate=500_000_000)
    scenario.field(0, 197, None, error="not_supported").field(0, 198, None, error="not_supported")
    with running_node(tmp_path, scenario) as node:
        node.wait(
            lambda: (node.value("gpuglass_gpu_pcie_transmit_bytes_total", source="throughput") or 0) > 5e7,
            what="measured bytes",
        )
        sent = node.value("gpuglass_gpu_pcie_transmit_bytes_total") or 0
        assert node.value("gpuglass_gpu_pcie_receive_bytes_total") == pytest.approx(sent / 2, rel=0.25)


def test_nvlink_bytes_and_errors_are_per_link(tmp_path: Path) -> None:
    scenario = one_gpu().nvlink(0, 3, tx_bytes=4096 * 1024, rx_bytes=1024, replay=7)
    with running_node(tmp_path, scenario) as node:
        node.wait(lambda: len(node.samples("gpuglass_gpu_nvlink_up")) == 18, what="18 links")
        assert node.value("gpuglass_gpu_nvlink_transmit_bytes_total", link="3") == 4096 * 1024
        assert node.value("gpuglass_gpu_nvlink_receive_bytes_total", link="3") == 1024
        assert node.value("gpuglass_gpu_nvlink_transmit_bytes_total", link="4") == 0


def test_a_card_without_nvlink_has_no_links(tmp_path: Path) -> None:
    with running_node(tmp_path, one_gpu(RTX_4090)) as node:
        node.wait_value("gpuglass_gpu_capability", 1, field="nvlink", state="unsupported")
        assert node.samples("gpuglass_gpu_nvlink_up") == []


def test_power_energy_temperatures_and_clocks(tmp_path: Path) -> None:
    scenario = one_gpu().gpu(
        0, power_mw=412_345, energy_mj=9_876_543_210, temp_gpu=61, temp_mem=74, clock_sm=1755, pstate=2
    )
    with running_node(tmp_path, scenario) as node:
        node.wait_value("gpuglass_gpu_power_watts", 412.3)
        node.wait_value("gpuglass_gpu_energy_joules_total", 9_876_543.2)
        assert node.value("gpuglass_gpu_power_limit_watts") == 700
        assert node.value("gpuglass_gpu_temperature_celsius", sensor="gpu") == 61
        assert node.value("gpuglass_gpu_temperature_celsius", sensor="memory") == 74
        assert node.value("gpuglass_gpu_clock_hertz", clock="sm") == 1_755_000_000
        assert node.value("gpuglass_gpu_performance_state") == 2
        assert node.value("gpuglass_gpu_temperature_limit_celsius", limit="slowdown") == 92


def test_throttling_is_a_duration_by_reason_and_a_present_state(tmp_path: Path) -> None:
    scenario = one_gpu().gpu(0, clocks_event_reasons=0x24).field(0, 74, 12_500_000_000, type="ull")
    scenario.field(0, 270, 250_000_000, type="ull")
    with running_node(tmp_path, scenario) as node:
        node.wait_value("gpuglass_gpu_throttle_seconds_total", 12.5, reason="power_cap")
        assert node.value("gpuglass_gpu_throttle_seconds_total", reason="thermal_hardware") == 0.25
        assert node.value("gpuglass_gpu_throttle_active", reason="power_cap") == 1
        assert node.value("gpuglass_gpu_throttle_active", reason="thermal_software") == 1
        assert node.value("gpuglass_gpu_throttle_active", reason="thermal_hardware") == 0


def test_ecc_remapping_and_the_recovery_action(tmp_path: Path) -> None:
    scenario = one_gpu().ecc(0, "uncorrected", "aggregate", 3)
    scenario.gpu(0, remapped_uncorrectable=2, remapped_pending=1, recovery_action=1)
    with running_node(tmp_path, scenario) as node:
        node.wait_value("gpuglass_gpu_ecc_errors_total", 3, type="uncorrected")
        assert node.value("gpuglass_gpu_ecc_errors_total", type="corrected") == 0
        assert node.value("gpuglass_gpu_remapped_rows_total", cause="uncorrected") == 2
        assert node.value("gpuglass_gpu_row_remap_pending") == 1
        assert node.value("gpuglass_gpu_row_remap_failed") == 0
        assert node.value("gpuglass_gpu_recovery_action", action="gpu_reset") == 1


def test_a_card_without_ecc_has_no_error_counts(tmp_path: Path) -> None:
    with running_node(tmp_path, one_gpu(RTX_4090)) as node:
        node.wait_value("gpuglass_gpu_capability", 1, field="ecc_mode", state="unsupported")
        assert node.samples("gpuglass_gpu_ecc_errors_total") == []


def test_the_snapshot_says_its_age_at_the_moment_of_the_scrape(tmp_path: Path) -> None:
    with running_node(tmp_path, one_gpu(), interval=0.5, slow_interval=0.5) as node:
        up(node)
        ages = [
            age for _ in range(40) if (age := node.value("gpuglass_gpu_snapshot_age_seconds")) is not None
        ]
        assert all(0 <= age < 5 for age in ages)
        assert len(set(ages)) > 1


def test_what_permission_is_lacking_for_is_said_and_not_zero(tmp_path: Path) -> None:
    scenario = one_gpu().fail(0, "nvmlDeviceGetBAR1MemoryInfo", "no_permission")
    with running_node(tmp_path, scenario) as node:
        node.wait_value("gpuglass_gpu_capability", 1, field="bar1", state="no_permission")
        assert node.samples("gpuglass_gpu_bar1_used_bytes") == []
        assert node.value("gpuglass_gpu_up") == 1


def test_an_old_driver_gives_what_it_can_and_names_the_rest(tmp_path: Path) -> None:
    proc_scenario = one_gpu(A100).gpu(0, used_mib=1000, util_gpu=40).process(0, 1, mem_mib=900, sm=30)
    with running_node(tmp_path, proc_scenario, old_driver=True) as node:
        up(node)
        node.wait_value("gpuglass_process_memory_used_bytes", 900 * MIB, process="init")
        # Version 1 of the memory call counts what is reserved as used.
        assert node.value("gpuglass_gpu_memory_used_bytes") == 1600 * MIB
        assert node.samples("gpuglass_gpu_memory_reserved_bytes") == []
        assert node.value("gpuglass_gpu_capability", field="memory_reserved", state="missing_function") == 1
        assert node.value("gpuglass_gpu_capability", field="gpm", state="missing_function") == 1
