"""Alerts about cards, links and drivers: what is lost, errs, is throttled, or cannot be believed."""

from __future__ import annotations

from alert_rules.common import (
    DEVICE_VARIABLES,
    GPU_NAME,
    NODE_VARIABLES,
    both,
    longer_than,
    neither,
    on_device,
    per_node,
)
from gpuglass.families import agent, gpu
from gpuglass.promql import aggregate, duration, increase, one_of, over_time, select
from recording_rules import records
from recording_rules.model import Alert, Record, Severity
from recording_rules.records import DEVICE
from recording_rules.settings import Settings


def alerts(settings: Settings) -> tuple[Alert, ...]:
    """Availability first, then errors, throttling, links, and what the figures are worth."""
    t = settings.alerts.health
    return (
        _device(
            "GPULost",
            f"{select(records.DEVICE_UP)} == 0",
            "critical",
            "A GPU does not answer its driver",
            f"{GPU_NAME} has not answered for {longer_than(t.lost_for)} "
            f"({gpu.UP.name} is {{{{ $value }}}}); what ran on it has failed.",
            hold=t.lost_for,
        ),
        _xid(
            settings, "GPUXidHardware", "hardware", "critical", "A GPU reports an XID error of its hardware"
        ),
        _xid(settings, "GPUXidDriver", "driver", "warning", "The driver reports an XID error of its own"),
        _xid(
            settings,
            "GPUXidApplication",
            "application",
            "warning",
            "A program caused an XID error, as an illegal access does",
        ),
        _xid(
            settings,
            "GPUXidUnknown",
            "unknown",
            "warning",
            "The driver reports an XID error of unknown cause",
        ),
        _ecc_uncorrected(settings),
        _ecc_corrected(settings),
        _device(
            "GPURowRemapFailed",
            f"{select(records.DEVICE_REMAP_FAILED)} == 1",
            "critical",
            "A row of GPU memory could not be replaced by a spare one",
            f"{GPU_NAME} has no spare row left where one is needed ({{{{ $value }}}}): the card is to "
            "be replaced.",
        ),
        _device(
            "GPURowRemapPending",
            f"{select(records.DEVICE_REMAP_PENDING)} == 1",
            "warning",
            "A row of GPU memory waits for a reset to be replaced",
            f"{GPU_NAME} has a bad row ({{{{ $value }}}}) that is replaced at the next reset of the GPU.",
        ),
        _throttled(
            settings,
            "GPUThrottledThermal",
            ("thermal_software", "thermal_hardware"),
            t.thermal_ratio,
            t.thermal_for,
            "A GPU is held down because it is too hot",
        ),
        _throttled(
            settings,
            "GPUThrottledPowerCap",
            ("power_cap",),
            t.power_ratio,
            t.power_for,
            "A GPU is held down by its power limit nearly all of the time",
        ),
        _throttled(
            settings,
            "GPUThrottledPowerBrake",
            ("power_brake",),
            t.brake_ratio,
            t.thermal_for,
            "The server's power supply pulls the brake on a GPU",
        ),
        _nvlink_errors(settings),
        _nvlink_down(settings),
        _pcie_replays(settings),
        _pcie_degraded(settings),
        _counters_disagree(settings),
        _driver_reloaded(settings),
    )


def _device(
    name: str,
    expression: str,
    severity: Severity,
    summary: str,
    description: str,
    *,
    hold: float = 0,
    keep_firing: float = 0,
) -> Alert:
    return Alert(
        name,
        expression,
        severity,
        "health",
        summary,
        description,
        "gpuglass-gpu",
        hold=hold,
        keep_firing=keep_firing,
        variables=DEVICE_VARIABLES,
    )


def _xid(settings: Settings, name: str, class_: str, severity: Severity, summary: str) -> Alert:
    # An event alerts at once and is shown for the window, whatever the rate's window is.
    xids = aggregate("sum", (*DEVICE, "xid"), select(records.DEVICE_XID, **{"class": class_}))
    return _device(
        name,
        f"{xids} > 0",
        severity,
        summary,
        f'XID {{{{ $labels.xid }}}} on {GPU_NAME}, {{{{ $value | printf "%.0f" }}}} times lately.',
        keep_firing=settings.alerts.health.event_window,
    )


def _ecc_uncorrected(settings: Settings) -> Alert:
    return _device(
        "GPUECCUncorrected",
        f"{aggregate('sum', DEVICE, select(records.DEVICE_ECC, type='uncorrected'))} > 0",
        "critical",
        "GPU memory had an error that could not be corrected",
        f'{{{{ $value | printf "%.0f" }}}} uncorrected memory errors on {GPU_NAME}: results since '
        "then are suspect.",
        keep_firing=settings.alerts.health.event_window,
    )


def _in_window(settings: Settings, per_second: str) -> str:
    """Events in the window, of a record of events per second."""
    return f"{per_second} * {settings.alerts.health.event_window:g}"


def _mean(settings: Settings, record: Record, **matchers: str) -> str:
    return aggregate("sum", DEVICE, over_time("avg", record, settings.alerts.health.event_window, **matchers))


def _ecc_corrected(settings: Settings) -> Alert:
    t = settings.alerts.health
    # The record counts over the rate window; its mean over the long window says how many there were in it.
    windows = t.event_window / settings.windows.rate
    errors = f"{_mean(settings, records.DEVICE_ECC, type='corrected')} * {windows:g}"
    return _device(
        "GPUECCCorrected",
        f"{errors} > {t.corrected_errors:g}",
        "warning",
        "GPU memory has to correct many errors",
        f'{{{{ $value | printf "%.0f" }}}} corrected memory errors in {duration(t.event_window)} on '
        f"{GPU_NAME}.",
    )


def _throttled(
    settings: Settings, name: str, reasons: tuple[str, ...], ratio: float, hold: float, summary: str
) -> Alert:
    # Reasons hold at the same time: their shares do not add up.
    share = aggregate("max", DEVICE, select(records.DEVICE_THROTTLED, reason=one_of(reasons)))
    return _device(
        name,
        f"{share} > {ratio:g}",
        "warning",
        summary,
        f"The clocks of {GPU_NAME} are held down {{{{ $value | humanizePercentage }}}} of the time.",
        hold=hold,
    )


def _nvlink_errors(settings: Settings) -> Alert:
    t = settings.alerts.health
    return _device(
        "GPUNVLinkErrors",
        f"{_in_window(settings, _mean(settings, records.DEVICE_NVLINK_ERRORS))} > {t.nvlink_errors:g}",
        "warning",
        "An NVLink has many errors",
        f'{{{{ $value | printf "%.0f" }}}} NVLink errors in {duration(t.event_window)} on {GPU_NAME}.',
    )


def _nvlink_down(settings: Settings) -> Alert:
    t = settings.alerts.health
    # Links that were never up are not wired.
    before = over_time("max", records.DEVICE_NVLINKS_UP, t.link_window)
    return _device(
        "GPUNVLinkDown",
        f"{before} - {select(records.DEVICE_NVLINKS_UP)} > 0",
        "warning",
        "NVLinks that were up are down",
        f'{{{{ $value | printf "%.0f" }}}} NVLinks of {GPU_NAME} are down that were up within '
        f"{duration(t.link_window)}.",
        hold=t.link_for,
    )


def _pcie_replays(settings: Settings) -> Alert:
    t = settings.alerts.health
    return _device(
        "GPUPCIeReplays",
        f"{_in_window(settings, _mean(settings, records.DEVICE_PCIE_REPLAYS))} > {t.pcie_replays:g}",
        "warning",
        "PCIe packets of a GPU have to be sent again",
        f'{{{{ $value | printf "%.0f" }}}} PCIe replays in {duration(t.event_window)} on {GPU_NAME}.',
    )


def _pcie_degraded(settings: Settings) -> Alert:
    # An idle card lowers the generation, never the number of lanes.
    current, widest = (
        aggregate("max", ("gpu_uuid",), select(gpu.PCIE_LINK_WIDTH, kind=kind)) for kind in ("current", "max")
    )
    return _device(
        "GPUPCIeDegraded",
        on_device(f"{current} < {widest}"),
        "warning",
        "A GPU's PCIe link has fewer lanes than it could",
        f'{GPU_NAME} is linked by {{{{ $value | printf "%.0f" }}}} PCIe lanes, fewer than card and '
        "slot can do.",
        hold=settings.alerts.health.link_for,
    )


def _counters_disagree(settings: Settings) -> Alert:
    t = settings.alerts.health
    return _device(
        "GPUCountersDisagree",
        both(
            f"{select(records.DEVICE_BUSY)} > {t.disagree_busy_ratio:g}",
            f"{select(records.DEVICE_GRAPHICS_ACTIVE)} < {t.disagree_active_ratio:g}",
        ),
        "warning",
        "A GPU is busy by its driver and idle by its profiling counters",
        f"The driver calls {GPU_NAME} busy {{{{ $value | humanizePercentage }}}} of the time; the "
        "profiling counters stand still.",
        hold=t.disagree_for,
    )


def _driver_reloaded(settings: Settings) -> Alert:
    window = settings.alerts.health.event_window
    loads = f"{increase(gpu.DRIVER_LOADS, window)} > 0"
    # An agent that started anew loads it for the first time.
    started = f"changes({select(agent.START_TIME, window)}) > 0"
    return Alert(
        "GPUDriverReloaded",
        per_node("max", f"({neither(loads, started, ('job', 'instance'))})"),
        "warning",
        "health",
        "The NVIDIA driver's library had to be loaded again",
        'The driver on {{ $labels.node }} was loaded {{ $value | printf "%.0f" }} times again within '
        f"{duration(window)}: it or a GPU was lost meanwhile.",
        "gpuglass-gpu",
        variables=NODE_VARIABLES,
    )
