"""Lost, hung, reset and vanished GPUs, drivers that come and go, XIDs: what stays, what disappears, what goes
on."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from exporters.gpu.xid_codes import CLASS
from gpuglass.demo.scenario import H200, RTX_4090, Scenario
from tests.support.node import Node, running_node

UP = "gpuglass_gpu_up"
POWER = "gpuglass_gpu_power_watts"
TOTAL = "gpuglass_gpu_memory_total_bytes"


def two() -> Scenario:
    return Scenario().gpus(2, H200)


def both_up(node: Node) -> None:
    node.wait(lambda: [s.value for s in node.samples(UP)] == [1, 1], what="both GPUs up")
    node.wait(lambda: len(node.samples(TOTAL)) == 2, what="the slow tier of both")


def data_of(node: Node, device: str) -> set[str]:
    """Families that have samples of a GPU, without identity and health, which outlive its data."""
    lasting = (
        "info",
        "up",
        "xid_errors_total",
        "xid_last_timestamp_seconds",
        "snapshot_age_seconds",
        "capability",
    )
    return {s.name for s in node.samples(device=device)} - {f"gpuglass_gpu_{name}" for name in lasting}


@pytest.mark.parametrize("code", ["lost", "reset_required"])
def test_a_gpu_that_is_lost_keeps_its_identity_and_loses_its_data(tmp_path: Path, code: str) -> None:
    with running_node(tmp_path, two()) as node:
        both_up(node)
        node.rewrite(two().fail(1, "*", code))
        node.wait_value(UP, 0, device="nvidia1", reason=code)
        node.wait(lambda: not data_of(node, "nvidia1"), what="no data of the lost GPU")
        assert node.value("gpuglass_gpu_info", device="nvidia1") == 1
        assert node.value(UP, device="nvidia0") == 1
        assert node.value(POWER, device="nvidia0") == 70
        # The driver is loaded again to get it back, and still lists it: the reason stays.
        node.wait(lambda: node.part._loads >= 3, seconds=30, what="two more attempts")
        node.wait_value(UP, 0, device="nvidia1", reason=code)


def test_the_other_gpus_go_on_sampling_while_one_is_lost(tmp_path: Path) -> None:
    with running_node(tmp_path, two()) as node:
        both_up(node)
        node.rewrite(two().gpu(1, lost=1).gpu(0, power_mw=300_000))
        node.wait_value(UP, 0, device="nvidia1", reason="lost")
        node.wait_value(POWER, 300, device="nvidia0")


def test_a_lost_gpu_that_comes_back_is_up_again_without_a_restart(tmp_path: Path) -> None:
    with running_node(tmp_path, two()) as node:
        both_up(node)
        node.rewrite(two().gpu(1, lost=1))
        node.wait_value(UP, 0, device="nvidia1", reason="lost")
        node.rewrite(two())
        node.wait_value(UP, 1, device="nvidia1")
        node.wait_value(POWER, 70, device="nvidia1")
        assert len(node.samples(UP)) == 2


def test_a_gpu_that_the_driver_lists_no_more_is_gone(tmp_path: Path) -> None:
    with running_node(tmp_path, two()) as node:
        both_up(node)
        node.rewrite(two().count(1))
        node.wait_value(UP, 0, device="nvidia1", reason="gone")
        node.wait_value(UP, 1, device="nvidia0")
        assert node.value("gpuglass_gpus") == 1
        node.rewrite(two())
        node.wait_value(UP, 1, device="nvidia1")


def test_a_call_that_hangs_blocks_neither_scrapes_nor_other_gpus_nor_the_exit(tmp_path: Path) -> None:
    with running_node(tmp_path, two()) as node:
        both_up(node)
        node.rewrite(two().hang(1, "nvmlDeviceGetPowerUsage", 60).gpu(0, power_mw=250_000))
        node.wait_value(UP, 0, device="nvidia1", reason="hung")
        node.wait(lambda: not data_of(node, "nvidia1"), what="no data of the hung GPU")
        node.wait_value(POWER, 250, device="nvidia0")
        started = time.monotonic()
        assert node.samples(UP)
        assert time.monotonic() - started < 20, "a scrape waited for the driver"
        started = time.monotonic()
        assert node.stop(1.0) is False, "the stuck thread must be reported"
        assert time.monotonic() - started < 20


def test_the_library_stays_loaded_while_pcie_traffic_is_measured(tmp_path: Path) -> None:
    """The measuring thread spends most of its time inside the driver: unloading it there would crash us."""

    def measuring() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "pcie-nvidia0"]

    scenario = Scenario().gpus(1, RTX_4090).hang(0, "nvmlDeviceGetPcieThroughput", 0.5)
    scenario.field(0, 197, None, error="not_supported").field(0, 198, None, error="not_supported")
    with running_node(tmp_path, scenario) as node:
        node.wait(measuring, what="the thread")
        time.sleep(0.2)  # it waits an interval of 0.1 s, then it calls
        assert node.stop()
        assert not measuring()


def test_a_hung_gpu_whose_call_returns_is_up_again(tmp_path: Path) -> None:
    with running_node(tmp_path, two()) as node:
        both_up(node)
        node.rewrite(two().hang(1, "nvmlDeviceGetMemoryInfo_v2", 60))
        node.wait_value(UP, 0, device="nvidia1", reason="hung")
        node.rewrite(two())
        node.wait_value(UP, 1, device="nvidia1")


def test_a_driver_that_hangs_when_it_is_loaded_is_said_to_hang(tmp_path: Path) -> None:
    with running_node(tmp_path, two().hang(None, "nvmlInitWithFlags", 60)) as node:
        node.wait_value("gpuglass_gpu_driver_up", 0, reason="hung")
        node.rewrite(two())
        both_up(node)
        assert node.value("gpuglass_gpu_driver_up") == 1


def test_a_reloaded_driver_is_picked_up(tmp_path: Path) -> None:
    with running_node(tmp_path, two().driver("550.54.15", generation=1)) as node:
        both_up(node)
        node.rewrite(two().driver("550.54.15", state="reloading", generation=1))
        node.wait(lambda: [s.value for s in node.samples(UP)] == [0, 0], what="both GPUs down")
        node.wait(lambda: node.value("gpuglass_gpu_driver_up") == 0, what="the driver down")
        assert not data_of(node, "nvidia0")
        node.rewrite(two().driver("580.65.06", generation=2))
        both_up(node)
        assert {s.labels["driver_version"] for s in node.samples("gpuglass_gpu_info")} == {"580.65.06"}
        assert (node.value("gpuglass_gpu_driver_loads_total") or 0) >= 2


def test_a_library_that_does_not_fit_the_driver_is_named_and_tried_again(tmp_path: Path) -> None:
    with running_node(tmp_path, two().driver("580.65.06", state="version_mismatch")) as node:
        node.wait_value("gpuglass_gpu_driver_up", 0, reason="version_mismatch")
        node.rewrite(two().driver("580.65.06"))
        both_up(node)


def test_without_any_driver_the_part_runs_and_says_so(tmp_path: Path) -> None:
    with running_node(tmp_path, two(), library=str(tmp_path / "libnvidia-ml.so.1")) as node:
        node.wait_value("gpuglass_gpu_driver_up", 0, reason="library_not_found")
        assert node.samples(UP) == []
        assert node.samples("gpuglass_gpus") == []
        assert node.part.not_ready() is None


def test_a_driver_that_is_installed_later_is_found(tmp_path: Path) -> None:
    from tests.fakes.nvml import build

    library = tmp_path / "libnvidia-ml.so.1"
    with running_node(tmp_path, two(), library=str(library)) as node:
        node.wait_value("gpuglass_gpu_driver_up", 0, reason="library_not_found")
        library.write_bytes(build().read_bytes())
        both_up(node)


def test_a_gpu_whose_every_call_fails_is_down_with_reason_error(tmp_path: Path) -> None:
    with running_node(tmp_path, two()) as node:
        both_up(node)
        node.rewrite(two().fail(1, "*", "unknown"))
        node.wait_value(UP, 0, device="nvidia1", reason="error")
        node.wait_value(UP, 1, device="nvidia0")


def test_one_call_that_fails_costs_one_value_and_marks_its_collector(tmp_path: Path) -> None:
    with running_node(tmp_path, two()) as node:
        both_up(node)
        node.rewrite(two().fail(0, "nvmlDeviceGetPowerUsage", "unknown"))
        node.wait_value(POWER, None, device="nvidia0")
        node.wait_value("gpuglass_gpu_collector_success", 0, device="nvidia0", collector="power")
        node.wait_value("gpuglass_gpu_capability", 1, device="nvidia0", field="power", state="error")
        assert node.value(UP, device="nvidia0") == 1
        assert node.value("gpuglass_gpu_collector_success", device="nvidia0", collector="activity") == 1
        assert node.value("gpuglass_gpu_collector_success", device="nvidia1", collector="power") == 1


def test_every_collector_says_its_duration_and_success(tmp_path: Path) -> None:
    with running_node(tmp_path, two()) as node:
        both_up(node)
        success = {
            s.labels["collector"] for s in node.samples("gpuglass_gpu_collector_success", device="nvidia0")
        }
        timed = {s.labels["collector"] for s in node.samples("gpuglass_gpu_collector_duration_seconds")}
        assert success == timed
        assert {
            "activity",
            "memory_used",
            "memory",
            "power",
            "thermals",
            "pcie",
            "nvlink",
            "errors",
            "processes",
        } <= success


def test_known_xids_are_there_at_zero_before_the_first_one(tmp_path: Path) -> None:
    with running_node(tmp_path, two()) as node:
        node.wait(lambda: node.samples("gpuglass_gpu_xid_errors_total"), what="XID series")
        samples = node.samples("gpuglass_gpu_xid_errors_total", device="nvidia0")
        assert {s.labels["xid"] for s in samples} == {str(code) for code in CLASS}
        assert all(s.value == 0 for s in samples)
        assert node.samples("gpuglass_gpu_xid_last_timestamp_seconds") == []


def test_an_xid_is_counted_once_by_gpu_code_and_class(tmp_path: Path) -> None:
    scenario = two()
    scenario.at(1.0).event(1, "xid", 79)
    scenario.at(1.2).event(0, "xid", 31)
    scenario.at(1.4).event(0, "xid", 31)
    with running_node(tmp_path, scenario) as node:
        both_up(node)
        node.wait_value("gpuglass_gpu_xid_errors_total", 2, device="nvidia0", xid="31")
        assert node.value("gpuglass_gpu_xid_errors_total", device="nvidia0", xid="31")
        (hardware,) = node.samples("gpuglass_gpu_xid_errors_total", device="nvidia1", xid="79")
        assert hardware.value == 1
        assert hardware.labels["class"] == "hardware"
        assert node.samples("gpuglass_gpu_xid_errors_total", xid="31")[0].labels["class"] == "application"
        last = node.value("gpuglass_gpu_xid_last_timestamp_seconds", device="nvidia1", xid="79")
        assert last == pytest.approx(time.time(), abs=30)
        assert node.value("gpuglass_gpu_xid_errors_total", device="nvidia1", xid="31") == 0


def test_the_xid_of_a_gpu_that_fell_off_the_bus_is_not_lost_with_it(tmp_path: Path) -> None:
    scenario = two()
    scenario.at(1.5).gpu(1, lost=1)
    scenario.at(1.5).event(1, "xid", 79)
    with running_node(tmp_path, scenario) as node:
        both_up(node)
        node.wait_value(UP, 0, device="nvidia1", reason="lost")
        node.wait_value("gpuglass_gpu_xid_errors_total", 1, device="nvidia1", xid="79")


def test_unknown_xids_are_bounded(tmp_path: Path) -> None:
    scenario = two()
    for code in range(1000, 1060):
        scenario.at(1.0 + code / 100_000).event(0, "xid", code)
    with running_node(tmp_path, scenario) as node:
        both_up(node)
        node.wait(
            lambda: (node.value("gpuglass_gpu_xid_errors_total", xid="other") or 0) == 60 - 32,
            what="the rest",
        )
        unknown = node.samples("gpuglass_gpu_xid_errors_total", **{"class": "unknown"})
        assert len(unknown) == 33
        assert sum(s.value for s in unknown) == 60


def test_where_events_cannot_be_watched_it_is_said_and_there_is_no_zero(tmp_path: Path) -> None:
    with running_node(tmp_path, two().fail(0, "nvmlDeviceRegisterEvents", "no_permission")) as node:
        both_up(node)
        node.wait_value(
            "gpuglass_gpu_capability", 1, device="nvidia0", field="xid_events", state="no_permission"
        )
        assert node.samples("gpuglass_gpu_xid_errors_total", device="nvidia0") == []
        assert node.samples("gpuglass_gpu_xid_errors_total", device="nvidia1")


def test_a_dead_event_set_is_replaced(tmp_path: Path) -> None:
    with running_node(tmp_path, two().fail(None, "nvmlEventSetWait_v2", "unknown")) as node:
        both_up(node)
        time.sleep(0.5)
        scenario = two()
        scenario.at(4.0).event(0, "xid", 48)
        node.rewrite(scenario)
        node.wait_value("gpuglass_gpu_xid_errors_total", 1, 15, device="nvidia0", xid="48")


def test_new_intervals_are_taken_without_a_restart(tmp_path: Path) -> None:
    import msgspec

    from gpuglass.config import Config, GpuConfig, Seconds

    with running_node(tmp_path, two(), interval=5.0, slow_interval=5.0) as node:
        both_up(node)
        config = Config(
            gpu=msgspec.structs.replace(GpuConfig(), interval=Seconds(0.1), slow_interval=Seconds(0.2))
        )
        node.part.reload(config)
        node.rewrite(two().gpu(0, power_mw=111_000))
        node.wait_value(POWER, 111, 8, device="nvidia0")
        node.rewrite(two().gpu(0, power_mw=222_000))
        node.wait_value(POWER, 222, 2, device="nvidia0")
