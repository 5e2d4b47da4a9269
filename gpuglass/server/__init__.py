"""The HTTP server of every process of the pack that exports metrics.

A store's expositions flow out over HTTP/1.1, with TLS and basic authentication as the exporter-toolkit's web
configuration file asks; what the server itself did can be read as a `ServerStats` snapshot.
"""

from gpuglass.server.address import Address, ListenError, parse_listen
from gpuglass.server.http import MetricsServer
from gpuglass.server.limits import ServerLimits
from gpuglass.server.stats import Reason, ServerStats
from gpuglass.server.web_config import WebConfig, WebConfigError, load_web_config

__all__ = [
    "Address",
    "ListenError",
    "MetricsServer",
    "Reason",
    "ServerLimits",
    "ServerStats",
    "WebConfig",
    "WebConfigError",
    "load_web_config",
    "parse_listen",
]
