"""NVIDIA's own libcudart, as PyPI has it: its functions are found, probed in the file itself, and heard when
called.

It gets nowhere without NVIDIA's driver: before anything else it asks `cuGetExportTable` for tables that are
documented nowhere, which the fake driver has not. So its calls fail here, and what the probes hear are calls
of the real functions that fail; that successes are booked is seen with the fake runtime."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ebpf import elf
from ebpf.layout import Kind, Layer
from ebpf.symbols import CONTEXTS, MEMORY, RUNTIME, points
from tests.ebpf.conftest import Rig
from tests.support import cudart

pytestmark = [pytest.mark.needs("cc", "root", "bpf", "ebpf", "cudart")]
VERSIONS = (12, 13)


def library(version: int) -> Path:
    (found,) = [path for path in cudart.libraries() if path.suffix == f".{version}"]
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_all_functions_of_the_table_are_found(version: int) -> None:
    fd = os.open(library(version), os.O_RDONLY)
    try:
        exported = elf.read(fd, (b"cuda",)).functions
    finally:
        os.close(fd)
    found, unknown = points(exported, Layer.RUNTIME, frozenset({MEMORY, CONTEXTS}))
    assert not unknown
    names = {point.symbol for point in found}
    assert names >= RUNTIME.keys()
    assert {"cudaMallocAsync_ptsz", "cudaFreeAsync_ptsz"} <= names
    assert "cudaLaunchKernel" in exported and "cudaLaunchKernel" not in names


@pytest.mark.parametrize("version", VERSIONS)
def test_its_calls_are_heard(rig: Rig, version: int) -> None:
    path = str(library(version))
    player = rig.player()
    player.do("load", path)
    rig.look(player)
    (attached,) = [one for one in rig.tracer.attacher.all() if one.path == path]
    assert attached.layer is Layer.RUNTIME
    assert attached.functions >= len(RUNTIME)

    code, address = player.do("out", "cudaMalloc", 1 << 20)
    assert code != 0 and address == 0, "the fake driver has become good enough: book successes, too"
    player.do("out", "cudaMallocAsync", 1 << 20, 0)
    failures = rig.traced(player.pid).process.failures
    assert failures[Layer.RUNTIME, Kind.DEVICE, code] >= 1
    assert sum(count for (layer, *_), count in failures.items() if layer is Layer.RUNTIME) == 2
    assert rig.sums(player.pid, Kind.DEVICE, Layer.RUNTIME).live_bytes == 0
    assert rig.sums(player.pid, Kind.DEVICE).live_bytes == 0


@pytest.mark.parametrize("version", VERSIONS)
def test_a_process_that_calls_nothing_of_it_is_not_in_the_ledger(rig: Rig, version: int) -> None:
    player = rig.player("-")
    player.do("load", str(library(version)))
    rig.look(player)
    assert not rig.lives(player.pid)
