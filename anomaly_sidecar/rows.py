"""Rows of state dataclasses: growing, clearing, saving and restoring arrays that have one row per series.

The parts keep their state in dataclasses whose arrays all have a row per series, and which may hold
further such dataclasses. What is done with rows is the same for all and stands here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anomaly_sidecar.interface import RowArray, State, StateError


def leaves(state: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Name, owner and field of every array and every number in a dataclass and those within it."""
    for field in fields(state):
        value = getattr(state, field.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        elif isinstance(value, (np.ndarray, bool, int, float)):
            yield f"{prefix}{field.name}", state, field.name


def resize(state: Any, fresh: Any) -> None:
    """Make room: arrays of `state` get the further rows of `fresh`, which is empty and has as many as
    wanted."""
    for (_, owner, name), (_, other, _) in zip(leaves(state), leaves(fresh), strict=True):
        old, new = getattr(owner, name), getattr(other, name)
        if isinstance(old, np.ndarray) and len(new) > len(old):
            setattr(owner, name, np.concatenate([old, new[len(old) :]]))


def clear(state: Any, rows: RowArray, fresh: Any) -> None:
    """Let `rows` start from nothing; `fresh` is empty and has one row."""
    for (_, owner, name), (_, other, _) in zip(leaves(state), leaves(fresh), strict=True):
        array = getattr(owner, name)
        if isinstance(array, np.ndarray):
            array[rows] = getattr(other, name)[0]


def save(state: Any, version: int) -> State:
    """Everything, arrays as views."""
    saved = State(meta={"version": version})
    for path, owner, name in leaves(state):
        value = getattr(owner, name)
        if isinstance(value, np.ndarray):
            saved.arrays[path] = value
        else:
            saved.meta[path] = value
    return saved


def nest(saved: State, name: str, part: State) -> None:
    """Put the state of a part into a whole, under its name."""
    saved.arrays.update({f"{name}/{key}": array for key, array in part.arrays.items()})
    saved.meta[name] = part.meta


def nested(saved: State, name: str) -> State:
    """What `nest` put in. Nothing where it is not there, which `restore` refuses."""
    prefix = f"{name}/"
    arrays = {key.removeprefix(prefix): a for key, a in saved.arrays.items() if key.startswith(prefix)}
    meta = saved.meta.get(name)
    return State(arrays, meta if isinstance(meta, dict) else {})


def restore(state: Any, saved: State, version: int) -> None:
    """Take what `save` gave. Raises `StateError` and then has changed nothing."""
    if saved.meta.get("version") != version:
        raise StateError(f"state of version {saved.meta.get('version')}, this is {version}")
    taken: list[tuple[Any, str, Any]] = []
    for path, owner, name in leaves(state):
        now = getattr(owner, name)
        if not isinstance(now, np.ndarray):
            found: Any = saved.meta.get(path)
            if type(found) is not type(now) and not (isinstance(now, float) and isinstance(found, int)):
                raise StateError(f"{path} is missing or no {type(now).__name__}")
            taken.append((owner, name, float(found) if isinstance(now, float) else found))
            continue
        array = saved.arrays.get(path)
        if array is None or array.dtype != now.dtype or array.shape[1:] != now.shape[1:]:
            raise StateError(f"the array {path} is missing or has another shape")
        if len(array) > len(now):
            raise StateError(f"{path}: {len(array)} rows are more than {len(now)}")
        whole: NDArray[Any] = now.copy()
        whole[: len(array)] = array
        taken.append((owner, name, whole))
    for owner, name, value in taken:
        setattr(owner, name, value)
