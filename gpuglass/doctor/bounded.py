"""Calls that may never return, with a limit: name servers, drivers, sockets that drip.

The call runs in a daemon thread. One that is stuck is left behind, and `leave` ends the process without it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_PREFIX = "doctor-"


class TookTooLong(Exception):
    """The call did not return in time."""


def bounded(name: str, seconds: float, call: Callable[[], T]) -> T:
    """The call's result or exception; raises `TookTooLong` after `seconds`."""
    results: list[T] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            results.append(call())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, name=_PREFIX + name, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if results:
        return results[0]
    raise TookTooLong(f"no result after {seconds:g} s")


def leave(code: int) -> int:
    """The exit code, or, with a call still stuck, the end of the process: the interpreter might wait for
    it."""
    if any(thread.name.startswith(_PREFIX) for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
