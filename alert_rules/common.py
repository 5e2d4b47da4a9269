"""What alerts of all categories share: how raw series get the labels of a device or node, how new counters
count, which dashboard shows what, and the annotations beside summary and description.

In: expressions as text. Out: expressions and templates as text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gpuglass.families import prices
from gpuglass.promql import Match, Metric, aggregate, duration, increase, select, times
from recording_rules import records
from recording_rules.devices import first_label
from recording_rules.records import ENGINE

DEVICE_VARIABLES = {"cluster": "cluster", "node": "node", "gpu_uuid": "gpu_uuid"}
NODE_VARIABLES = {"cluster": "cluster", "node": "node"}
MODEL_VARIABLES = {"cluster": "cluster", "model_name": "model_name"}
TENANT_VARIABLES = {"cluster": "cluster", "tenant": "tenant"}
REQUEST_VARIABLES = {"cluster": "cluster", "model_name": "model_name", "tenant": "tenant"}

GPU_NAME = "{{ $labels.node }}/{{ $labels.device }} ({{ $labels.model }}, {{ $labels.gpu_uuid }})"
ENGINE_NAME = (
    "{{ $labels.model_name }}, engine {{ $labels.engine }}"
    "{{ with $labels.workload_pod }}, pod {{ . }}{{ end }}"
)


def on_device(expression: str) -> str:
    """Series with a `gpu_uuid`, times 1, with the labels of the device. A GPU that nobody lists drops out."""
    return times(
        expression, select(records.DEVICE_INFO), ("gpu_uuid",), "group_left (cluster, node, device, model)"
    )


def per_device(how: str, expression: str, *labels: str) -> str:
    """Raw series of GPUs, by device and `labels`: both endpoint layouts and all replicas give one series."""
    return on_device(aggregate(how, ("gpu_uuid", *labels), expression))


def per_engine(how: str, expression: str, *labels: str) -> str:
    """Raw series of engines, by engine and `labels`."""
    return aggregate(how, (*ENGINE, *labels), expression)


def per_node(how: str, expression: str, *labels: str) -> str:
    """Series of the pack's own processes by node: the label of the targets where they have one, else the host
    in `instance`."""
    named = first_label(expression, "node", ("node", "instance"), port=True)
    return aggregate(how, ("cluster", "node", *labels), named)


def grown(metric: Metric, window: float, /, **matchers: str | Match) -> str:
    """By how much counters grew, where they did. One that was not there in the window before has grown by its
    value: events whose label sets appear with the first of them would be missed by `increase`."""
    now = select(metric, **matchers)
    before = f"max_over_time({select(metric, window, **matchers)} offset {duration(window)})"
    return f"({increase(metric, window, **matchers)} > 0)\nor\n(({now} unless {before}) > 0)"


def by(labels: Sequence[str]) -> str:
    """Labels as `on (…)` and `by (…)` take them."""
    return ", ".join(labels)


def longer_than(seconds: float) -> str:
    """How long a condition has held when it alerts, in words."""
    return f"more than {duration(seconds)}" if seconds else "a moment"


def both(expression: str, condition: str, on: Sequence[str] | None = None) -> str:
    """`expression` where `condition` has a sample, too."""
    joined = f"and on ({by(on)})" if on is not None else "and"
    return f"({expression})\n{joined}\n({condition})"


def neither(expression: str, condition: str, on: Sequence[str] | None = None) -> str:
    """`expression` where `condition` has no sample."""
    joined = f"unless on ({by(on)})" if on is not None else "unless"
    return f"({expression})\n{joined}\n({condition})"


PRICE_OF_MODEL = (
    '{{ with query (printf "max by (currency) (' + prices.GPU_HOUR.name + '{model=%q})" $labels.model) }}'
    '{{ with . | first }}{{ . | value | printf "%.2f" }} {{ . | label "currency" }} an hour for this '
    "GPU{{ end }}{{ end }}"
)
"""Template: price of an hour of the alert's card with its currency; nothing where no price is configured."""


def requests_url(dashboard_base: str, variables: Mapping[str, str] = REQUEST_VARIABLES) -> str:
    """Template: the requests of the alert's model and tenant, whose exemplars lead to the traces."""
    chosen = "&".join(f"var-{name}={{{{ $labels.{label} | urlquery }}}}" for name, label in variables.items())
    return f"{dashboard_base}/gpuglass-requests?{chosen}"
