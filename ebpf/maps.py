"""The program's maps: made here for both loaders, so that sizes and flags are decided in one place."""

from __future__ import annotations

import resource
from collections.abc import Mapping

from ebpf import kernel
from ebpf.layout import NO_PREALLOC, SETTINGS, MapSpec

SAFE_ALLOCATOR = (6, 1)
"""First kernel whose maps may allocate in any tracing program (bpf_mem_alloc); before, it warns and can
deadlock."""

NO_MEMLOCK = (5, 11)
"""First kernel that charges maps to the cgroup and not to RLIMIT_MEMLOCK."""


class Maps:
    """Open maps by name."""

    def __init__(self, specs: Mapping[str, MapSpec], version: tuple[int, int]) -> None:
        if version < NO_MEMLOCK:
            _raise_memlock()
        self.specs = specs
        self._open: dict[str, kernel.Map] = {}
        try:
            for name, spec in specs.items():
                flags = NO_PREALLOC if spec.sparse and version >= SAFE_ALLOCATOR else 0
                fd = kernel.create_map(
                    spec.kind, spec.key_size, spec.value_size, spec.max_entries, flags, f"gg_{name}"
                )
                self._open[name] = kernel.Map(fd, spec.key_size, spec.value_size, spec.max_entries)
        except OSError:
            self.close()
            raise

    def __getitem__(self, name: str) -> kernel.Map:
        return self._open[name]

    @property
    def fds(self) -> dict[str, int]:
        """Descriptors by name."""
        return {name: found.fd for name, found in self._open.items()}

    def configure(
        self, large_bytes: int, per_second: tuple[int, int, int, int], only_listed: bool, stacks: bool
    ) -> None:
        """Write the program's settings."""
        packed = SETTINGS.pack(large_bytes, *per_second, int(only_listed), int(stacks), *[0] * 8)
        self["settings"].set(bytes(4), packed)

    def close(self) -> None:
        """Give all descriptors back; the kernel frees what nothing else holds."""
        for found in self._open.values():
            found.close()
        self._open.clear()


def _raise_memlock() -> None:
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (ValueError, OSError):
        _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
