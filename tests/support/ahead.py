"""Slow things that tests need, made before their turn: one after the other in a thread, beside the tests.

In: functions by the name of the fixture that gives their result, `ahead.prepared("NAME", make)` in the
conftest or test module of both. Out: `get()`, which waits while the thread makes it and makes it itself where
the thread has not begun. What is made is a process that starts or computes, so that the thread mostly waits;
a failure is raised where the result is asked for.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")

FREE_MEBIBYTES = 6144
"""With less memory free nothing is made ahead: several servers would run at a time that else run in turn."""
_AVAILABLE = re.compile(r"^MemAvailable:\s+(\d+) kB$", re.MULTILINE)


class Prepared(Generic[T]):
    """One result, made once, by whoever is first to want it. `make` gets a stack for what has to be ended."""

    def __init__(self, make: Callable[[ExitStack], T]) -> None:
        self._make = make
        self._stack = ExitStack()
        self._lock = threading.RLock()
        self._made: list[T] = []
        self._failure: BaseException | None = None
        self._closed = False

    def get(self) -> T:
        """The result. Raises what `make` raised."""
        with self._lock:
            if self._failure:
                raise self._failure
            if not self._made:
                try:
                    self._made.append(self._make(self._stack))
                except BaseException as error:
                    self._failure = error
                    raise
            return self._made[0]

    def begin(self) -> None:
        """Make it now, unless it was closed meanwhile; a failure is kept for `get`."""
        with self._lock:
            if not self._closed:
                with suppress(BaseException):
                    self.get()

    def close(self) -> None:
        """End what was made, once nobody makes it any more."""
        with self._lock:
            self._closed = True
            self._stack.close()


def short_folder(stack: ExitStack) -> Path:
    """A folder until the stack closes, with a short name: a Unix socket's path has at most 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="gpuglass-"))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


Fixture = tuple[str, str]
"""The module of a fixture, and its name."""

_registered: dict[Fixture, Prepared[Any]] = {}


def prepared(fixture: str, make: Callable[[ExitStack], T]) -> Prepared[T]:
    """What `fixture` of `make`'s module gives; it is made ahead if a selected test asks for that fixture."""
    _registered[make.__module__, fixture] = made = Prepared(make)
    return made


class Ahead:
    """The thread of one session."""

    def __init__(self, fixtures: Iterable[Fixture]) -> None:
        """Begins to make what these fixtures give, in their order, as far as it is registered."""
        self._queue = [_registered[one] for one in dict.fromkeys(fixtures) if one in _registered]
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for one in self._queue:
            if self._stopping.is_set() or _free_mebibytes() < FREE_MEBIBYTES:
                return
            one.begin()

    def stop(self) -> None:
        """Makes nothing more, and ends what was made, by the thread or by those who asked."""
        self._stopping.set()
        self._thread.join()
        for one in (*reversed(self._queue), *reversed(_registered.values())):
            one.close()


def _free_mebibytes() -> int:
    found = _AVAILABLE.search(Path("/proc/meminfo").read_text())
    return int(found[1]) >> 10 if found else 0
