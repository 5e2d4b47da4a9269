"""Hooks: our functions around the engine's methods, such that the engine cannot notice when ours fail.

A hooked method runs exactly once, with its own arguments, result and exception, whatever happens in our part.
An error of ours is counted, logged once, and after three errors the hook is off for the life of the process.
`table` says for each hook whether it is active, unavailable (and why) or disabled.
"""

from __future__ import annotations

import functools
import inspect
import logging
import time
from collections.abc import Callable
from typing import Any

from gpuglass_vllm import records, settings

logger = logging.getLogger("gpuglass_vllm")

STRIKES = 3
"""Errors after which a hook stays off."""

Before = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""Gets the object, arguments and keyword arguments; what it returns goes to `After` as token."""
After = Callable[[Any, tuple[Any, ...], dict[str, Any], Any, Any], None]
"""Gets the object, arguments, keyword arguments, result and token."""
OnError = Callable[[Any, tuple[Any, ...], dict[str, Any], BaseException, Any], None]
"""Gets the object, arguments, keyword arguments, the engine's exception and token."""


class InjectedFault(Exception):
    """Raised by each call of a hook that GPUGLASS_FAULT names."""


class Hook:
    """One thing that is observed, by one or more wrapped methods. `on` is read before each call."""

    __slots__ = (
        "_logged",
        "apart",
        "errors",
        "fault",
        "name",
        "ns",
        "on",
        "reason",
        "role",
        "state",
        "wanted",
    )

    def __init__(self, name: str, role: str) -> None:
        """`name` starts with the role: `core.kv`. The hook is unavailable until `activate` is called."""
        self.name = name
        self.role = role
        self.on = False
        self.state = "unavailable"
        self.reason = "the engine did not come to the point where it is observed"
        self.errors = 0
        self.ns = 0
        self.wanted = True
        """False: there is nothing to see for now; spares a call that is made in each step."""
        self.apart = False
        """Its time is no part of what the probe's hooks take: it was asked for."""
        self.fault = False
        self._logged = False

    def activate(self) -> bool:
        """Switch on, unless the operator or earlier errors switched it off; whether it is on."""
        current = settings.current()
        if {self.name, self.role, "all"} & current.disabled:
            self._set("disabled", "by GPUGLASS_DISABLE")
        elif self.state != "disabled":
            self.fault = bool({self.name, self.role, "all"} & current.fault)
            self.state, self.reason, self.on = "active", "", True
        return self.on

    def unavailable(self, reason: str) -> None:
        """Say why this engine does not let itself be observed here."""
        if self.state != "disabled":
            self._set("unavailable", reason)

    def not_wanted(self, reason: str) -> None:
        """Say that nobody asked for it."""
        self._set("disabled", reason)

    def failed(self, error: BaseException) -> None:
        """Count an error of ours; the third switches the hook off."""
        self.errors += 1
        if not self._logged:
            self._logged = True
            logger.warning("%s failed and may switch itself off: %r", self.name, error, exc_info=error)
        if self.errors >= STRIKES:
            self._set("disabled", f"after {STRIKES} errors, the last: {error!r}"[:200])

    def check(self) -> None:
        """Raise if a fault is to be injected here."""
        if self.fault:
            raise InjectedFault(self.name)

    def guard(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function` if the hook is on; its result, or None if it failed.

        For calls whose time counts for another hook already, or is not the engine's (the link's thread).
        """
        if not self.on:
            return None
        try:
            self.check()
            return function(*args)
        except Exception as error:
            self.failed(error)
            return None

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Like `guard`, on one of the engine's threads: the time counts as the hook's."""
        start = time.perf_counter_ns()
        result = self.guard(function, *args)
        self.ns += time.perf_counter_ns() - start
        return result

    def _set(self, state: str, reason: str) -> None:
        self.on = False
        self.state, self.reason = state, reason


class Table:
    """The hooks of this process."""

    def __init__(self) -> None:
        self._hooks: dict[str, Hook] = {}

    def hook(self, name: str) -> Hook:
        """The hook of that name (`role.what`), made at the first call."""
        hook = self._hooks.get(name)
        if hook is None:
            hook = self._hooks[name] = Hook(name, name.partition(".")[0])
        return hook

    def capabilities(self, role: str) -> list[records.Capability]:
        """What the hooks of a role can see here, by name."""
        return [
            records.Capability(hook=hook.name, state=hook.state, reason=hook.reason)
            for hook in sorted(self._hooks.values(), key=lambda hook: hook.name)
            if hook.role == role
        ]

    def errors(self, role: str) -> dict[str, int]:
        """Errors swallowed, by hook that had any."""
        return {hook.name: hook.errors for hook in self._hooks.values() if hook.role == role and hook.errors}

    def spent_ns(self, role: str) -> int:
        """Time that a role's hooks took from the engine's threads."""
        return sum(hook.ns for hook in self._hooks.values() if hook.role == role and not hook.apart)


table = Table()


def wrap(
    owner: type | Any,
    name: str,
    hook: Hook,
    *,
    before: Before | None = None,
    after: After | None = None,
    on_error: OnError | None = None,
    holder: str = "",
) -> bool:
    """Put our functions around a method of a class (or a function of a module).

    Works on methods, static methods (the object is None) and coroutine functions. With `holder`, methods
    only: our functions get that attribute of the object in its place, and are not called where it has none.
    Wrapping twice does nothing. Returns False, and says so in the hook, if there is no such method.
    """
    try:
        raw = inspect.getattr_static(owner, name)
    except AttributeError:
        hook.unavailable(f"this version has no {getattr(owner, '__name__', owner)}.{name}")
        return False
    static = isinstance(raw, staticmethod)
    original = raw.__func__ if static else raw
    if not callable(original):
        hook.unavailable(f"{name} is not a function in this version")
        return False
    wrapped_by = getattr(original, "__gpuglass__", ())
    if hook.name in wrapped_by:
        return True
    if inspect.iscoroutinefunction(original):
        replacement = _wrapped_coroutine(original, hook, static, before, after, on_error)
    else:
        replacement = _wrapped(original, hook, static, before, after, on_error, holder)
    replacement.__gpuglass__ = (*wrapped_by, hook.name)  # type: ignore[attr-defined]
    setattr(owner, name, staticmethod(replacement) if static else replacement)
    return True


def _wrapped(
    original: Callable[..., Any],
    hook: Hook,
    static: bool,
    before: Before | None,
    after: After | None,
    on_error: OnError | None,
    holder: str,
) -> Callable[..., Any]:
    clock = time.perf_counter_ns

    # Runs in each step of the engine, its instructions and data cold: as few calls as can be.
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not (hook.on and hook.wanted):
            return original(*args, **kwargs)
        this, rest = (None, args) if static else (args[0], args[1:])
        if holder:
            this = getattr(this, holder, None)
            if this is None:
                return original(*args, **kwargs)
        token = None
        if before is not None:
            start = clock()
            try:
                if hook.fault:
                    hook.check()
                token = before(this, rest, kwargs)
            except Exception as error:
                hook.failed(error)
            hook.ns += clock() - start
        try:
            result = original(*args, **kwargs)
        except BaseException as error:
            if on_error is not None and hook.on:
                try:
                    hook.check()
                    on_error(this, rest, kwargs, error, token)
                except Exception as own:
                    hook.failed(own)
            raise
        if after is not None and hook.on:
            start = clock()
            try:
                if hook.fault:
                    hook.check()
                after(this, rest, kwargs, result, token)
            except Exception as error:
                hook.failed(error)
            hook.ns += clock() - start
        return result

    return wrapper


def _wrapped_coroutine(
    original: Callable[..., Any],
    hook: Hook,
    static: bool,
    before: Before | None,
    after: After | None,
    on_error: OnError | None,
) -> Callable[..., Any]:
    @functools.wraps(original)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        this, rest = (None, args) if static else (args[0], args[1:])
        token = hook.run(before, this, rest, kwargs) if before is not None else None
        try:
            result = await original(*args, **kwargs)
        except BaseException as error:
            if on_error is not None:
                hook.run(on_error, this, rest, kwargs, error, token)
            raise
        if after is not None:
            hook.run(after, this, rest, kwargs, result, token)
        return result

    return wrapper
