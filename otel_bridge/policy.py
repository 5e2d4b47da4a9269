"""Names requests in exemplars by traces that the collector has accepted, and by no others: a click on an
exemplar never ends in "trace not found"."""

from __future__ import annotations

import threading
from collections import OrderedDict

from gpuglass.exemplar import NameByRequest, Names, RequestRef

MAX_ACCEPTED = 8192
"""Requests whose accepted trace is remembered, for what is told of them after their end."""


class NameByAcceptedTrace:
    """Implements `gpuglass.exemplar.ExemplarPolicy`. Histograms of ended requests wait for `accept`."""

    waits = True

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._accepted: OrderedDict[str, str] = OrderedDict()
        """Trace id by request id."""
        self._by_request = NameByRequest()

    def accept(self, request_id: str, external_id: str, trace_id: bytes) -> Names:
        """The collector has the trace of a request: its labels from now on."""
        text = trace_id.hex()
        if request_id:
            with self._lock:
                self._accepted[request_id] = text
                if len(self._accepted) > MAX_ACCEPTED:
                    self._accepted.popitem(last=False)
        return self._by_request.names(RequestRef(request_id, external_id, text))

    def names(self, request: RequestRef) -> Names:
        """trace_id if it was accepted; the request's ids in any case."""
        with self._lock:
            trace_id = self._accepted.get(request.request_id, "")
        return self._by_request.names(RequestRef(request.request_id, request.external_id, trace_id))
