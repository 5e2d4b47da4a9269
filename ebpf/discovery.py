"""Finds the CUDA libraries that processes use or are about to use.

Three ways lead to a library. When a program starts (the kernel says so), the places from which its loader
would take libcuda are looked at through its root folder, so that probes are on before the first allocation; a
moment later its memory map tells what it really loaded; and processes are looked through from time to time,
those that the driver lists as users of a GPU more often, for what was loaded late or from elsewhere. Each
look is bounded in files and bytes."""

from __future__ import annotations

import heapq
import os
import re
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

from ebpf.attach import Attacher, Attachment, layer_of
from ebpf.layout import Layer
from gpuglass.procfs import ProcFs

STANDARD = (
    *(
        "usr/lib/x86_64-linux-gnu",
        "usr/lib/aarch64-linux-gnu",
        "usr/lib64",
        "usr/lib",
        "lib/x86_64-linux-gnu",
    ),
    *("usr/local/nvidia/lib64", "usr/local/cuda/compat", "usr/local/cuda/lib64"),
    *("usr/lib/wsl/lib", "run/nvidia/driver/usr/lib/x86_64-linux-gnu"),
)
"""Where libcuda.so.1 is looked for below a root: distributions, the container toolkit, CUDA's compatibility
package, the GPU operator."""

LOOKS = (0.3, 2.0, 10.0)
"""Seconds after a program's start at which its memory map is read."""
EACH = 30.0
"""Seconds after which a process is looked at again."""
EACH_GPU = 2.0
"""The same for a process that the driver lists."""
_MAPS_LIMIT = 16 << 20
_ENVIRON_LIMIT = 1 << 18
_PER_ROUND = 200
"""Processes whose maps are read in one round."""
_MAX_KNOWN = 65536
_LINE = re.compile(rb"([0-9a-f]+-[0-9a-f]+) ..x. \S+ \S+ ([0-9]+) +(/.*/(lib(?:cuda|c10_cuda)[^/\n]*))")


class Discovery:
    """Looks at processes and hands libraries to the attacher. Used by one thread."""

    def __init__(self, attacher: Attacher, proc: ProcFs, own: int = os.getpid()) -> None:
        self._attacher = attacher
        self._proc = proc
        self._own = own
        self._due: list[tuple[float, int]] = []
        """When to look at which pid."""
        self._known: OrderedDict[int, float] = OrderedDict()
        """When each pid was last looked at."""
        self._roots: OrderedDict[tuple[int, int, int, bytes], float] = OrderedDict()
        self.libraries: dict[int, list[Attachment]] = {}
        """What each living process was seen with."""

    def host(self) -> None:
        """Probe what the host itself has."""
        for folder in STANDARD:
            path = f"/{folder}/libcuda.so.1"
            if os.path.exists(path):
                self._attacher.probe(path, Layer.DRIVER, os.path.realpath(path), standing=True)

    def started(self, pid: int, now: float) -> None:
        """A program began to run: look where it will look."""
        self._before_it_loads(pid, now)
        self._again(pid, now)

    def _again(self, pid: int, now: float) -> None:
        for after in LOOKS:
            if len(self._due) < _MAX_KNOWN:
                heapq.heappush(self._due, (now + after, pid))

    def _before_it_loads(self, pid: int, now: float) -> None:
        try:
            namespace = os.stat(self._proc.root / str(pid) / "ns/mnt").st_ino
            folder = os.stat(self._proc.root / str(pid) / "root")  # a runtime changes it on the way
        except OSError:
            return
        environment = self._proc.read(pid, "environ", _ENVIRON_LIMIT) or b""
        paths = next((v[16:] for v in environment.split(b"\0") if v.startswith(b"LD_LIBRARY_PATH=")), b"")[
            :4096
        ]
        key = (namespace, folder.st_dev, folder.st_ino, paths)
        if now - self._roots.get(key, -EACH) < 1.0:
            return
        self._roots[key] = now
        while len(self._roots) > 1024:
            self._roots.popitem(last=False)
        root = f"{self._proc.root}/{pid}/root"
        folders = [
            os.fsdecode(part).strip("/") for part in re.split(rb"[:;]", paths)[:32] if part[:1] == b"/"
        ]
        for name in (*folders, *STANDARD):
            self._candidates(root, name)

    def _candidates(self, root: str, folder: str) -> None:
        # Opened below the process's root as the kernel resolves it there; a link that leaves it would be
        # resolved in ours, so links are followed by hand.
        for name, layer in (
            ("libcuda.so.1", Layer.DRIVER),
            *((name, Layer.RUNTIME) for name in ("libcudart.so.11.0", "libcudart.so.12", "libcudart.so.13")),
        ):
            if layer in self._attacher.layers and (path := _resolve(root, f"{folder}/{name}")):
                self._attacher.probe(path, layer, f"/{folder}/{name}")

    def look(self, pid: int, now: float) -> list[Attachment]:
        """Probe what a process has loaded."""
        self._known[pid] = now
        self._known.move_to_end(pid)
        while len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)
        if pid == self._own:
            return []
        raw = self._proc.read(pid, "maps", _MAPS_LIMIT)
        found: list[Attachment] = []
        for match in _LINE.finditer(raw or b""):
            name = os.fsdecode(match[4].removesuffix(b" (deleted)"))
            layer = layer_of(name)
            if layer is None:
                continue
            attachment = self._probe_mapped(pid, match, layer)
            if attachment is not None and attachment not in found:
                found.append(attachment)
        if found:
            self.libraries[pid] = found
        else:
            self.libraries.pop(pid, None)
        return found

    def _probe_mapped(self, pid: int, match: re.Match[bytes], layer: Layer) -> Attachment | None:
        mapped = os.fsdecode(match[3].removesuffix(b" (deleted)"))
        path = f"{self._proc.root}/{pid}/root{mapped}"
        try:
            is_same = os.stat(path).st_ino == int(match[2])
        except OSError:
            is_same = False
        if (
            not is_same
        ):  # replaced since: the mapping itself still leads to the file, for those with the right
            path = f"{self._proc.root}/{pid}/map_files/{match[1].decode()}"
        return self._attacher.probe(path, layer, mapped)

    def round(self, now: float, on_gpu: Iterable[int]) -> None:
        """Look at the processes whose time has come; once a second or so."""
        left = _PER_ROUND
        while self._due and self._due[0][0] <= now and left:
            _, pid = heapq.heappop(self._due)
            self.look(pid, now)
            left -= 1
        for pid in on_gpu:
            if left and now - self._known.get(pid, -EACH) >= EACH_GPU:
                self.look(pid, now)
                left -= 1
        try:
            pids = [int(name) for name in os.listdir(self._proc.root) if name.isdigit()]
        except OSError:
            return
        alive = set(pids)
        for pid in [pid for pid in self._known if pid not in alive]:
            del self._known[pid]
            self.libraries.pop(pid, None)
        for pid in pids:
            if not left:
                break
            if pid not in self._known:
                self._again(pid, now)  # its start was not told, or it began before us
            if now - self._known.get(pid, -EACH) >= EACH:
                self.look(pid, now)
                left -= 1
        for attachments in self.libraries.values():
            for attachment in attachments:
                attachment.seen = now


def _resolve(root: str, path: str) -> str | None:
    """The file behind a path below `root`, links followed as a process with that root would; None without
    one."""
    at = [part for part in path.split("/") if part]
    done: list[str] = []
    for _ in range(64):
        if not at:
            return f"{root}/{'/'.join(done)}" if done else None
        part = at.pop(0)
        if part == "..":
            done = done[:-1]
            continue
        if part == ".":
            continue
        here = f"{root}/{'/'.join([*done, part])}"
        try:
            link = os.readlink(here)
        except OSError as error:
            if error.errno != 22:  # EINVAL: no link
                return None
            done.append(part)
            continue
        if link.startswith("/"):
            done = []
        at = [*(name for name in Path(link).parts if name != "/"), *at]
    return None
