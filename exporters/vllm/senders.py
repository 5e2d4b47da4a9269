"""What the receiver remembers of senders: which packets it has taken in, how fast each may be, how often one
was wrong. Pure: no sockets, no clocks.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

REMEMBERED = 8192
"""Names of senders whose last packet is remembered; twice the most that can be connected."""
REMEMBERED_PER_USER = 2048
"""Of one user, so that nobody makes us forget the senders of others by inventing names."""

STRIKES = 3
STRIKE_SECONDS = 60.0
"""So many refused packets or records within that time end a connection."""


@dataclass(slots=True)
class Taken:
    """The last packet taken in of one sender."""

    uid: int
    seq: int = 0


class Memory:
    """Last `seq` by sender's name, over connections. Least recently connected ones are forgotten first.

    A name belongs to the user who used it first. Names in use are not forgotten as long as fewer than
    `per_user` of one user are.
    """

    def __init__(self, size: int = REMEMBERED, per_user: int = REMEMBERED_PER_USER) -> None:
        self._size = size
        self._per_user = per_user
        self._users: OrderedDict[int, OrderedDict[str, Taken]] = OrderedDict()
        self._owner: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._owner)

    def claim(self, name: str, uid: int) -> Taken | None:
        """What is known of a sender; None if its name belongs to another user."""
        if self._owner.setdefault(name, uid) != uid:
            return None
        names = self._users.setdefault(uid, OrderedDict())
        self._users.move_to_end(uid)
        taken = names.setdefault(name, Taken(uid))
        names.move_to_end(name)
        if len(names) > self._per_user:
            self._forget(uid)
        elif len(self._owner) > self._size:
            self._forget(max(self._users, key=lambda user: len(self._users[user])))
        return taken

    def _forget(self, uid: int) -> None:
        names = self._users[uid]
        name, _ = names.popitem(last=False)
        del self._owner[name]
        if not names:
            del self._users[uid]


@dataclass(slots=True)
class Budget:
    """A token bucket that may be overdrawn: who took more than there was has to wait.

    A packet is read before its cost is known, so that a sender waits after a large one, not before it.
    """

    rate: float
    """Tokens per second."""
    burst: float
    tokens: float = field(init=False)
    at: float = 0.0

    def __post_init__(self) -> None:
        self.tokens = self.burst

    def take(self, cost: float, now: float) -> float:
        """Take tokens; gives the seconds until there is one again, 0 if there is."""
        self.tokens = min(self.burst, self.tokens + self.rate * max(0.0, now - self.at)) - cost
        self.at = now
        return max(0.0, (1 - self.tokens) / self.rate)

    def wait(self, now: float) -> float:
        """Seconds until there is a token; 0 if there is one now."""
        return self.take(0, now)


class Strikes:
    """Counts what was wrong with one connection lately."""

    __slots__ = ("_at",)

    def __init__(self) -> None:
        self._at: deque[float] = deque(maxlen=STRIKES)

    def add(self, now: float) -> bool:
        """Note one; True if that was one too many."""
        self._at.append(now)
        return len(self._at) == STRIKES and now - self._at[0] <= STRIKE_SECONDS
