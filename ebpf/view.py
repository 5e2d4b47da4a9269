"""What is known of the traced processes together: the kernel's ledger, who they are, what the driver lists
for them.

The tracer writes it, the publisher and the sender read it. One thread.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ebpf.layout import Kind
from ebpf.ledger import Holding, Process
from ebpf.reconcile import Reconciled
from gpuglass.workload import Workload


@dataclass(slots=True)
class Traced:
    """One life of one program."""

    process: Process
    name: str
    start_ticks: int
    workload: Workload = field(default_factory=Workload)
    started_ns: int = 0
    """CLOCK_MONOTONIC of the process's start; 0: unknown."""
    tensors_known: bool = False
    """All its live tensors are in the ledger."""
    since_ns: int = 0
    """CLOCK_MONOTONIC from which on its ledger is complete."""
    reconciled: list[Reconciled] = field(default_factory=list)
    exact: bool = True
    lost_before: int = 0
    """Losses that a resynchronisation has settled."""
    resyncs: int = 0
    drift: dict[Kind, int] = field(default_factory=dict)
    """Bytes by which sums and single entries differed at the last look: a call under way looks the same."""
    corrected: bool = False
    """A sum was corrected at the last look."""
    epoch: int = 0
    holdings: dict[tuple[Kind, int], Holding] = field(default_factory=dict)
    wanted: bool | None = None
    """Whether its namespace is to be traced; None: it is not known yet which one it is of."""
    seen_at: float = 0.0
    """When it was first read, on the monotonic clock."""
    ended_at: float | None = None
    """When it was seen to have ended, on the monotonic clock."""
    told_end: bool = False

    @property
    def identity(self) -> tuple[str, str, str, str]:
        """Workload and name, as labels."""
        workload = self.workload
        return (workload.namespace, workload.pod, workload.container, self.name)
