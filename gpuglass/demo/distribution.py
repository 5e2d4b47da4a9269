"""Finds Prometheus, Alertmanager and their tools, or fetches them from the distribution.

In: a program's name. Out: the path of an executable file, from the PATH if it is there, else unpacked from
the Debian or Ubuntu package into a cache folder. Nothing is installed: no service starts, no right is
needed, and deleting the cache folder undoes it. What cannot be had raises `ProgramMissing`, one line that
names the mend.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

APT_SECONDS = 300
"""How long one call of apt-get may take before the network counts as lacking."""


@dataclass(frozen=True, slots=True)
class _Source:
    package: str
    names: tuple[str, ...]
    """File names of the program: upstream's and the distribution's."""


PROGRAMS = {
    "prometheus": _Source("prometheus", ("prometheus",)),
    "promtool": _Source("prometheus", ("promtool",)),
    "alertmanager": _Source("prometheus-alertmanager", ("alertmanager", "prometheus-alertmanager")),
    "amtool": _Source("prometheus-alertmanager", ("amtool",)),
}


class Reason(enum.StrEnum):
    """Why a program could not be had."""

    NO_APT = "no apt-get and dpkg-deb on this machine"
    NO_NETWORK = "no network"
    UNKNOWN_PACKAGE = "apt knows no such package"
    NO_PERMISSION = "no permission"
    DISK_FULL = "disk full"
    FAILED = "apt-get failed"


class ProgramMissing(Exception):
    """A program is neither on the PATH nor to be fetched; the text is one line that ends with the mend."""

    def __init__(self, program: str, reason: Reason, detail: str, command: str) -> None:
        super().__init__(f"{program} is missing: {reason}{f' ({detail})' if detail else ''}; {command}")
        self.program = program
        self.reason = reason
        self.command = command


def cache_folder() -> Path:
    """`$GPUGLASS_CACHE`, else `gpuglass` in the XDG cache folder. It need not exist yet."""
    if chosen := os.environ.get("GPUGLASS_CACHE"):
        return Path(chosen).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "gpuglass"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file `path` against other processes; folders above it are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def locate(program: str) -> Path | None:
    """The program on the PATH or in the cache folder, without fetching anything."""
    source = PROGRAMS[program]
    for name in source.names:
        if on_path := shutil.which(name):
            return Path(on_path)
    unpacked = [
        file
        for name in source.names
        for file in (cache_folder() / "debian").glob(f"{source.package}_*/usr/bin/{name}")
        if os.access(file, os.X_OK)
    ]
    return max(unpacked, key=lambda file: file.stat().st_mtime, default=None)


def describe_missing(programs: Iterable[str] = PROGRAMS) -> str | None:
    """One line about those that neither the PATH nor the cache holds; None if all are there."""
    lacking = [program for program in programs if locate(program) is None]
    if not lacking:
        return None
    packages = sorted({PROGRAMS[program].package for program in lacking})
    return f"{', '.join(lacking)} not found; apt-get install {' '.join(packages)}"


def find(program: str) -> Path:
    """The path of `program`, one of `PROGRAMS`; downloads its package (about 20 MB) when it must.

    Raises ProgramMissing.
    """
    if found := locate(program):
        return found
    source, folder = PROGRAMS[program], cache_folder() / "debian"
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise ProgramMissing(
            program, Reason.NO_APT, "", "put it on the PATH, from https://prometheus.io/download/"
        )
    try:
        with locked(folder / f"{source.package}.lock"):
            if locate(program) is None:  # another process may have fetched it meanwhile
                _fetch(program, source.package, folder)
    except OSError as error:
        _explain(program, source.package, f"{error.strerror}: {error.filename}", error.errno)
    if found := locate(program):
        return found
    raise ProgramMissing(
        program,
        Reason.FAILED,
        f"the package {source.package} does not contain it",
        "put it on the PATH, from https://prometheus.io/download/",
    )


def _fetch(program: str, package: str, folder: Path) -> None:
    """Unpacks `package` to `folder`/PACKAGE_VERSION_ARCHITECTURE, which appears only when complete."""
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as temporary:
        download = _apt(temporary, "download", package)
        if download.returncode:
            # apt's lists are absent (a fresh container) or stale. Lists of our own need no root, leave the
            # machine as it is and do not wait for another apt that runs.
            (Path(temporary) / "lists/partial").mkdir(parents=True)
            private = (f"State::Lists={temporary}/lists", "Cache::pkgcache=", "Cache::srcpkgcache=")
            options = [part for option in private for part in ("-o", f"Dir::{option}")]
            update = _apt(temporary, *options, "update")
            download = _apt(temporary, *options, "download", package)
            if download.returncode:
                _explain(program, package, f"{update.stderr}\n{download.stderr}")
        deb = next(Path(temporary).glob("*.deb"))
        unpack = _run(temporary, "dpkg-deb", "-x", deb.name, "unpacked")
        if unpack.returncode:
            _explain(program, package, unpack.stderr)
        (Path(temporary) / "unpacked").rename(folder / deb.stem)


def _apt(cwd: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return _run(
        cwd, "apt-get", "-qq", "-o", "Acquire::http::Timeout=20", "-o", "Acquire::Retries=2", *arguments
    )


def _run(cwd: str, *command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            cwd=cwd,
            env=os.environ | {"LC_ALL": "C"},
            capture_output=True,
            text=True,
            timeout=APT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"E: timed out after {APT_SECONDS} s")


_SIGNS = (
    (Reason.DISK_FULL, r"No space left|enough free space|Disk quota exceeded"),
    (
        Reason.NO_NETWORK,
        r"Could not resolve|Temporary failure|Failed to fetch|[Uu]nable to connect|Could not connect"
        r"|timed out|Cannot initiate the connection|Network is unreachable",
    ),
    (Reason.UNKNOWN_PACKAGE, r"Unable to locate package|no installation candidate|Can't find a source"),
    (Reason.NO_PERMISSION, r"Permission denied|Read-only file system|Operation not permitted"),
)
"""What apt-get and dpkg-deb print, most telling first: a full disk also fails to fetch."""


def _explain(program: str, package: str, output: str, number: int | None = None) -> NoReturn:
    """Raises ProgramMissing for what apt-get, dpkg-deb or the kernel said."""
    detail = ""
    reason = Reason.FAILED
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        reason, detail = Reason.NO_PERMISSION, output
    elif number in (errno.ENOSPC, errno.EDQUOT):
        reason, detail = Reason.DISK_FULL, output
    else:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("E:")] or lines
        detail = errors[-1].removeprefix("E: ") if errors else ""
        for known, sign in _SIGNS:
            if matching := [line for line in lines if re.search(sign, line)]:
                reason, detail = known, matching[-1].removeprefix("E: ").removeprefix("W: ")
                break
    match reason:
        case Reason.NO_PERMISSION | Reason.DISK_FULL:
            command = f"choose another folder than {cache_folder()} with GPUGLASS_CACHE=FOLDER"
        case Reason.UNKNOWN_PACKAGE:
            command = f"as root: apt-get update && apt-get install {package} (on Ubuntu it is in universe)"
        case _:
            command = f"with network, as root: apt-get update && apt-get install {package}"
    raise ProgramMissing(program, reason, detail, command)
