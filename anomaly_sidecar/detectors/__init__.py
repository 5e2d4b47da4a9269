"""Detectors made for GPU inference, a module each, and all kinds that the configuration can name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from anomaly_sidecar import autoscale, forecast
from anomaly_sidecar.detectors import analyzers
from anomaly_sidecar.interface import Kind

KINDS: Mapping[str, Kind] = MappingProxyType(
    {kind.name: kind for kind in (*analyzers.KINDS, forecast.KIND, autoscale.KIND)}
)
"""By name: detectors, "forecast" and "replicas"."""
