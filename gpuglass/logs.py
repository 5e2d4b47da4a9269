"""Logging to standard error, as text or as one JSON object per line."""

from __future__ import annotations

import json
import logging
import sys
import time

from gpuglass.config import LogConfig

LOG = logging.getLogger("gpuglass")


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "ts": self.formatTime(record, "%Y-%m-%dT%H:%M:%SZ"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
        }
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def configure(config: LogConfig) -> None:
    """Set level and format of all the pack's loggers."""
    formatter = (
        _Json()
        if config.format == "json"
        else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    )
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    LOG.handlers[:] = [handler]
    LOG.propagate = False
    LOG.setLevel(config.level.upper())
