"""What a metric family is, and the batch in which a part of the pack hands over its samples.

Families are declared once in `gpuglass/families/` and collected by `gpuglass.catalog`. A part fills a `Batch`
with values for declared families; the batch refuses wrong labels at once, so a typo never reaches a scrape.
Out come `prometheus_client` samples, which `gpuglass.store` renders.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from prometheus_client.samples import Exemplar, Sample

MAX_LABEL_VALUE = 256
"""Characters kept of a label value: names come from processes and files that anyone may write."""

_NAME = re.compile(r"gpuglass_[a-z0-9_]+\Z")
_LABEL = re.compile(r"[a-z][a-z0-9_]*\Z")
UNITS = frozenset({"", "bytes", "seconds", "ratio", "watts", "joules", "celsius", "hertz", "volts", "tokens"})


class CatalogError(ValueError):
    """A programmer's error: a family declared or filled wrongly."""


class Kind(StrEnum):
    """OpenMetrics type of a family."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"
    INFO = "info"


class Tier(StrEnum):
    """Endpoint that carries a family: `/metrics/fast` (about 1 s) or `/metrics/slow` (about 15 s)."""

    FAST = "fast"
    SLOW = "slow"


class Owner(StrEnum):
    """The one process that exports a family."""

    AGENT = "agent"
    TRACER = "cuda-tracer"
    ANOMALY = "anomaly"


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """Declaration of one metric family.

    `name` is the name that queries use: counters end in `_total`, info families in `_info`. `unit` is the
    name's last word before that, or empty. Label names in `optional` are left out of a sample when their
    value is empty, which Prometheus treats as the same. `absent` says what it means when there is no sample.
    `buckets` are the upper bounds of a histogram without `+Inf`. Samples of a family with `source_labels`
    carry, beside `labels`, those of the series that they are about.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    unit: str = ""
    tier: Tier = Tier.SLOW
    owner: Owner = Owner.AGENT
    absent: str = ""
    optional: frozenset[str] = frozenset()
    buckets: tuple[float, ...] = ()
    source_labels: bool = False

    def __post_init__(self) -> None:
        if not _NAME.match(self.name):
            raise CatalogError(f"{self.name}: a family's name is gpuglass_ and lower-case words")
        if self.unit not in UNITS:
            raise CatalogError(f"{self.name}: unknown unit {self.unit!r}")
        if self.unit and not self.base_name.endswith(f"_{self.unit}"):
            raise CatalogError(f"{self.name}: the unit {self.unit} is not the end of the name")
        if (self.kind is Kind.COUNTER) != self.name.endswith("_total"):
            raise CatalogError(f"{self.name}: counters, and only they, end in _total")
        if (self.kind is Kind.INFO) != self.name.endswith("_info"):
            raise CatalogError(f"{self.name}: info families, and only they, end in _info")
        if self.name.endswith(("_count", "_sum", "_bucket", "_created")):
            raise CatalogError(f"{self.name}: this ending belongs to the samples of histograms")
        # A forecast's quantile is no summary's, but queries are to spell it as they do there.
        reserved = {"le"} if self.source_labels else {"le", "quantile"}
        if bad := [label for label in self.labels if not _LABEL.match(label) or label in reserved]:
            raise CatalogError(f"{self.name}: bad label name {bad[0]!r}")
        if len(set(self.labels)) != len(self.labels):
            raise CatalogError(f"{self.name}: a label is named twice")
        if self.source_labels and self.kind is not Kind.GAUGE:
            raise CatalogError(f"{self.name}: only gauges carry the labels of their source")
        if not self.optional <= set(self.labels):
            raise CatalogError(f"{self.name}: optional labels must be among the labels")
        if not self.help.endswith("."):
            raise CatalogError(f"{self.name}: help texts are sentences")
        if (self.kind is Kind.HISTOGRAM) != bool(self.buckets) or list(self.buckets) != sorted(
            set(self.buckets)
        ):
            raise CatalogError(f"{self.name}: histograms, and only they, have ascending buckets")
        if not all(map(math.isfinite, self.buckets)):
            raise CatalogError(f"{self.name}: bounds of buckets are finite, +Inf is added")

    @property
    def base_name(self) -> str:
        """Name without the suffix that the type adds (OpenMetrics' MetricFamily name)."""
        return self.name.removesuffix("_total").removesuffix("_info")


@dataclass(frozen=True, slots=True)
class Histogram:
    """A histogram's state: observations per bucket (not cumulative, the last is +Inf) and their sum."""

    counts: Sequence[int]
    sum: float
    exemplars: Mapping[int, Exemplar] = field(default_factory=dict)
    """Exemplars by bucket index."""


_NO_SAMPLES: Mapping[tuple[str, ...], Sample] = {}


@dataclass(slots=True)
class Batch:
    """Samples of declared families, gathered by one part and handed to the store at once.

    `prefix` holds label values that stand before those given to `add`: a collector of one GPU need not repeat
    them. `previous` are the samples of the batch before: what did not change is taken from there, which is
    most of the work saved.
    """

    samples: dict[Family, dict[tuple[str, ...], Sample]] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    previous: Mapping[Family, Mapping[tuple[str, ...], Sample]] = field(default_factory=dict)

    def scoped(self, *prefix: str) -> Batch:
        """Same batch, with further label values in front of those given to `add`."""
        return Batch(self.samples, self.prefix + prefix, self.previous)

    def add(self, family: Family, value: float, *labels: str, exemplar: Exemplar | None = None) -> None:
        """Add one sample. `labels` are the values in the family's order. NaN means unknown: nothing is added.

        Raises `CatalogError` for a wrong number of labels or a sample that is there already.
        """
        if family.kind is Kind.HISTOGRAM:
            raise CatalogError(f"{family.name}: use add_histogram")
        if value != value:
            return
        key = self.prefix + labels
        old = self.previous.get(family, _NO_SAMPLES).get(key)
        if old is not None and exemplar is None and old.exemplar is None:
            into = self.samples.get(family)
            if into is None:
                into = self.samples[family] = {}
            if key not in into:
                into[key] = old if old.value == value else Sample(old.name, old.labels, value)
                return
        key, names, into = self._place(family, labels)
        into[key] = Sample(family.name, names, value, None, exemplar)

    def add_histogram(self, family: Family, histogram: Histogram, *labels: str) -> None:
        """Add one histogram; raises like `add`."""
        if family.kind is not Kind.HISTOGRAM or len(histogram.counts) != len(family.buckets) + 1:
            raise CatalogError(f"{family.name}: not a histogram of {len(histogram.counts)} buckets")
        key, names, into = self._place(family, labels)
        total = 0
        for index, count in enumerate(histogram.counts):
            total += count
            le = repr(float(family.buckets[index])) if index < len(family.buckets) else "+Inf"
            exemplar = histogram.exemplars.get(index)
            into[(*key, le)] = Sample(f"{family.name}_bucket", {**names, "le": le}, total, None, exemplar)
        into[(*key, "count")] = Sample(f"{family.name}_count", names, total)
        into[key] = Sample(f"{family.name}_sum", names, histogram.sum)

    def _place(
        self, family: Family, labels: tuple[str, ...]
    ) -> tuple[tuple[str, ...], dict[str, str], dict[tuple[str, ...], Sample]]:
        key = tuple(map(_clean, self.prefix + labels))
        if len(key) != len(family.labels):
            raise CatalogError(f"{family.name}: labels are {family.labels}, got {key}")
        into = self.samples.setdefault(family, {})
        names = {
            name: value
            for name, value in zip(family.labels, key, strict=True)
            if value or name not in family.optional
        }
        if key in into:
            raise CatalogError(f"{family.name}: second sample for {names}")
        return key, names, into


def _clean(value: str) -> str:
    """Bound a label value and replace what is not valid UTF-8 (lone surrogates of undecodable file names)."""
    if len(value) > MAX_LABEL_VALUE:
        value = value[:MAX_LABEL_VALUE]
    return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
