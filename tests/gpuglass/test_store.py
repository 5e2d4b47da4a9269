"""What is published is what a scrape gets: formats, cache, sources, many threads at once."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.samples import Exemplar

from gpuglass import store as store_module
from gpuglass.family import Batch, CatalogError, Family, Histogram, Kind, Tier
from gpuglass.store import CONTENT_TYPE_TEXT, Format, Lines, Store, line_head, negotiate

FAST = Family("gpuglass_test_power_watts", Kind.GAUGE, "Power.", ("device",), "watts", Tier.FAST)
SLOW = Family("gpuglass_test_energy_joules_total", Kind.COUNTER, "Energy.", ("device",), "joules")
OTHER = Family("gpuglass_test_up", Kind.GAUGE, "Up.")
HISTOGRAM = Family("gpuglass_test_seconds", Kind.HISTOGRAM, "Time.", (), "seconds", buckets=(0.1, 1.0))

BOTH = frozenset(Tier)
TEXT = negotiate("")
OPENMETRICS = negotiate("application/openmetrics-text;version=1.0.0")

PROMETHEUS_2_42 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
    "application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,"
    "text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
)
PROMETHEUS_3_TEXT_FIRST = (
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;version=0.0.4;q=0.4,*/*;q=0.1"
)
PROMETHEUS_2_PROTOBUF = (
    "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited,"
    "application/openmetrics-text;version=1.0.0;q=0.8,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)


@pytest.fixture
def store() -> Store:
    return Store((FAST, SLOW, OTHER, HISTOGRAM))


def batch(*values: tuple[Family, float, str]) -> Batch:
    made = Batch()
    for family, value, device in values:
        made.add(family, value, *([device] if family.labels else []))
    return made


def text(store: Store, tiers: frozenset[Tier] = BOTH, fmt: Format = TEXT) -> str:
    return store.exposition(tiers, fmt).decode()


# Publishing


def test_a_scrape_gets_what_was_published_sorted_by_name(store: Store) -> None:
    store.publish("gpu", batch((OTHER, 1, ""), (FAST, 70.5, "nvidia0")))
    assert text(store) == (
        "# HELP gpuglass_test_power_watts Power.\n# TYPE gpuglass_test_power_watts gauge\n"
        'gpuglass_test_power_watts{device="nvidia0"} 70.5\n'
        "# HELP gpuglass_test_up Up.\n# TYPE gpuglass_test_up gauge\ngpuglass_test_up 1.0\n"
    )


def test_an_empty_store_is_an_empty_exposition_in_each_format(store: Store) -> None:
    assert text(store) == ""
    assert text(store, fmt=OPENMETRICS) == "# EOF\n"


def test_a_later_batch_replaces_the_whole_of_the_earlier_one(store: Store) -> None:
    store.publish("gpu", batch((FAST, 70, "nvidia0"), (FAST, 71, "nvidia1"), (SLOW, 5, "nvidia0")))
    store.publish("gpu", batch((FAST, 80, "nvidia1")))
    assert [line for line in text(store).splitlines() if not line.startswith("#")] == [
        'gpuglass_test_power_watts{device="nvidia1"} 80.0'
    ]


def test_sources_replace_only_their_own(store: Store) -> None:
    store.publish("a", batch((FAST, 70, "nvidia0")))
    store.publish("b", batch((SLOW, 5, "nvidia0")))
    store.publish("a", batch((FAST, 80, "nvidia0")))
    assert "gpuglass_test_energy_joules_total" in text(store)
    store.withdraw("b")
    assert "gpuglass_test_energy_joules_total" not in text(store)
    assert 'gpuglass_test_power_watts{device="nvidia0"} 80.0' in text(store)


def test_withdrawing_what_was_never_published_is_nothing_and_publishing_again_works(store: Store) -> None:
    store.withdraw("a")
    store.publish("a", batch((OTHER, 1, "")))
    store.withdraw("a")
    assert text(store) == ""
    store.publish("a", batch((OTHER, 2, "")))
    assert "gpuglass_test_up 2.0" in text(store)


def test_a_family_belongs_to_one_source_even_after_it_withdrew(store: Store) -> None:
    store.publish("a", batch((OTHER, 1, "")))
    store.publish("b", batch((FAST, 70, "nvidia0")))
    store.withdraw("a")
    with pytest.raises(CatalogError, match="gpuglass_test_up is published by a, not by b"):
        store.publish("b", batch((OTHER, 2, "")))
    assert "gpuglass_test_up" not in text(store)
    assert "gpuglass_test_power_watts" in text(store)  # the refused batch changed nothing


def test_a_refused_batch_claims_no_family(store: Store) -> None:
    store.publish("a", batch((OTHER, 1, "")))
    with pytest.raises(CatalogError):
        store.publish("b", batch((FAST, 70, "nvidia0"), (OTHER, 2, "")))
    store.publish("c", batch((FAST, 80, "nvidia0")))
    assert "80.0" in text(store)


def test_a_family_that_this_process_does_not_own_is_refused() -> None:
    store = Store((OTHER,))
    with pytest.raises(CatalogError, match="gpuglass_test_power_watts is not declared for this process"):
        store.publish("gpu", batch((FAST, 70, "nvidia0")))
    with pytest.raises(CatalogError, match="is not declared"):  # the same name declared elsewhere is another
        store.publish("gpu", batch((Family("gpuglass_test_up", Kind.GAUGE, "Up."), 1, "")))
    store.publish("gpu", batch((OTHER, 1, "")))


def test_a_family_whose_only_sample_is_unknown_is_absent(store: Store) -> None:
    store.publish("gpu", batch((OTHER, float("nan"), "")))
    assert text(store) == ""


def test_tiers_are_served_apart_and_together(store: Store) -> None:
    store.publish("gpu", batch((FAST, 70, "nvidia0"), (SLOW, 5, "nvidia0")))
    fast, slow = text(store, frozenset({Tier.FAST})), text(store, frozenset({Tier.SLOW}))
    assert "watts" in fast and "joules" not in fast
    assert "joules" in slow and "watts" not in slow
    assert sorted((fast + slow).splitlines()) == sorted(text(store).splitlines())


def test_series_are_counted_by_tier_without_live_ones(store: Store) -> None:
    assert dict(store.series()) == {Tier.FAST: 0, Tier.SLOW: 0}
    store.add_live("live", lambda live: live.add(OTHER, 1), *Tier)
    store.publish("gpu", batch((FAST, 70, "nvidia0"), (FAST, 70, "nvidia1"), (SLOW, 5, "nvidia0")))
    assert dict(store.series()) == {Tier.FAST: 2, Tier.SLOW: 1}


# Live samples


def test_live_samples_are_made_at_each_scrape_and_published_ones_are_not(store: Store) -> None:
    scrapes = iter(range(1, 100))
    store.add_live("age", lambda live: live.add(OTHER, next(scrapes)), *Tier)
    store.publish("gpu", batch((FAST, 70, "nvidia0")))
    assert "gpuglass_test_up 1.0" in text(store)
    assert "gpuglass_test_up 2.0" in text(store)
    assert 'watts{device="nvidia0"} 70.0' in text(store)


def test_live_samples_keep_to_their_tier(store: Store) -> None:
    store.add_live("live", lambda live: live.add(FAST, 70, "nvidia0"), *Tier)
    assert "watts" in text(store, frozenset({Tier.FAST}))
    assert text(store, frozenset({Tier.SLOW})) == ""


def test_live_samples_are_made_only_for_scrapes_of_their_tiers(store: Store) -> None:
    made: list[int] = []

    def fill(live: Batch) -> None:
        made.append(1)
        live.add(SLOW, len(made), "nvidia0")

    store.add_live("live", fill, Tier.SLOW)
    text(store, frozenset({Tier.FAST}))
    assert made == []
    assert "joules" in text(store, frozenset({Tier.SLOW}))
    assert "joules" in text(store)
    assert len(made) == 2


# Cache


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the families that were rendered, in order."""
    names: list[str] = []
    original = store_module._Rendered.render

    def counted(self: store_module._Rendered, fmt: Format) -> bytes:
        if fmt.content_type not in self.bytes_by_format:
            names.append(self.family.name)
        return original(self, fmt)

    monkeypatch.setattr(store_module._Rendered, "render", counted)
    return names


def test_unchanged_families_are_rendered_once_and_changed_ones_again(
    store: Store, encoded: list[str]
) -> None:
    store.publish("gpu", batch((FAST, 70, "nvidia0"), (OTHER, 1, "")))
    first = text(store)
    assert encoded == [FAST.name, OTHER.name]
    store.publish("gpu", batch((FAST, 70, "nvidia0"), (OTHER, 1, "")))
    assert text(store) == first
    assert encoded == [FAST.name, OTHER.name]
    store.publish("gpu", batch((FAST, 71, "nvidia0"), (OTHER, 1, "")))
    assert "71.0" in text(store)
    assert encoded == [FAST.name, OTHER.name, FAST.name]


def test_each_format_is_rendered_for_itself(store: Store, encoded: list[str]) -> None:
    store.publish("gpu", batch((OTHER, 1, "")))
    for _ in range(3):
        assert "# EOF" not in text(store)
        assert text(store, fmt=OPENMETRICS).endswith("# EOF\n")
    assert encoded == [OTHER.name, OTHER.name]


@pytest.mark.parametrize(
    "change",
    [
        ((FAST, 70, "nvidia1"),),
        ((FAST, 70, "nvidia0"), (FAST, 70, "nvidia1")),
        ((FAST, 70.000001, "nvidia0"),),
    ],
)
def test_another_label_another_series_or_another_value_is_a_change(
    store: Store, change: tuple[tuple[Family, float, str], ...]
) -> None:
    store.publish("gpu", batch((FAST, 70, "nvidia0")))
    before = text(store)
    store.publish("gpu", batch(*change))
    assert text(store) != before


def test_another_exemplar_is_a_change(store: Store) -> None:
    def publish(trace: str) -> str:
        made = Batch()
        made.add(SLOW, 5, "nvidia0", exemplar=Exemplar({"trace_id": trace}, 1.0))
        store.publish("gpu", made)
        return text(store, fmt=OPENMETRICS)

    assert publish("a") != publish("b")


# Formats


def histogram(trace: str = "abc") -> Batch:
    made = Batch()
    exemplar = Exemplar({"trace_id": trace}, 0.5, 1700000000.0)
    made.add_histogram(HISTOGRAM, Histogram([1, 2, 0], 1.1, {1: exemplar}))
    return made


def test_openmetrics_carries_exemplars_and_the_unit(store: Store) -> None:
    store.publish("traces", histogram())
    (family,) = parse_openmetrics(text(store, fmt=OPENMETRICS))
    assert (family.type, family.unit) == ("histogram", "seconds")
    exemplars = {s.labels["le"]: s.exemplar for s in family.samples if s.name.endswith("_bucket")}
    assert exemplars["0.1"] is None
    assert exemplars["1.0"] is not None
    assert (exemplars["1.0"].labels, exemplars["1.0"].value) == ({"trace_id": "abc"}, 0.5)


def test_the_text_format_has_the_same_numbers_without_exemplars(store: Store) -> None:
    store.publish("traces", histogram())
    assert "trace_id" not in text(store)
    numbers = [
        [(s.name, s.labels, s.value) for family in parse(body) for s in family.samples]
        for parse, body in ((parse_text, text(store)), (parse_openmetrics, text(store, fmt=OPENMETRICS)))
    ]
    assert numbers[0] == numbers[1] != []


@pytest.mark.parametrize("fmt", [TEXT, OPENMETRICS])
def test_there_is_no_created_series(store: Store, fmt: Format) -> None:
    store.publish("traces", histogram())
    store.publish("gpu", batch((SLOW, 5, "nvidia0")))
    body = text(store, fmt=fmt)
    assert "gpuglass_test_energy_joules_total{" in body
    assert "_created" not in body


def test_openmetrics_ends_once(store: Store) -> None:
    store.publish("gpu", batch((FAST, 70, "nvidia0"), (OTHER, 1, "")))
    store.add_live("live", lambda live: live.add(SLOW, 1, "nvidia0"), *Tier)
    assert text(store, fmt=OPENMETRICS).count("# EOF\n") == 1


# Negotiation


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        (PROMETHEUS_2_42, "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=underscores"),
        (PROMETHEUS_3, "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=allow-utf-8"),
        (PROMETHEUS_2_PROTOBUF, negotiate(PROMETHEUS_2_42).content_type),
        (PROMETHEUS_3_TEXT_FIRST, "text/plain; version=1.0.0; charset=utf-8; escaping=allow-utf-8"),
        ("text/plain;version=0.0.4", CONTENT_TYPE_TEXT),
        ("text/html,application/xhtml+xml,*/*;q=0.8", CONTENT_TYPE_TEXT),
        ("*/*", CONTENT_TYPE_TEXT),
        ("", CONTENT_TYPE_TEXT),
        ("application/openmetrics-text;version=0.0.1", CONTENT_TYPE_TEXT),
        ("application/openmetrics-text;version=99.0.0", CONTENT_TYPE_TEXT),
        ("application/openmetrics-text;version=1.0.0\u0000", CONTENT_TYPE_TEXT),
        ("application/openmetrics-text;version=one", CONTENT_TYPE_TEXT),
        ("application/vnd.google.protobuf", CONTENT_TYPE_TEXT),
    ],
)  # fmt: skip
def test_the_format_follows_the_accept_header(accept: str, content_type: str) -> None:
    assert negotiate(accept).content_type == content_type


@pytest.mark.parametrize("accept", [PROMETHEUS_2_42, PROMETHEUS_3, PROMETHEUS_3_TEXT_FIRST, ""])
def test_the_body_is_what_the_content_type_says(store: Store, accept: str) -> None:
    store.publish("traces", histogram())
    fmt = negotiate(accept)
    body = text(store, fmt=fmt)
    assert fmt.openmetrics == fmt.content_type.startswith("application/openmetrics-text")
    assert body.endswith("# EOF\n") == fmt.openmetrics
    parse: Callable[[str], object] = parse_openmetrics if fmt.openmetrics else parse_text
    assert list(parse(body))  # type: ignore[call-overload]


@pytest.mark.parametrize("kind", ["application/openmetrics-text", "text/plain"])
@pytest.mark.parametrize("scheme", ["allow-utf-8", "underscores", "values"])
def test_no_escaping_scheme_that_keeps_plain_names_changes_ours(store: Store, kind: str, scheme: str) -> None:
    store.publish("gpu", batch((FAST, 70, "nvidia0")))
    body = text(store, fmt=negotiate(f"{kind};version=1.0.0;escaping={scheme}"))
    assert 'gpuglass_test_power_watts{device="nvidia0"} 70.0\n' in body


_WORDS = st.sampled_from(
    [
        *("application/openmetrics-text", "text/plain", "*/*", ";", ",", "=", " ", "\t", "q=0.5"),
        *("version", "1.0.0", "0.0.4", "2.0.0", "1", "1.0", "10.0.0"),
        *("escaping", "allow-utf-8", "dots", "values", "underscores"),
    ]
)
_KNOWN = {
    CONTENT_TYPE_TEXT,
    "application/openmetrics-text; version=1.0.0; charset=utf-8",
    *(
        f"{kind}; charset=utf-8; escaping={scheme}"
        for kind in (
            "text/plain; version=1.0.0",
            "application/openmetrics-text; version=1.0.0",
            "application/openmetrics-text; version=2.0.0",
        )
        for scheme in ("allow-utf-8", "underscores", "dots", "values")
    ),
}


@given(st.one_of(st.lists(_WORDS, max_size=30).map("".join), st.text(st.characters(), max_size=2000)))
@example("application/openmetrics-text;version=" + "9" * 5000)
@example("text/plain;version=1..0")
@example(",;=" * 1000)
def test_no_header_breaks_the_negotiation_or_makes_a_format_of_its_own(accept: str) -> None:
    store = Store((OTHER,))
    store.publish("gpu", batch((OTHER, 1, "")))
    fmt = negotiate(accept)
    assert fmt.content_type in _KNOWN
    assert store.exposition(BOTH, fmt)


# Threads


def test_scrapes_during_publication_see_one_batch_or_the_other_and_never_a_mixture(store: Store) -> None:
    stop = threading.Event()
    errors: list[str] = []

    def publish(source: str, family: Family, labels: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            store.publish(source, batch(*((family, number, f"nvidia{i}") for i in range(labels))))

    def scrape(fmt: Format) -> None:
        last = {FAST.name: 0.0, SLOW.name: 0.0}
        try:
            while not stop.is_set():
                parse = parse_openmetrics if fmt.openmetrics else parse_text
                for family in parse(text(store, fmt=fmt)):
                    values = {s.value for s in family.samples}
                    name = family.samples[0].name
                    if len(values) != 1 or len(family.samples) != 8 or min(values) < last[name]:
                        errors.append(f"{name}: {family.samples}, last {last[name]}")
                        return
                    last[name] = min(values)
            if not all(last.values()):
                errors.append(f"nothing was seen: {last}")
        except Exception as error:
            errors.append(repr(error))

    threads = [
        threading.Thread(target=publish, args=("a", FAST, 8)),
        threading.Thread(target=publish, args=("b", SLOW, 8)),
        *(threading.Thread(target=scrape, args=(fmt,)) for fmt in (TEXT, OPENMETRICS, TEXT)),
    ]
    for thread in threads:
        thread.start()
    stop.wait(0.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []


# Families with the labels of their source

SOURCE = Family("gpuglass_test_score", Kind.GAUGE, "Score.", ("query",), source_labels=True)
LABELS = {"query": "q", "pod": 'a "quoted"\\path\nü', "empty": ""}


@pytest.mark.parametrize("fmt", [TEXT, OPENMETRICS])
def test_lines_come_back_whole_from_the_parsers(fmt: Format) -> None:
    store = Store((SOURCE, OTHER))
    heads = [line_head(SOURCE, LABELS), line_head(SOURCE, {})]
    store.publish("scores", batch((OTHER, 1, "")), {SOURCE: Lines(heads, [0.25, 1e-9])})
    parse = parse_openmetrics if fmt.openmetrics else parse_text
    score, up = parse(text(store, fmt=fmt))
    found = [(sample.name, sample.labels, sample.value) for sample in score.samples]
    without_empty = {name: value for name, value in LABELS.items() if value}
    assert found == [(SOURCE.name, without_empty, 0.25), (SOURCE.name, {}, 1e-9)]
    assert up.name == OTHER.name
    assert store.series() == {Tier.FAST: 0, Tier.SLOW: 3}


def test_lines_are_replaced_by_the_next_publication_and_go_with_their_source() -> None:
    store = Store((SOURCE,))
    for value in (1.0, 2.0):
        store.publish("scores", Batch(), {SOURCE: Lines([line_head(SOURCE, {})], [value])})
        assert f"{SOURCE.name} {value}\n" in text(store)
    store.publish("scores", Batch(), {SOURCE: Lines([], [])})
    assert text(store) == ""


def test_lines_of_another_source_or_of_a_family_without_source_labels_are_refused() -> None:
    store = Store((SOURCE, OTHER))
    store.publish("scores", Batch(), {SOURCE: Lines([], [])})
    with pytest.raises(CatalogError, match="is published by scores"):
        store.publish("others", Batch(), {SOURCE: Lines([], [])})
    with pytest.raises(CatalogError, match="not declared for lines"):
        store.publish("scores", Batch(), {OTHER: Lines([], [])})
