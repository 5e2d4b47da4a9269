"""Entry point of the trace bridge for the agent: made only where an endpoint is configured, so that a node
without traces needs none of its packages."""

from __future__ import annotations

from gpuglass.errors import ConfigError
from gpuglass.family import Tier
from gpuglass.part import Part, PartContext


def create(context: PartContext) -> Part | None:
    """Make the part; None without `traces.endpoint` or a receiver (`engines.enabled`). Raises
    `ConfigError`."""
    config = context.config.traces
    if not config.endpoint or not context.config.engines.enabled:
        return None
    try:
        from otel_bridge import bridge, transport
    except ImportError as error:
        raise ConfigError(
            f"traces.endpoint: traces need the package {error.name}: pip install 'gpuglass[traces]', or "
            "leave traces.endpoint empty"
        ) from None
    part = bridge.TracesPart(config, context.records, transport.make(config))
    context.store.add_live("traces", part.fill, Tier.SLOW)
    return part
