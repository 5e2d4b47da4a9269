"""Errors that a user can mend. The command line prints them as one line and exits with their code."""

from __future__ import annotations


class UserError(Exception):
    """One line that names the setting or file, the value and the mend. Exit code 1."""

    exit_code = 1


class ConfigError(UserError):
    """The configuration is refused. Exit code 2."""

    exit_code = 2
