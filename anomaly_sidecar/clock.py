"""Time as the server shows it, carried on by this machine's monotonic clock.

Samples carry the server's time, so evaluations follow its clock: a jump of this machine's changes nothing.
The server is asked from time to time, and at once when this machine's two clocks disagree (a jump, or a
suspend) or when it is another server.
"""

from __future__ import annotations

from anomaly_sidecar.interface import Clock
from gpuglass.logs import LOG

ASK_EVERY = 300.0
JUMP = 5.0
"""Seconds from which on a difference is a jump and not the run of a clock."""


class ServerClock:
    """Not usable before the first `set`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._server = 0.0
        self._monotonic: float | None = None
        self._wall = 0.0
        self._doubtful = False
        self.jumps = 0

    @property
    def known(self) -> bool:
        """Whether the server was asked already."""
        return self._monotonic is not None

    def now(self) -> float:
        """Unix seconds by the server's clock."""
        if self._monotonic is None:
            raise RuntimeError("the server was not asked yet")
        return self._server + self._clock.monotonic() - self._monotonic

    def offset(self) -> float:
        """This machine's clock minus the server's, when it was asked last."""
        return self._wall - self._server

    def must_ask(self) -> bool:
        """Whether it is time to ask the server."""
        if self._monotonic is None or self._doubtful:
            return True
        elapsed = self._clock.monotonic() - self._monotonic
        return elapsed >= ASK_EVERY or abs(self._clock.time() - self._wall - elapsed) > JUMP

    def doubt(self) -> None:
        """Ask as soon as can be: the server may be another one."""
        self._doubtful = True

    def set(self, server: float) -> float:
        """The server says that it is `server`; gives by how much its clock jumped (0: not at all)."""
        jumped = 0.0
        if self._monotonic is not None:
            elapsed = self._clock.monotonic() - self._monotonic
            own = self._clock.time() - self._wall - elapsed
            difference = server - self.now()
            if abs(own) > JUMP:
                self.jumps += 1
                LOG.warning("this machine's clock jumped by %+.1f s; evaluations follow the server's", own)
            if abs(difference) > JUMP:
                jumped = difference
                self.jumps += 1
                LOG.warning("the server's clock jumped by %+.1f s", difference)
        self._doubtful = False
        self._server, self._monotonic, self._wall = server, self._clock.monotonic(), self._clock.time()
        return jumped
