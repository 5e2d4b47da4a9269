"""Writer of the scenario files that the simulated GPU driver plays.

Pure data in (GPU models, values, processes, failures, events, each from a time on), one text file out. Tests
and the demo build a ``Scenario``, write it, and write it again when the simulated machine changes; names are
checked here, so a misspelt key fails where it is written and not as a driver that answers "not supported".
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

Value = int | float | str | None
"""A number, a text, or None for "the GPU has no such value"."""

Gpu = int | Literal["*"]
"""A GPU's index, or "*" for the default of every GPU."""

ALL_SCOPES: Final = "all"
"""The scope of a field value that stands for all links or lanes together."""


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


GPU_KEYS: Final = _names(
    """
    uuid name serial vbios pci_bus_id pci_device_id minor arch brand compute_capability
    mig_mode mig_mode_pending persistence_mode compute_mode lost
    total_bytes used_bytes reserved_bytes bar1_total_bytes bar1_used_bytes
    total_mib used_mib reserved_mib bar1_total_mib bar1_used_mib
    util_gpu util_mem util_enc util_dec util_jpg util_ofa sample_period_ms sample_count
    power_mw power_instant_mw power_avg_mw power_limit_mw power_default_limit_mw power_min_limit_mw
    power_max_limit_mw energy_mj
    temp_gpu temp_mem temp_shutdown temp_slowdown temp_mem_max temp_gpu_max
    clock_graphics clock_sm clock_mem clock_video clock_max_graphics clock_max_sm
    clock_max_mem clock_max_video
    pstate clocks_event_reasons ecc_mode ecc_mode_pending
    remapped_correctable remapped_uncorrectable remapped_pending remapped_failure
    retired_sbe retired_dbe retired_pending
    pcie_replay pcie_gen pcie_gen_max pcie_width pcie_width_max
    pcie_tx_bytes pcie_rx_bytes pcie_tx_rate pcie_rx_rate
    gpm_support recovery_action event_types
    proc_sample_ms proc_grow proc_util_garbage proc_util_zero
    """
)
TEXT_KEYS: Final = frozenset({"uuid", "name", "serial", "vbios", "pci_bus_id", "compute_capability", "arch"})
OWN_KEYS: Final = frozenset({"uuid", "pci_bus_id", "minor"})  # make no sense as a default of every GPU
PROCESS_TYPES: Final = ("compute", "graphics", "mps")
LINK_KEYS: Final = _names(
    "replay recovery crc_flit crc_data ecc_data state speed_mbps tx_bytes rx_bytes tx_rate rx_rate"
)
MIG_KEYS: Final = _names("slices ci_slices sm ce dec enc jpg ofa reserved_mib")
EVENTS: Final = _names(
    """xid ecc_sbe ecc_dbe pstate clock power_source mig_config ecc_sbe_storm dram_retirement
    dram_retirement_failure poison poison_fatal gpu_unavailable recovery_action"""
)
RETURN_NAMES: Final = _names(
    """ok uninitialized invalid_argument not_supported no_permission not_found insufficient_size
    driver_not_loaded timeout function_not_found lost reset_required version_mismatch insufficient_resources
    not_ready unknown"""
)
DRIVER_STATES: Final = ("ok", "not_loaded", "version_mismatch", "reloading")
FIELD_TYPES: Final = ("double", "uint", "ulong", "ull", "sll", "int", "ushort")
ECC_LOCATIONS: Final = ("l1", "l2", "dram", "register", "texture", "cbu", "sram")
MAX_GPUS: Final = 64


class ScenarioError(ValueError):
    """A name or value that the simulated driver would not understand."""


def _one_of(what: str, name: str, names: frozenset[str] | tuple[str, ...]) -> str:
    if name not in names:
        raise ScenarioError(f"unknown {what} {name!r}, one of: {', '.join(sorted(names))}")
    return name


def _index(what: str, number: int, most: int) -> int:
    if not 0 <= number <= most:
        raise ScenarioError(f"{what} {number} is not within 0 to {most}")
    return number


def _written(value: Value) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ScenarioError(f"{value} is not a finite number")
        return repr(value)
    if not value.strip() or value != value.strip() or any(c in value for c in "\n\r\0"):
        raise ScenarioError(f"{value!r} is empty, spans lines or has spaces at its ends")
    return value


def _word(name: str, value: int | str) -> str:
    text = _written(value)
    if any(c.isspace() for c in text):
        raise ScenarioError(f"{name}={text!r} must not hold spaces")
    return f"{name}={text}"


def _gpu(gpu: Gpu) -> str:
    return "gpu.*" if gpu == "*" else f"gpu.{_index('GPU', gpu, MAX_GPUS - 1)}"


def _one_gpu(gpu: int) -> str:
    return f"gpu.{_index('GPU', gpu, MAX_GPUS - 1)}"


@dataclass(frozen=True)
class Model:
    """A kind of GPU: what does not change while it runs, and a plausible idle state."""

    values: Mapping[str, Value]
    nvlinks: int = 0
    nvlink_mbps: int = 0


def _model(name: str, arch: str, capability: str, total_mib: int, watts: int, *, nvlinks: int = 0,
           nvlink_mbps: int = 0, idle_watts: int = 70, sm_mhz: int = 1980, mem_mhz: int = 2619,
           pcie_gen: int = 5,
           bar1_mib: int = 131072, ecc: bool = True, mig: bool = True, gpm: bool = True, serial: bool = True,
           temp_mem: bool = True, reserved_mib: int = 600, brand: int = 14) -> Model:  # fmt: skip
    values: dict[str, Value] = {
        "name": name, "arch": arch, "compute_capability": capability, "brand": brand,
        "serial": "1650000000000" if serial else None,
        "total_mib": total_mib, "reserved_mib": reserved_mib, "used_mib": 0,
        "bar1_total_mib": bar1_mib, "bar1_used_mib": 2,
        "util_gpu": 0, "util_mem": 0, "util_enc": 0, "util_dec": 0,
        "power_mw": idle_watts * 1000, "power_limit_mw": watts * 1000, "power_default_limit_mw": watts * 1000,
        "power_min_limit_mw": watts * 400, "power_max_limit_mw": watts * 1000,
        "temp_gpu": 32, "temp_mem": 38 if temp_mem else None,
        "temp_shutdown": 95, "temp_slowdown": 92, "temp_gpu_max": 87,
        "temp_mem_max": 105 if temp_mem else None,
        "clock_graphics": 345, "clock_sm": 345, "clock_mem": mem_mhz, "clock_video": 765,
        "clock_max_graphics": sm_mhz, "clock_max_sm": sm_mhz, "clock_max_mem": mem_mhz,
        "clock_max_video": 1545,
        "pstate": 0, "clocks_event_reasons": 1, "persistence_mode": 1, "compute_mode": 0,
        "mig_mode": 0 if mig else None, "ecc_mode": 1 if ecc else None,
        "remapped_correctable": 0 if ecc else None, "remapped_uncorrectable": 0 if ecc else None,
        "remapped_pending": 0 if ecc else None, "remapped_failure": 0 if ecc else None,
        "pcie_replay": 0, "pcie_gen": pcie_gen, "pcie_gen_max": pcie_gen, "pcie_width": 16,
        "pcie_width_max": 16,
        "pcie_tx_rate": 0, "pcie_rx_rate": 0, "gpm_support": int(gpm), "recovery_action": 0,
    }  # fmt: skip
    return Model(values, nvlinks, nvlink_mbps)


H200: Final = _model("NVIDIA H200", "hopper", "9.0", 143771, 700, nvlinks=18, nvlink_mbps=26562, mem_mhz=3201,
                     bar1_mib=262144)  # fmt: skip
H100: Final = _model("NVIDIA H100 80GB HBM3", "hopper", "9.0", 81559, 700, nvlinks=18, nvlink_mbps=26562)
A100: Final = _model("NVIDIA A100-SXM4-80GB", "ampere", "8.0", 81920, 400, nvlinks=12, nvlink_mbps=25781,
                     idle_watts=60, sm_mhz=1410, mem_mhz=1593, pcie_gen=4, gpm=False)  # fmt: skip
RTX_4090: Final = _model("NVIDIA GeForce RTX 4090", "ada", "8.9", 24564, 450, idle_watts=20, sm_mhz=3105,
                         mem_mhz=10501, pcie_gen=4, bar1_mib=32768, ecc=False, mig=False, gpm=False,
                         serial=False, temp_mem=False, reserved_mib=300, brand=5)  # fmt: skip
MODELS: Final[Mapping[str, Model]] = {"H200": H200, "H100": H100, "A100": A100, "RTX 4090": RTX_4090}


@dataclass
class _Lines:
    """What a scenario and its views at other times share."""

    values: dict[tuple[float, str], str] = field(default_factory=dict)
    events: list[tuple[float, str, str]] = field(default_factory=list)
    clock_start: float | None = None


class Scenario:
    """Builder of one scenario; every method that sets something returns the builder, so calls chain.

    A value holds from the builder's time on (0, or ``at``'s) until a later one; set twice for the same
    time, the last counts.
    """

    def __init__(self) -> None:
        self._lines = _Lines()
        self._time = 0.0

    def at(self, seconds: float) -> Scenario:
        """The same scenario, setting what takes effect so many seconds after the clock's start."""
        if not (math.isfinite(seconds) and 0 <= seconds <= 1e9):
            raise ScenarioError(f"time {seconds} is not within 0 to 1e9 seconds")
        view = Scenario()
        view._lines = self._lines
        view._time = float(seconds)
        return view

    def _set(self, key: str, value: Value) -> None:
        self._lines.values[self._time, key] = _written(value)

    # The machine

    def clock(self, start: float) -> Scenario:
        """Time 0 is at this moment of ``time.monotonic()``, and not when the driver first reads the file."""
        self._lines.clock_start = start
        return self

    def driver(
        self,
        version: str | None = None,
        *,
        cuda: str | None = None,
        nvml: str | None = None,
        state: str | None = None,
        generation: int | None = None,
    ) -> Scenario:
        """``state``: ok, not_loaded, version_mismatch, reloading; a larger ``generation``: reloaded."""
        if state is not None:
            _one_of("driver state", state, DRIVER_STATES)
        given = {"version": version, "cuda": cuda, "nvml": nvml, "state": state, "generation": generation}
        for key, value in given.items():
            if value is not None:
                self._set(f"driver.{key}", value)
        return self

    def count(self, gpus: int) -> Scenario:
        self._set("gpu.count", _index("number of GPUs", gpus, MAX_GPUS))
        return self

    def gpus(self, number: int, model: Model = H200) -> Scenario:
        """That many GPUs of a model, each with its own uuid, bus id, serial and minor number."""
        self.count(number)
        for gpu in range(number):
            self.model(gpu, model)
        return self

    def model(self, gpu: int, model: Model) -> Scenario:
        """Makes this GPU one of a model; does not change ``count``."""
        self.gpu(gpu, **model.values)
        self.gpu(gpu, uuid=uuid_of(gpu), pci_bus_id=f"00000000:{gpu + 1:02X}:00.0", minor=gpu)
        if model.values.get("serial") is not None:
            self.gpu(gpu, serial=f"{1650000000000 + gpu}")
        self._set(f"{_one_gpu(gpu)}.nvlink.count", model.nvlinks or None)
        if model.nvlinks:
            self.nvlink(gpu, speed_mbps=model.nvlink_mbps, tx_rate=0, rx_rate=0)
            for error in ("replay", "recovery", "crc_flit", "crc_data"):
                self.nvlink(gpu, **{error: 0})
        if model.values.get("ecc_mode"):
            for kind in ("corrected", "uncorrected"):
                for counter in ("volatile", "aggregate"):
                    self.ecc(gpu, kind, counter, 0)
        return self

    # Values of a GPU

    def gpu(self, gpu: Gpu, **values: Value) -> Scenario:
        """Values by the names in ``GPU_KEYS``; None makes one unavailable."""
        for key, value in values.items():
            _one_of("GPU key", key, GPU_KEYS)
            if gpu == "*" and key in OWN_KEYS:
                raise ScenarioError(f"{key} must differ between GPUs, so gpu '*' cannot have it")
            if isinstance(value, str) and key not in TEXT_KEYS:
                raise ScenarioError(f"{key} is a number, not {value!r}")
            self._set(f"{_gpu(gpu)}.{key}", value)
        return self

    def gpm(self, gpu: Gpu, values: Mapping[int, float | None], *, mig: int | None = None) -> Scenario:
        """Performance metrics by NVML_GPM_METRIC_* id, of the GPU or of one of its MIG instances."""
        where = _gpu(gpu) if mig is None else f"{_mig_gpu(gpu)}.mig.{_index('MIG index', mig, 7)}"
        for metric, value in values.items():
            self._set(f"{where}.gpm.{_index('metric', metric, 1023)}", value)
        return self

    def field(
        self,
        gpu: Gpu,
        field_id: int,
        value: int | float | None = None,
        *,
        scope: int | str | None = None,
        error: str | int | None = None,
        type: str | None = None,
    ) -> Scenario:
        """A field value by NVML_FI_* id: a value (and its type), or an error. "ok" clears an error."""
        if isinstance(scope, str):
            _one_of("field scope", scope, (ALL_SCOPES,))
        key = f"{_gpu(gpu)}.field.{_index('field', field_id, 65535)}"
        if scope is not None:
            key += f".scope.{scope if isinstance(scope, str) else _index('scope', scope, 0xFFF0)}"
        if value is not None:
            self._set(key, value)
        if error is not None:
            self._set(f"{key}.error", _return_code(error))
        if type is not None:
            self._set(f"{key}.type", _one_of("field type", type, FIELD_TYPES))
        return self

    def nvlink(
        self, gpu: Gpu, link: int | None = None, *, count: int | None = None, **values: Value
    ) -> Scenario:
        """Values of one link, or with ``link`` None the default of every link, by ``LINK_KEYS``."""
        if count is not None:
            self._set(f"{_gpu(gpu)}.nvlink.count", _index("number of links", count, 36))
        which = "*" if link is None else str(_index("link", link, 35))
        for key, value in values.items():
            self._set(f"{_gpu(gpu)}.nvlink.{which}.{_one_of('link key', key, LINK_KEYS)}", value)
        return self

    def ecc(
        self, gpu: Gpu, kind: str, counter: str, count: int | None, *, location: str | None = None
    ) -> Scenario:
        """``kind``: corrected, uncorrected; ``counter``: volatile, aggregate; in total, or at a location."""
        _one_of("ECC kind", kind, ("corrected", "uncorrected"))
        _one_of("ECC counter", counter, ("volatile", "aggregate"))
        where = f".{_one_of('ECC location', location, ECC_LOCATIONS)}" if location is not None else ""
        self._set(f"{_gpu(gpu)}.ecc.{kind}.{counter}{where}", count)
        return self

    # Processes and MIG instances

    def process(
        self,
        gpu: int,
        pid: int,
        *,
        type: str = "compute",
        mem_mib: int | float | None = 0,
        sm: int = 0,
        memutil: int = 0,
        enc: int = 0,
        dec: int = 0,
        gi: int | None = None,
        ci: int | None = None,
    ) -> Scenario:
        """A process on the GPU; ``mem_mib`` None: the driver cannot tell its memory."""
        words = [_word("type", _one_of("process type", type, PROCESS_TYPES))]
        words.append("mem=none" if mem_mib is None else f"mem_mib={_written(mem_mib)}")
        numbers = {"sm": sm, "memutil": memutil, "enc": enc, "dec": dec, "gi": gi, "ci": ci}
        for name, number in numbers.items():
            if number is not None and (number or name in ("gi", "ci")):
                words.append(_word(name, _index(name, number, 2**32 - 1)))
        self._set(f"{_one_gpu(gpu)}.proc.{_index('pid', pid, 2**32 - 2)}", " ".join(words))
        return self

    def gone(self, gpu: int, pid: int) -> Scenario:
        """The process has ended."""
        self._set(f"{_one_gpu(gpu)}.proc.{_index('pid', pid, 2**32 - 2)}", "gone")
        return self

    def mig(
        self,
        gpu: int,
        index: int,
        *,
        uuid: str | None = None,
        gi: int | None = None,
        ci: int = 0,
        profile: str = "1g.18gb",
        total_mib: int | float = 16384,
        used_mib: int | float = 0,
        **values: int,
    ) -> Scenario:
        """A MIG instance (the GPU's ``mig_mode`` must be 1); more values by the names in ``MIG_KEYS``."""
        words = [
            _word("uuid", uuid if uuid is not None else mig_uuid_of(gpu, index)),
            _word("gi", index + 1 if gi is None else gi),
            _word("ci", ci),
            _word("profile", profile),
            f"total_mib={_written(total_mib)}",
            f"used_mib={_written(used_mib)}",
        ]
        words += [_word(_one_of("MIG key", name, MIG_KEYS), value) for name, value in values.items()]
        self._set(f"{_one_gpu(gpu)}.mig.{_index('MIG index', index, 7)}", " ".join(words))
        return self

    def mig_gone(self, gpu: int, index: int) -> Scenario:
        """The MIG instance has been destroyed."""
        self._set(f"{_one_gpu(gpu)}.mig.{_index('MIG index', index, 7)}", "gone")
        return self

    # Trouble and events

    def fail(self, gpu: Gpu | None, function: str, code: str | int) -> Scenario:
        """Calls of the function ("*": every one) return the code; ``gpu`` None: calls that name no GPU."""
        self._set(f"{_trouble(gpu, 'fail', function)}", _return_code(code))
        return self

    def hang(self, gpu: Gpu | None, function: str, seconds: float) -> Scenario:
        """Calls of the function block so long, or until a later ``hang`` of 0 seconds."""
        if not 0 <= seconds <= 1e6:
            raise ScenarioError(f"a hang of {seconds} seconds is not within 0 to 1e6")
        self._set(f"{_trouble(gpu, 'hang', function)}", seconds)
        return self

    def clear(self, gpu: Gpu | None, function: str = "*") -> Scenario:
        """Ends what ``fail`` and ``hang`` said of the same function."""
        return self.fail(gpu, function, "ok").hang(gpu, function, 0)

    def event(
        self, gpu: int, name: str, data: int | None = None, *, gi: int | None = None, ci: int | None = None
    ) -> Scenario:
        """One event at the builder's time, for example ``at(3).event(0, "xid", 79)``."""
        words = [_one_of("event", name, EVENTS)]
        if data is not None:
            words.append(str(_index("event data", data, 10**15)))
        words += [_word(key, number) for key, number in (("gi", gi), ("ci", ci)) if number is not None]
        self._lines.events.append((self._time, f"{_one_gpu(gpu)}.event", " ".join(words)))
        return self

    # Out

    def text(self) -> str:
        """The whole scenario (whatever time this builder is at) as the driver reads it."""
        lines = self._lines
        out = [] if lines.clock_start is None else [f"clock.start = {lines.clock_start:.6f}"]
        steps = [(time, key, value) for (time, key), value in lines.values.items()] + lines.events
        for time, key, value in steps:
            out.append(f"{key} = {value}" if time == 0 else f"@{time!r} {key} = {value}")
        return "\n".join(out) + "\n"

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Writes the file so that a reader sees the old text or the new one, never a part."""
        target = Path(path)
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(self.text())
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return target


def uuid_of(gpu: int) -> str:
    """The uuid that ``model`` gives a GPU."""
    return f"GPU-5c0ffee0-0000-4000-8000-{gpu:012x}"


def mig_uuid_of(gpu: int, index: int) -> str:
    """The uuid that ``mig`` gives an instance."""
    return f"MIG-5c0ffee0-0000-4000-9000-{gpu:010x}{index:02x}"


def _mig_gpu(gpu: Gpu) -> str:
    if gpu == "*":
        raise ScenarioError("MIG instances belong to one GPU, not to '*'")
    return _one_gpu(gpu)


def _return_code(code: str | int) -> str:
    if isinstance(code, int):
        return str(_index("return code", code, 2**31))
    return _one_of("return code", code, RETURN_NAMES)


def _trouble(gpu: Gpu | None, kind: str, function: str) -> str:
    if function != "*" and not (function.startswith("nvml") and function.isidentifier()):
        raise ScenarioError(f"{function!r} is neither a function's name nor '*'")
    return f"{kind}.{function}" if gpu is None else f"{_gpu(gpu)}.{kind}.{function}"
