"""Exemplars: how a sample of a counter or histogram names the request behind it.

In flows what is known of a request, out flow labels that fit into OpenMetrics' 128 characters. Which labels
name a request is a policy that is passed in: without tracing it is the engine's request id; whoever exports
traces supplies a policy that knows which of them were accepted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

from prometheus_client.samples import Exemplar

MAX_CHARACTERS = 128
"""Characters of all names and values of an exemplar's labels together (OpenMetrics 1.0, "Exemplars")."""

_TRACE_ID = re.compile(r"[0-9a-f]{32}\Z")
_NO_TRACE = "0" * 32

_PLAIN = str.maketrans({'"': "_", "\\": "_", "\n": "_"})
"""Not every parser of OpenMetrics reads an escaped character in an exemplar (prometheus_client does not), and
one that cannot loses the whole scrape; no sane id has such characters."""

Names = Sequence[tuple[str, str]]
"""Label names and values, the most wanted first."""


@dataclass(frozen=True, slots=True)
class RequestRef:
    """What an exemplar can say of a request. Empty means unknown."""

    request_id: str
    """The engine's own id."""
    external_id: str = ""
    """As client or server named it."""
    trace_id: str = ""
    """32 hex digits."""
    sampled: bool = False
    """The caller's sampled flag."""


class ExemplarPolicy(Protocol):
    """Decides by which labels an exemplar names a request."""

    @property
    def waits(self) -> bool:
        """Whether exemplars of a request that has ended are left to whoever hears of its end
        (`gpuglass.record_hub.EndedRequest.exemplify`), because its labels are known only later."""

    def names(self, request: RequestRef) -> Names:
        """Labels for `request`, the most wanted first; those that do not fit are left out."""


class NameByRequest:
    """The policy while nobody exports traces from here: the caller's trace id if one came, the request's ids.

    The engine's id comes before the client's: it is unique, logs have it, and in vLLM it begins with the
    client's, so that either finds it.
    """

    waits = False

    def names(self, request: RequestRef) -> Names:
        """trace_id, request_id, and external_id where the request id does not begin with it."""
        found = []
        if is_trace_id(request.trace_id):
            found.append(("trace_id", request.trace_id))
        if request.request_id:
            found.append(("request_id", request.request_id))
        if request.external_id and not request.request_id.startswith(request.external_id):
            found.append(("external_id", request.external_id))
        return found


def is_trace_id(text: str) -> bool:
    """Whether `text` is a trace id of W3C trace context (version 00, "trace-id"): all zeros is none."""
    return _TRACE_ID.match(text) is not None and text != _NO_TRACE


def fit(names: Names) -> dict[str, str]:
    """The labels of `names`, in their order, that fit into an exemplar.

    A first one that is too long by itself is cut: the beginning of an id still finds its request.
    """
    labels: dict[str, str] = {}
    left = MAX_CHARACTERS
    for name, value in names:
        value = value.translate(_PLAIN)
        if not labels:
            value = value[: left - len(name)]
        need = len(name) + len(value)
        if need <= left and value and name not in labels:
            labels[name] = value
            left -= need
    return labels


def side_by_side(victim: Names, others: Iterable[tuple[str, str]]) -> Names:
    """The labels of a request and, with a prefix of their own, of another; taken in turn, so that both fit
    in."""
    turns = zip_longest(victim, ((f"holder_{name}", value) for name, value in others))
    return [pair for turn in turns for pair in turn if pair is not None]


def exemplar(labels: dict[str, str], value: float, unix_seconds: float) -> Exemplar | None:
    """An exemplar with its time, rounded to milliseconds; None where no label names anything."""
    return Exemplar(labels, value, round(unix_seconds, 3)) if labels else None


def newer(old: Exemplar | None, new: Exemplar | None) -> Exemplar | None:
    """The later one of a series: Prometheus refuses an exemplar that is not newer than the one before it."""
    if old is None or new is None:
        return new or old
    return new if float(new.timestamp or 0) > float(old.timestamp or 0) else old
