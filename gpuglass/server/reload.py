"""Follows the web configuration file and its certificates while the server runs.

A `WebConfigSource` is asked for what is in force at each connection and request; at most once a second it
looks whether a file changed. The toolkit re-reads the file for every request and answers 500 while it is
broken. Here the last good configuration stays in force instead, because certificates are renewed in two
writes (certificate, then key) and monitoring should not fail in between. That is safe because nothing ever
becomes more open by itself: a change that would switch TLS, client certificates or authentication off is
refused like a broken file and needs a restart. Refused changes are counted and logged once.
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpuglass.server.auth import BasicAuth
from gpuglass.server.tls import make_context, tls_files
from gpuglass.server.web_config import (
    ClientAuth,
    RateLimit,
    TLSConfig,
    WebConfig,
    WebConfigError,
    load_web_config,
)

CHECK_SECONDS = 1.0

log = logging.getLogger("gpuglass.server")

_STRICTNESS = dict.fromkeys(ClientAuth, 0) | {
    ClientAuth.VERIFY_IF_GIVEN: 1,
    ClientAuth.REQUIRE_AND_VERIFY: 2,
}

_Signature = tuple[tuple[int, ...] | None, ...]


class TokenBucket:
    """Lets `burst` calls through at once and one more each `interval` seconds."""

    def __init__(self, interval: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval = interval
        self._burst = float(burst)
        self._clock = clock
        self._lock = threading.Lock()
        self._tokens = float(burst)
        self._at = clock()

    def take(self) -> bool:
        """Take a token if there is one."""
        with self._lock:
            now = self._clock()
            self._tokens = min(self._burst, self._tokens + (now - self._at) / self._interval)
            self._at = now
            if self._tokens < 1:
                return False
            self._tokens -= 1
            return True


@dataclass(frozen=True, slots=True)
class InForce:
    """What the server works with: one configuration with everything that was made from it."""

    generation: int = 0
    tls: TLSConfig | None = None
    context: ssl.SSLContext | None = None
    auth: BasicAuth | None = None
    bucket: TokenBucket | None = None
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class ReloadStats:
    """See `ServerStats` for the fields."""

    ok: bool = True
    reloads: int = 0
    failures: int = 0


class WebConfigSource:
    """Gives the configuration in force. Raises `WebConfigError` in the constructor if the file is unusable.

    Without a path it always gives plain HTTP without authentication.
    """

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._checking = threading.Lock()
        # One bcrypt at a time, as in the toolkit: guessing can never take more than one CPU.
        self._work = threading.BoundedSemaphore(1)
        self._files: list[Path] = []
        self._seen: _Signature = ()
        self._stats = ReloadStats()
        self._next_check = clock() + CHECK_SECONDS
        self._now = InForce()
        if path is not None:
            config = self._read(path)
            self._now = self._make(config, path, 0)

    @property
    def stats(self) -> ReloadStats:
        """Counts of changes since the start."""
        return self._stats

    def current(self) -> InForce:
        """What is in force, after a look at the files if the last one is a second ago. Never raises."""
        if (
            self._path is not None
            and self._clock() >= self._next_check
            and self._checking.acquire(blocking=False)
        ):
            try:
                self._next_check = self._clock() + CHECK_SECONDS
                self._check(self._path)
            finally:
                self._checking.release()
        return self._now

    def _check(self, path: Path) -> None:
        if _signature(self._files) == self._seen:
            return
        old = self._now
        try:
            config = self._read(path)
            _refuse_opening(old, config, path)
            self._now = self._make(config, path, old.generation + 1)
            self._stats = ReloadStats(True, self._stats.reloads + 1, self._stats.failures)
            log.info("%s: the changed web configuration is in force", path)
        except (WebConfigError, OSError) as error:
            self._stats = ReloadStats(False, self._stats.reloads, self._stats.failures + 1)
            log.warning("%s; the configuration before stays in force", error)

    def _read(self, path: Path) -> WebConfig:
        """Read the file, and note the state of all files before their content is read: no change is missed.

        A refused configuration's files are followed too, since mending one of them must be noticed.
        """
        self._files = self._files or [path]
        self._seen = _signature(self._files)
        config = load_web_config(path)
        files = tls_files(config.tls, path.parent) if config.tls else []
        self._files, self._seen = [path, *files], (self._seen[0], *_signature(files))
        return config

    def _make(self, config: WebConfig, path: Path, generation: int) -> InForce:
        return InForce(
            generation,
            config.tls,
            make_context(config.tls, path) if config.tls else None,
            BasicAuth(config.users, self._work) if config.users else None,
            _bucket(config.rate_limit),
            config.headers,
        )


def _refuse_opening(old: InForce, new: WebConfig, path: Path) -> None:
    """Raise for a change that would let in who is kept out, or that open connections would not see."""
    if (old.tls is None) != (new.tls is None):
        raise WebConfigError(f"{path}: tls_server_config: TLS cannot be switched on or off without a restart")
    if old.auth is not None and not new.users:
        raise WebConfigError(f"{path}: basic_auth_users: authentication is switched off only by a restart")
    if old.tls and new.tls:
        if _STRICTNESS[new.tls.client_auth_type] < _STRICTNESS[old.tls.client_auth_type]:
            raise WebConfigError(f"{path}: tls_server_config.client_auth_type: is weakened only by a restart")
        if old.tls.client_allowed_sans and not new.tls.client_allowed_sans:
            raise WebConfigError(f"{path}: tls_server_config.client_allowed_sans: removed only by a restart")


def _bucket(limit: RateLimit | None) -> TokenBucket | None:
    return TokenBucket(limit.seconds, limit.burst) if limit and limit.seconds else None


def _signature(files: list[Path]) -> _Signature:
    """What changes when a file is written, replaced, or made readable; None for one that is not there."""
    return tuple(_identity(file) for file in files)


def _identity(file: Path) -> tuple[int, ...] | None:
    try:
        found = os.stat(file)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
