"""All groups of alerting rules."""

from __future__ import annotations

from recording_rules.model import Group
from recording_rules.settings import Settings


def groups(settings: Settings) -> list[Group]:
    """Groups of alerting rules."""
    return []
