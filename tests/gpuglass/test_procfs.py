from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuglass.procfs import (
    INITIAL_PID_NAMESPACE,
    NAME_LIMIT,
    PidView,
    ProcFs,
    clean_name,
    parse_namespace_pids,
    parse_stat,
)

# Captured from a Linux 6.18 machine: 52 fields after the man page's numbering.
TAIL = (
    b"11068 11068 4399 0 -1 4194304 1123 0 1 0 2 1 0 0 20 0 1 0 98765 21909504 2518 "
    b"18446744073709551615 4194304 7237421 140736215441232 0 0 0 0 16781312 2 0 0 0 17 1 0 0 0 0 0 "
    b"10363944 11778552 34840576 140736215443121 140736215443130 140736215443130 140736215445482 0"
)


def stat(name: bytes, pid: int = 42, state: bytes = b"S") -> bytes:
    return b"%d (%s) %s %s\n" % (pid, name, state, TAIL)


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the awaited state never came"
        time.sleep(0.01)


def write(root: Path, pid: int | str, **files: bytes) -> None:
    folder = root / str(pid)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


# --- the stat line


def test_a_captured_line_gives_name_state_parent_threads_and_start_time() -> None:
    process = parse_stat(stat(b"python3"))
    assert process is not None
    assert (process.pid, process.name, process.state) == (42, "python3", "S")
    assert (process.parent, process.threads, process.start_time) == (11068, 1, 98765)


@pytest.mark.parametrize("name", [b"a b", b"a) R 1", b"((", b"))", b"x\ny", b") S 1 2 3 (", b"", b" "])
def test_a_name_cannot_shift_the_fields_behind_it(name: bytes) -> None:
    process = parse_stat(stat(name))
    assert process is not None
    assert (process.pid, process.state, process.start_time) == (42, "S", 98765)
    assert process.name == name.decode().replace("\n", "\ufffd")


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"42",
        b"42 (x",
        b"42 )x( S",
        b"42 (x) S 1 2 3",
        b"pid (x) S " + TAIL,
        b"42 (x) 7 " + TAIL,
        b"42 (x) S one " + TAIL,
    ],
)
def test_what_is_not_a_stat_line_is_no_process(line: bytes) -> None:
    assert parse_stat(line) is None


@given(st.binary(max_size=400))
def test_no_bytes_make_the_parser_raise(raw: bytes) -> None:
    parse_stat(raw)
    parse_stat(b"1 (" + raw + b") S " + TAIL)


@given(st.binary(max_size=15).filter(lambda name: b"\x00" not in name))
def test_every_possible_name_is_printable_and_bounded(name: bytes) -> None:
    process = parse_stat(stat(name))
    assert process is not None
    assert process.start_time == 98765
    assert len(process.name) <= NAME_LIMIT
    assert process.name.isprintable() or "\ufffd" in process.name
    assert all(char.isprintable() or char == "\ufffd" for char in process.name)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (b"vllm::engine", "vllm::engine"),
        ("größe".encode(), "größe"),
        (b"half\xc3", "half\ufffd"),
        (b"\x1b[31mred", "\ufffd[31mred"),
        ("a\u202eb\u2028c".encode(), "a\ufffdb\ufffdc"),
        (b"x" * 100, "x" * NAME_LIMIT),
    ],
)
def test_a_name_is_made_fit_for_a_label(raw: bytes, clean: str) -> None:
    assert clean_name(raw) == clean


# --- alive or gone


@pytest.mark.parametrize("state", ["R", "S", "D", "T", "t", "I"])
def test_a_running_sleeping_or_stopped_process_is_not_gone(state: str) -> None:
    process = parse_stat(stat(b"x", state=state.encode()))
    assert process is not None and not process.gone


@pytest.mark.parametrize("state", ["Z", "X"])
def test_a_zombie_or_dead_process_is_told_and_is_gone(state: str) -> None:
    process = parse_stat(stat(b"x", state=state.encode()))
    assert process is not None and process.state == state and process.gone


def test_a_real_zombie_is_gone_and_after_reaping_is_no_process() -> None:
    # Not a fork: what other tests import may start threads in every forked child, and those end one by one.
    child = subprocess.Popen(["true"])
    procfs = ProcFs()

    def is_zombie() -> bool:
        process = procfs.process(child.pid)
        return process is not None and process.state == "Z"

    try:
        wait_until(is_zombie)
        process = procfs.process(child.pid)
        assert process is not None and process.gone and process.parent == os.getpid()
    finally:
        child.wait()
    assert procfs.process(child.pid) is None


MAIN_THREAD_LEAVES = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
ctypes.CDLL(None).syscall({exit_number}, 0)
"""


def test_a_real_process_whose_main_thread_has_left_is_not_gone() -> None:
    exit_number = {"x86_64": 60, "aarch64": 93}.get(os.uname().machine)
    if exit_number is None:
        pytest.skip("the number of the exit system call is not known for this machine")
    child = subprocess.Popen([sys.executable, "-c", MAIN_THREAD_LEAVES.format(exit_number=exit_number)])
    procfs = ProcFs()

    def leader_left() -> bool:
        process = procfs.process(child.pid)
        return process is not None and process.state == "Z"

    try:
        wait_until(leader_left)
        process = procfs.process(child.pid)
        assert process is not None and process.threads == 2 and not process.gone
    finally:
        child.kill()
        child.wait()


# --- reading a procfs


def test_own_process_is_found_in_the_real_procfs() -> None:
    own = ProcFs().process(os.getpid())
    assert own is not None
    assert (own.pid, own.parent) == (os.getpid(), os.getppid())
    assert own.state in "RS"
    boot_ticks = time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK")
    assert 0 < own.start_time <= boot_ticks + 1


def test_a_child_that_renames_itself_is_read_with_its_exact_identity() -> None:
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(15, b"a) Z\n1 (b", 0, 0, 0)  # PR_SET_NAME
        os.write(write_end, b"x")
        time.sleep(60)
        os._exit(0)
    try:
        os.read(read_end, 1)
        process = ProcFs().process(child)
        assert process is not None
        # Kernels differ in whether stat escapes a newline; either way nothing unprintable comes through.
        assert process.name.startswith("a) Z") and process.name.endswith("1 (b")
        assert process.name.isprintable()
        assert process.parent == os.getpid() and not process.gone
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(read_end)
        os.close(write_end)


@pytest.mark.parametrize("pid", [0, -1, 2**31, 10**30])
def test_an_impossible_pid_is_no_process(pid: int) -> None:
    assert ProcFs().process(pid) is None


def test_a_stat_that_names_another_pid_is_not_believed(tmp_path: Path) -> None:
    write(tmp_path, 42, stat=stat(b"x", pid=42))
    write(tmp_path, 43, stat=stat(b"x", pid=42))
    procfs = ProcFs(tmp_path)
    assert procfs.process(42) is not None
    assert procfs.process(43) is None


def test_a_read_is_bounded_and_a_missing_file_is_none(tmp_path: Path) -> None:
    write(tmp_path, 42, cgroup=b"x" * 200_000)
    procfs = ProcFs(tmp_path)
    assert procfs.read(42, "cgroup", 100_000) == b"x" * 100_000
    assert procfs.read(42, "cgroup", 300_000) == b"x" * 200_000
    assert procfs.read(42, "mountinfo", 10) is None
    assert procfs.read(42, "", 10) is None  # a directory


# --- whose pids


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Callable[..., ProcFs]]:
    def build(inode: str | None, nspid: str, with_init: bool = True) -> ProcFs:
        write(tmp_path, "self", status=f"Name:\tx\nNSpid:\t{nspid}\nThreads:\t1\n".encode())
        if inode is not None:
            (tmp_path / "self" / "ns").mkdir()
            (tmp_path / "self" / "ns" / "pid").symlink_to(inode)
        if with_init:
            write(tmp_path, 1, stat=stat(b"systemd", pid=1))
        return ProcFs(tmp_path)

    yield build


def test_the_first_pid_namespace_is_the_hosts(fake: Callable[..., ProcFs]) -> None:
    namespace = fake(f"pid:[{INITIAL_PID_NAMESPACE}]", "4711").pid_namespace()
    assert namespace.is_host and namespace.view is PidView.HOST
    assert "4026531836" in namespace.reason


def test_any_other_pid_namespace_is_private_and_says_the_mend(fake: Callable[..., ProcFs]) -> None:
    namespace = fake("pid:[4026532500]", "7").pid_namespace()
    assert namespace.view is PidView.PRIVATE and not namespace.is_host
    assert "4026532500" in namespace.reason and "hostPID" in namespace.reason


def test_a_host_procfs_mounted_into_a_private_namespace_does_not_make_it_the_hosts(
    fake: Callable[..., ProcFs],
) -> None:
    namespace = fake("pid:[4026532500]", "4711\t7").pid_namespace()
    assert namespace.view is PidView.PRIVATE
    assert "outer pid namespace" in namespace.reason


@pytest.mark.parametrize("inode", [None, "pid:[x]", "mnt:[4026531836]", "pid:[²]"])
def test_without_a_readable_namespace_link_the_view_is_unknown(
    fake: Callable[..., ProcFs], inode: str | None
) -> None:
    namespace = fake(inode, "7").pid_namespace()
    assert namespace.view is PidView.UNKNOWN and not namespace.is_host


def test_a_procfs_that_hides_other_processes_is_not_taken_for_the_hosts(
    fake: Callable[..., ProcFs],
) -> None:
    namespace = fake(f"pid:[{INITIAL_PID_NAMESPACE}]", "4711", with_init=False).pid_namespace()
    assert namespace.view is PidView.UNKNOWN
    assert "hidepid" in namespace.reason


def test_the_real_procfs_answers_with_a_reason_of_one_line() -> None:
    namespace = ProcFs().pid_namespace()
    inode = os.stat("/proc/self/ns/pid").st_ino
    assert namespace.is_host == (inode == INITIAL_PID_NAMESPACE and os.access("/proc/1/stat", os.R_OK))
    assert namespace.reason and "\n" not in namespace.reason


@pytest.mark.parametrize(
    ("status", "pids"),
    [
        ("Name:\tx\nNSpid:\t1\n", (1,)),
        ("NSpid:\t4711\t7\t1\n", (4711, 7, 1)),
        ("Name:\tx\n", ()),
        ("NSpid:\tx\t²\n", ()),
        ("", ()),
    ],
)
def test_nspid_is_read_outermost_first(status: str, pids: tuple[int, ...]) -> None:
    assert parse_namespace_pids(status) == pids
