"""Writes the recording rule files in `generated/`. May import `gpuglass`."""
