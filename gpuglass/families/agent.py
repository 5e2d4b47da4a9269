"""Families that a process of the pack exports about itself: build, configuration, server, use of CPU and
memory."""

from __future__ import annotations

from gpuglass.family import Family, Kind, Tier

_ALWAYS = "The agent does not run."


def _gauge(
    name: str, unit: str, help: str, *labels: str, tier: Tier = Tier.SLOW, absent: str = _ALWAYS
) -> Family:
    return Family(f"gpuglass_agent_{name}", Kind.GAUGE, help, labels, unit, tier, absent=absent)


def _counter(name: str, unit: str, help: str, *labels: str) -> Family:
    return Family(f"gpuglass_agent_{name}", Kind.COUNTER, help, labels, unit, absent=_ALWAYS)


BUILD_INFO = Family(
    "gpuglass_agent_build_info", Kind.INFO, "Version of the agent.", ("version", "python"), absent=_ALWAYS
)
START_TIME = _gauge("start_timestamp_seconds", "seconds", "Unix time at which the agent started.")
CONFIG_RELOAD_OK = _gauge(
    "config_last_reload_success", "", "1 if the last (re)load of the configuration was taken."
)
CONFIG_RELOAD_TIME = _gauge(
    "config_last_reload_success_timestamp_seconds",
    "seconds",
    "Unix time at which the configuration in force was loaded.",
)
CAPABILITY = _gauge(
    "capability",
    "",
    "Always 1: what this node lets the agent see by feature (host_pid, pod_resources, container_names, "
    "engine_socket, engine_pids), with state.",
    "feature",
    "state",
)
HTTP_REQUESTS = _counter(
    "http_requests_total", "", "HTTP requests answered, by handler and status code.", "handler", "code"
)
HTTP_REJECTED = _counter(
    "http_rejected_total", "", "Connections and requests refused or cut off, by reason.", "reason"
)
HTTP_BYTES = _counter("http_sent_bytes_total", "bytes", "Bytes of response bodies sent.")
HTTP_CONNECTIONS = _gauge("http_connections", "", "Connections open now.")
SCRAPE_SECONDS = _counter(
    "scrape_render_seconds_total", "seconds", "Time spent rendering scrapes, by handler.", "handler"
)
SCRAPES = _counter("scrapes_total", "", "Scrapes rendered, by handler.", "handler")
WEB_CONFIG_OK = _gauge(
    "web_config_last_reload_success",
    "",
    "1 if the web configuration file in force is the one on disk.",
    absent="No web configuration file is set.",
)
CPU = _counter("cpu_seconds_total", "seconds", "CPU time that the agent used.")
MEMORY = _gauge("resident_memory_bytes", "bytes", "Memory of the agent that is resident.")
OPEN_FDS = _gauge("open_fds", "", "File descriptors that the agent has open.")
THREADS = _gauge("threads", "", "Threads of the agent.")
SERIES = _gauge("series", "", "Series that the agent published at the last scrape, by tier.", "tier")
