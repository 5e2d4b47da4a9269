"""Writes the alert rule files in `generated/`, holds the runbooks and the command `gpuglass rules`.

May import `gpuglass` and `recording_rules`."""
