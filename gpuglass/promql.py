"""A small PromQL writer: label scopes are typed once, and a selector names only metrics that are declared.

In: metrics (families of the catalog, records of the rules, metrics of other exporters), matchers, windows in
seconds. Out: PromQL as text, which composes with f-strings; `metrics_in` reads the metrics' names back out of
such a text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from gpuglass.family import Family, Kind

TARGET_LABELS = frozenset({"job", "instance", "cluster", "namespace", "pod", "container", "node"})
"""Labels that Prometheus adds to whatever it scrapes, or that operators commonly let it add."""

Histograms = Literal["classic", "native"]
"""How histograms are stored: as `_bucket` series, or natively (also what Prometheus 3 has converted)."""


class PromqlError(ValueError):
    """A programmer's error: a selector that can never match."""


class Metric(Protocol):
    """What a selector can name: a family, a record, a metric of another exporter."""

    @property
    def name(self) -> str: ...

    @property
    def labels(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True)
class Match:
    """A matcher; a plain text is one for equality."""

    operator: Literal["=", "!=", "=~", "!~"]
    value: str


def regex(pattern: str) -> Match:
    """Label matches the anchored pattern."""
    return Match("=~", pattern)


def one_of(values: Iterable[str]) -> Match:
    """Label is one of the values."""
    known = list(values)
    return Match("=", known[0]) if len(known) == 1 else Match("=~", "|".join(map(re.escape, known)))


def not_equal(value: str) -> Match:
    """Label is not the value; `not_equal("")` is "label is there"."""
    return Match("!=", value)


def quote(text: str) -> str:
    """A PromQL string."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def duration(seconds: float) -> str:
    """Seconds as PromQL writes them: 90 is 1m30s."""
    if seconds <= 0 or seconds * 1000 != int(seconds * 1000):
        raise PromqlError(f"{seconds} is no duration of whole milliseconds")
    rest, text = int(seconds * 1000), ""
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        if rest >= size:
            text += f"{rest // size}{unit}"
            rest %= size
    return text


def select(metric: Metric, window: float | None = None, /, **matchers: str | Match) -> str:
    """A selector, over a window in seconds if one is given. Raises `PromqlError` for a label that the metric
    does not have, and for a histogram, whose samples have names of their own."""
    if isinstance(metric, Family) and metric.kind is Kind.HISTOGRAM:
        raise PromqlError(f"{metric.name} is a histogram: use the functions for histograms")
    return _selector(metric, metric.name, window, matchers)


def _selector(metric: Metric, name: str, window: float | None, matchers: dict[str, str | Match]) -> str:
    known = TARGET_LABELS.union(metric.labels)
    if unknown := sorted(matchers.keys() - known) if not getattr(metric, "source_labels", False) else []:
        raise PromqlError(f"{metric.name} has no label {unknown[0]}; it has {', '.join(metric.labels)}")
    parts = [
        f"{label}={quote(match)}"
        if isinstance(match, str)
        else f"{label}{match.operator}{quote(match.value)}"
        for label, match in matchers.items()
    ]
    inner = "{" + ", ".join(parts) + "}" if parts else ""
    return f"{name}{inner}" + (f"[{duration(window)}]" if window is not None else "")


def rate(metric: Metric, window: float, /, **matchers: str | Match) -> str:
    """Growth of a counter per second."""
    return f"rate({select(metric, window, **matchers)})"


def increase(metric: Metric, window: float, /, **matchers: str | Match) -> str:
    """Growth of a counter over the window."""
    return f"increase({select(metric, window, **matchers)})"


def over_time(how: str, metric: Metric, window: float, /, **matchers: str | Match) -> str:
    """`avg_over_time` and its like: `over_time("avg", …)`."""
    return f"{how}_over_time({select(metric, window, **matchers)})"


def quantile_over_time(quantile: float, metric: Metric, window: float, /, **matchers: str | Match) -> str:
    """Quantile of a series' own samples in the window."""
    return f"quantile_over_time({quantile:g}, {select(metric, window, **matchers)})"


def aggregate(how: str, labels: Sequence[str], expression: str) -> str:
    """`how by (labels) (expression)`, a long expression on lines of its own."""
    if "\n" in expression or len(expression) > 90:
        return f"{how} by ({', '.join(labels)}) (\n{indent(expression)}\n)"
    return f"{how} by ({', '.join(labels)}) ({expression})"


def indent(expression: str) -> str:
    """Two spaces before each line."""
    return "\n".join(f"  {line}" for line in expression.split("\n"))


_ATOM = re.compile(r"[\w:.]+(\{[^{}]*\})?(\[\w+\])?\Z")
_HEAD = re.compile(r"\w+( (by|without) \([^()]*\) |)(?=\()")


def parenthesize(expression: str) -> str:
    """In parentheses, unless it is one selector, call, aggregation or parenthesis."""
    if _ATOM.match(expression):
        return expression
    head = _HEAD.match(expression)
    start = head.end() if head else 0
    if expression[start : start + 1] == "(" and _closing(expression, start) == len(expression) - 1:
        return expression
    return f"(\n{indent(expression)}\n)" if "\n" in expression else f"({expression})"


def _closing(text: str, start: int) -> int:
    """Where the parenthesis at `start` closes; -1 if it does not."""
    bare = _TEXT.sub(lambda match: "_" * len(match[0]), text)
    depth = 0
    for at in range(start, len(bare)):
        depth += {"(": 1, ")": -1}.get(bare[at], 0)
        if depth == 0:
            return at
    return -1


def divide(numerator: str, denominator: str, on: Sequence[str] | None = None, group: str = "") -> str:
    """A quotient without a sample where the denominator is 0. `on` are the labels to join by, `group` such as
    `group_left (model)`."""
    joined = f" on ({', '.join(on)})" if on is not None else ""
    return f"{parenthesize(numerator)}\n/{joined}{' ' + group if group else ''}\n({denominator} > 0)"


def first_of(*expressions: str, on: Sequence[str] | None = None) -> str:
    """The first expression, and of the others what has no sample in those before, compared by labels `on`."""
    joined = f"or on ({', '.join(on)})" if on is not None else "or"
    return f"\n{joined}\n".join(parenthesize(e) if len(expressions) > 1 else e for e in expressions)


def times(left: str, right: str, on: Sequence[str], group: str = "group_left ()") -> str:
    """`left * right`, where right has at most one sample for each set of the labels `on`."""
    return f"{parenthesize(left)}\n* on ({', '.join(on)}) {group}\n{parenthesize(right)}"


def relabel(expression: str, label: str, value: str, source: str, pattern: str) -> str:
    """`label_replace`: set `label` to `value` where `source` matches the anchored pattern."""
    return f"label_replace({expression}, {quote(label)}, {quote(value)}, {quote(source)}, {quote(pattern)})"


def labelled(expression: str, label: str, value: str) -> str:
    """Expression with one more label of a constant value."""
    return relabel(expression, label, value, "", "")


# Histograms


def histogram_quantile(
    form: Histograms, quantile: float, metric: Metric, window: float, by: Sequence[str], /, **m: str | Match
) -> str:
    """Quantile of what was observed in the window, by labels; NaN where nothing was."""
    return quantile_of(form, quantile, histogram_rates(form, metric, window, **m), by)


def histogram_rates(form: Histograms, metric: Metric, window: float, /, **m: str | Match) -> str:
    """Histograms per second, for `quantile_of`."""
    return f"rate({_h(metric, '' if form == 'native' else '_bucket', window, m)})"


def quantile_of(form: Histograms, quantile: float, rates: str, by: Sequence[str]) -> str:
    """Quantile of rates of histograms, added up by labels; NaN where nothing was observed."""
    labels = [*by] if form == "native" else [*by, "le"]
    return f"histogram_quantile({quantile:g}, {aggregate('sum', labels, rates)})"


def histogram_count(form: Histograms, metric: Metric, window: float, /, **m: str | Match) -> str:
    """Observations per second."""
    if form == "native":
        return f"histogram_count(rate({_h(metric, '', window, m)}))"
    return f"rate({_h(metric, '_count', window, m)})"


def histogram_sum(form: Histograms, metric: Metric, window: float, /, **m: str | Match) -> str:
    """Sum of what is observed, per second."""
    if form == "native":
        return f"histogram_sum(rate({_h(metric, '', window, m)}))"
    return f"rate({_h(metric, '_sum', window, m)})"


def histogram_at_most(
    form: Histograms, bound: float, metric: Metric, window: float, /, **m: str | Match
) -> str:
    """Observations per second of at most `bound`, which has to be a bucket's bound."""
    if form == "native":
        rates = f"rate({_h(metric, '', window, m)})"
        # Without observations the fraction is NaN; 0 of 0 is what the classic form says.
        return f"(histogram_fraction(0, {bound:g}, {rates}) * histogram_count({rates}) >= 0)"
    le = re.escape(f"{bound:g}") + ("" if bound != int(bound) else r"(\.0)?")
    return f"rate({_h(metric, '_bucket', window, {**m, 'le': regex(le)})})"


def _h(metric: Metric, suffix: str, window: float, matchers: dict[str, str | Match]) -> str:
    if isinstance(metric, Family) and metric.kind is not Kind.HISTOGRAM:
        raise PromqlError(f"{metric.name} is no histogram")
    bare = {label: match for label, match in matchers.items() if label != "le"}
    _selector(metric, metric.name, None, bare)  # refuses unknown labels
    parts = _Labels((*metric.labels, "le"), metric.name)
    return _selector(parts, metric.name + suffix, window, matchers)


@dataclass(frozen=True, slots=True)
class _Labels:
    labels: tuple[str, ...]
    name: str


# Reading

_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'|`[^`]*`|#[^\n]*')
_BRACES = re.compile(r"\{[^{}]*\}")
_BRACKETS = re.compile(r"\[[^\[\]]*\]")
_GROUPING = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^()]*\)", re.IGNORECASE)
_WORD = re.compile(r"(?<![\w:.])([a-zA-Z_:][\w:]*)(?!\w)(\s*\()?")
KEYWORDS = frozenset(
    {"and", "or", "unless", "bool", "offset", "inf", "nan", "atan2", "start", "end", "by", "without", "on"}
    | {"ignoring", "group_left", "group_right"}
)
AGGREGATIONS = frozenset(
    {"sum", "min", "max", "avg", "group", "stddev", "stdvar", "count", "count_values", "bottomk", "topk"}
    | {"quantile", "limitk", "limit_ratio"}
)


def metrics_in(expression: str) -> Iterator[str]:
    """Names of the metrics that an expression selects by name, as they stand there (`_bucket` and all)."""
    text = _TEXT.sub(" ", expression)  # strings and comments in one go: each may hold the other's marks
    for pattern in (_BRACES, _BRACKETS, _GROUPING):
        text = pattern.sub(" ", text)
    for word, call in _WORD.findall(text):
        if not call and word.lower() not in KEYWORDS and word not in AGGREGATIONS:
            yield word
