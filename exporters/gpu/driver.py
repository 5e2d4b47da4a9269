"""NVML's life: loading the library, initialising it, giving it up so that a replaced driver is picked up.

pynvml keeps one library and its function pointers in module globals; this module is the only one that touches
them.
"""

from __future__ import annotations

import _ctypes
import ctypes
from collections.abc import Sequence

import pynvml

from exporters.gpu.device import Gpu, identify
from exporters.gpu.observe import driver_reason
from gpuglass.logs import LOG

LIBRARY = "libnvidia-ml.so.1"
SEARCH = (
    LIBRARY,
    "/usr/local/nvidia/lib64/libnvidia-ml.so.1",
    "/run/nvidia/driver/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1",
    "/run/nvidia/driver/usr/lib/aarch64-linux-gnu/libnvidia-ml.so.1",
)
"""Where the library is tried: the loader's path, then where Kubernetes node images and the GPU operator put
it."""


class DriverUnavailable(Exception):
    """NVML cannot be used now. `reason` is a word for a label, the text a line for a person."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Nvml:
    """The loaded library. One per process, used by one thread."""

    def __init__(self, library: str = "") -> None:
        self._candidates = (library,) if library else SEARCH
        self._open = False

    def open(self) -> None:
        """Load and initialise; raises `DriverUnavailable`."""
        if pynvml.nvmlLib is None:
            pynvml.nvmlLib = self._load()
        try:
            pynvml.nvmlInit()
        except (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError) as error:
            self._unload()
            raise DriverUnavailable(driver_reason(error), f"NVML does not start: {error}") from None
        self._open = True

    def _load(self) -> ctypes.CDLL:
        problems = []
        for path in self._candidates:
            try:
                return ctypes.CDLL(path)
            except OSError as error:
                problems.append(str(error))
        raise DriverUnavailable(
            "library_not_found",
            f"{problems[0]}; install the NVIDIA driver, or set gpu.nvml_library to the path of {LIBRARY}",
        )

    def gpus(self) -> tuple[tuple[Gpu, ...], int]:
        """GPUs that answer, and the number that NVML lists; raises `DriverUnavailable`."""
        try:
            count = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError as error:
            raise DriverUnavailable(driver_reason(error), f"NVML lists no GPUs: {error}") from None
        found = []
        for index in range(count):
            try:
                found.append(identify(index))
            except pynvml.NVMLError as error:
                LOG.warning("GPU %d does not answer: %s", index, error)
        return tuple(found), count

    def count(self) -> int | None:
        """Number of GPUs that NVML lists; None if it does not answer."""
        try:
            return int(pynvml.nvmlDeviceGetCount())
        except pynvml.NVMLError:
            return None

    def close(self) -> None:
        """Shut down and unload. No other thread may be inside the library."""
        if self._open:
            self._open = False
            try:
                pynvml.nvmlShutdown()
            except pynvml.NVMLError as error:
                LOG.debug("NVML shutdown: %s", error)
        self._unload()

    def _unload(self) -> None:
        """Forget the library, so that one replaced on disk (a driver update) is loaded next time."""
        library, pynvml.nvmlLib = pynvml.nvmlLib, None
        pynvml._nvmlGetFunctionPointer_cache.clear()
        if library is not None:
            try:
                _ctypes.dlclose(library._handle)
            except OSError as error:
                LOG.debug("unloading NVML: %s", error)


def missing(known: Sequence[Gpu], present: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """GPUs that were seen before and are not there now."""
    uuids = {gpu.uuid for gpu in present}
    return tuple(gpu for gpu in known if gpu.uuid not in uuids)
