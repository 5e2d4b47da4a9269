"""Alerts about latency: error budgets that burn (several windows and rates), and engines that stand still."""

from __future__ import annotations

from alert_rules.common import ENGINE_NAME, MODEL_VARIABLES, both, requests_url
from gpuglass.promql import aggregate, duration, first_of, one_of, select
from recording_rules import records
from recording_rules.model import Alert, Severity
from recording_rules.records import ENGINE, MODEL
from recording_rules.settings import BurnRate, Settings

OBJECTIVES = {
    "first_token": ("SLOFirstTokenBurn", "first tokens come too late"),
    "inter_token": ("SLOInterTokenBurn", "tokens follow each other too slowly"),
    "request_duration": ("SLORequestDurationBurn", "requests take too long"),
    "errors": ("SLOErrorsBurn", "requests fail"),
}
"""Name of the alert and what goes wrong, by the objective's name in `model:slo_burn:ratio`."""

LIVE_DIALECTS = ("probe", "vllm", "triton_vllm")
"""Engines whose tokens are counted while they are made; the others' jump when a request ends."""


def alerts(settings: Settings) -> tuple[Alert, ...]:
    """Burn rates by objective, the page before the ticket; then engines that stand still."""
    burns = (
        _burn(settings, objective, severity)
        for objective in OBJECTIVES
        for severity in (Severity.__args__)  # type: ignore[attr-defined]
    )
    return (*burns, _stalled(settings), _stuck(settings))


def _burn(settings: Settings, objective: str, severity: Severity) -> Alert:
    slo = settings.slo
    name, wrong = OBJECTIVES[objective]
    fast, slow = (
        (slo.page_fast, slo.page_slow) if severity == "critical" else (slo.ticket_fast, slo.ticket_slow)
    )
    traffic = f"{select(records.SLO_TOTAL, slo=objective)} > {slo.min_requests_per_second:g}"
    return Alert(
        name,
        both(
            first_of(_burns(objective, fast), _burns(objective, slow), on=MODEL),
            traffic,
            MODEL,
        ),
        severity,
        "latency",
        f"An error budget burns: {wrong}",
        f'{{{{ $labels.model_name }}}}: {wrong}; the budget for it burns {{{{ $value | printf "%.1f" '
        f"}}}} times as fast as it may.",
        "gpuglass-requests",
        hold=settings.alerts.latency.burn_for,
        variables=MODEL_VARIABLES,
        annotations={"traces_url": requests_url(settings.dashboard_base, MODEL_VARIABLES)},
    )


def _burns(objective: str, pair: BurnRate) -> str:
    """Burn rate of the long window, where both windows burn: the short one ends the alert when it is over."""
    long, short = (
        aggregate("max", MODEL, select(records.SLO_BURN, slo=objective, window=duration(window)))
        for window in (pair.long, pair.short)
    )
    return both(f"{long} > {pair.factor:g}", f"{short} > {pair.factor:g}", MODEL)


def _produces_nothing() -> str:
    """Engines that make no token, of those that tell while they make them."""
    tokens = aggregate("sum", ENGINE, select(records.ENGINE_TOKENS))
    return both(f"{tokens} == 0", select(records.ENGINE_INFO, dialect=one_of(LIVE_DIALECTS)), ENGINE)


def _stalled(settings: Settings) -> Alert:
    waiting = f"{select(records.ENGINE_WAITING)} > 0"
    idle = f"{select(records.ENGINE_RUNNING)} == 0"
    return Alert(
        "EngineAdmissionStalled",
        both(both(waiting, idle, ENGINE), _produces_nothing(), ENGINE),
        "critical",
        "latency",
        "Requests wait and the engine admits none",
        f'{{{{ $value | printf "%.0f" }}}} requests wait in {ENGINE_NAME}, none runs, and no token is made.',
        "gpuglass-requests",
        hold=settings.alerts.latency.stalled_for,
        variables=MODEL_VARIABLES,
    )


def _stuck(settings: Settings) -> Alert:
    running = f"{select(records.ENGINE_RUNNING)} > 0"
    return Alert(
        "EngineStepStuck",
        both(running, _produces_nothing(), ENGINE),
        "critical",
        "latency",
        "Requests run and the engine makes no token",
        f'{{{{ $value | printf "%.0f" }}}} requests run in {ENGINE_NAME}, and no token is made: a '
        "step does not end.",
        "gpuglass-requests",
        hold=settings.alerts.latency.stalled_for,
        variables=MODEL_VARIABLES,
    )
