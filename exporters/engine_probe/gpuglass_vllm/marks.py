"""What travels with a request from frontend to core and workers: `SamplingParams.extra_args["gpuglass"]`.

A client can put values of its own into `extra_args` (`vllm_xargs`). So ours starts with a random mark that
only the processes of this server know, and the frontend replaces whatever a client put there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from gpuglass_vllm import records, settings

KEY = "gpuglass"


class Mark(NamedTuple):
    """What core and workers learn about a request."""

    tenant: str = records.NO_TENANT
    counted: bool = False
    """The frontend counts how the request ends; the core need not."""


NONE = Mark()


def put(params: Any, mark: Mark) -> None:
    """Write a mark into sampling or pooling parameters (which belong to this request alone)."""
    name = "extra_args" if hasattr(params, "extra_args") else "extra_kwargs"
    if hasattr(params, name):
        value = [settings.current().instance, mark.tenant, mark.counted]
        setattr(params, name, {**(getattr(params, name) or {}), KEY: value})


def get(params: Any) -> Mark:
    """The mark that our frontend put into parameters; `NONE` if there is none or it is not ours."""
    args = getattr(params, "extra_args", None) or getattr(params, "extra_kwargs", None)
    if not args:
        return NONE
    value = args.get(KEY)
    if (
        not isinstance(value, (list, tuple))
        or len(value) != 3
        or not isinstance(value[1], str)
        or value[0] != settings.current().instance
    ):
        return NONE
    return Mark(value[1][: records.MAX_TENANT], value[2] is True)


def tenant_of(params: Any) -> str:
    """Tenant that the frontend gave to a request; `NO_TENANT` where it gave none."""
    return get(params).tenant
