"""The latest samples of every family, and their rendering for a scrape.

Parts publish batches from their own threads; a scrape reads what lies there and never calls back into a
driver. Each family is rendered by `prometheus_client` once per format and kept until its samples change, so
that a scrape mostly joins bytes that exist already.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from prometheus_client.exposition import choose_encoder, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import ALLOWUTF8
from prometheus_client.samples import Sample

from gpuglass.family import Batch, CatalogError, Family, Tier

Live = Callable[[Batch], None]
"""Adds samples computed at the moment of the scrape, from memory only (ages, counters of the server
itself)."""

CONTENT_TYPE_TEXT = "text/plain; version=0.0.4; charset=utf-8"
_OPENMETRICS_END = b"# EOF\n"


@dataclass(frozen=True, slots=True)
class Format:
    """An exposition format that was negotiated: the content type and `prometheus_client`'s encoder for it."""

    content_type: str
    encode: Callable[[_One], bytes]

    @property
    def openmetrics(self) -> bool:
        """True for formats that carry exemplars and end with an EOF line."""
        return self.content_type.startswith("application/openmetrics-text")


@dataclass(frozen=True, slots=True)
class _One:
    """The least that an encoder of `prometheus_client` asks of a registry."""

    metric: Metric

    def collect(self) -> Iterable[Metric]:
        return (self.metric,)


_TEXT = Format(CONTENT_TYPE_TEXT, generate_latest)
_KNOWN_VERSIONS = ("1.0.0", "2.0.0")


def negotiate(accept: str) -> Format:
    """Choose the format for an `Accept` header as Prometheus 2.x and 3.x send it.

    A header that `prometheus_client` cannot read, or a version that it merely echoes, gives the classic text
    format, which every scraper reads: the number of formats (and so of cached renderings) stays small.
    """
    try:
        encode, content_type = choose_encoder(accept[:1024])
    except (TypeError, ValueError):
        return _TEXT
    version = next((p.strip()[8:] for p in content_type.split(";") if p.strip().startswith("version=")), "")
    if version not in _KNOWN_VERSIONS:
        return _TEXT
    if not content_type.endswith("escaping=dots"):
        # All our names are legacy names, which every other scheme leaves as they are. `prometheus_client`
        # 0.26 rewrites them under "values" all the same, and looks at each character of them under
        # "underscores".
        unescaped: Callable[..., bytes] = encode
        encode = partial(unescaped, escaping=ALLOWUTF8)
    return Format(content_type, encode)


def line_head(family: Family, labels: Mapping[str, str]) -> str:
    """A sample's line up to its value, the same in all formats: names are legacy names, values are escaped.

    Labels are sorted by name as `prometheus_client` does; empty ones are left out.
    """
    pairs = [f'{name}="{_escaped(value)}"' for name, value in sorted(labels.items()) if value]
    return f"{family.name}{{{','.join(pairs)}}} " if pairs else f"{family.name} "


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


@dataclass(frozen=True, slots=True)
class Lines:
    """Samples of one family with source labels: beginnings of lines (`line_head`) and their values.

    Tens of thousands of series change their value in each cycle and keep their labels, so the labels are
    rendered once by who publishes them. Values are finite.
    """

    heads: Sequence[str]
    values: Sequence[float]

    def render(self) -> bytes:
        """The lines."""
        lines = [f"{head}{value!r}\n" for head, value in zip(self.heads, self.values, strict=True)]
        return "".join(lines).encode("utf-8", "replace")


@dataclass(slots=True, eq=False)
class _Rendered:
    """Samples of one family and their renderings by content type."""

    family: Family
    samples: dict[tuple[str, ...], Sample]
    lines: Lines | None = None
    bytes_by_format: dict[str, bytes] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples) + (len(self.lines.heads) if self.lines else 0)

    def render(self, fmt: Format) -> bytes:
        found = self.bytes_by_format.get(fmt.content_type)
        if found is None:
            family = self.family
            metric = Metric(family.base_name, family.help, family.kind.value, family.unit)
            metric.samples = list(self.samples.values())
            found = fmt.encode(_One(metric)).removesuffix(_OPENMETRICS_END)
            if self.lines is not None:
                found += self.lines.render()
            self.bytes_by_format[fmt.content_type] = found
        return found


_NO_LINES: Mapping[Family, Lines] = {}


class Store:
    """Holds what each part published last. Safe for any number of publishers and scrapes at once.

    `families` are the declared ones that this process owns: publishing any other raises `CatalogError`.
    """

    def __init__(self, families: Iterable[Family]) -> None:
        self._declared = frozenset(families)
        self._lock = threading.Lock()
        self._sources: dict[str, dict[Family, _Rendered]] = {}
        self._owner_of: dict[Family, str] = {}
        self._live: dict[str, tuple[Live, frozenset[Tier]]] = {}

    def publish(self, source: str, batch: Batch, lines: Mapping[Family, Lines] = _NO_LINES) -> None:
        """Replace everything that `source` published before. A family belongs to one source for good.

        `lines` are of families with source labels that are not in `batch`.
        """
        before = self._sources.get(source, {})
        now: dict[Family, _Rendered] = {}
        for family, samples in batch.samples.items():
            if family not in self._declared:
                raise CatalogError(f"{family.name} is not declared for this process")
            if samples:
                old = before.get(family)
                now[family] = (
                    old if old is not None and old.samples == samples else _Rendered(family, samples)
                )
        for family, of_family in lines.items():
            if family not in self._declared or not family.source_labels or family in now:
                raise CatalogError(f"{family.name} is not declared for lines of this process")
            if of_family.heads:
                now[family] = _Rendered(family, {}, of_family)
        with self._lock:
            for family in (*batch.samples, *lines):
                owner = self._owner_of.get(family, source)
                if owner != source:
                    raise CatalogError(f"{family.name} is published by {owner}, not by {source}")
            self._owner_of.update(dict.fromkeys((*batch.samples, *lines), source))
            self._sources[source] = now

    def withdraw(self, source: str) -> None:
        """Drop everything that `source` published: its series go stale at the next scrape."""
        with self._lock:
            self._sources.pop(source, None)

    def add_live(self, source: str, live: Live, *tiers: Tier) -> None:
        """Let `live` add samples of `tiers` at each scrape. It must only read memory and be quick."""
        if not tiers:
            raise CatalogError(f"{source}: live samples of no tier would never be scraped")
        with self._lock:
            self._live[source] = (live, frozenset(tiers))

    def exposition(self, tiers: frozenset[Tier], fmt: Format) -> bytes:
        """Render all families of `tiers`, sorted by name."""
        with self._lock:
            published = list(self._sources.values())
            live = [fill for fill, of_tiers in self._live.values() if of_tiers & tiers]
        rendered = [entry for source in published for entry in source.values() if entry.family.tier in tiers]
        for fill in live:
            batch = Batch()
            fill(batch)
            rendered += [
                _Rendered(family, samples)
                for family, samples in batch.samples.items()
                if samples and family.tier in tiers and family in self._declared
            ]
        rendered.sort(key=lambda entry: entry.family.name)
        body = b"".join(entry.render(fmt) for entry in rendered)
        return body + _OPENMETRICS_END if fmt.openmetrics else body

    def series(self) -> Mapping[Tier, int]:
        """Number of published samples by tier, without those of live sources."""
        with self._lock:
            published = list(self._sources.values())
        counts = dict.fromkeys(Tier, 0)
        for source in published:
            for entry in source.values():
                counts[entry.family.tier] += len(entry)
        return counts
