"""SIGINT and SIGTERM for a program that has things to clean up.

In flow the signals, out flows `Stopped` at the next pause, so that no other line of the program is ever
interrupted. A user who cannot wait sends a second one.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):
    """The user wants the demo to end."""


class Signals:
    """SIGINT and SIGTERM: the first one ends the demo at the next pause, a later one at once."""

    def __init__(self, kill: Callable[[], None]) -> None:
        self._kill = kill
        self._asked: float | None = None
        self._interrupting = False
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Take the signals until the block ends."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self._on_signal) for number in numbers]
        wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)
            os.close(self._reader)
            os.close(self._writer)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked is None:
            self._asked = now
            if self._interrupting:
                raise Stopped
        elif now - self._asked > 0.5:  # make passes a signal on that its whole group has got: that is one
            self._kill()
            os._exit(130)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """In the block a signal interrupts what runs. Raises Stopped."""
        self._interrupting = True
        try:
            self.pause(0)
            yield
        finally:
            self._interrupting = False

    def pause(self, seconds: float) -> None:
        """Wait, or raise Stopped as soon as a signal has come."""
        until = time.monotonic() + seconds
        while self._asked is None:
            left = until - time.monotonic()
            select.select([self._reader], [], [], max(0.0, left))
            if left <= 0:
                return
        raise Stopped
