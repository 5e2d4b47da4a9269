"""Whether the tracer may run here at all: architecture and kernel on the allow list, rights, lockdown.

All checks read files; the first that fails is a `Refused` with one line that says what to do. Exit code 2.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from gpuglass.errors import ConfigError

OLDEST = (5, 8)
"""Ring buffers, CAP_BPF and CAP_PERFMON came with it."""

CAPABILITIES = {"CAP_DAC_READ_SEARCH": 2, "CAP_SYS_PTRACE": 19, "CAP_PERFMON": 38, "CAP_BPF": 39}
"""What is needed, by bit of CapEff (linux/capability.h). CAP_SYS_ADMIN stands for the last two."""
_SYS_ADMIN = 21


class Refused(ConfigError):
    """The tracer does not run here; one line."""


def kernel_version(release: str) -> tuple[int, int]:
    """(6, 18) of 6.18.44-generic; (0, 0) if it cannot be read."""
    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def check(
    allow: Sequence[str],
    root: Path = Path("/"),
    machine: str = platform.machine(),
    release: str = os.uname().release,
) -> None:
    """Raise `Refused` if something forbids tracing here."""
    if machine not in ("x86_64", "aarch64"):
        raise Refused(f"the CUDA tracer knows x86_64 and aarch64, this is {machine}")
    here = f"{machine} {release}"
    if not any(fnmatchcase(here, pattern) for pattern in allow):
        raise Refused(
            f"tracer.allow: {here!r} is on none of its patterns ({', '.join(allow)}); add it once you "
            f"have tried it "
            "on a node that may crash"
        )
    if kernel_version(release) < OLDEST:
        raise Refused(f"the CUDA tracer needs Linux 5.8 or newer, this is {release}")
    _check_lockdown(root)
    _check_rights(root)
    if not (root / "sys/bus/event_source/devices/uprobe/type").exists():
        raise Refused(
            "the kernel offers no uprobes (CONFIG_UPROBE_EVENTS), or /sys is not mounted: in a container "
            "mount the "
            "host's /sys read-only"
        )


def _check_lockdown(root: Path) -> None:
    try:
        text = (root / "sys/kernel/security/lockdown").read_text()
    except OSError:
        return
    if "[confidentiality]" in text:
        raise Refused(
            "kernel lockdown is at confidentiality, which lets no BPF program read memory: boot with "
            "lockdown=integrity or without lockdown="
        )


def _check_rights(root: Path) -> None:
    try:
        text = (root / "proc/self/status").read_text()
    except OSError as error:
        raise Refused(f"/proc/self/status cannot be read: {error.strerror}") from None
    match = re.search(r"^CapEff:\s*([0-9a-f]+)$", text, re.MULTILINE)
    effective = int(match[1], 16) if match else 0
    lacking = [
        name
        for name, bit in CAPABILITIES.items()
        if not effective >> bit & 1
        and not (name in ("CAP_PERFMON", "CAP_BPF") and effective >> _SYS_ADMIN & 1)
    ]
    if lacking:
        short = ", ".join(name.removeprefix("CAP_") for name in lacking)
        raise Refused(
            f"the CUDA tracer lacks {', '.join(lacking)}: run it as root, or in a container with "
            f"capabilities add: [{short}]"
        )
