"""All kinds of detectors and forecasts that the configuration can name."""

from __future__ import annotations

from types import MappingProxyType

from anomaly_sidecar import autoscale, forecast
from anomaly_sidecar.detectors import analyzers

KINDS = MappingProxyType({kind.name: kind for kind in (*analyzers.KINDS, forecast.KIND, autoscale.KIND)})
