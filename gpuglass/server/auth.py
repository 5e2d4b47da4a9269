"""Basic authentication against bcrypt hashes, at a bounded cost.

An `Authorization` field flows in, a verdict flows out. A pair of user and password is checked with bcrypt
once; after that a keyed digest of it is enough, so that a scrape each second stays cheap. Nothing here is
ever logged.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from enum import Enum

from gpuglass.server.web_config import bcrypt_cost

MAX_ACCEPTED = 64
MAX_REFUSED = 36
"""Digests remembered, 100 together. Refused ones are kept apart, so that guessing cannot push out accepted
ones; they keep a scraper with a wrong password from costing a bcrypt each second."""

_BCRYPT_BYTES = 72
"""Bytes of a password that bcrypt uses; some implementations refuse longer ones, htpasswd cuts them."""


class Verdict(Enum):
    """Outcome of a check."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    BUSY = "busy"
    """Other passwords were being checked for as long as the caller could wait."""


class BasicAuth:
    """Checks credentials against one set of users. A changed file makes a new object, with empty memory.

    `work` bounds how many bcrypt computations run at once in the whole server.
    """

    def __init__(self, users: Mapping[str, str], work: threading.Semaphore) -> None:
        self._hashes = {user.encode(): hashed.encode() for user, hashed in users.items()}
        self._work = work
        self._secret = os.urandom(32)
        self._lock = threading.Lock()
        self._accepted: OrderedDict[bytes, bytes] = OrderedDict()
        self._refused: OrderedDict[bytes, None] = OrderedDict()
        # An unknown user is checked against a hash that no password has, at the cost of the dearest user:
        # the time does not tell whether the user exists (exactly so when all hashes have the same cost).
        cost = max((bcrypt_cost(hashed) or 0 for hashed in users.values()), default=10)
        self._nobody = f"$2b${cost:02d}${'.' * 53}".encode()

    def check(self, authorization: str, seconds: float) -> Verdict:
        """Check the value of an `Authorization` field. Waits at most `seconds` for its turn."""
        credentials = _decode(authorization)
        if credentials is None:
            return Verdict.REFUSED
        user, password = credentials
        digest = hmac.digest(self._secret, len(user).to_bytes(4, "big") + user + password, hashlib.sha256)
        if (remembered := self._remembered(user, digest)) is not None:
            return remembered
        if not self._work.acquire(timeout=max(0.0, seconds)):
            return Verdict.BUSY
        try:
            # Whoever held the turn before may have checked the same pair.
            if (remembered := self._remembered(user, digest)) is not None:
                return remembered
            known = self._hashes.get(user)
            right = _matches(password, known or self._nobody) and known is not None
        finally:
            self._work.release()
        with self._lock:
            if right:
                self._accepted[user] = digest
                _bound(self._accepted, MAX_ACCEPTED)
            else:
                self._refused[digest] = None
                _bound(self._refused, MAX_REFUSED)
        return Verdict.ACCEPTED if right else Verdict.REFUSED

    def _remembered(self, user: bytes, digest: bytes) -> Verdict | None:
        with self._lock:
            accepted = self._accepted.get(user)
            if accepted is not None and hmac.compare_digest(accepted, digest):
                self._accepted.move_to_end(user)
                return Verdict.ACCEPTED
            # The digests are keyed: the time of a look-up tells nothing about the password.
            return Verdict.REFUSED if digest in self._refused else None


def _decode(authorization: str) -> tuple[bytes, bytes] | None:
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        user, colon, password = base64.b64decode(token.strip(), validate=True).partition(b":")
    except (binascii.Error, ValueError):
        return None
    return (user, password) if colon else None


def _matches(password: bytes, hashed: bytes) -> bool:
    import bcrypt  # half a megabyte that a server without passwords does without

    try:
        return bcrypt.checkpw(password[:_BCRYPT_BYTES], hashed)
    except ValueError:  # a password that bcrypt cannot take
        return False


def _bound(memory: OrderedDict[bytes, bytes] | OrderedDict[bytes, None], size: int) -> None:
    while len(memory) > size:
        memory.popitem(last=False)
