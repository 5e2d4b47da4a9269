"""PyTorch's allocator by its static probes: live tensors beside the memory that it has reserved."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpf import kernel, markers
from ebpf.elf import ElfError
from ebpf.gate import kernel_version
from ebpf.layout import Kind, Layer
from ebpf.ledger import Sums
from ebpf.markers import Argument, Place
from ebpf.send import _state
from ebpf.tracer import layers_of
from gpuglass.config import Config, TracerConfig
from tests.ebpf.conftest import Player, Rig, running_rig
from tests.fakes.cuda import TENSORS, build

MIB = 1 << 20
LISTENING = 3 + 100 * 2
"""Each place of a static probe counts: three of malloc, two of free."""
needs_bpf = pytest.mark.needs("cc", "bpf", "ebpf")


@pytest.fixture(scope="module", params=["core", "bcc"])
def tracing(request: pytest.FixtureRequest, bpf_object: Path) -> Iterator[Rig]:
    if not kernel.has_uprobe_multi(kernel_version(os.uname().release)):
        pytest.skip("static probes need Linux 6.6")
    with running_rig(loader=request.param, object=str(bpf_object), tensors=True) as rig:
        yield rig


def _with_tensors(rig: Rig) -> Player:
    """A process that has loaded the driver and PyTorch's allocator, both of them probed."""
    player = rig.player()
    player.do("load", str(build() / TENSORS))
    rig.look(player)
    return player


def _tensors(rig: Rig, player: Player) -> Sums:
    return rig.sums(player.pid, Kind.DEVICE, Layer.TENSORS)


@needs_bpf
def test_tensors_are_booked_wherever_the_arguments_lie(tracing: Rig) -> None:
    player = _with_tensors(tracing)
    first = player.out("tensorAllocate", 3000)
    in_memory = player.out("tensorAllocateInMemory", 5 * MIB)
    constant = player.out("tensorAllocateConstant")
    sums = _tensors(tracing, player)
    assert (sums.live_bytes, sums.live_count, sums.allocations) == (3000 + 5 * MIB + 4096, 3, 3)
    player.call("tensorFree", first)
    player.call("tensorFreeUncached", in_memory)
    sums = _tensors(tracing, player)
    assert (sums.live_bytes, sums.live_count, sums.frees) == (4096, 1, 2)
    assert (sums.allocated_bytes, sums.freed_bytes) == (3000 + 5 * MIB + 4096, 3000 + 5 * MIB)
    player.call("tensorFree", constant)
    assert _tensors(tracing, player).live_bytes == 0
    # They are no memory of their own.
    assert tracing.traced(player.pid).process.gpu_bytes() == 0
    assert tracing.losses() == {}


@needs_bpf
def test_what_was_never_told_is_no_free_and_an_address_given_anew_was_freed(tracing: Rig) -> None:
    player = _with_tensors(tracing)
    player.call("tensorFree", 0x7FFF00000000)
    address = player.out("tensorAllocate", MIB)
    player.do("again", "tensorAllocate", address, 2 * MIB)
    sums = _tensors(tracing, player)
    assert (sums.live_bytes, sums.live_count, sums.frees, sums.allocations) == (2 * MIB, 1, 1, 2)


@needs_bpf
def test_the_counter_of_listeners_rises_and_falls_and_costs_nothing_before(
    tracing: Rig, bpf_object: Path
) -> None:
    player = _with_tensors(tracing)
    assert player.do("call", "tensorListeners") == LISTENING
    for attachment in tracing.tracer.attacher.all():
        if attachment.layer is Layer.TENSORS:
            tracing.tracer.attacher.detach(attachment)
    assert player.do("call", "tensorListeners") == 0
    address = player.out("tensorAllocate", MIB)
    assert tracing.lives(player.pid) == []
    tracing.look(player)
    assert player.do("call", "tensorListeners") == LISTENING
    player.call("tensorFree", address)
    assert _tensors(tracing, player).frees == 0


@needs_bpf
def test_live_tensors_are_told_only_where_all_of_them_are_known(tracing: Rig) -> None:
    # Whatever PyTorch held when it was probed is not known, and nothing says how much that was.
    early = Player(tracing.library)
    tracing.players.append(early)
    early.do("load", str(build() / TENSORS))
    for attachment in tracing.tracer.attacher.all():
        if attachment.layer is Layer.TENSORS:
            tracing.tracer.attacher.detach(attachment)
    early.out("cuMemAlloc_v2", MIB)
    tracing.look(early)
    early.out("cuMemAlloc_v2", MIB)
    early.out("tensorAllocate", 1000)
    late = _with_tensors(tracing)
    late.out("cuMemAlloc_v2", 4 * MIB)
    late.out("tensorAllocate", MIB)
    for player in (early, late):
        assert _tensors(tracing, player).allocations == 1
    tracing.tracer.reconcile(time.monotonic())
    told = {
        player.pid: {m.kind: m.live_bytes for m in _state(0, tracing.traced(player.pid), []).memory}
        for player in (early, late)
    }
    assert told[early.pid] == {"device": 2 * MIB}
    assert told[late.pid] == {"device": 4 * MIB, "tensor": MIB}
    late.kill()
    assert _tensors(tracing, late).live_bytes == 0


@needs_bpf
def test_a_library_without_the_probes_is_refused_by_name(
    tracing: Rig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "libc10_cuda.so"
    other.write_bytes((build() / "libcudart.so.12").read_bytes())
    assert tracing.tracer.attacher.probe(str(other), Layer.TENSORS, str(other)) is None
    assert "has no static probes for PyTorch's allocations" in caplog.text


def test_an_older_kernel_traces_all_but_tensors(caplog: pytest.LogCaptureFixture) -> None:
    config = Config(tracer=TracerConfig(tensors=True))
    assert layers_of(config, False) == {Layer.DRIVER}
    assert "tracer.tensors needs Linux 6.6" in caplog.text
    assert layers_of(config, True) == {Layer.DRIVER, Layer.TENSORS}


@pytest.mark.parametrize(
    ("spelled", "machine", "expected"),
    [
        ("-8@%rax", "x86_64", Argument(Place.REGISTER, 80, 0, 8)),
        ("8@%r14", "x86_64", Argument(Place.REGISTER, 8, 0, 8)),
        ("-1@%dl", "x86_64", Argument(Place.REGISTER, 96, 0, 1)),
        ("4@%r9d", "x86_64", Argument(Place.REGISTER, 64, 0, 4)),
        ("-8@-56(%rbp)", "x86_64", Argument(Place.MEMORY, 32, -56, 8)),
        ("8@(%rsp)", "x86_64", Argument(Place.MEMORY, 152, 0, 8)),
        ("-4@$-1", "x86_64", Argument(Place.CONSTANT, 0, -1, 4)),
        ("8@$0x200", "x86_64", Argument(Place.CONSTANT, 0, 512, 8)),
        ("8@x19", "aarch64", Argument(Place.REGISTER, 152, 0, 8)),
        ("-4@w0", "aarch64", Argument(Place.REGISTER, 0, 0, 4)),
        ("8@[sp, 16]", "aarch64", Argument(Place.MEMORY, 248, 16, 8)),
        ("8@[x1]", "aarch64", Argument(Place.MEMORY, 8, 0, 8)),
        ("8@42", "aarch64", Argument(Place.CONSTANT, 0, 42, 8)),
    ],
)
def test_an_argument_is_found_where_its_note_says(spelled: str, machine: str, expected: Argument) -> None:
    assert markers.argument(spelled, machine) == expected


@pytest.mark.parametrize(
    "spelled",
    [
        *("", "8@", "8@%", "8@%xmm0", "3@%rax", "8@8(%rax,%rbx,4)", "8@name(%rip)", "8@$99999999999", "%rax"),
        *("8@ff(%rax)", "8@$08", "8@$-0x", f"8@${'9' * 5000}"),
    ],
)
def test_an_argument_that_is_not_understood_is_refused(spelled: str) -> None:
    with pytest.raises(ElfError, match="not understood"):
        markers.argument(spelled, "x86_64")


def _note(location: int, base: int, semaphore: int, *words: bytes) -> bytes:
    return struct.pack("<QQQ", location, base, semaphore) + b"".join(word + b"\0" for word in words)


def test_notes_of_a_prelinked_library_move_with_its_base() -> None:
    notes = [
        (0x5000, _note(0x1010, 0x4000, 0x3000, b"pytorch", b"free", b"-8@%rdi")),
        (0x5000, _note(0x1010, 0x4000, 0, b"python", b"gc__start", b"-4@%eax")),
    ]
    (found,) = markers.parse(notes, "pytorch", lambda address: address - 0x100)
    assert (found.name, found.offset, found.semaphore, found.arguments) == (
        *("free", 0x1F10, 0x3F00, ("-8@%rdi",)),
    )


def test_arguments_are_told_apart_as_either_machine_spells_them() -> None:
    notes = [
        (0, _note(16, 0, 0, b"pytorch", b"malloc", spelled))
        for spelled in (b"-8@%rax -8@-56(%rbp)", b"8@x0 8@[sp, 16]")
    ]
    x86, arm = markers.parse(notes, "pytorch", lambda address: address)
    assert x86.arguments == ("-8@%rax", "-8@-56(%rbp)")
    assert arm.arguments == ("8@x0", "8@[sp, 16]")


@pytest.mark.parametrize(
    "note",
    [b"", b"\0" * 23, _note(1, 0, 0, b"pytorch"), _note(1 << 40, 0, 0, b"pytorch", b"free", b"-8@%rdi")],
)
def test_a_note_that_makes_no_sense_is_refused(note: bytes) -> None:
    with pytest.raises(ElfError):
        markers.parse([(0, note)], "pytorch", lambda address: address if address < 1 << 20 else None)
