"""Containers by podman, from nothing: an image of one program, its loader, its libc and the fake libcuda."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fakes.cuda import LIBRARY, build
from tests.fakes.nvml import compiler

_PROGRAM = r"""
#include <stdio.h>
#include <unistd.h>
extern int cuMemAlloc_v2(unsigned long *, unsigned long);
int main(void) {
  unsigned long address;
  char line[64];
  usleep(700000); /* what an interpreter takes before it allocates */
  cuMemAlloc_v2(&address, 3 << 20);
  puts("\"ready\"");
  fflush(stdout);
  while (fgets(line, sizeof line, stdin)) {
    cuMemAlloc_v2(&address, 1 << 20);
    puts("0");
    fflush(stdout);
  }
  return 0;
}
"""
_CONFIGURATION = """\
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]
[engine]
cgroup_manager = "cgroupfs"
runtime = "runc"
events_logger = "none"
"""


class Podman:
    """podman with a store of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "containers.conf").write_text(_CONFIGURATION)
        self.environment = {**os.environ, "CONTAINERS_CONF": str(folder / "containers.conf")}
        self.runroot = tempfile.mkdtemp(prefix="gg-podman-")  # podman bounds its length
        self.program = ["podman", "--root", str(folder / "store"), "--runroot", self.runroot]

    def do(self, *arguments: str) -> str:
        """Run one command."""
        done = subprocess.run(
            [*self.program, *arguments], env=self.environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def import_image(self, name: str) -> None:
        """Make the image."""
        source, program = self.folder / "play.c", self.folder / "play"
        source.write_text(_PROGRAM)
        libraries = build()
        subprocess.run(
            [*compiler(), str(source), "-o", str(program), f"-L{libraries}", f"-l:{LIBRARY}"], check=True
        )
        needed = subprocess.run(["ldd", str(program)], capture_output=True, text=True).stdout
        archive = self.folder / "image.tar"
        with tarfile.open(archive, "w") as tar:
            tar.add(program, "play")
            tar.add(libraries / LIBRARY, f"usr/lib/x86_64-linux-gnu/{LIBRARY}")
            for path in re.findall(r"(/\S+) \(", needed):
                tar.add(os.path.realpath(path), path.lstrip("/"))
        self.do("import", str(archive), name)

    def run(self, image: str) -> list[str]:
        """The command that runs the image's program in the foreground."""
        return [*self.program, "run", "-i", "--rm", "--network", "none", image, "/play"]

    def running(self) -> dict[str, int]:
        """The host's pid of each container's program by the container's id."""
        listed = json.loads(self.do("ps", "--no-trunc", "--format", "json") or "[]")
        return {one["Id"]: int(one["Pid"]) for one in listed}


@contextmanager
def podman(folder: Path) -> Iterator[Podman]:
    """podman, whose containers, mounts and files are gone afterwards."""
    made = Podman(folder)
    try:
        yield made
    finally:
        subprocess.run([*made.program, "rm", "-fa", "-t", "0"], env=made.environment, capture_output=True)
        subprocess.run([*made.program, "rmi", "-fa"], env=made.environment, capture_output=True)
        subprocess.run(["umount", "-l", str(folder / "store/overlay")], capture_output=True)
        for place in (folder, Path(made.runroot)):
            shutil.rmtree(place, ignore_errors=True)
