"""The receiver's socket in the file system: made, guarded, made anew when somebody removed it.

In flows the configuration, out comes a listening SOCK_SEQPACKET socket or an `EndpointError` that names the
setting and the mend. A socket that an agent before us left behind is replaced; one that still answers, or a
file that is no socket, is left alone.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import pwd
import socket
import stat
from pathlib import Path

from gpuglass.config import EnginesConfig
from gpuglass.errors import ConfigError

DEFAULT_SOCKET = "/run/gpuglass/agent.sock"
"""Where engines look when they are told nothing else (`GPUGLASS_SOCKET` of gpuglass-vllm)."""

BACKLOG = 128
SEQPACKET = socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC


class EndpointError(ConfigError):
    """The socket cannot be made. One line: setting, path, reason, mend."""


class Endpoint:
    """The socket that engines connect to."""

    def __init__(self, config: EnginesConfig) -> None:
        self.path = Path(config.socket or DEFAULT_SOCKET)
        self.is_default = not config.socket
        self._config = config
        self._identity: tuple[int, int] | None = None

    def open(self) -> socket.socket:
        """Make the folder and the socket and listen; raises `EndpointError`."""
        owner = _number("owner", self._config.owner)
        group = _number("group", self._config.group)
        self._make_folder(owner, group)
        listening = socket.socket(socket.AF_UNIX, SEQPACKET)
        try:
            self._bind(listening)
            # Nobody can connect before listen, so the rights are in force from the first connection on.
            os.chmod(self.path, self._config.socket_mode.bits)
            if owner != -1 or group != -1:
                os.chown(self.path, owner, group)
            listening.listen(BACKLOG)
            self._identity = _identity(self.path)
        except OSError as error:
            listening.close()
            raise self._error(error) from None
        except EndpointError:
            listening.close()
            raise
        return listening

    def is_ours(self) -> bool:
        """Whether the path still leads to the socket that we listen on: cleaners of /run and /tmp exist."""
        return self._identity is not None and _identity(self.path) == self._identity

    def remove(self) -> None:
        """Remove the socket if it is still ours, so that senders see at once that nobody listens."""
        if self.is_ours():
            with contextlib.suppress(OSError):
                self.path.unlink()
        self._identity = None

    def _make_folder(self, owner: int, group: int) -> None:
        folder = self.path.parent
        try:
            if folder.is_dir():
                return  # somebody else's: its rights are his business
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700)
            if owner != -1 or group != -1:
                os.chown(folder, owner, group)
            os.chmod(folder, self._config.directory_mode.bits)
        except FileExistsError:
            return
        except OSError as error:
            raise self._error(error, folder) from None

    def _bind(self, listening: socket.socket) -> None:
        try:
            listening.bind(str(self.path))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            self._clear()
            listening.bind(str(self.path))

    def _clear(self) -> None:
        """Remove the socket of an agent that has gone; raises `EndpointError` for anything else."""
        try:
            is_socket = stat.S_ISSOCK(self.path.lstat().st_mode)
        except FileNotFoundError:
            return
        if not is_socket:
            raise EndpointError(
                f"engines.socket: {self.path} is there and is no socket: remove it or name another path"
            )
        if answers(self.path):
            raise EndpointError(
                f"engines.socket: another process answers on {self.path}: stop it or name another path"
            )
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def _error(self, error: OSError, path: Path | None = None) -> EndpointError:
        mend = "name a path that this user may write, or set engines.enabled: false"
        if error.errno == errno.EPERM and (self._config.owner or self._config.group):
            mend = "only root may set engines.owner and engines.group"
        return EndpointError(f"engines.socket: {path or self.path}: {error.strerror}: {mend}")


def answers(path: Path) -> bool:
    """Whether somebody listens on a socket. Never blocks."""
    with socket.socket(socket.AF_UNIX, SEQPACKET) as probe:
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True  # its queue is full, it is of another type, or we may not ask
    return True


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _number(key: str, name: str) -> int:
    """Uid or gid of a name or number; -1 if empty; raises `EndpointError`."""
    if not name:
        return -1
    if name.isascii() and name.isdecimal() and len(name) <= 10:
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid if key == "owner" else grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):
        what = "user" if key == "owner" else "group"
        raise EndpointError(f"engines.{key}: there is no {what} {name!r} here: give its number") from None
