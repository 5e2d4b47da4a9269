"""The command itself: help, version, wrong usage, errors in one line, readers that go away."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest

import gpuglass
from gpuglass import cli
from gpuglass.command import Command
from gpuglass.errors import ConfigError, UserError

ROOT = Path(__file__).parents[2]
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][
    "gpuglass.commands"
]


def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("GPUGLASS_")}
    return subprocess.run(
        [sys.executable, "-m", "gpuglass", *arguments],
        env=environ | more,
        capture_output=True,
        text=True,
        timeout=30,
    )


def with_command(monkeypatch: pytest.MonkeyPatch, do: object) -> None:
    """A command `try` that does one thing."""

    def act(_: Namespace) -> int:
        if isinstance(do, BaseException):
            raise do
        assert isinstance(do, int)
        return do

    command = Command("tries", lambda parser: None, act)
    monkeypatch.setattr(cli, "commands", lambda only: {"try": command})


# Usage


def test_help_lists_every_command_with_its_summary(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in cli.commands().items():
        assert any(line.split()[:1] == [name] and command.summary in line for line in lines), name


def test_the_declared_commands_are_there_and_no_others() -> None:
    assert cli.commands().keys() >= DECLARED.keys() >= {"agent", "config", "doctor", "metrics"}
    assert "serve" not in cli.commands()


@pytest.mark.parametrize("name", sorted(DECLARED))
def test_each_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert f"usage: gpuglass {name}" in said
    assert "examples:\n" in said


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"gpuglass {gpuglass.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["agent", "--fly"], ["metrics", "--tier", "medium"], ["config"]]
)
def test_wrong_usage_gives_2_and_names_itself_on_standard_error(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: gpuglass")
    assert ": error: " in err.splitlines()[-1]


# Exit codes


@pytest.mark.parametrize("code", [0, 1, 3])
def test_the_commands_code_is_the_exit_code(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    with_command(monkeypatch, code)
    assert cli.main(["try"]) == code


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("it failed"), 1, "gpuglass: it failed\n"),
        (ConfigError("gpu.interval: no"), 2, "gpuglass: gpu.interval: no\n"),
        (UserError("two\nlines"), 1, "gpuglass: two lines\n"),
    ],
)
def test_an_error_of_the_user_is_one_line_on_standard_error(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: UserError,
    code: int,
    line: str,
) -> None:
    with_command(monkeypatch, error)
    assert cli.main(["try"]) == code
    assert capsys.readouterr() == ("", line)


def test_a_defect_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    with_command(monkeypatch, ZeroDivisionError("a defect"))
    with pytest.raises(ZeroDivisionError):
        cli.main(["try"])


def test_an_interrupt_gives_130_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_command(monkeypatch, KeyboardInterrupt())
    assert cli.main(["try"]) == 130
    assert capsys.readouterr() == ("", "")


def test_what_is_registered_but_no_command_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        def __init__(self, name: str, value: object) -> None:
            self.name, self._value = name, value

        def load(self) -> object:
            return self._value

    good = Command("good", lambda parser: None, lambda arguments: 0)
    entries = [Entry("b", good), Entry("a", "nonsense")]
    monkeypatch.setattr(cli, "entry_points", lambda group: entries)
    assert cli.commands() == {"b": good}


def test_only_the_command_that_is_asked_for_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    class Entry:
        def __init__(self, name: str) -> None:
            self.name = name

        def load(self) -> Command:
            loaded.append(self.name)
            return Command(self.name, lambda parser: None, lambda arguments: 0)

    monkeypatch.setattr(cli, "entry_points", lambda group: [Entry("b"), Entry("a")])
    assert cli.main(["b"]) == 0
    assert loaded == ["b"]
    with pytest.raises(SystemExit):
        cli.main(["c"])
    assert loaded == ["b", "a", "b"]


def test_a_command_adds_arguments_of_its_own() -> None:
    def configure(parser: ArgumentParser) -> None:
        parser.add_argument("--high", type=int)

    fly = Command("flies", configure, lambda arguments: 0)
    assert cli.parser({"fly": fly}).parse_args(["fly", "--high", "3"]).high == 3
    with pytest.raises(SystemExit):
        cli.parser({"fly": fly}).parse_args(["fly", "--low", "3"])


# As a process


def test_an_error_as_a_process_is_one_line_without_a_traceback() -> None:
    done = run("agent", "--config", "/nowhere/agent.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpuglass: /nowhere/agent.yaml: cannot read it: No such file or directory\n"


@pytest.mark.parametrize(
    "arguments", [["metrics"], ["metrics", "gpuglass_gpus"], ["--version"], ["metrics", "--help"]]
)
def test_a_reader_that_went_away_is_no_error(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "gpuglass", *arguments], stdout=writing, stderr=subprocess.PIPE, timeout=30
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_output_that_cannot_be_written_is_an_error() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "gpuglass", "metrics", "gpuglass_gpus"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=30,
        )
    assert done.returncode == 1
    assert done.stderr == "gpuglass: cannot write the output: No space left on device\n"
