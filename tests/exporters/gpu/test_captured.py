"""What a real H100 (driver 580, under a matrix product) gave, captured: names, labels and sums still hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gpuglass import catalog
from tests.support.prometheus import promtool_check_metrics

CAPTURE = Path(__file__).parents[2] / "fixtures" / "gpu" / "h100_driver_580.txt"


def captured() -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for metric in text_string_to_metric_families(CAPTURE.read_text()):
        for sample in metric.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def test_every_captured_family_is_still_declared_with_those_labels() -> None:
    samples = captured()
    assert len(samples) > 60
    for name, entries in samples.items():
        family = catalog.BY_NAME[name]
        for labels, _ in entries:
            assert set(family.labels) - family.optional <= set(labels) <= set(family.labels), name


def test_the_captured_parts_add_up_to_their_whole() -> None:
    samples = captured()
    one = {name: entries[0][1] for name, entries in samples.items() if len(entries) == 1}
    parts = sum(value for _, value in samples["gpuglass_process_memory_used_bytes"])
    assert parts + one["gpuglass_gpu_memory_unattributed_bytes"] == one["gpuglass_gpu_memory_used_bytes"]
    memory = sum(one[f"gpuglass_gpu_memory_{part}_bytes"] for part in ("used", "free", "reserved"))
    assert memory == one["gpuglass_gpu_memory_total_bytes"], (
        "version 2 of the call: used does not hold reserved"
    )


def test_the_capture_names_no_machine() -> None:
    text = CAPTURE.read_text()
    assert "GPU-5c0ffee0-0000-4000-8000-000000000000" in text
    assert {labels["gpu_uuid"] for labels, _ in captured()["gpuglass_gpu_up"]} == {
        "GPU-5c0ffee0-0000-4000-8000-000000000000"
    }


@pytest.mark.needs("debian-prometheus")
def test_promtool_finds_nothing_in_the_capture(debian_promtool: Path) -> None:
    assert promtool_check_metrics(CAPTURE.read_text(), debian_promtool) == []
