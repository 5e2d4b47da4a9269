"""What is made before its turn: once, in the order of the tests, with its failures where they belong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support import ahead
from tests.support.ahead import Ahead, Prepared, prepared
from tests.test_support import Session, session  # noqa: F401 - a fixture

Make = Callable[[ExitStack], str]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What `making` has made; nothing else is registered meanwhile, and memory is no matter."""
    monkeypatch.setattr(ahead, "_registered", {})
    monkeypatch.setattr(ahead, "FREE_MEBIBYTES", 0)
    yield []


def here(*names: str) -> list[ahead.Fixture]:
    return [(__name__, name) for name in names]


def making(made: list[str], name: str) -> Make:
    def make(stack: ExitStack) -> str:
        stack.callback(made.append, f"end of {name}")
        made.append(name)
        return name

    return make


def test_what_is_asked_for_is_made_once_in_the_order_of_the_tests(made: list[str]) -> None:
    first, second = prepared("first", making(made, "first")), prepared("second", making(made, "second"))
    prepared("third", making(made, "third"))
    thread = Ahead(here("second", "tmp_path", "first", "second"))
    thread._thread.join()
    assert made == ["second", "first"]
    assert (first.get(), second.get()) == ("first", "second")
    thread.stop()
    assert made == ["second", "first", "end of first", "end of second"]


def test_what_no_test_has_as_its_fixture_ends_too(made: list[str]) -> None:
    """What one thing that is made asks of another."""
    part = prepared("part", making(made, "part"))
    whole = prepared("whole", lambda _: part.get())
    thread = Ahead(here("whole"))
    whole.get()
    thread.stop()
    assert made == ["part", "end of part"]


def test_a_failure_is_raised_where_it_is_asked_for_and_the_next_is_made(made: list[str]) -> None:
    def fail(stack: ExitStack) -> str:
        stack.callback(made.append, "end")
        raise OSError("no such model")

    bad, good = prepared("bad", fail), prepared("good", making(made, "good"))
    thread = Ahead(here("bad", "good"))
    thread._thread.join()
    assert good.get() == "good"
    for _ in range(2):
        with pytest.raises(OSError, match="no such model"):
            bad.get()
    thread.stop()
    assert made == ["good", "end of good", "end"]


def test_who_comes_early_waits_for_what_is_begun_and_makes_the_rest(made: list[str]) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slowly(stack: ExitStack) -> str:
        begun.set()
        assert go_on.wait(30)
        return making(made, "slow")(stack)

    slow, quick = prepared("slow", slowly), prepared("quick", making(made, "quick"))
    thread = Ahead(here("slow", "quick"))
    assert begun.wait(30)
    assert quick.get() == "quick"
    threading.Timer(0.05, go_on.set).start()
    assert slow.get() == "slow"
    thread.stop()
    assert made == ["quick", "slow", "end of quick", "end of slow"]


def test_after_the_end_nothing_is_made(made: list[str]) -> None:
    one = Prepared(making(made, "one"))
    one.close()
    one.begin()
    assert made == []


def test_with_little_memory_each_is_made_by_the_test_that_needs_it(
    made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "FREE_MEBIBYTES", 1 << 30)
    one = prepared("one", making(made, "one"))
    thread = Ahead(here("one"))
    thread._thread.join()
    assert made == []
    assert one.get() == "one"
    thread.stop()
    assert made == ["one", "end of one"]


def test_the_memory_of_this_machine_is_known() -> None:
    assert 0 < ahead._free_mebibytes() < 1 << 30


SESSION = """
import subprocess, time
from pathlib import Path
from tests.support import ahead

ahead.FREE_MEBIBYTES = 0

def make(stack):
    child = subprocess.Popen(["sleep", "60"])
    stack.callback(child.wait)
    stack.callback(child.kill)
    Path("made").touch()
    return child.pid

def lacking(stack):
    Path("lacking").touch()

SLOW = ahead.prepared("slow", make)
LACKING = ahead.prepared("nothing", lacking)
ELSEWHERE = ahead.prepared("tmp_path", lacking)

@pytest.fixture
def slow(): return SLOW.get()

@pytest.fixture
def nothing(): return LACKING.get()

def test_before():
    until = time.monotonic() + 30
    while not Path("made").exists():
        assert time.monotonic() < until
        time.sleep(0.01)

@pytest.mark.needs("unicorn")
def test_lacks_something(nothing): pass

def test_end(): assert END

def test_it(slow, tmp_path): assert slow and tmp_path.is_dir()  # the tmp_path of another module
"""


@pytest.mark.parametrize("ends", ["at the end", "early"])
def test_a_session_makes_it_beside_the_tests_before_and_ends_it(
    session: Session,  # noqa: F811
    tmp_path: Path,
    ends: str,
) -> None:
    outcome = session(SESSION.replace("END", str(ends == "at the end")), "-x")
    assert "processes behind" not in outcome.text
    assert outcome.code == (0 if ends == "at the end" else 1), outcome.text
    assert (
        "3 passed, 1 skipped" if ends == "at the end" else "1 failed, 1 passed, 1 skipped"
    ) in outcome.text
    assert (tmp_path / "session/made").exists()
    assert not (tmp_path / "session/lacking").exists()
