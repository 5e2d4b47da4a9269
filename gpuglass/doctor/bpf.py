"""Checks of what the CUDA tracer would need of the kernel. Files are read and nothing is attached.

The tracer is optional, so what is missing is a note, and a warning only where it would mislead. `root` and
`proc` are where the machine's files are seen.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpuglass.doctor.check import Check, Status
from gpuglass.procfs import ProcFs

CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_PERFMON, CAP_BPF = 19, 21, 38, 39
"""Bits of CapEff (linux/capability.h)."""

RING_BUFFER = (5, 8)
"""First kernel with BPF ring buffers, CAP_BPF and CAP_PERFMON."""
NO_MEMLOCK = (5, 11)
"""First kernel that charges BPF memory to the cgroup and not to RLIMIT_MEMLOCK."""
DEFAULT_MEMLOCK = 64 << 20
"""Bytes that the tracer's maps need at most on older kernels."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """What is passed in of the running kernel and interpreter."""

    release: str
    memlock: int
    """Soft limit in bytes; -1 is none."""
    other_bcc: str = ""
    """Folder of a Python package `bcc` that would be imported here; empty without one."""

    @property
    def version(self) -> tuple[int, int]:
        """(6, 18) of 6.18.44-generic; (0, 0) if it cannot be read."""
        match = re.match(r"(\d+)\.(\d+)", self.release)
        return (int(match[1]), int(match[2])) if match else (0, 0)


def checks(root: Path, proc: ProcFs, kernel: Kernel) -> list[Check]:
    """All checks of this group; the memory limit only where the kernel counts it."""
    found = [
        version(kernel),
        rights(proc.read("self", "status", 65536) or b"", kernel),
        lockdown(_text(root / "sys/kernel/security/lockdown")),
        headers(root, kernel.release),
        bcc(root, kernel.other_bcc),
    ]
    if kernel.version < NO_MEMLOCK:
        found.append(memlock(kernel.memlock))
    return found


def version(kernel: Kernel) -> Check:
    """Ring buffers came with 5.8. BTF is not needed: the program reads nothing of the kernel's own."""
    title = "kernel"
    if kernel.version < RING_BUFFER:
        return Check(
            "bpf.kernel",
            title,
            Status.INFO,
            f"{kernel.release} has no BPF ring buffers",
            "kernel 5.8 or newer",
        )
    return Check("bpf.kernel", title, Status.OK, kernel.release)


def rights(status: bytes, kernel: Kernel) -> Check:
    """CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN; CAP_SYS_PTRACE to find libraries of other users'
    processes."""
    title = "rights"
    match = re.search(rb"^CapEff:\s*([0-9a-f]{1,16})$", status, re.MULTILINE)
    effective = int(match[1], 16) if match else 0

    def has(bit: int) -> bool:
        return bool(effective >> bit & 1)

    split = kernel.version >= RING_BUFFER and has(CAP_BPF) and has(CAP_PERFMON)
    missing = []
    if not (has(CAP_SYS_ADMIN) or split):
        missing += ["CAP_BPF", "CAP_PERFMON"] if kernel.version >= RING_BUFFER else ["CAP_SYS_ADMIN"]
    if not has(CAP_SYS_PTRACE):
        missing.append("CAP_SYS_PTRACE")
    if missing:
        short = ", ".join(name.removeprefix("CAP_") for name in missing)
        return Check(
            "bpf.rights",
            title,
            Status.INFO,
            f"this process lacks {' and '.join(missing)}",
            f"run the tracer (not the agent) as root, or in a container with capabilities add: [{short}]",
        )
    held = "CAP_SYS_ADMIN" if has(CAP_SYS_ADMIN) else "CAP_BPF, CAP_PERFMON"
    return Check("bpf.rights", title, Status.OK, f"{held}, CAP_SYS_PTRACE")


def lockdown(text: str) -> Check:
    """`none [integrity] confidentiality`: the last forbids reading memory from BPF."""
    title = "lockdown"
    match = re.search(r"\[(\w+)\]", text)
    if match is not None and match[1] == "confidentiality":
        return Check(
            "bpf.lockdown",
            title,
            Status.WARN,
            "confidentiality: the kernel lets no BPF program read memory",
            "boot with lockdown=integrity, or without lockdown=",
        )
    return Check("bpf.lockdown", title, Status.OK, match[1] if match is not None else "none")


def headers(root: Path, release: str) -> Check:
    """bcc compiles at start; probes of user space do with the headers of another kernel."""
    title = "kernel headers"
    for own in (f"lib/modules/{release}/build", "sys/kernel/kheaders.tar.xz"):
        if (root / own).exists():
            return Check("bpf.headers", title, Status.OK, f"/{own}")
    other = sorted(path.name for path in root.glob("usr/src/linux-headers-*"))
    if other:
        return Check(
            "bpf.headers",
            title,
            Status.OK,
            f"/usr/src/{other[-1]}, of another kernel: enough for probes of user space",
        )
    return Check(
        "bpf.headers",
        title,
        Status.INFO,
        "none: bcc compiles its programs when it starts",
        f"apt-get install linux-headers-{release}, or linux-headers-generic (linux-headers-amd64 on Debian)",
    )


def bcc(root: Path, other: str = "") -> Check:
    """The distribution's package; PyPI's `bcc` is something else."""
    title, mend = "bcc", "apt-get install python3-bpfcc"
    package = root / "usr/lib/python3/dist-packages/bcc/__init__.py"
    if other:
        return Check(
            "bpf.bcc",
            title,
            Status.WARN,
            f"the Python package bcc in {other} is an unrelated one of PyPI",
            f"pip uninstall bcc; {mend}",
        )
    if not package.exists():
        return Check(
            "bpf.bcc", title, Status.INFO, "not installed (PyPI's package bcc is an unrelated one)", mend
        )
    return Check("bpf.bcc", title, Status.OK, f"/{package.parent.relative_to(root)}")


def memlock(limit: int) -> Check:
    """Kernels before 5.11 count BPF maps against RLIMIT_MEMLOCK."""
    title = "locked memory"
    if 0 <= limit < DEFAULT_MEMLOCK:
        return Check(
            "bpf.memlock",
            title,
            Status.INFO,
            f"limited to {limit >> 10} KiB, which this kernel counts BPF maps against",
            "ulimit -l unlimited, or LimitMEMLOCK=infinity in the tracer's unit",
        )
    return Check("bpf.memlock", title, Status.OK, "unlimited" if limit < 0 else f"{limit >> 20} MiB")


def unrelated_bcc(origins: Sequence[str]) -> str:
    """Folder of a package `bcc` that is not the BPF compiler collection, which has a `libbcc.py`."""
    for origin in origins:
        folder = Path(origin)
        if folder.is_dir() and not (folder / "libbcc.py").exists():
            return str(folder)
    return ""


def _text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(4096)
    except OSError:
        return ""
