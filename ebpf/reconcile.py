"""Brings the ledger of a process together with what the driver lists for it, GPU by GPU. Pure.

What the driver says beyond the ledger is `untracked`: the context and its modules, managed memory, what was
allocated before tracing began. Which of several GPUs holds an allocation is known from its context's device,
CUDA's ordinal in that process, by way of the process's CUDA_VISIBLE_DEVICES; where that is unknown nothing is
concluded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GRANULARITY = 2 << 20
"""Bytes in which the driver hands out device memory: it lists up to this much more or less per allocation
class."""


@dataclass(frozen=True, slots=True)
class Reconciled:
    """One process on one GPU, in bytes."""

    gpu_uuid: str
    listed: int
    tracked: int

    @property
    def untracked(self) -> int:
        """What the driver lists beyond the ledger."""
        return self.listed - self.tracked

    @property
    def contradicts(self) -> bool:
        """Whether the ledger holds clearly more than the driver lists, which cannot be."""
        return self.untracked < -max(GRANULARITY, self.listed // 50)


def visible_gpus(environment: bytes, uuids: Sequence[str]) -> list[str] | None:
    """The GPUs that a process sees, in the order of CUDA's ordinals; None if that cannot be told.

    `environment` is /proc/PID/environ, `uuids` are all GPUs in the driver's order, which is that of the bus.
    """
    variables = dict(part.split(b"=", 1) for part in environment.split(b"\0") if b"=" in part)
    text = variables.get(b"CUDA_VISIBLE_DEVICES")
    by_bus = variables.get(b"CUDA_DEVICE_ORDER", b"") == b"PCI_BUS_ID"
    if text is None:
        return list(uuids) if by_bus or len(uuids) == 1 else None
    found: list[str] = []
    for part in text.decode("ascii", "replace").split(","):
        name = part.strip()
        if name.startswith("GPU-"):
            matching = [uuid for uuid in uuids if uuid.startswith(name)]
            if len(matching) != 1:
                return found
            found.append(matching[0])
        elif name.isdigit() and int(name) < len(uuids):
            if not by_bus and len(uuids) > 1:
                return None  # numbered by speed, which is not known here
            found.append(uuids[int(name)])
        else:
            return found  # CUDA stops at the first that it does not know
    return found


def reconcile(
    by_ordinal: Mapping[int, int], listed: Mapping[str, int | None], visible: Sequence[str] | None
) -> list[Reconciled]:
    """Compare what is live by ordinal (-1: unknown) with what the driver lists by uuid."""
    known = {uuid: size for uuid, size in listed.items() if size is not None}
    if len(listed) == 1:
        return [Reconciled(uuid, size, sum(by_ordinal.values())) for uuid, size in known.items()]
    if visible is None or by_ordinal.get(-1, 0):
        return []
    tracked = {visible[ordinal]: size for ordinal, size in by_ordinal.items() if 0 <= ordinal < len(visible)}
    if any(size and not 0 <= ordinal < len(visible) for ordinal, size in by_ordinal.items()):
        return []
    return [Reconciled(uuid, size, tracked.get(uuid, 0)) for uuid, size in known.items()]
