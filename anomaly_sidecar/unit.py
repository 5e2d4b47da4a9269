"""One query or detector at run time: its series, its analyzer, what it needs to read next, and its state.

In flow answers of the reader, out flow lines to publish. It knows time only from its frames: `plan` says
what to read when the server's clock shows a time. History and gaps are read before the present, in pieces,
so that a frame follows a frame. Called from one thread.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anomaly_sidecar import snapshot
from anomaly_sidecar.interface import Analyzer, FloatArray, Frame, RowArray, State, StateError
from anomaly_sidecar.publish import Publisher
from anomaly_sidecar.reader import Matrix, Vector
from anomaly_sidecar.table import Changes, SeriesTable
from gpuglass.family import Family
from gpuglass.logs import LOG
from gpuglass.store import Lines

_FINE_GAP = 86400.0
"""A gap up to this long is filled at the query's own interval, a longer one at the history's step."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What a unit reads. Durations in seconds."""

    name: str
    roles: Mapping[str, str]
    """Expression by role; the first decides which series there are."""
    interval: float
    offset: float
    history: float
    history_step: float
    limit: int
    ttl: float
    by: tuple[str, ...] = ()
    keep_name: bool = True
    """Keep the name of the source metric as the label `metric`: not where metrics are joined."""
    valid: tuple[float, float] = (-np.inf, np.inf)
    identity: str = ""
    """Further settings on which the meaning of the state depends."""

    @property
    def signature(self) -> str:
        """Changes when a state of before no longer fits."""
        text = json.dumps(
            [
                dict(self.roles),
                self.interval,
                self.by,
                self.keep_name,
                [str(v) for v in self.valid],
                self.identity,
            ]
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask how many series there are, before history is read in pieces of the right size."""

    at: float


@dataclass(frozen=True, slots=True)
class Instant:
    """Evaluate at a time."""

    at: float


@dataclass(frozen=True, slots=True)
class Range:
    """Read a piece of history."""

    start: float
    end: float
    step: float


Request = Probe | Instant | Range


@dataclass(slots=True)
class Counts:
    """What a unit did, for its own metrics."""

    evaluations: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    stages: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds by stage."""
    samples: int = 0
    backfilled: int = 0
    read_bytes: int = 0


class Unit:
    """See the module."""

    def __init__(self, spec: Spec, analyzer: Analyzer) -> None:
        self.spec = spec
        self.analyzer = analyzer
        self.table = SeriesTable(spec.limit, spec.ttl, spec.by, spec.keep_name)
        self.publisher = Publisher(spec.name)
        self.counts = Counts()
        self.last: float | None = None
        """Time of the latest frame."""
        self.last_live: float | None = None
        self.restored = "new"
        self.lines: dict[Family, Lines] = {}
        self._expected: int | None = None
        """Series that a probe counted."""

    # What to read

    def plan(self, now: float, max_points: int, max_samples: int) -> Request | None:
        """What to read next when the server's clock shows `now`; None: nothing before the next interval."""
        spec = self.spec
        at = (now - spec.offset) // spec.interval * spec.interval
        if self.last is not None and at <= self.last:
            return None
        start: float
        if self.last is None:
            step = spec.history_step
            start = (at - spec.history) // step * step + step
        else:
            step = spec.interval if at - self.last <= _FINE_GAP else max(spec.interval, spec.history_step)
            start = self.last + step
            if start < at - spec.history:
                start = (at - spec.history) // step * step + step
        end = start + (at - spec.interval / 2 - start) // step * step
        if end < start:
            return Instant(at)
        if self._expected is None:
            return Probe(at)
        most = min(max_points, max(1, max_samples // max(1, self._expected, len(self.table))))
        return Range(start, min(end, start + (most - 1) * step), step)

    def next_due(self, now: float) -> float:
        """When `plan` has something to read at the earliest, by the same clock as `now`."""
        if self.last is None:
            return now
        return self.last + self.spec.interval + self.spec.offset

    def too_much(self, request: Request) -> bool:
        """The server refused a range as too large: ask for less. False if it cannot be less."""
        if not isinstance(request, Range) or request.end <= request.start:
            return False
        self._expected = max(1, self._expected or 1) * 2
        return True

    # What was read

    def take(self, request: Request, answers: Mapping[str, Vector | Matrix]) -> None:
        """Take in the answers by role."""
        self.counts.read_bytes += sum(answer.bytes_read for answer in answers.values())
        first = answers[next(iter(self.spec.roles))]
        if isinstance(request, Probe):
            self._expected = len(first.keys)
            return
        started = time.perf_counter()
        if isinstance(request, Instant):
            times = np.array([request.at])
            step, live = self.spec.interval, True
        else:
            step, live = request.step, False
            times = request.start + step * np.arange(round((request.end - request.start) / step) + 1)
        values = self._joined(answers, len(times), step)
        joined = time.perf_counter()
        # What lies before the first sample of all says nothing, and costs as much as the rest.
        primary = next(iter(values.values()))
        known = np.isfinite(primary).any(axis=1)
        begin = int(known.argmax()) if self.last is None and known.any() else 0
        for index, at in list(enumerate(times.tolist()))[begin:]:
            by_role = {role: array[index] for role, array in values.items()}
            self.analyzer.observe(Frame(at, by_role, step, live))
        self.last = times.tolist()[-1]
        if live:
            self.last_live = self.last
            self._expected = None  # a later gap counts anew
        self.counts.stages["join"] += joined - started
        self.counts.stages["analyze"] += time.perf_counter() - joined
        partial = any(answer.partial for answer in answers.values())
        if live:
            self.counts.evaluations["partial" if partial else "ok"] += 1
            self.publish()

    def publish(self) -> None:
        """Make the lines of the latest frame."""
        started = time.perf_counter()
        self.lines = self.publisher.lines(self.analyzer.outputs(), self.table.labels)
        self.counts.stages["publish"] += time.perf_counter() - started

    def _joined(
        self, answers: Mapping[str, Vector | Matrix], steps: int, step: float
    ) -> dict[str, FloatArray]:
        """Values by role, shape (steps, capacity); admits and forgets series."""
        located: dict[str, RowArray] = {}
        for number, (role, answer) in enumerate(answers.items()):
            rows, changes = self.table.locate(answer.keys, admit=number == 0)
            located[role] = rows
            self._apply(changes)
        values: dict[str, FloatArray] = {}
        low, high = self.spec.valid
        for number, (role, answer) in enumerate(answers.items()):
            samples = np.atleast_2d(answer.values)
            with np.errstate(invalid="ignore"):
                samples = np.where(
                    (samples >= low) & (samples <= high) & np.isfinite(samples), samples, np.nan
                )
            if number and len(answer.keys) == 1 and not self.table.reduced(answer.keys[0]):
                values[role] = np.repeat(samples, self.table.capacity, axis=1)
            else:
                values[role], twice = self.table.place(located[role], samples)
                self.counts.changes["ambiguous"] += twice
            taken = int(np.isfinite(samples).sum())
            self.counts.samples += taken
            if isinstance(answer, Matrix):
                self.counts.backfilled += taken
        primary = next(iter(values.values()))
        present: NDArray[np.bool_] = np.any(np.isfinite(primary), axis=0)
        self._apply(Changes(evicted=self.table.age(present, steps * step)))
        return values

    def _apply(self, changes: Changes) -> None:
        counts = self.counts.changes
        counts["admitted"] += len(changes.admitted)
        counts["evicted"] += len(changes.evicted)
        counts["refused"] += changes.refused
        if changes.evicted:
            self.analyzer.evict(np.array(changes.evicted, np.intp))
            self.publisher.forget(changes.evicted)
        if changes.admitted:
            labels = [self.table.labels[row] or () for row in changes.admitted]
            self.publisher.forget(changes.admitted)
            self.analyzer.admit(np.array(changes.admitted, np.intp), labels, self.table.capacity)

    # State

    def path(self, folder: Path) -> Path:
        """Where the state lies."""
        return folder / f"{self.spec.name}.state"

    def _state(self) -> State:
        state = self.analyzer.save()
        meta = {
            "signature": self.spec.signature,
            "last": self.last,
            "table": self.table.save(),
            "analyzer": state.meta,
        }
        return State(state.arrays, meta)

    def save(self, folder: Path) -> int:
        """Write the state; gives its size. Raises OSError and `StateError`."""
        return snapshot.save(self._state(), self.path(folder))

    def adopt(self, old: Unit, fresh: Analyzer) -> bool:
        """Go on where another unit of the same signature is, with a new analyzer; False if that cannot be."""
        state = old._state()
        try:
            copies = {name: array.copy() for name, array in state.arrays.items()}
            self._take_state(State(copies, state.meta), fresh)
        except (StateError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            LOG.warning("%s: starting anew: %s", self.spec.name, " ".join(str(error).split())[:200])
            return False
        self.counts, self.restored = old.counts, old.restored
        self.last_live, self.lines = old.last_live, old.lines
        return True

    def restore(self, folder: Path, fresh: Sequence[Analyzer]) -> None:
        """Take the newest good state from the folder. A broken one is told and the one before is tried.

        `fresh` are new analyzers to restore into: one that failed half-way is thrown away.
        """
        attempts = iter(fresh)
        outcome = "new"
        for path, state in snapshot.load(self.path(folder)):
            try:
                if isinstance(state, StateError):
                    raise state
                if state.meta.get("signature") != self.spec.signature:
                    outcome = "changed"
                    LOG.warning(
                        "%s: %s was learned with another configuration; starting anew", self.spec.name, path
                    )
                    break
                self._take_state(state, next(attempts))
            except (StateError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                LOG.error(
                    "%s: state %s not taken: %s", self.spec.name, path, " ".join(str(error).split())[:200]
                )
                outcome = "damaged"
                continue
            self.restored = "previous" if path.suffix == ".previous" else "latest"
            LOG.info("%s: %d series restored from %s", self.spec.name, len(self.table), path)
            return
        self.restored = outcome

    def _take_state(self, state: State, analyzer: Analyzer) -> None:
        table = SeriesTable(self.spec.limit, self.spec.ttl, self.spec.by, self.spec.keep_name)
        table.restore(state.meta["table"])
        last = state.meta["last"]
        if last is not None and not isinstance(last, int | float):
            raise StateError("the time of the latest frame is no number")
        rows = table.rows()
        analyzer.admit(rows, [table.labels[row] or () for row in rows.tolist()], table.capacity)
        analyzer.restore(State(state.arrays, state.meta["analyzer"]))
        self.table, self.analyzer, self.last = table, analyzer, last
