"""Memory errors, row remapping, page retirement, and what the driver says has to be done with the GPU."""

from __future__ import annotations

import pynvml

from exporters.gpu.device import Gpu
from exporters.gpu.observe import Field, FieldReader, Observations
from gpuglass.families import gpu as families
from gpuglass.family import Tier

RECOVERY_ACTION = Field(pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION, "recovery_action")
_ACTIONS = {
    value: name.removeprefix("NVML_GPU_RECOVERY_ACTION_").lower()
    for name, value in vars(pynvml).items()
    if name.startswith("NVML_GPU_RECOVERY_ACTION_")
}
_ECC_TYPES = {
    pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED: "corrected",
    pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED: "uncorrected",
}
_RETIRED = {
    pynvml.NVML_PAGE_RETIREMENT_CAUSE_MULTIPLE_SINGLE_BIT_ECC_ERRORS: "corrected",
    pynvml.NVML_PAGE_RETIREMENT_CAUSE_DOUBLE_BIT_ECC_ERROR: "uncorrected",
}


class Errors:
    """Health of the memory, over the life of the card."""

    name = "errors"
    tier = Tier.SLOW

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._recovery = FieldReader((RECOVERY_ACTION,))

    def collect(self, see: Observations, now: float) -> None:
        """Note error counts, remapped rows or retired pages, and the recovery action."""
        handle = self._gpu.handle
        mode = see.read("ecc_mode", pynvml.nvmlDeviceGetEccMode, handle)
        if mode is not None:
            see.add(families.ECC_ENABLED, mode[0])
        if mode is None or mode[0]:
            for kind, name in _ECC_TYPES.items():
                count = see.read(
                    f"ecc_{name}", pynvml.nvmlDeviceGetTotalEccErrors, handle, kind, pynvml.NVML_AGGREGATE_ECC
                )
                see.add(families.ECC_ERRORS, count, name)
        rows = see.read("remapped_rows", pynvml.nvmlDeviceGetRemappedRows, handle)
        if rows is not None:
            corrected, uncorrected, pending, failed = rows
            see.add(families.REMAPPED_ROWS, corrected, "corrected")
            see.add(families.REMAPPED_ROWS, uncorrected, "uncorrected")
            see.add(families.ROW_REMAP_PENDING, pending)
            see.add(families.ROW_REMAP_FAILED, failed)
        else:
            for cause, name in _RETIRED.items():
                pages = see.read_list(
                    f"retired_pages_{name}", pynvml.nvmlDeviceGetRetiredPages, handle, cause
                )
                see.add(families.RETIRED_PAGES, None if pages is None else len(pages), name)
        (action,) = self._recovery.read(see, handle)
        if action is not None:
            see.add(families.RECOVERY_ACTION, 1, _ACTIONS.get(int(action), "unknown"))

    def close(self) -> None:
        """Nothing is held."""
