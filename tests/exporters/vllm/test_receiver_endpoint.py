"""The receiver's socket in the file system: what it replaces, what it leaves alone, what it says."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from exporters.vllm import endpoint as module
from exporters.vllm import receiver
from exporters.vllm.endpoint import Endpoint, EndpointError, answers
from gpuglass.config import EnginesConfig, Mode
from tests.exporters.vllm.receiver_rig import hello, running_receiver, tenant


def endpoint(path: Path, **changes: Any) -> Endpoint:
    return Endpoint(msgspec.structs.replace(EnginesConfig(), socket=str(path), **changes))


def refusal(path: Path, **changes: Any) -> str:
    with pytest.raises(EndpointError) as error:
        endpoint(path, **changes).open()
    text = str(error.value)
    assert len(text.splitlines()) == 1
    assert error.value.exit_code == 2
    return text


def test_folder_and_socket_are_made_with_their_modes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "agent.sock"
    old = os.umask(0o077)
    try:
        with endpoint(path, directory_mode=Mode("0750"), socket_mode=Mode("0660")).open():
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o750
            assert stat.S_IMODE(path.stat().st_mode) == 0o660
            assert answers(path)
    finally:
        os.umask(old)


def test_a_folder_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir(mode=0o700)
    with endpoint(tmp_path / "mine" / "agent.sock").open():
        assert stat.S_IMODE((tmp_path / "mine").stat().st_mode) == 0o700


@pytest.mark.needs("root")
def test_folder_and_socket_get_the_owner_and_group_that_are_set(tmp_path: Path) -> None:
    path = tmp_path / "new" / "agent.sock"
    with endpoint(path, owner="1234", group="5678").open():
        for made in (path, path.parent):
            assert (made.stat().st_uid, made.stat().st_gid) == (1234, 5678)


def test_the_socket_of_an_agent_that_has_gone_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    endpoint(path).open().close()
    assert path.exists()
    assert not answers(path)
    with endpoint(path).open():
        assert answers(path)


@pytest.mark.parametrize("kind", [socket.SOCK_SEQPACKET, socket.SOCK_STREAM])
def test_a_socket_on_which_somebody_answers_is_left_alone(tmp_path: Path, kind: int) -> None:
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(str(path))
        other.listen()
        assert refusal(path) == (
            f"engines.socket: another process answers on {path}: stop it or name another path"
        )
        assert path.exists()


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("/etc/passwd")])
def test_what_is_no_socket_is_left_alone(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "agent.sock"
    make(path)
    assert "is there and is no socket: remove it or name another path" in refusal(path)
    assert path.is_symlink() or path.exists()


def test_what_cannot_be_made_is_said_with_the_mend(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = refusal(tmp_path / "file" / "agent.sock")
    assert said.startswith(f"engines.socket: {tmp_path / 'file'}")
    assert said.endswith("name a path that this user may write, or set engines.enabled: false")


def test_users_that_are_not_there_are_named(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    assert refusal(path, owner="nobody-here") == (
        "engines.owner: there is no user 'nobody-here' here: give its number"
    )
    assert refusal(path, group="nobody-here").startswith("engines.group: there is no group 'nobody-here'")
    assert not path.exists()


def test_only_our_own_socket_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    ours = endpoint(path)
    with ours.open():
        assert ours.is_ours()
        path.unlink()
        with endpoint(path).open():
            assert not ours.is_ours()
            ours.remove()
            assert path.exists()
    again = endpoint(path)
    with again.open():
        again.remove()
        assert not path.exists()


def test_a_removed_socket_is_made_again_and_old_connections_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver, "TICK", 0.05)
    with running_receiver(tmp_path) as rig:
        sender = rig.connect(hello())
        rig.wait(lambda: rig.sink.hellos)
        rig.path.unlink()
        rig.wait(lambda: answers(rig.path))
        sender.send(tenant(), seq=1)
        assert sender.ack() == 1
        rig.works()
    assert not rig.path.exists()


def test_without_a_path_of_its_own_the_receiver_waits_until_the_default_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver, "TICK", 0.05)
    monkeypatch.setattr(receiver, "REOPEN_SECONDS", 0.1)
    path = tmp_path / "folder" / "agent.sock"
    path.parent.touch()  # no folder can be made there
    monkeypatch.setattr(module, "DEFAULT_SOCKET", str(path))
    with running_receiver(tmp_path, socket="") as rig:
        assert rig.receiver.down == "socket"
        path.parent.unlink()
        rig.wait(lambda: not rig.receiver.down)
        assert answers(path)


def test_with_a_path_of_its_own_it_does_not_start_without_it(tmp_path: Path) -> None:
    (tmp_path / "agent.sock").touch()
    with pytest.raises(EndpointError), running_receiver(tmp_path):
        pass
