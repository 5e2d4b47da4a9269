"""Which libraries are probed: one attachment per file, whatever paths and containers lead to it.

A file is known by inode number, size and times, not by device: seen through overlayfs a file has its own
inode number and times but the overlay's device, and the kernel puts probes on the file below. So two
containers that share a layer are probed once. Two ordinary file systems with equal numbers are still told
apart by their devices."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from ebpf import elf, kernel, markers
from ebpf.layout import SITE, SITES, Layer
from ebpf.symbols import PYTORCH, STATIC, Point, points
from gpuglass.logs import LOG

LIBRARY_NAME: Mapping[Layer, re.Pattern[str]] = {
    Layer.DRIVER: re.compile(r"libcuda\.so(\.[0-9.]+)?\Z"),
    Layer.RUNTIME: re.compile(r"libcudart(-[0-9a-f]+)?\.so(\.[0-9.]+)?\Z"),
    Layer.TENSORS: re.compile(r"libc10_cuda\.so\Z"),
}
PREFIXES: Mapping[Layer, bytes] = {Layer.DRIVER: b"cu", Layer.RUNTIME: b"cuda"}
MAX_LIBRARIES = 64
"""Files probed at a time; each has some 70 probes."""

_OVERLAYFS = 0x794C7630
_INODE_BITS = (1 << 48) - 1
"""With xino an overlay marks the layer in the highest bits."""


def layer_of(name: str) -> Layer | None:
    """Which library a file name is of."""
    return next((layer for layer, pattern in LIBRARY_NAME.items() if pattern.match(name)), None)


@dataclass(frozen=True, slots=True)
class FileId:
    """What a file is known by."""

    inode: int
    size: int
    modified_ns: int
    changed_ns: int


def identify(fd: int) -> tuple[FileId, int]:
    """A file's identity, and the device of its file system; 0 on an overlay, whose device says nothing."""
    status = os.fstat(fd)
    try:
        is_overlay = _file_system(fd) == _OVERLAYFS
    except OSError:
        is_overlay = False
    name = FileId(status.st_ino & _INODE_BITS, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return name, 0 if is_overlay else status.st_dev


def _file_system(fd: int) -> int:
    """f_type of statfs(2), which Python's statvfs leaves out."""
    import ctypes

    buffer = ctypes.create_string_buffer(256)
    if ctypes.CDLL(None, use_errno=True).fstatfs(fd, buffer):
        raise OSError(ctypes.get_errno(), "fstatfs")
    return int.from_bytes(buffer.raw[:4], "little")


@dataclass(slots=True)
class Attachment:
    """A probed library."""

    file: FileId
    device: int
    layer: Layer
    path: str
    """As it was found; for people."""
    attached_ns: int
    """CLOCK_MONOTONIC, once all probes were on."""
    attached_boot: float
    """Seconds since boot at that moment, as /proc counts processes' starts."""
    unknown: tuple[str, ...] = ()
    """Exported versions of known functions that this tracer does not know."""
    functions: int = 0
    """Functions that are probed."""
    probes: dict[str, list[int]] = field(default_factory=dict)
    """Descriptors by group."""
    sites: tuple[int, ...] = ()
    """Numbers of its static probes' places in the program's table."""
    seen: float = 0.0
    """When a process was last seen with it, on the monotonic clock."""
    standing: bool = False
    """The host's own: kept whether or not a process uses it."""


class Attacher:
    """Puts probes on and takes them off. Used by one thread."""

    def __init__(
        self,
        programs: Mapping[str, int],
        groups: frozenset[str],
        layers: frozenset[Layer],
        multi: bool,
        sites: kernel.Map | None = None,
    ) -> None:
        """`sites` is the program's table of static probes' places, for `Layer.TENSORS`."""
        self._programs = programs
        self._sites = sites
        self._free_sites = list(range(SITES))
        self._groups = groups
        self.layers = layers
        self._multi = multi
        self._kind = 0 if multi else kernel.uprobe_type()
        self.attached: dict[FileId, list[Attachment]] = {}
        self.refused: dict[FileId, str] = {}
        """Files that cannot be probed, and why; not tried again."""

    def __len__(self) -> int:
        return sum(map(len, self.attached.values()))

    def all(self) -> list[Attachment]:
        """All attachments."""
        return [one for several in self.attached.values() for one in several]

    def probe(self, path: str, layer: Layer, shown: str, standing: bool = False) -> Attachment | None:
        """Probe the file behind a path unless it is probed already; None if it cannot be."""
        if layer not in self.layers:
            return None
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            name, device = identify(fd)
            for known in self.attached.get(name, []):
                if known.device == device or not known.device or not device:
                    known.seen = time.monotonic()
                    known.standing |= standing
                    return known
            if name in self.refused:
                return None
            return self._attach(fd, name, device, layer, shown, standing)
        finally:
            os.close(fd)

    def _attach(
        self, fd: int, name: FileId, device: int, layer: Layer, shown: str, standing: bool
    ) -> Attachment | None:
        if len(self) >= MAX_LIBRARIES:
            LOG.warning("%s is not traced: %d libraries are, which is the most", shown, MAX_LIBRARIES)
            return None
        unknown: list[str] = []
        sites: tuple[int, ...] = ()
        try:
            if layer is Layer.TENSORS:
                probes, sites = self._open_static(fd)
                number = len(sites)
            else:
                library = elf.read(fd, (PREFIXES[layer],))
                wanted, unknown = points(library.functions, layer, self._groups)
                if not wanted:
                    raise elf.ElfError("exports none of the functions that are traced")
                probes = self._open(fd, wanted)
                number = len(wanted)
        except (elf.ElfError, OSError) as error:
            LOG.warning("%s is not traced: %s", shown, error)
            if len(self.refused) < 1024:
                self.refused[name] = str(error)
            return None
        attachment = Attachment(
            *(name, device, layer, shown, time.monotonic_ns(), time.clock_gettime(time.CLOCK_BOOTTIME)),
            *(tuple(unknown), number, probes, sites, time.monotonic(), standing),
        )
        self.attached.setdefault(name, []).append(attachment)
        LOG.info("tracing %s: %d functions", shown, attachment.functions)
        for symbol in unknown:
            LOG.warning("%s exports %s, which is not known and not traced", shown, symbol)
        return attachment

    def _open(self, fd: int, wanted: list[Point]) -> dict[str, list[int]]:
        # By descriptor, so that it is the file that was read, whatever its path leads to by now. All returns
        # before any entry: an entry without its return would be a call that never ends.
        path = f"/proc/self/fd/{fd}"
        probes: dict[str, list[int]] = {}
        try:
            for at_return in (True, False):
                for (group, name), offsets in _by_program(wanted, at_return).items():
                    opened = probes.setdefault(group, [])
                    program = self._programs[name]
                    if self._multi:
                        opened.append(kernel.attach_uprobes(program, path, offsets, at_return))
                        continue
                    for offset in offsets:
                        opened.append(kernel.attach_uprobe(program, path, offset, at_return, self._kind))
        except OSError:
            close_probes(probes)
            raise
        return probes

    def _open_static(self, fd: int) -> tuple[dict[str, list[int]], tuple[int, ...]]:
        """Probe what PyTorch's allocator tells by itself; descriptors and the places' numbers."""
        assert self._sites is not None and self._multi, "asked for where static probes cannot be had"
        found = [
            (marker, STATIC[marker.name]) for marker in markers.read(fd, PYTORCH) if marker.name in STATIC
        ]
        if {marker.name for marker, _ in found} != STATIC.keys():
            raise elf.ElfError("has no static probes for PyTorch's allocations (they came with 2.2)")
        if len(found) > len(self._free_sites):
            raise elf.ElfError(f"there are {SITES} static probes, which is the most")
        packed = [
            SITE.pack(*_site(marker.arguments, static.address), *_site(marker.arguments, static.size))
            for marker, static in found
        ]
        numbers = tuple(self._free_sites.pop() for _ in found)
        opened: list[int] = []
        try:
            for number, raw in zip(numbers, packed, strict=True):
                self._sites.set(number.to_bytes(4, "little"), raw)
            # Frees first: an allocation whose free is not seen would live for ever.
            for name in ("free", "malloc"):
                of_name = [
                    (marker, number)
                    for (marker, _), number in zip(found, numbers, strict=True)
                    if marker.name == name
                ]
                opened.append(
                    kernel.attach_uprobes(
                        self._programs[STATIC[name].program],
                        f"/proc/self/fd/{fd}",
                        [marker.offset for marker, _ in of_name],
                        False,
                        [marker.semaphore for marker, _ in of_name],
                        [number for _, number in of_name],
                    )
                )
        except OSError:
            close_probes({"": opened})
            self._free_sites += numbers
            raise
        return {"tensors": opened}, numbers

    def detach(self, attachment: Attachment) -> None:
        """Take a library's probes off."""
        close_probes(attachment.probes)
        self._free_sites += attachment.sites
        several = self.attached[attachment.file]
        several.remove(attachment)
        if not several:
            del self.attached[attachment.file]

    def detach_unused(self, now: float, linger: float) -> None:
        """Take the probes off what no process has used for `linger` seconds: they keep its file system
        busy."""
        for attachment in self.all():
            if not attachment.standing and now - attachment.seen > linger:
                LOG.info("%s is used no more", attachment.path)
                self.detach(attachment)

    def close(self) -> None:
        """Take all probes off."""
        for attachment in self.all():
            self.detach(attachment)


def _site(arguments: tuple[str, ...], index: int | None) -> tuple[int, int, int, int]:
    """An argument as the program wants it; that of no argument is the constant 0."""
    if index is None:
        return 0, 0, markers.Place.CONSTANT, 0
    if index >= len(arguments):
        raise elf.ElfError("a static probe has fewer arguments than PyTorch gives")
    found = markers.argument(arguments[index])
    return found.offset, found.register, found.place, 64 - 8 * found.size


def _by_program(wanted: list[Point], at_return: bool) -> dict[tuple[str, str], list[int]]:
    """Offsets by group and program."""
    found: dict[tuple[str, str], list[int]] = {}
    for point in wanted:
        name = point.probe.leave if at_return else point.probe.entry
        if name:
            found.setdefault((point.group, name), []).append(point.offset)
    return found


def close_probes(probes: Mapping[str, list[int]]) -> None:
    """Take off what stands by group."""
    kernel.close_together(fd for several in probes.values() for fd in several)
