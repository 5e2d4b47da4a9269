"""Libraries are found wherever they are, and each file is probed once."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpf import elf
from ebpf.attach import Attachment
from ebpf.layout import Kind, Layer
from ebpf.symbols import MEMORY, points
from tests.ebpf.conftest import Player, Rig, running_rig
from tests.ebpf.containers import podman
from tests.fakes.cuda import LIBRARY, build

pytestmark = pytest.mark.needs("cc", "bpf", "ebpf")

MIB = 1 << 20


@pytest.fixture
def fresh(bpf_object: Path) -> Iterator[Rig]:
    """A tracer that knows nothing yet."""
    with running_rig(loader="core", object=str(bpf_object)) as rig:
        yield rig


def attached(rig: Rig, ending: str) -> list[Attachment]:
    return [one for one in rig.tracer.attacher.all() if one.path.endswith(ending)]


def test_a_program_that_starts_is_seen_from_its_first_allocation(fresh: Rig, tmp_path: Path) -> None:
    library = shutil.copy(build() / LIBRARY, tmp_path / LIBRARY)
    player = Player("-", env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)})
    fresh.players.append(player)
    fresh.wait(lambda: attached(fresh, f"{tmp_path.name}/{LIBRARY}"), "probed before it is loaded")
    player.do("load", str(library))
    player.out("cuMemAlloc_v2", MIB)
    traced = fresh.traced(player.pid)
    assert traced.process.sums[Layer.DRIVER, Kind.DEVICE].live_bytes == MIB


def test_a_library_that_is_loaded_late_from_elsewhere_is_found(fresh: Rig, tmp_path: Path) -> None:
    hidden = tmp_path / "no/usual/place"
    hidden.mkdir(parents=True)
    library = shutil.copy(build() / LIBRARY, hidden / LIBRARY)
    player = Player("-")
    fresh.players.append(player)
    before = time.monotonic_ns()
    player.do("load", str(library))
    player.out("cuMemAlloc_v2", 5 * MIB)  # nobody can have seen this one
    fresh.wait(lambda: attached(fresh, LIBRARY), "found by looking")
    player.out("cuMemAlloc_v2", MIB)
    traced = fresh.traced(player.pid)
    assert traced.process.sums[Layer.DRIVER, Kind.DEVICE].live_bytes == MIB
    assert traced.since_ns > before  # and the ledger says from when on it is complete


def test_a_replaced_library_is_probed_as_well_as_the_one_that_is_still_mapped(
    fresh: Rig, tmp_path: Path
) -> None:
    path = tmp_path / LIBRARY
    shutil.copy(build() / LIBRARY, path)
    old = Player(str(path))
    fresh.players.append(old)
    shutil.copy(build(future=True) / LIBRARY, tmp_path / "new")
    os.replace(tmp_path / "new", path)
    new = Player(str(path))
    fresh.players.append(new)
    for player in (old, new):
        fresh.look(player)
        player.out("cuMemAlloc_v2", MIB)
        assert fresh.sums(player.pid, Kind.DEVICE).live_bytes == MIB
    assert len(attached(fresh, LIBRARY)) == 2


def test_a_file_under_many_names_is_probed_once(fresh: Rig, tmp_path: Path) -> None:
    first = tmp_path / LIBRARY
    shutil.copy(build() / LIBRARY, first)
    other = tmp_path / "other"
    other.mkdir()
    os.link(first, other / LIBRARY)
    players = [Player(str(first)), Player(str(other / LIBRARY))]
    fresh.players += players
    for player in players:
        fresh.look(player)
        player.out("cuMemAlloc_v2", MIB)
        assert fresh.sums(player.pid, Kind.DEVICE).allocations == 1
    assert len(fresh.tracer.attacher) == 1


def test_a_copy_is_another_file(fresh: Rig, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy2(build() / LIBRARY, tmp_path / name / LIBRARY)
        player = Player(str(tmp_path / name / LIBRARY))
        fresh.players.append(player)
        fresh.look(player)
    assert len(fresh.tracer.attacher) == 2


def test_probes_go_when_nobody_uses_the_library_any_more(fresh: Rig, tmp_path: Path) -> None:
    library = shutil.copy(build() / LIBRARY, tmp_path / LIBRARY)
    player = Player(str(library))
    fresh.players.append(player)
    fresh.look(player)
    assert len(fresh.tracer.attacher) == 1
    fresh.tracer.attacher.detach_unused(time.monotonic() + 30, 60)
    assert len(fresh.tracer.attacher) == 1
    fresh.tracer.attacher.detach_unused(time.monotonic() + 61, 60)
    assert len(fresh.tracer.attacher) == 0


def test_an_unknown_version_is_named_and_two_names_of_one_function_are_one() -> None:
    fd = os.open(build(future=True) / LIBRARY, os.O_RDONLY)
    try:
        functions = elf.read(fd, (b"cu",)).functions
    finally:
        os.close(fd)
    found, unknown = points(functions, Layer.DRIVER, frozenset({MEMORY}))
    assert unknown == ["cuMemAlloc_v9"]
    assert functions["cuMemAlloc_v2_ptds"] == functions["cuMemAlloc_v2"]
    assert len([point for point in found if point.offset == functions["cuMemAlloc_v2"]]) == 1


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "machine", "huge tables"])
def test_what_only_looks_like_a_library_is_refused_once(
    fresh: Rig, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = (build() / LIBRARY).read_bytes()
    broken = {
        "empty": b"",
        "text": b"no library at all\n" * 100,
        "cut": whole[:5000],
        "machine": whole[:18] + b"\x99\0" + whole[20:],
        "huge tables": whole[:0x3C] + b"\xff\xff" + whole[0x3E:],
    }[damage]
    path = tmp_path / LIBRARY
    path.write_bytes(broken)
    for _ in range(2):
        assert fresh.tracer.attacher.probe(str(path), Layer.DRIVER, str(path)) is None
    assert len(fresh.tracer.attacher.refused) == 1
    assert len(fresh.tracer.attacher) == 0


@pytest.mark.needs("podman", "root")
def test_containers_of_one_image_share_its_probes_and_are_told_apart(fresh: Rig, tmp_path: Path) -> None:
    with podman(tmp_path) as engine:
        engine.import_image("localhost/play")
        players = []
        for _ in range(2):
            player = Player.__new__(Player)
            start(fresh, player, engine.run("localhost/play"), engine.environment)
            players.append(player)
        containers = engine.running()
        assert len(containers) == 2
        for container, pid in containers.items():
            traced = fresh.traced(pid)
            assert traced.process.sums[Layer.DRIVER, Kind.DEVICE].live_bytes == 3 * MIB
            assert traced.workload.container_id == container
        probed = [(one.path, one.file) for one in attached(fresh, "x86_64-linux-gnu/libcuda.so.1")]
        assert len(probed) == 1, probed
        for player in players:
            player.end()


def start(rig: Rig, player: Player, command: list[str], environment: dict[str, str]) -> None:
    """A container, while the tracer works beside it."""
    import json
    import select
    import subprocess

    player.process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    player.pid = player.process.pid
    rig.players.append(player)
    assert player.process.stdout is not None
    out = player.process.stdout
    rig.wait(lambda: select.select([out], [], [], 0)[0], "the container speaks", 60)
    assert json.loads(out.readline()) == "ready"
