"""The verdict on one kind of memory of one process, over time.

Each complete minute the shortest stretches of the history are judged, longer ones as their intervals
complete. One steady growth among them is a suspicion; it stands until the memory is given back or growth
has stopped for as long as the evidence took. What was given back is remembered as a ceiling: until growth
exceeds it, the same rise is no news (a sawtooth accuses nobody twice).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum

from ebpf.verdict.floors import BIN_SECONDS, SCALES, Floors
from ebpf.verdict.trend import FAST, MIN_GROWTH, STRETCHES, Trend, Why, follows_load, judge

LOADING_SECONDS = 7200.0
"""How long a process's first growth counts as loading, if it is fast all the time."""
HOLD_SECONDS = 1800.0
"""How long growth must have stopped before a suspicion is taken back, at least."""
CEILING_SECONDS = 86400.0
_LOAD_ENDS = 0.5
"""A pace below this share of the minute before ends a load; what ends more slowly was none."""
_STOPPED = 0.25
"""Growth below this share of the suspected pace has stopped."""
_FREED = 0.25
"""Share of the suspected growth that may be left when memory counts as given back."""
_SURE = 3.0
"""Growth of so many times the least that is judged makes a straight line certain."""


class State(StrEnum):
    """What is thought of one kind of memory in one process."""

    LEARNING = "learning"
    """Loading, or watched for less than the shortest stretch."""
    HEALTHY = "healthy"
    UNKNOWN = "unknown"
    """It grows, and what it is cannot be told yet: a cache that fills, more load, or a leak."""
    BLIND = "blind"
    """The ledger contradicts the driver or missed too much."""
    SUSPECTED = "suspected"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on one kind of memory."""

    state: State
    why: Why | None = None
    """What keeps growth from being called a leak, where it grows."""
    trend: Trend | None = None
    """The evidence, while suspected."""
    confidence: float = 0.0
    """0.5 to 1 while suspected: how straight the growth is and how far beyond the least that is judged."""
    growth: float = 0.0
    """Bytes since it began, while suspected."""


_LEARNING = Verdict(State.LEARNING)
_HEALTHY = Verdict(State.HEALTHY)
_IS_GROWTH = (Why.STEPS, Why.SLOWING, Why.FAST, Why.LOAD, Why.DOUBT)


class LeakWatch:
    """Watches one kind of memory of one process. Costs the same for each sample, however old it gets."""

    __slots__ = (
        *(
            "_base",
            "_ceilings",
            "_ceilings_until",
            "_first",
            "_floors",
            "_kind",
            "_loading",
            "_open",
            "_pace",
            "_scale",
            "_seconded_until",
        ),
        "verdict",
    )

    def __init__(self, kind: str) -> None:
        self.verdict = _LEARNING
        self._kind = kind
        self._floors = Floors()
        self._first: tuple[float, float] | None = None
        self._loading = True
        self._pace = 0.0
        self._seconded_until = -math.inf
        self._open: dict[int, Why] = {}
        """Scales at which it grows, undecided."""
        self._scale = 0
        self._base = 0.0
        self._ceilings: list[float] = []
        self._ceilings_until = -math.inf

    def restart(self) -> None:
        """What comes is not comparable with what was: learn anew."""
        self.__init__(self._kind)  # type: ignore[misc]

    def add(self, at: float, live: float, requests: float, doubt: float, drifted: bool) -> None:
        """One sample: seconds, bytes, requests served so far (NaN: unknown), bytes that may have been booked
        wrongly so far, and whether ledger and driver contradict each other."""
        if self._first is None:
            self._first = (at, live)
        done = self._floors.add(at, live, requests, doubt)
        if not done:
            return
        if self._loading and self._is_loading(at):
            return
        if self.verdict.state is State.SUSPECTED:
            if not self._is_over(at):
                self._renew(done)
                return
            self._open.clear()
            self.verdict = _HEALTHY
        self._look(at, done, drifted)

    def _is_loading(self, at: float) -> bool:
        assert self._first is not None
        began, first = self._first
        floors = self._floors.row(0).floors
        recent = [floor for floor in floors[-3:] if floor == floor]
        if at - began > LOADING_SECONDS or (len(floors) >= 3 and len(recent) < 2):
            self._loading = False
        elif len(floors) >= 3:
            pace = (recent[-1] - recent[0]) / (BIN_SECONDS * (len(recent) - 1))
            self._loading = pace > FAST and recent[-1] > first
            if not self._loading and pace < _LOAD_ENDS * self._pace:
                self._floors.keep(3)  # what was loaded is no growth
            self._pace = pace
        return self._loading

    def _look(self, at: float, done: int, drifted: bool) -> None:
        """Judge the scales with a new interval."""
        for scale in range(done):
            row = self._floors.row(scale)
            if len(row.floors) < STRETCHES[0]:
                break
            self._open.pop(scale, None)
            for count in STRETCHES:
                found = judge(row, count, self._kind)
                if isinstance(found, Trend):
                    if drifted:
                        self._open[scale] = Why.DOUBT
                    elif self._follows_load(found, scale):
                        self._open[scale] = Why.LOAD
                    elif scale == 0 and self._is_chance(at):
                        self._open[scale] = Why.SLOWING
                        break
                    elif self._is_news(row.floors, scale, at):
                        self._suspect(found, scale, row.floors[-count:])
                        return
                elif found in _IS_GROWTH:
                    self._open[scale] = found
        if len(self._floors.row(0).floors) < STRETCHES[0]:
            self.verdict = _LEARNING
        elif self._open:
            why = next(iter(self._open.values()))
            self.verdict = Verdict(State.BLIND if why is Why.DOUBT else State.UNKNOWN, why)
        else:
            self.verdict = Verdict(State.BLIND, Why.DOUBT) if drifted else _HEALTHY

    def _is_chance(self, at: float) -> bool:
        """Chance makes a bend look straight once, and the last floors may hold something temporary, which
        only later ones tell: one of the next minutes has to say the same."""
        floors = self._floors.row(0).floors
        if at > self._seconded_until:
            self._seconded_until = at + 3.5 * BIN_SECONDS
            return True
        return floors[-1] != floors[-1]  # nothing was seen since

    def _follows_load(self, trend: Trend, scale: int) -> bool:
        return any(
            follows_load(self._floors.row(longer), trend) for longer in range(scale, min(scale + 4, SCALES))
        )

    def _is_news(self, floors: list[float], scale: int, at: float) -> bool:
        if at > self._ceilings_until:
            return True
        known = [floor for floor in floors[-2:] if floor == floor]
        return bool(known) and min(known) > self._ceilings[scale] + MIN_GROWTH / 2

    def _suspect(self, trend: Trend, scale: int, stretch: list[float]) -> None:
        self._scale = scale
        lasts = max(trend.seconds, self._floors.row(scale).end - trend.since)
        last = next(floor for floor in reversed(stretch) if floor == floor)
        self._base = last - trend.slope * lasts
        self._tell(trend, last)

    def _tell(self, trend: Trend, level: float) -> None:
        growth = max(0.0, level - self._base)
        sure = min(1.0, growth / (_SURE * MIN_GROWTH))
        self.verdict = Verdict(
            State.SUSPECTED, None, trend, max(0.5, trend.straightness * (0.5 + 0.5 * sure)), growth
        )

    def _renew(self, done: int) -> None:
        """Keep slope and growth of a suspicion up to date, and when it began."""
        old = self.verdict.trend
        assert old is not None
        recent = [floor for floor in self._floors.row(0).floors[-3:] if floor == floor]
        if not recent:
            return
        trend = old
        if self._scale < done:
            found = judge(self._floors.row(self._scale), STRETCHES[0], self._kind)
            if isinstance(found, Trend):
                trend = replace(found, since=old.since)
        self._tell(trend, recent[-1])

    def _is_over(self, at: float) -> bool:
        """Whether the memory was given back, or growth has stopped for long enough."""
        trend = self.verdict.trend
        assert trend is not None
        recent = [floor for floor in self._floors.row(0).floors[-3:] if floor == floor]
        if recent and max(recent) < self._base + _FREED * self.verdict.growth:
            self._remember(at)
            return True
        hold = max(HOLD_SECONDS, trend.seconds)
        # The first scale that reaches back that far in half of its intervals.
        scale = next((s for s in range(SCALES) if BIN_SECONDS * (1 << s) * 18 >= hold), SCALES - 1)
        row = self._floors.row(scale)
        bins = math.ceil(hold / row.seconds) + 1
        floors = [floor for floor in row.floors[-bins:] if floor == floor]
        if len(row.floors) < bins or len(floors) < bins // 2 or row.end - hold < trend.since + trend.seconds:
            return False
        served = row.work[-1] - row.work[-bins]
        if served == 0 and trend.per_request == trend.per_request:
            return False  # nobody asked anything: a leak per request rests
        if floors[-1] - floors[0] >= _STOPPED * trend.slope * hold:
            return False
        self._remember(at)
        return True

    def _remember(self, at: float) -> None:
        rows = [self._floors.row(scale).floors for scale in range(SCALES)]
        highest = [max((f for f in floors if f == f), default=-math.inf) for floors in rows]
        if at <= self._ceilings_until:
            highest = list(map(max, highest, self._ceilings))
        self._ceilings, self._ceilings_until = highest, at + CEILING_SECONDS
