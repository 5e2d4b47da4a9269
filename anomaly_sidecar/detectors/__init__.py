"""Detectors made for GPU inference: each has an own module of pure steps over arrays."""

from __future__ import annotations

from anomaly_sidecar.interface import Kind

KINDS: dict[str, Kind] = {}
"""Kinds of detectors and forecasts that a configuration can name."""
