"""The rule files as a whole: what `gpuglass rules build` writes, what is committed in `generated/`, and what
is wrong with either."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from alert_rules import document as alerts_document
from alert_rules import groups as alerts
from recording_rules import check, document
from recording_rules import groups as records
from recording_rules.groups import DEFAULT, Options
from recording_rules.model import Alert, Group
from recording_rules.settings import Settings
from recording_rules.writer import Form, render

RECORDS, ALERTS = "gpuglass-records", "gpuglass-alerts"
_PACKAGES = Path(__file__).parents[1]
RUNBOOKS = Path(__file__).parent / "runbooks"


def all_groups(settings: Settings, options: Options = DEFAULT) -> list[Group]:
    """Recording and alerting groups together."""
    return [*records.groups(settings, options), *alerts.groups(settings)]


def rule_files(settings: Settings, options: Options, form: Form) -> dict[str, str]:
    """Text of each file by its name."""
    return {
        f"{RECORDS}.yaml": render(RECORDS, records.groups(settings, options), settings, form),
        f"{ALERTS}.yaml": render(ALERTS, alerts.groups(settings), settings, form),
    }


def committed() -> dict[Path, str]:
    """What lies in the repository: the files with default settings, and the tables of the READMEs."""
    settings = Settings()
    made = rule_files(settings, DEFAULT, "prometheus")
    wanted = {
        _PACKAGES / "recording_rules/generated" / f"{RECORDS}.yaml": made[f"{RECORDS}.yaml"],
        _PACKAGES / "alert_rules/generated" / f"{ALERTS}.yaml": made[f"{ALERTS}.yaml"],
    }
    for package, tables in (
        ("recording_rules", document.TABLES),
        ("alert_rules", alerts_document.TABLES),
    ):
        page = _PACKAGES / package / "README.md"
        if page.exists():  # an installed package has no READMEs
            wanted[page] = document.updated(page, tables)
    return wanted


def write_committed() -> list[Path]:
    """Write what `committed` says; gives the paths that changed."""
    changed = []
    for path, text in committed().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            changed.append(path)
    return changed


def stale() -> Iterator[str]:
    """One line for each committed file that differs from what would be written."""
    for path, text in committed().items():
        where = path.relative_to(_PACKAGES)
        if not path.exists():
            yield f"{where}: is missing; run `gpuglass rules check --write`"
        elif path.read_text(encoding="utf-8") != text:
            yield f"{where}: is out of date; run `gpuglass rules check --write`"


def faults(settings: Settings) -> Iterator[str]:
    """One line for each fault of the rules, whichever options they are written with."""
    for form in ("classic", "native"):
        yield from check.faults(
            all_groups(settings, Options(histograms="native" if form == "native" else "classic"))
        )
    for group in alerts.groups(settings):
        for rule in group.rules:
            if isinstance(rule, Alert):
                page = (rule.runbook or rule.name).partition("#")[0]
                if not (RUNBOOKS / f"{page}.md").exists():
                    yield f"{rule.name}: has no runbook alert_rules/runbooks/{page}.md"
