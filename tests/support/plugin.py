"""The pytest plugin behind tests/conftest.py: requirements, time budgets, what is made ahead, no
process left behind.

In: `needs` marks, and `GPUGLASS_REQUIRE`, `GPUGLASS_BUDGETS` from the environment. Out: tests that are
skipped or failed with a command that mends it, a summary of what was not run, a failing session when a room
took too long.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator, Iterator

import pytest

from tests.support import processes
from tests.support.ahead import Ahead, Fixture
from tests.support.budgets import Spent
from tests.support.requirements import (
    REQUIREMENTS,
    Provision,
    UnknownRequirement,
    parse_required,
)

PROVISION = pytest.StashKey[Provision]()
SKIPPED = pytest.StashKey[Counter[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "needs(*names): runs only where the requirements of tests/support/requirements.py are met"
    )
    if config.option.durations is None:
        config.option.durations = 10
    try:
        required = parse_required(os.environ.get("GPUGLASS_REQUIRE", ""))
    except UnknownRequirement as error:
        raise pytest.UsageError(str(error)) from None
    config.stash[PROVISION] = Provision(required)
    config.stash[SKIPPED] = Counter()
    if scale := os.environ.get("GPUGLASS_BUDGETS"):
        try:
            config.pluginmanager.register(Budgets(float(scale)))
        except ValueError:
            raise pytest.UsageError(
                f"GPUGLASS_BUDGETS={scale!r}: give 1, or a factor that stretches the budgets"
            ) from None


def pytest_unconfigure(config: pytest.Config) -> None:
    if PROVISION in config.stash:
        config.stash[PROVISION].stop()


def needs(item: pytest.Item) -> list[str]:
    """The requirements of a test, without repetition."""
    names = dict.fromkeys(str(name) for mark in item.iter_markers("needs") for name in mark.args)
    for name in names:
        if name not in REQUIREMENTS:
            raise pytest.UsageError(str(UnknownRequirement(name, item.nodeid)))
    return list(names)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tests that need what is still being provided run last; the rest runs beside it."""
    wanted = {item: needs(item) for item in session.items}
    if session.config.option.collectonly:
        return
    provision = session.config.stash[PROVISION]
    provision.start(dict.fromkeys(name for names in wanted.values() for name in names))
    session.items.sort(key=lambda item: any(map(provision.is_pending, wanted[item])))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Waits for a tool build here: outside of the test's timeout, its duration and so the room's budget."""
    provision = item.config.stash[PROVISION]
    for name in needs(item):
        if provision.is_pending(name) and (
            terminal := item.config.pluginmanager.get_plugin("terminalreporter")
        ):
            terminal.ensure_newline()
            terminal.write_line(f"waiting for {name}: {REQUIREMENTS[name].what}")
        provision.lacking(name)
    return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    provision = item.config.stash[PROVISION]
    for name in needs(item):
        if reason := provision.lacking(name):
            message = f"needs {name}: {reason}; to have it: {REQUIREMENTS[name].command}"
            if name in provision.required:
                pytest.fail(message, pytrace=False)
            item.config.stash[SKIPPED][name] += 1
            pytest.skip(message)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if skipped := config.stash[SKIPPED]:
        terminalreporter.section("not run on this machine")
        for name, count in sorted(skipped.items()):
            reason = config.stash[PROVISION].lacking(name)
            tests = f"{count} test{'s' if count > 1 else ''}"
            terminalreporter.write_line(
                f"{name} ({tests}): {reason}; to have it: {REQUIREMENTS[name].command}"
            )


class Budgets:
    """Sums the time of each room's tests and fails the session if a room took too long."""

    def __init__(self, scale: float) -> None:
        self.spent = Spent(scale)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.spent.add(report.nodeid, report.duration)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.spent.exceeded() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for line in self.spent.exceeded():
            terminalreporter.write_line(line, red=True)


def _fixtures_of_tests_that_run(session: pytest.Session) -> Iterator[Fixture]:
    """In the order of the tests; not of those that lack something, or still wait for it."""
    provision = session.config.stash[PROVISION]
    for item in session.items:
        if any(provision.is_pending(name) or provision.lacking(name) for name in needs(item)):
            continue
        if isinstance(item, pytest.Function):
            # pytest tells which definition of a name a test gets nowhere else.
            for name, definitions in item._fixtureinfo.name2fixturedefs.items():
                yield definitions[-1].func.__module__, name


@pytest.fixture(scope="session", autouse=True)
def no_process_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails the session if a process that a test started outlives it."""
    mark = processes.mark_session()
    ahead = Ahead(_fixtures_of_tests_that_run(request.session))
    yield
    ahead.stop()
    request.config.stash[PROVISION].stop()
    if left := processes.survivors(mark):
        processes.kill(left)
        lines = "".join(f"\n  {pid}: {command}" for pid, command in left.items())
        pytest.fail(f"tests left processes behind (killed now):{lines}", pytrace=False)
