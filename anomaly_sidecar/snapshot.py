"""State on disk and between processes: arrays and JSON as one npz, versioned, checksummed, atomic.

An npz is a zip archive: the CRC-32 of each member is checked when it is read, and what the manifest lists
must be there. Pickles are neither written nor read, so a state file can at worst be refused. The file before
the latest stays, and is taken when the latest is broken.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from anomaly_sidecar.interface import State, StateError

FORMAT = 1
_MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 256 << 20


def write(state: State, file: IO[bytes]) -> None:
    """Write to a seekable file. Raises `StateError` for arrays that need a pickle."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in state.arrays.items():
            if array.dtype.hasobject:
                raise StateError(f"the array {name} holds objects")
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
        manifest = {"format": FORMAT, "arrays": sorted(state.arrays), "meta": state.meta}
        archive.writestr(_MANIFEST, json.dumps(manifest, allow_nan=True))


def read(file: IO[bytes]) -> State:
    """Read what `write` wrote. Raises `StateError` for everything else."""
    try:
        with zipfile.ZipFile(file) as archive:
            if archive.getinfo(_MANIFEST).file_size > MAX_MANIFEST_BYTES:
                raise StateError("the manifest is too large")
            manifest = json.loads(archive.read(_MANIFEST))
            if manifest["format"] != FORMAT:
                raise StateError(f"format {manifest['format']}, this program reads {FORMAT}")
            arrays: dict[str, Any] = {}
            for name in manifest["arrays"]:
                with archive.open(f"{name}.npy") as member:
                    arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
                    if member.read(1):  # reads to the end, where the checksum is looked at
                        raise StateError(f"the array {name} is longer than it says")
            return State(arrays, dict(manifest["meta"]))
    except StateError:
        raise
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, MemoryError, RecursionError) as error:
        raise StateError(f"damaged: {' '.join(str(error).split())[:120]}") from None
    except (ValueError, KeyError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise StateError(f"not a state: {' '.join(str(error).split())[:120]}") from None


def to_bytes(state: State) -> bytes:
    """For a pipe."""
    buffer = io.BytesIO()
    write(state, buffer)
    return buffer.getvalue()


def from_bytes(data: bytes) -> State:
    """As `to_bytes` gave it; raises `StateError`."""
    return read(io.BytesIO(data))


def save(state: State, path: Path) -> int:
    """Replace the file at `path`, keeping the one before; gives its size. Raises OSError.

    A process that is killed at any moment leaves a whole file: the new one takes its name when it is on disk.
    """
    temporary, previous = path.with_suffix(".tmp"), previous_of(path)
    with temporary.open("wb") as file:
        write(state, file)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, previous)
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return size


def previous_of(path: Path) -> Path:
    """Where the file before the latest lies."""
    return path.with_suffix(".previous")


def load(path: Path) -> Iterator[tuple[Path, State | StateError]]:
    """The latest file and the one before, as far as they are there, read when asked for."""
    for candidate in (path, previous_of(path)):
        try:
            with candidate.open("rb") as file:
                yield candidate, read(file)
        except FileNotFoundError:
            continue
        except StateError as error:
            yield candidate, error
        except OSError as error:
            yield candidate, StateError(f"cannot be read: {error.strerror}")
