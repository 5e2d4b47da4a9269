"""Power, energy, temperatures, clocks and what holds the clocks down."""

from __future__ import annotations

from collections.abc import Mapping

import pynvml

from exporters.gpu.device import Gpu
from exporters.gpu.observe import Field, FieldReader, Observations
from gpuglass.families import gpu as families
from gpuglass.family import Tier

ENERGY = Field(pynvml.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION, "energy")
MEMORY_TEMPERATURE = Field(pynvml.NVML_FI_DEV_MEMORY_TEMP, "temperature_memory")

THROTTLE_SECONDS: Mapping[Field, str] = {
    Field(pynvml.NVML_FI_DEV_PERF_POLICY_POWER, "throttle_power_cap"): "power_cap",
    Field(
        pynvml.NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN, "throttle_thermal_software"
    ): "thermal_software",
    Field(
        pynvml.NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_THERM_SLOWDOWN, "throttle_thermal_hardware"
    ): "thermal_hardware",
    Field(
        pynvml.NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_POWER_BRAKE_SLOWDOWN, "throttle_power_brake"
    ): "power_brake",
    Field(pynvml.NVML_FI_DEV_PERF_POLICY_SYNC_BOOST, "throttle_sync_boost"): "sync_boost",
    Field(pynvml.NVML_FI_DEV_PERF_POLICY_BOARD_LIMIT, "throttle_board_limit"): "board_limit",
    Field(pynvml.NVML_FI_DEV_PERF_POLICY_RELIABILITY, "throttle_reliability"): "reliability",
}
"""Time in nanoseconds for which a reason held, counted by the driver since it was loaded."""

THROTTLE_BITS: Mapping[int, str] = {
    pynvml.nvmlClocksEventReasonSwPowerCap: "power_cap",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "thermal_software",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "thermal_hardware",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "power_brake",
    pynvml.nvmlClocksEventReasonSyncBoost: "sync_boost",
}

CLOCKS: Mapping[int, str] = {
    pynvml.NVML_CLOCK_SM: "sm",
    pynvml.NVML_CLOCK_MEM: "memory",
    pynvml.NVML_CLOCK_GRAPHICS: "graphics",
    pynvml.NVML_CLOCK_VIDEO: "video",
}

LIMITS: Mapping[int, str] = {
    pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN: "slowdown",
    pynvml.NVML_TEMPERATURE_THRESHOLD_SHUTDOWN: "shutdown",
    pynvml.NVML_TEMPERATURE_THRESHOLD_MEM_MAX: "memory_max",
}

_HIGHEST_TEMPERATURE = 250.0


class Power:
    """Power drawn, each fast sample."""

    name = "power"
    tier = Tier.FAST

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def collect(self, see: Observations, now: float) -> None:
        """Note the power, to a tenth of a watt: the sensor is good to some watts."""
        milliwatts = see.read("power", pynvml.nvmlDeviceGetPowerUsage, self._gpu.handle)
        if milliwatts is not None:
            see.add(families.POWER, round(milliwatts / 1000, 1))

    def close(self) -> None:
        """Nothing is held."""


class Thermals:
    """Energy, limits, temperatures, clocks, throttling and performance state."""

    name = "thermals"
    tier = Tier.SLOW

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._fields = FieldReader((ENERGY, MEMORY_TEMPERATURE, *THROTTLE_SECONDS))

    def collect(self, see: Observations, now: float) -> None:
        """Note them all; the counters in one driver call."""
        handle = self._gpu.handle
        millijoules, memory_temperature, *throttled = self._fields.read(see, handle)
        for reason, nanoseconds in zip(THROTTLE_SECONDS.values(), throttled, strict=True):
            if nanoseconds is not None:
                see.add(families.THROTTLE, round(nanoseconds / 1e9, 3), reason)
        if millijoules is None:
            millijoules = see.read("energy", pynvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        if millijoules is not None:
            see.add(families.ENERGY, round(millijoules / 1000, 1))
        limit = see.read("power_limit", pynvml.nvmlDeviceGetEnforcedPowerLimit, handle)
        see.add(families.POWER_LIMIT, None if limit is None else round(limit / 1000, 1))
        self._temperatures(see, memory_temperature)
        self._clocks(see)
        state = see.read("performance_state", pynvml.nvmlDeviceGetPerformanceState, handle)
        see.add(families.PERFORMANCE_STATE, state if state is not None and state <= 15 else None)

    def _temperatures(self, see: Observations, memory: float | None) -> None:
        handle = self._gpu.handle
        gpu = see.read(
            "temperature_gpu", pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU
        )
        see.add(families.TEMPERATURE, gpu, "gpu")
        if memory:  # cards without the sensor answer 0
            see.add(families.TEMPERATURE, memory, "memory")
        for limit, name in LIMITS.items():
            degrees = see.read(
                f"temperature_limit_{name}", pynvml.nvmlDeviceGetTemperatureThreshold, handle, limit
            )
            if degrees is not None and 0 < degrees < _HIGHEST_TEMPERATURE:
                see.add(families.TEMPERATURE_LIMIT, degrees, name)

    def _clocks(self, see: Observations) -> None:
        handle = self._gpu.handle
        for clock, name in CLOCKS.items():
            megahertz = see.read(f"clock_{name}", pynvml.nvmlDeviceGetClockInfo, handle, clock)
            see.add(families.CLOCK, None if megahertz is None else megahertz * 1e6, name)
            highest = see.read(f"clock_max_{name}", pynvml.nvmlDeviceGetMaxClockInfo, handle, clock)
            see.add(families.CLOCK_MAX, None if highest is None else highest * 1e6, name)
        bits = see.read("throttle_reasons", pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
        if bits is None:  # the same call under its name before driver 535
            bits = see.read("throttle_reasons_old", pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
        if bits is not None:
            for bit, reason in THROTTLE_BITS.items():
                see.add(families.THROTTLE_ACTIVE, 1 if bits & bit else 0, reason)

    def close(self) -> None:
        """Nothing is held."""
