"""Programs come from the PATH, the cache or the distribution's packages; what cannot be had says its mend."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gpuglass.demo import distribution
from gpuglass.demo.distribution import ProgramMissing, Reason

Put = Callable[[str, str], Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPUGLASS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Makes a PATH that holds the shell, its basic tools, a dpkg-deb and what is put there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "cp", "mkdir", "touch", "sleep", "cat", "tar", "dpkg-deb", "python3"):
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(folder))

    def program(name: str, script: str) -> Path:
        path = folder / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    return program


@pytest.fixture
def deb(tmp_path: Path, put: Put) -> Path:
    """A package as the distribution's, with a small amtool in it."""
    if not shutil.which("dpkg-deb"):
        pytest.skip("dpkg-deb is Debian's")
    root = tmp_path / "package"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(
        "Package: prometheus-alertmanager\nVersion: 1.0\nArchitecture: all\n"
        "Maintainer: T <t@example.com>\nDescription: t\n"
    )
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/bin/amtool").write_text("#!/bin/sh\necho amtool\n")
    (root / "usr/bin/amtool").chmod(0o755)
    path = tmp_path / "prometheus-alertmanager_1.0_all.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", root, path], check=True, capture_output=True)
    return path


def test_what_is_on_the_path_is_taken_by_either_name(put: Put, cache: Path) -> None:
    upstream, debians = put("amtool", ""), put("prometheus-alertmanager", "")
    assert distribution.find("amtool") == upstream
    assert distribution.find("alertmanager") == debians
    assert not cache.exists()


def test_a_package_is_unpacked_into_the_cache_once(put: Put, deb: Path, cache: Path) -> None:
    put("apt-get", f"cp {deb} .; echo $* >>{cache}.log")
    found = distribution.find("amtool")
    assert found == cache / "debian/prometheus-alertmanager_1.0_all/usr/bin/amtool"
    assert subprocess.run([found], capture_output=True, text=True).stdout == "amtool\n"
    assert distribution.find("amtool") == found
    assert len(Path(f"{cache}.log").read_text().splitlines()) == 1
    assert not list((cache / "debian").glob(".new-*"))


def test_without_package_lists_it_fetches_lists_of_its_own(put: Put, deb: Path, cache: Path) -> None:
    put(
        "apt-get",
        f"""
        echo "$*" >>{cache}.log
        case "$*" in
          *Dir::State::Lists=*update) touch lists/ready;;
          *) [ -e lists/ready ] && exec cp {deb} .; echo 'E: Unable to locate package x' >&2; exit 100;;
        esac
        """,
    )
    assert distribution.find("amtool").exists()
    assert len(Path(f"{cache}.log").read_text().splitlines()) == 3


def test_two_processes_at_once_download_once(put: Put, deb: Path, cache: Path) -> None:
    put("apt-get", f"cp {deb} .; echo $* >>{cache}.log; sleep 0.5")
    code = "from gpuglass.demo import distribution; print(distribution.find('amtool'))"
    root = Path(distribution.__file__).parents[2]
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert len({process.communicate()[0] for process in both}) == 1
    assert [process.returncode for process in both] == [0, 0]
    assert len(Path(f"{cache}.log").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("said", "reason", "mend"),
    [
        (
            "E: Unable to locate package prometheus",
            Reason.UNKNOWN_PACKAGE,
            "apt-get update && apt-get install prometheus",
        ),
        (
            "E: Failed to fetch http://deb.example/x  Could not resolve 'deb.example'",
            Reason.NO_NETWORK,
            "with network, as root: apt-get update",
        ),
        (
            "W: Failed to fetch http://x  Could not connect\nE: Unable to locate package prometheus",
            Reason.NO_NETWORK,
            "with network",
        ),
        (
            "E: Write error - write (28: No space left on device)",
            Reason.DISK_FULL,
            "with GPUGLASS_CACHE=FOLDER",
        ),
        (
            "E: Could not open file x - open (13: Permission denied)",
            Reason.NO_PERMISSION,
            "with GPUGLASS_CACHE=FOLDER",
        ),
        ("E: Something new", Reason.FAILED, "apt-get install prometheus"),
        ("", Reason.FAILED, "apt-get install prometheus"),
    ],
)
def test_a_failing_apt_is_told_in_one_line_with_the_mend(
    put: Put, cache: Path, said: str, reason: Reason, mend: str
) -> None:
    put("dpkg-deb", "")
    put("apt-get", f'cat >&2 <<"END"\n{said}\nEND\nexit 100')
    with pytest.raises(ProgramMissing) as caught:
        distribution.find("prometheus")
    text = str(caught.value)
    assert caught.value.reason is reason
    assert text.startswith(f"prometheus is missing: {reason}")
    assert mend in text
    assert "\n" not in text
    assert not list((cache / "debian").glob("*/"))


def test_a_package_that_cannot_be_unpacked_leaves_nothing(put: Put, cache: Path) -> None:
    put("apt-get", "touch prometheus_1_all.deb")
    put("dpkg-deb", "mkdir unpacked; echo 'dpkg-deb: error: write: No space left on device' >&2; exit 2")
    with pytest.raises(ProgramMissing) as caught:
        distribution.find("prometheus")
    assert caught.value.reason is Reason.DISK_FULL
    assert not list((cache / "debian").glob("*/"))


def test_a_machine_without_apt_is_pointed_to_the_download(put: Put) -> None:
    with pytest.raises(
        ProgramMissing, match=r"no apt-get .*; put it on the PATH, from https://prometheus.io"
    ) as caught:
        distribution.find("prometheus")
    assert caught.value.reason is Reason.NO_APT


def test_a_cache_folder_that_cannot_be_written_is_named(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    put("apt-get", "")
    put("dpkg-deb", "")
    monkeypatch.setenv("GPUGLASS_CACHE", "/sys/gpuglass")  # refused to root, too
    with pytest.raises(ProgramMissing, match=r"choose another folder than /sys/gpuglass") as caught:
        distribution.find("prometheus")
    assert caught.value.reason is Reason.NO_PERMISSION


def test_an_apt_that_hangs_is_given_up(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribution, "APT_SECONDS", 0.2)
    put("dpkg-deb", "")
    put("apt-get", "exec sleep 30")
    with pytest.raises(ProgramMissing) as caught:
        distribution.find("prometheus")
    assert caught.value.reason is Reason.NO_NETWORK


def test_describe_missing_names_only_what_is_lacking(put: Put) -> None:
    put("prometheus", "")
    assert distribution.describe_missing(["prometheus"]) is None
    text = distribution.describe_missing()
    assert (
        text == "promtool, alertmanager, amtool not found; apt-get install prometheus prometheus-alertmanager"
    )


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GPUGLASS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert distribution.cache_folder() == tmp_path / "gpuglass"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the XDG specification: to be ignored
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert distribution.cache_folder() == tmp_path / "home/.cache/gpuglass"


@pytest.mark.needs("apt")
def test_the_real_package_is_downloaded_and_runs(cache: Path) -> None:
    amtool = distribution.find("amtool")
    assert amtool.is_relative_to(cache) or shutil.which("amtool")
    assert "amtool" in subprocess.run([amtool, "--version"], capture_output=True, text=True).stdout
    assert os.access(amtool, os.X_OK)
