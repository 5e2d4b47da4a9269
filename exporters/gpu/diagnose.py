"""The GPU part of `gpuglass doctor`: what the driver lets us read of each GPU, and how to get the rest.

A thread surveys the driver and notes each answer at once; when a call does not return, what was learned until
then is reported with it. `judge` turns a survey into checks and is pure.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pynvml

from exporters.gpu.collectors.links import RX, TX
from exporters.gpu.collectors.processes import running
from exporters.gpu.device import Gpu, identify
from exporters.gpu.driver import LIBRARY, DriverUnavailable, Nvml
from exporters.gpu.observe import (
    DriverDown,
    FieldReader,
    GpuDown,
    Observations,
    State,
    code_of,
    driver_reason,
)
from gpuglass.config import Config
from gpuglass.doctor.bounded import TookTooLong, bounded
from gpuglass.doctor.check import Check, Status

SECONDS = 10.0
"""How long the driver may take to answer everything."""

_NVIDIA = "0x10de"
_DISPLAY = "0x03"
"""PCI class of display controllers; NVIDIA's bridges and network cards have others."""
_ONE = "nvmlDeviceGetHandleByIndex"


@dataclass(slots=True)
class Card:
    """What one GPU answered. `down` is empty, or why it does not answer."""

    index: int
    down: str = ""
    model: str = ""
    architecture: str = ""
    mig_mode: str = ""
    ecc: str = ""
    """enabled, disabled, or empty if it has none."""
    states: dict[str, State] = field(default_factory=dict)
    processes: int | None = None
    asked: bool = False
    """Everything was asked; false while a call is under way."""


@dataclass(slots=True)
class Survey:
    """What was learned of the driver so far. Written by one thread; `call` is the one that it is in."""

    library: str = ""
    error: tuple[str, str] | None = None
    """Why NVML cannot be used: a word and a line."""
    driver: str = ""
    cuda: str = ""
    count: int | None = None
    cards: list[Card] = field(default_factory=list)
    call: str = ""
    hung_after: float | None = None
    """Seconds after which `call` was given up."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the machine shows of NVIDIA without the driver's library."""

    hardware: bool = False
    """A GPU of NVIDIA is on the PCI bus, or its device files are here."""
    device_files: bool = False
    container: bool = False
    visible_devices: str | None = None
    capabilities: str | None = None
    xid_wanted: bool = True
    library_wanted: bool = False
    """gpu.nvml_library is set."""

    @property
    def asked(self) -> bool:
        """Whether a GPU is expected here."""
        given = self.visible_devices not in (None, "", "void", "none")
        return self.hardware or self.library_wanted or given


def diagnose(config: Config) -> list[Check]:
    """The checks of the group `gpu`; takes at most `SECONDS`."""
    if not config.gpu.enabled:
        return [Check("gpu.enabled", "GPU exporter", Status.INFO, "switched off by gpu.enabled: false")]
    here = surroundings(config, os.environ)
    return judge(take_survey(config.gpu.nvml_library, SECONDS), here)


def take_survey(library: str, seconds: float) -> Survey:
    """Ask the driver everything, for at most `seconds`."""
    survey = Survey()
    try:
        bounded("gpu", seconds, lambda: _ask(survey, Nvml(library)))
    except TookTooLong:
        survey.hung_after = seconds
    return survey


def surroundings(config: Config, environ: Mapping[str, str], root: Path = Path("/")) -> Surroundings:
    """Look at the PCI bus, the device files and the container's variables."""
    device_files = (root / "dev/nvidiactl").exists()
    return Surroundings(
        hardware=device_files or (root / "proc/driver/nvidia/version").exists() or _on_bus(root),
        device_files=device_files,
        container=any((root / mark).exists() for mark in (".dockerenv", "run/.containerenv"))
        or "KUBERNETES_SERVICE_HOST" in environ
        or "NVIDIA_VISIBLE_DEVICES" in environ,
        visible_devices=environ.get("NVIDIA_VISIBLE_DEVICES"),
        capabilities=environ.get("NVIDIA_DRIVER_CAPABILITIES"),
        xid_wanted=config.gpu.xid_events,
        library_wanted=bool(config.gpu.nvml_library),
    )


def _on_bus(root: Path) -> bool:
    for device in root.glob("sys/bus/pci/devices/*"):
        try:
            if (device / "vendor").read_text().strip() == _NVIDIA and (
                device / "class"
            ).read_text().startswith(_DISPLAY):
                return True
        except OSError:
            continue
    return False


# --- the survey


def _ask(survey: Survey, nvml: Nvml) -> None:
    try:
        survey.call = "nvmlInit"
        nvml.open()
    except DriverUnavailable as error:
        survey.error = (error.reason, str(error))
        return
    try:
        survey.library = _loaded(Path("/proc/self/maps"))
        _ask_driver(survey)
    except (pynvml.NVMLError, DriverDown) as error:
        reason = error.reason if isinstance(error, DriverDown) else driver_reason(error)
        survey.error = (reason, f"the driver gave up: {error}")
    finally:
        survey.call = "nvmlShutdown"
        nvml.close()


def _ask_driver(survey: Survey) -> None:
    survey.call = "nvmlSystemGetDriverVersion"
    survey.driver = pynvml.nvmlSystemGetDriverVersion()
    survey.call = "nvmlSystemGetCudaDriverVersion_v2"
    try:
        number = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        survey.cuda = f"{number // 1000}.{number % 1000 // 10}"
    except pynvml.NVMLError:
        survey.cuda = ""
    survey.call = "nvmlDeviceGetCount"
    survey.count = pynvml.nvmlDeviceGetCount()
    for index in range(survey.count):
        card = Card(index)
        survey.cards.append(card)
        survey.call = f"{_ONE} of GPU {index}"
        try:
            _ask_card(survey, card, identify(index))
            card.asked = True
        except GpuDown as error:
            card.down = error.reason
        except pynvml.NVMLError as error:
            card.down = _down(error)


def _down(error: Exception) -> str:
    """A word for why a GPU does not answer; what concerns the whole driver is raised."""
    see = Observations()
    try:
        see.failed("identity", error)
    except GpuDown as down:
        return down.reason
    code = code_of(error)
    return "no_permission" if code == pynvml.NVML_ERROR_NO_PERMISSION else str(error)


def _ask_card(survey: Survey, card: Card, gpu: Gpu) -> None:
    card.model, card.architecture, card.mig_mode = gpu.model, gpu.architecture, gpu.mig_mode
    see = Observations(time.monotonic)
    card.states = see.states

    def read(name: str, call: Callable[..., object], *arguments: object) -> object:
        survey.call = f"{call.__name__} of GPU {card.index}"
        return see.read(name, call, *arguments)

    support = read("gpm", pynvml.nvmlGpmQueryDeviceSupport, gpu.handle)
    if support is not None and not getattr(support, "isSupportedDevice", 0):
        see.refuse("gpm", State.UNSUPPORTED)
    elif support is not None and not gpu.mig:
        _sample_gpm(read, gpu.handle)
    ecc = read("ecc", pynvml.nvmlDeviceGetEccMode, gpu.handle)
    if isinstance(ecc, Sequence) and ecc:
        card.ecc = "enabled" if ecc[0] else "disabled"
    events = read("xid", pynvml.nvmlDeviceGetSupportedEventTypes, gpu.handle)
    if isinstance(events, int) and not events & pynvml.nvmlEventTypeXidCriticalError:
        see.refuse("xid", State.UNSUPPORTED)
    survey.call = f"nvmlDeviceGetFieldValues of GPU {card.index}"
    FieldReader((TX, RX)).read(see, gpu.handle)
    survey.call = f"nvmlDeviceGetComputeRunningProcesses of GPU {card.index}"
    processes = see.read_list("processes", running, "compute", gpu.handle)
    card.processes = None if processes is None else len(processes)


def _sample_gpm(read: Callable[..., object], handle: object) -> None:
    """Read the counters once: only that tells whether we may."""
    buffer = read("gpm", pynvml.nvmlGpmSampleAlloc)
    if buffer is not None:
        read("gpm", pynvml.nvmlGpmSampleGet, handle, buffer)
        pynvml.nvmlGpmSampleFree(buffer)


def _loaded(maps: Path) -> str:
    """Path of the library that was loaded."""
    try:
        for line in maps.read_text(errors="replace").splitlines():
            path = line.partition("/")[1] + line.partition("/")[2]
            if os.path.basename(path).startswith(LIBRARY.removesuffix(".1")):
                return path
    except OSError:
        pass
    return LIBRARY


# --- the judgement


def judge(survey: Survey, here: Surroundings) -> list[Check]:
    """Checks of a survey."""
    if survey.error is not None and survey.error[0] == "library_not_found" and not survey.library:
        return [_no_library(survey.error[1], here)]
    checks: list[Check] = []
    if survey.library:
        checks.append(Check("gpu.library", "NVML library", Status.OK, survey.library))
    if survey.driver:
        cuda = f", CUDA {survey.cuda}" if survey.cuda else ""
        checks.append(Check("gpu.driver", "driver", Status.OK, f"{survey.driver}{cuda}"))
    if survey.error is not None:
        checks.append(_no_driver(*survey.error, here))
    if survey.hung_after is not None:
        checks.append(_hung(survey.call, survey.hung_after))
    if survey.count is not None and survey.error is None:
        checks += _of_cards(survey, here)
    return checks


def _no_library(text: str, here: Surroundings) -> Check:
    name, title = "gpu.library", "NVML library"
    finding = text.partition("; ")[0]
    if not here.asked:
        return Check(
            name,
            title,
            Status.WARN,
            f"no GPU of NVIDIA is seen on this machine, and no {LIBRARY}",
            "on a machine with one: install NVIDIA's driver; without: gpu.enabled: false",
        )
    if here.library_wanted:
        return Check(
            name,
            title,
            Status.FAIL,
            finding,
            f"gpu.nvml_library: path of {LIBRARY}, or remove the setting to search for it",
        )
    if here.container:
        return Check(name, title, Status.FAIL, f"no {LIBRARY} in this container", _container_mend(here))
    return Check(
        name,
        title,
        Status.FAIL,
        f"a GPU of NVIDIA is here, but no {LIBRARY}",
        "install NVIDIA's driver (Debian: apt-get install nvidia-driver; Ubuntu: ubuntu-drivers install), or "
        f"set gpu.nvml_library to the path of {LIBRARY}",
    )


def _container_mend(here: Surroundings) -> str:
    given = {word.strip() for word in (here.capabilities or "").split(",")}
    if here.capabilities and not given & {"utility", "all"}:
        return "set NVIDIA_DRIVER_CAPABILITIES=utility in the container"
    return (
        "set NVIDIA_VISIBLE_DEVICES=all and NVIDIA_DRIVER_CAPABILITIES=utility, and use NVIDIA's runtime: "
        "runtimeClassName: nvidia (Kubernetes), --gpus all (docker)"
    )


_DRIVER_MENDS: Mapping[str, str] = {
    "driver_not_loaded": "modprobe nvidia; if it fails: dmesg | grep -i -e nvidia -e nvrm",
    "version_mismatch": "reboot: the kernel still runs the module of the driver before the update",
    "uninitialized": "the driver is being reloaded: run the doctor again",
}


def _no_driver(reason: str, text: str, here: Surroundings) -> Check:
    mend = _DRIVER_MENDS.get(reason, "nvidia-smi; dmesg | grep -i -e nvrm -e xid")
    if reason == "driver_not_loaded" and here.container and not here.device_files:
        mend = _container_mend(here)
    if "ermission" in text:
        mend = "let this user read and write /dev/nvidiactl and /dev/nvidia0 (ls -l /dev/nvidia*)"
    return Check("gpu.driver", "driver", Status.FAIL, text, mend)


def _hung(call: str, seconds: float) -> Check:
    return Check(
        "gpu.hang",
        "driver call",
        Status.FAIL,
        f"a call into the driver did not return within {seconds:g} s: {call}",
        "dmesg | grep -i -e nvrm -e xid; a driver that stays like this needs a reboot. If it is only slow to "
        "start: nvidia-smi -pm 1",
    )


_CARD_MENDS: Mapping[str, str] = {
    "lost": "end its processes, then nvidia-smi --gpu-reset -i {index}; if it stays lost: reboot, and look "
    "for XID 79 in dmesg",
    "reset_required": "end its processes, then nvidia-smi --gpu-reset -i {index}",
    "gone": "nvidia-smi -L; if it is missing there too: reboot, and check its seat and power",
    "no_permission": "let this user read and write /dev/nvidia{index} (ls -l /dev/nvidia*)",
}
_CARD_WORDS: Mapping[str, str] = {
    "lost": "is lost: it fell off the bus or does not answer there",
    "reset_required": "needs a reset",
    "gone": "has gone",
    "no_permission": "may not be opened by this user",
}


def _of_cards(survey: Survey, here: Surroundings) -> list[Check]:
    if not survey.count:
        mend = _container_mend(here) if here.container else "nvidia-smi -L; lspci -d 10de:"
        return [Check("gpu.devices", "GPUs", Status.FAIL, "the driver lists none", mend)]
    asked = [card for card in survey.cards if card.asked or card.down]
    up = [card for card in asked if not card.down]
    checks: list[Check] = []
    if up:
        answered = f" ({len(up)} of {survey.count} answered)" if len(up) < survey.count else ""
        checks.append(Check("gpu.devices", "GPUs", Status.OK, _models(up) + answered))
    for card in asked:
        if card.down:
            word = _CARD_WORDS.get(card.down, f"does not answer: {card.down}")
            mend = _CARD_MENDS.get(card.down, "nvidia-smi -q -i {index}; dmesg | grep -i -e nvrm -e xid")
            checks.append(
                Check(
                    f"gpu.down_{card.index}",
                    f"GPU {card.index}",
                    Status.FAIL,
                    f"GPU {card.index} {word}",
                    mend.format(index=card.index),
                )
            )
    if up:
        checks += [_gpm(up), _xid(up, here.xid_wanted), _pcie(up), _processes(up), _mig(up), _ecc(up)]
    return checks


def _models(cards: Iterable[Card]) -> str:
    counts: dict[str, int] = {}
    for card in cards:
        counts[card.model] = counts.get(card.model, 0) + 1
    return ", ".join(f"{count} × {model}" for model, count in counts.items())


def _without(cards: Sequence[Card], field_name: str) -> tuple[list[Card], State | None]:
    """Cards on which a field cannot be read, and why on the first."""
    found = [card for card in cards if card.states.get(field_name) is not State.SUPPORTED]
    return found, (found[0].states.get(field_name, State.ERROR) if found else None)


def _on(found: Sequence[Card], cards: Sequence[Card]) -> str:
    """`GPU 3: ` or `GPUs 0, 1: `, or nothing for all."""
    if len(found) == len(cards):
        return ""
    return f"GPU{'s' if len(found) > 1 else ''} {', '.join(str(card.index) for card in found)}: "


def _word(state: State | None) -> str:
    return (state or State.ERROR).value.replace("_", " ")


_NEWER_DRIVER = "install driver {version} or newer"
_GPM = "SM activity, occupancy, tensor pipes and DRAM activity"


def _gpm(cards: Sequence[Card]) -> Check:
    name, title = "gpu.gpm", "GPM counters"
    found, why = _without(cards, "gpm")
    if not found:
        return Check(name, title, Status.OK, _GPM)
    where = _on(found, cards)
    architectures = ", ".join(sorted({card.architecture for card in found}))
    if why is State.NO_PERMISSION:
        return Check(
            name,
            title,
            Status.WARN,
            f"{where}no permission: {_GPM} are missing",
            "run the agent with CAP_SYS_ADMIN, or load the module with "
            "options nvidia NVreg_RestrictProfilingToAdminUsers=0",
        )
    old = {"kepler", "maxwell", "pascal", "volta", "turing", "ampere", "ada"}
    if all(card.architecture in old for card in found):
        finding = f"{where}{_GPM} are missing: {architectures} has no GPM (Hopper or newer has)"
        return Check(name, title, Status.INFO, finding)
    mend = _NEWER_DRIVER.format(version=525) if why is State.MISSING_FUNCTION else ""
    reason = "the driver is too old" if mend else "the driver does not give it (a virtual GPU?)"
    return Check(name, title, Status.WARN, f"{where}{_GPM} are missing: {reason}", mend)


def _xid(cards: Sequence[Card], wanted: bool) -> Check:
    name, title = "gpu.xid", "XID events"
    if not wanted:
        return Check(name, title, Status.INFO, "switched off by gpu.xid_events: false")
    found, why = _without(cards, "xid")
    if not found:
        return Check(name, title, Status.OK, "can be watched")
    mend = (
        "run the agent as root, or with access to /dev/nvidia-caps"
        if why is State.NO_PERMISSION
        else "dmesg | grep Xid shows them; alert on that log instead"
    )
    return Check(name, title, Status.WARN, f"{_on(found, cards)}cannot be watched ({_word(why)})", mend)


def _pcie(cards: Sequence[Card]) -> Check:
    name, title = "gpu.pcie", "PCIe bytes"
    found, why = _without(cards, "pcie_bytes")
    if not found:
        return Check(name, title, Status.OK, "counted by the card")
    where = _on(found, cards)
    if why is State.NO_PERMISSION:
        return Check(
            name, title, Status.WARN, f"{where}no permission to read the counters", "run the agent as root"
        )
    return Check(name, title, Status.INFO, f"{where}no counters: estimated from samples of 20 ms")


def _processes(cards: Sequence[Card]) -> Check:
    name, title = "gpu.processes", "processes"
    found, why = _without(cards, "processes")
    if not found:
        number = sum(card.processes or 0 for card in cards)
        return Check(name, title, Status.OK, f"listed; {number or 'none'} on a GPU now")
    mend = "run the agent as root" if why is State.NO_PERMISSION else _NEWER_DRIVER.format(version="450")
    return Check(name, title, Status.WARN, f"{_on(found, cards)}not listed ({_word(why)})", mend)


def _mig(cards: Sequence[Card]) -> Check:
    name, title = "gpu.mig", "MIG"
    split = [card for card in cards if card.mig_mode == "enabled"]
    if not split:
        return Check(name, title, Status.OK, "off")
    return Check(
        name,
        title,
        Status.INFO,
        f"{_on(split, cards)}on: instances have memory and GPM values, but no utilization",
    )


def _ecc(cards: Sequence[Card]) -> Check:
    name, title = "gpu.ecc", "ECC"
    off = [card for card in cards if card.ecc == "disabled"]
    without = [card for card in cards if not card.ecc]
    if off:
        index = ",".join(str(card.index) for card in off)
        return Check(
            name,
            title,
            Status.INFO,
            f"{_on(off, cards)}off: memory errors are not counted",
            f"nvidia-smi -i {index} -e 1, then nvidia-smi --gpu-reset -i {index}",
        )
    if without:
        return Check(name, title, Status.INFO, f"{_on(without, cards)}this model counts no memory errors")
    return Check(name, title, Status.OK, "on")
