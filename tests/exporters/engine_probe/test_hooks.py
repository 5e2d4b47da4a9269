"""Hooks stand around an engine's methods and cannot hurt it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from gpuglass_vllm import hooks, settings


class Engine:
    def __init__(self) -> None:
        self.calls = 0

    def step(self, number: int, *, twice: bool = False) -> int:
        """Does a step."""
        self.calls += 1
        if number < 0:
            raise ValueError("negative")
        return number * (2 if twice else 1)

    @staticmethod
    def name(text: str) -> str:
        return text.upper()

    async def serve(self, number: int) -> int:
        await asyncio.sleep(0)
        return self.step(number)


@pytest.fixture
def engine_class() -> type[Engine]:
    """A class of its own for each test: wrapping changes it."""
    return type("Engine", (Engine,), dict(Engine.__dict__))


@pytest.fixture
def use_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def use(**environment: str) -> None:
        monkeypatch.setattr(settings, "_current", settings.read(environment))

    use(GPUGLASS_SOCKET="/nowhere")
    yield use


@pytest.fixture
def hook(use_settings: Any) -> hooks.Hook:
    hook = hooks.Hook("core.test", "core")
    hook.activate()
    return hook


def boom(*args: Any) -> None:
    raise RuntimeError("ours")


def test_sees_arguments_and_result_and_changes_nothing(engine_class: type[Engine], hook: hooks.Hook) -> None:
    seen: list[Any] = []
    assert hooks.wrap(
        engine_class,
        "step",
        hook,
        before=lambda this, args, kwargs: (this.calls, args, kwargs),
        after=lambda this, args, kwargs, result, token: seen.append((this.calls, result, token)),
    )
    assert engine_class().step(3, twice=True) == 6
    assert seen == [(1, 6, (0, (3,), {"twice": True}))]
    assert engine_class.step.__doc__ == "Does a step."


@pytest.mark.parametrize("where", ["before", "after"])
def test_our_error_never_reaches_the_engine_and_the_third_switches_off(
    engine_class: type[Engine], hook: hooks.Hook, where: str
) -> None:
    hooks.wrap(engine_class, "step", hook, **{where: boom})  # type: ignore[arg-type]
    engine = engine_class()
    assert [engine.step(n) for n in range(5)] == [0, 1, 2, 3, 4]
    assert engine.calls == 5
    assert (hook.errors, hook.on, hook.state) == (3, False, "disabled")
    assert "ours" in hook.reason
    assert not hook.activate(), "off for the life of the process"


def test_the_engines_error_passes_and_is_seen(engine_class: type[Engine], hook: hooks.Hook) -> None:
    seen: list[str] = []
    hooks.wrap(
        engine_class,
        "step",
        hook,
        on_error=lambda this, args, kwargs, error, token: seen.append(str(error)),
    )
    with pytest.raises(ValueError, match="negative"):
        engine_class().step(-1)
    assert seen == ["negative"]


def test_an_error_while_seeing_an_error_is_swallowed(engine_class: type[Engine], hook: hooks.Hook) -> None:
    hooks.wrap(engine_class, "step", hook, on_error=boom)
    with pytest.raises(ValueError, match="negative"):
        engine_class().step(-1)
    assert hook.errors == 1


def test_wrapping_twice_observes_once(engine_class: type[Engine], hook: hooks.Hook) -> None:
    seen: list[int] = []
    for _ in range(2):
        hooks.wrap(
            engine_class, "step", hook, after=lambda this, args, kwargs, result, token: seen.append(result)
        )
    engine_class().step(7)
    assert seen == [7]


def test_two_hooks_on_one_method_both_see(engine_class: type[Engine], hook: hooks.Hook) -> None:
    other = hooks.Hook("core.other", "core")
    other.activate()
    seen: list[str] = []
    hooks.wrap(engine_class, "step", hook, before=lambda *_: seen.append("one"))
    hooks.wrap(engine_class, "step", other, before=lambda *_: seen.append("other"))
    engine_class().step(1)
    assert sorted(seen) == ["one", "other"]


def test_static_methods_and_coroutines(engine_class: type[Engine], hook: hooks.Hook) -> None:
    seen: list[Any] = []
    hooks.wrap(
        engine_class, "name", hook, after=lambda this, a, k, result, token: seen.append((this, result))
    )
    hooks.wrap(engine_class, "serve", hook, after=lambda this, a, k, result, token: seen.append(result))
    assert engine_class.name("a") == engine_class().name("a") == "A"
    assert asyncio.run(engine_class().serve(4)) == 4
    with pytest.raises(ValueError, match="negative"):
        asyncio.run(engine_class().serve(-4))
    assert seen == [(None, "A"), (None, "A"), 4]


def test_a_missing_method_is_said_not_raised(engine_class: type[Engine], hook: hooks.Hook) -> None:
    hook.on, hook.state = False, "unavailable"
    assert not hooks.wrap(engine_class, "gone", hook, before=boom)
    assert hook.state == "unavailable"
    assert "Engine.gone" in hook.reason


@pytest.mark.parametrize("names", ["core.test", "core", "all"])
def test_the_operator_can_switch_a_hook_off(use_settings: Any, names: str) -> None:
    use_settings(GPUGLASS_DISABLE=f"x, {names}")
    hook = hooks.Hook("core.test", "core")
    assert not hook.activate()
    assert (hook.state, hook.reason) == ("disabled", "by GPUGLASS_DISABLE")


def test_injected_faults_behave_like_errors(use_settings: Any, engine_class: type[Engine]) -> None:
    use_settings(GPUGLASS_FAULT="all")
    hook = hooks.Hook("core.test", "core")
    hook.activate()
    seen: list[int] = []
    hooks.wrap(engine_class, "step", hook, before=lambda *_: seen.append(1))
    assert [engine_class().step(n) for n in range(4)] == [0, 1, 2, 3]
    assert seen == []
    assert (hook.errors, hook.state) == (3, "disabled")


def test_the_table_tells_by_role(use_settings: Any) -> None:
    table = hooks.Table()
    assert table.hook("core.kv") is table.hook("core.kv")
    table.hook("core.kv").activate()
    table.hook("core.evictions").unavailable("prefix caching is off")
    table.hook("worker.steps").failed(RuntimeError("x"))
    assert [(c.hook, c.state, c.reason) for c in table.capabilities("core")] == [
        ("core.evictions", "unavailable", "prefix caching is off"),
        ("core.kv", "active", ""),
    ]
    assert table.errors("worker") == {"worker.steps": 1}
    assert table.errors("core") == {}
