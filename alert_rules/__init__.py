"""Writes the alert rule files in `generated/`, and holds the runbooks. May import `gpuglass`."""
