"""XID codes of data-centre GPUs and whose fault each most likely is.

Source: NVIDIA's Xid catalog (docs.nvidia.com/deploy/xid-errors). `application`: a program's fault first, such
as an address that is not mapped. `hardware`: memory, links, board. `driver`: driver, firmware or what it did
on its own. A code that is not here is `unknown`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

APPLICATION = (13, 31, 43, 45, 68, 69, 137)
HARDWARE = (
    48, 54, 57, 58, 62, 63, 64, 65, 74, 79, 92, 93, 94, 95, 110, 121, 122, 136, 140, 142, 143, 144, 145, 146,
    147, 148, 149, 150, 156, 158, 160, 171, 172,
)  # fmt: skip
DRIVER = (8, 32, 38, 44, 46, 56, 61, 66, 78, 80, 109, 119, 120, 123, 154)

CLASS: Mapping[int, str] = MappingProxyType(
    dict.fromkeys(APPLICATION, "application")
    | dict.fromkeys(HARDWARE, "hardware")
    | dict.fromkeys(DRIVER, "driver")
)
"""Class by code."""

UNKNOWN = "unknown"


def classify(code: int) -> str:
    """hardware, driver, application or unknown."""
    return CLASS.get(code, UNKNOWN)
