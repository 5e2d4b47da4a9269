"""The entry that vLLM calls in each of its processes (group `vllm.general_plugins`), and nothing else does.

Without GPUGLASS_SOCKET nothing is hooked. Whatever fails here is logged; the engine starts all the same.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from gpuglass_vllm import settings
from gpuglass_vllm.hooks import Hook, table, wrap

logger = logging.getLogger("gpuglass_vllm")

_loaded = False


def load() -> None:
    """Install the hooks, once per process (children made by fork inherit them). Never raises."""
    global _loaded
    try:
        if _loaded or not settings.current().socket:
            return
        _loaded = True
        os.register_at_fork(after_in_child=_after_fork)
        for part, install in (
            ("frontend.requests", _frontend),
            ("core.scheduler", _core),
            ("worker.steps", _worker),
        ):
            _guarded(table.hook(part), install)
    except Exception as error:
        logger.warning("GPUGlass is not loaded: %r", error, exc_info=error)


def _guarded(hook: Hook, install: Callable[[], None]) -> None:
    """Install one role's hooks; if that fails, the others are installed all the same."""
    try:
        install()
    except ImportError as error:
        hook.unavailable(f"this version has no {error.name or error}")
    except Exception as error:
        hook.unavailable(f"could not be installed: {error!r}"[:200])
        logger.warning("%s could not be installed: %r", hook.name, error, exc_info=error)


def _frontend() -> None:
    from gpuglass_vllm import frontend

    frontend.install()


def _core() -> None:
    """Schedulers are hooked as their classes are chosen, so that one given by --scheduler-cls is seen too."""
    from vllm.config import SchedulerConfig

    from gpuglass_vllm import core

    hook = table.hook("core.scheduler")
    if wrap(
        SchedulerConfig,
        "get_scheduler_cls",
        hook,
        after=lambda config, args, kwargs, chosen, token: core.install(chosen),
    ):
        hook.activate()


def _worker() -> None:
    from gpuglass_vllm import worker

    worker.install()


def _after_fork() -> None:
    from gpuglass_vllm import core, frontend

    frontend.after_fork()
    core.after_fork()
