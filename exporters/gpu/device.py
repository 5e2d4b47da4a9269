"""A GPU's identity, read once when the driver is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pynvml


@dataclass(frozen=True, slots=True)
class Gpu:
    """Identity of one GPU and its handle in the present life of the driver.

    `device` is the name of its device file, `nvidia<minor>`: stable over restarts of the agent, unlike an
    index.
    """

    handle: Any
    index: int
    uuid: str
    device: str
    model: str
    pci_bus_id: str
    architecture: str
    compute_capability: str
    driver_version: str
    cuda_version: str
    mig_mode: str

    @property
    def mig(self) -> bool:
        """True if the card is split into MIG instances."""
        return self.mig_mode == "enabled"


_ARCHITECTURES = {
    value: name.removeprefix("NVML_DEVICE_ARCH_").lower()
    for name, value in vars(pynvml).items()
    if name.startswith("NVML_DEVICE_ARCH_") and isinstance(value, int)
}


def text(value: object) -> str:
    """NVML's strings are bytes in some versions of the binding."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _or(fallback: Any, call: Callable[..., Any], *arguments: Any) -> Any:
    """A part of the identity that a driver may not know."""
    try:
        return call(*arguments)
    except pynvml.NVMLError as error:
        if isinstance(error, (pynvml.NVMLError_GpuIsLost, pynvml.NVMLError_Uninitialized)):
            raise
        return fallback


def cuda_version() -> str:
    """Newest CUDA version that the driver serves, as 13.0; raises NVMLError."""
    number = pynvml.nvmlSystemGetCudaDriverVersion_v2()
    return f"{number // 1000}.{number % 1000 // 10}"


def mig_mode(handle: Any) -> str:
    """enabled, disabled or not_available."""
    current = _or(None, pynvml.nvmlDeviceGetMigMode, handle)
    if current is None:
        return "not_available"
    return "enabled" if current[0] == pynvml.NVML_DEVICE_MIG_ENABLE else "disabled"


def identify(index: int) -> Gpu:
    """Read the identity of the GPU with an NVML index; raises NVMLError if it does not answer."""
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    major_minor = _or(None, pynvml.nvmlDeviceGetCudaComputeCapability, handle)
    minor = _or(index, pynvml.nvmlDeviceGetMinorNumber, handle)
    pci = _or(None, pynvml.nvmlDeviceGetPciInfo, handle)
    return Gpu(
        handle=handle,
        index=index,
        uuid=text(pynvml.nvmlDeviceGetUUID(handle)),
        device=f"nvidia{minor}",
        model=text(_or("unknown", pynvml.nvmlDeviceGetName, handle)),
        pci_bus_id=text(pci.busId).lower() if pci is not None else "",
        architecture=_ARCHITECTURES.get(_or(-1, pynvml.nvmlDeviceGetArchitecture, handle), "unknown"),
        compute_capability=f"{major_minor[0]}.{major_minor[1]}" if major_minor else "",
        driver_version=text(_or("", pynvml.nvmlSystemGetDriverVersion)),
        cuda_version=_or("", cuda_version),
        mig_mode=mig_mode(handle),
    )
