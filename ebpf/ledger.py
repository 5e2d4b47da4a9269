"""Reads the kernel's ledger: sums per process and kind, failures by code, what stacks hold.

In flow the program's maps, out flow plain values. Processes are known by the program's own id, one per life
of one program; what has ended is read a last time, turned into implicit frees, and removed from the kernel.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from ebpf import layout
from ebpf.kernel import Map, possible_cpus
from ebpf.layout import LATENCY_SLOTS, LOSSES, SIZE_SLOTS, FailureKey, Kind, Layer, Live, Record, TotalsKey
from ebpf.maps import Maps


@dataclass(slots=True)
class Sums:
    """What a process did with one kind of memory in one ledger. Bytes, calls, nanoseconds."""

    live_bytes: int = 0
    live_count: int = 0
    allocated_bytes: int = 0
    allocations: int = 0
    freed_bytes: int = 0
    frees: int = 0
    context_bytes: int = 0
    context_frees: int = 0
    allocate_ns: int = 0
    free_ns: int = 0
    exit_bytes: int = 0
    exit_frees: int = 0
    sizes: list[int] = field(default_factory=lambda: [0] * SIZE_SLOTS)
    latencies: list[int] = field(default_factory=lambda: [0] * LATENCY_SLOTS)

    def add(self, values: tuple[int, ...]) -> None:
        """Add the kernel's sums."""
        self.live_bytes += _signed(values[0])
        self.live_count += _signed(values[1])
        self.allocated_bytes += values[2]
        self.allocations += values[3]
        self.freed_bytes += values[4]
        self.frees += values[5]
        self.context_bytes += values[6]
        self.context_frees += values[7]
        self.allocate_ns += values[8]
        self.free_ns += values[9]
        for index in range(SIZE_SLOTS):
            self.sizes[index] += values[10 + index]
        for index in range(LATENCY_SLOTS):
            self.latencies[index] += values[10 + SIZE_SLOTS + index]

    def end(self) -> None:
        """The process has gone: what was live is freed."""
        self.exit_bytes, self.exit_frees = self.live_bytes, self.live_count
        self.live_bytes = self.live_count = 0


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


@dataclass(slots=True)
class Process:
    """One life of one program, as the kernel's ledger has it."""

    id: int
    record: Record
    sums: dict[tuple[Layer, Kind], Sums] = field(default_factory=dict)
    devices: dict[int, int] = field(default_factory=dict)
    """Live bytes of GPU memory by CUDA's ordinal in that process; -1: unknown."""
    failures: dict[tuple[Layer, Kind, int], int] = field(default_factory=dict)
    """Failed calls by kind and CUresult."""

    @property
    def pid(self) -> int:
        """As the machine's first pid namespace numbers it."""
        return self.record.tgid

    def gpu_bytes(self) -> int:
        """Live bytes that take memory of a GPU for certain: device and virtual of the driver's ledger."""
        return sum(
            sums.live_bytes
            for (layer, kind), sums in self.sums.items()
            if layer is Layer.DRIVER and kind in (Kind.DEVICE, Kind.VIRTUAL)
        )


def _correct(process: Process, by_kind: dict[Kind, int]) -> None:
    for kind, drift in by_kind.items():
        sums = process.sums.get((Layer.DRIVER, kind))
        if sums is None:
            continue
        sums.live_bytes -= drift
        if kind in (Kind.DEVICE, Kind.VIRTUAL) and process.devices:
            most = max(process.devices, key=lambda device: process.devices[device])
            process.devices[most] -= drift


def drifts(before: Process, after: Process, holdings: dict[tuple[Kind, int], Holding]) -> dict[Kind, int]:
    """By how many bytes each sum differs from the single entries that were read between the two readings.

    Only kinds in which nothing was allocated or freed meanwhile can be told.
    """
    found = {}
    for kind in (Kind.DEVICE, Kind.HOST, Kind.MANAGED, Kind.VIRTUAL):
        then = before.sums.get((Layer.DRIVER, kind))
        now = after.sums.get((Layer.DRIVER, kind))
        if then is None or now is None or then != now:
            continue
        held = sum(holding.bytes for (of, _), holding in holdings.items() if of is kind)
        if then.live_bytes != held:
            found[kind] = then.live_bytes - held
    return found


@dataclass(slots=True)
class Holding:
    """What one stack has allocated and not freed."""

    bytes: int = 0
    count: int = 0
    oldest_ns: int = 0


class Ledger:
    """The kernel's ledger. Used by one thread."""

    def __init__(self, maps: Maps) -> None:
        self._maps = maps
        self._cpus = possible_cpus()
        self._corrections: dict[int, dict[Kind, int]] = {}

    def records(self) -> dict[int, Record]:
        """All lives by id, with what their threads have not handed over yet."""
        found = {
            id: Record(*values)
            for keys, data in self._maps["records"].batches()
            for (id,), values in zip(
                layout.U64.iter_unpack(keys), layout.RECORD.iter_unpack(data), strict=True
            )
        }
        for _, data in self._maps["threads"].batches():
            for id, calls, spent, *_ in layout.THREAD.iter_unpack(data):
                if (record := found.get(id)) is not None:
                    found[id] = record._replace(calls=record.calls + calls, spent_ns=record.spent_ns + spent)
        return found

    def current(self) -> dict[int, int]:
        """The id under which each pid's calls are booked now."""
        return {
            tgid: values[0]
            for keys, data in self._maps["processes"].batches()
            for (tgid,), values in zip(
                layout.U32.iter_unpack(keys), layout.PROCESS.iter_unpack(data), strict=True
            )
        }

    def read(self) -> dict[int, Process]:
        """Everything but single allocations, by id."""
        processes = {id: Process(id, record) for id, record in self.records().items()}
        for keys, data in self._maps["totals"].batches():
            for raw, values in zip(
                layout.TOTALS_KEY.iter_unpack(keys), layout.TOTALS.iter_unpack(data), strict=True
            ):
                key = TotalsKey(*raw)
                process = processes.get(key.id)
                if process is None:
                    continue
                layer, kind = Layer(key.layer), Kind(key.kind)
                process.sums.setdefault((layer, kind), Sums()).add(values)
                if layer is Layer.DRIVER and kind in (Kind.DEVICE, Kind.VIRTUAL):
                    live = _signed(values[0])
                    process.devices[key.device] = process.devices.get(key.device, 0) + live
        for keys, data in self._maps["failures"].batches():
            for raw, (count,) in zip(
                layout.FAILURE_KEY.iter_unpack(keys), layout.U64.iter_unpack(data), strict=True
            ):
                failure = FailureKey(*raw)
                process = processes.get(failure.id)
                if process is not None:
                    place = (Layer(failure.layer), Kind(failure.kind), failure.code)
                    process.failures[place] = process.failures.get(place, 0) + count
        for id, by_kind in self._corrections.items():
            if id in processes:
                _correct(processes[id], by_kind)
        return processes

    def correct(self, id: int, kind: Kind, drift: int) -> None:
        """Take `drift` bytes off what is live from now on: the single entries say that the sum is wrong."""
        by_kind = self._corrections.setdefault(id, {})
        by_kind[kind] = by_kind.get(kind, 0) + drift

    def losses(self) -> dict[str, int]:
        """What could not be kept, by name; see `enum loss`."""
        found = {}
        buffer = Map(self._maps["losses"].fd, 4, 8 * self._cpus, len(LOSSES))
        for index, name in enumerate(LOSSES):
            raw = buffer.get(layout.U32.pack(index)) or b""
            found[name] = sum(value for (value,) in layout.U64.iter_unpack(raw))
        return found

    def holdings(self) -> dict[int, dict[tuple[Kind, int], Holding]]:
        """What each stack holds, by id, kind and stack, of the driver's ledger without mappings.

        An allocation that went with its context is left out.
        """
        destroyed = {
            number
            for keys, _ in self._maps["destroyed"].batches()
            for (number,) in layout.U64.iter_unpack(keys)
        }
        reset = {id: record.driver_reset_ns for id, record in self.records().items()}
        found: dict[int, dict[tuple[Kind, int], Holding]] = defaultdict(dict)
        for keys, data in self._maps["live"].batches():
            for (id, address), raw in zip(
                layout.LIVE_KEY.iter_unpack(keys), layout.LIVE.iter_unpack(data), strict=True
            ):
                if address & (layout.OF_RUNTIME | layout.OF_MAPPING | layout.OF_TENSOR):
                    continue
                live = Live(*raw)
                if not address & layout.OF_OBJECT and (
                    live.context in destroyed if live.context else live.time_ns <= reset.get(id, 0)
                ):
                    continue
                holding = found[id].setdefault((Kind(live.kind), live.stack), Holding(0, 0, live.time_ns))
                holding.bytes += live.size
                holding.count += 1
                holding.oldest_ns = min(holding.oldest_ns, live.time_ns)
        return dict(found)

    def stack(self, number: int) -> tuple[int, ...]:
        """A stack's addresses, innermost first."""
        raw = self._maps["stacks"].get(layout.U32.pack(number)) if number >= 0 else None
        if raw is None:
            return ()
        depth, *addresses = layout.STACK.unpack(raw)
        return tuple(addresses[:depth])

    def forget(self, ids: frozenset[int]) -> None:
        """Remove all that the kernel holds of lives that have ended."""
        if not ids:
            return
        for id in ids:
            self._corrections.pop(id, None)
        for tgid, id in self.current().items():
            if id in ids:
                self._maps["processes"].delete(layout.U32.pack(tgid))
        for name, key in (
            ("live", layout.LIVE_KEY),
            ("totals", layout.TOTALS_KEY),
            ("failures", layout.FAILURE_KEY),
            ("contexts", layout.CONTEXT_KEY),
            ("records", layout.U64),
        ):
            held = self._maps[name]
            gone = [
                bytes(keys[at : at + key.size])
                for keys, _ in held.batches()
                for at in range(0, len(keys), key.size)
                if layout.U64.unpack_from(keys, at)[0] in ids
            ]
            for raw in gone:
                held.delete(raw)

    def ignore(self, pid: int) -> None:
        """Book nothing more of a process that runs now."""
        id = self.current().get(pid)
        if id is not None:
            self._maps["processes"].set(layout.U32.pack(pid), layout.PROCESS.pack(id, 1, 0))
            threads = self._maps["threads"]
            known = [
                layout.U64.pack(who)
                for keys, _ in threads.batches()
                for (who,) in layout.U64.iter_unpack(keys)
                if who >> 32 == pid
            ]
            for raw in known:
                threads.delete(raw)
