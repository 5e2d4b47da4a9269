"""What a family's declaration must say, and what a batch takes and refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.samples import Exemplar, Sample

from gpuglass.family import MAX_LABEL_VALUE, Batch, CatalogError, Family, Histogram, Kind

GAUGE = Family("gpuglass_test_power_watts", Kind.GAUGE, "Power.", ("device", "pod"), "watts")
OPTIONAL = Family("gpuglass_test_up", Kind.GAUGE, "Up.", ("device", "pod"), optional=frozenset({"pod"}))
COUNTER = Family("gpuglass_test_bytes_total", Kind.COUNTER, "Bytes.", (), "bytes")
HISTOGRAM = Family(
    "gpuglass_test_seconds", Kind.HISTOGRAM, "Time.", ("device",), "seconds", buckets=(0.1, 1.0, 10.0)
)


def only(batch: Batch, family: Family) -> Sample:
    (sample,) = batch.samples[family].values()
    return sample


# Declarations


def declared(name: str = "gpuglass_test_watts", kind: Kind = Kind.GAUGE, **more: Any) -> Family:
    return Family(name, kind, more.pop("help", "A sentence."), **more)


@pytest.mark.parametrize(
    ("name", "kind", "more"),
    [
        ("gpuglass_test", Kind.GAUGE, {}),
        ("gpuglass_test_watts", Kind.GAUGE, {"unit": "watts"}),
        ("gpuglass_test_bytes_total", Kind.COUNTER, {"unit": "bytes"}),
        ("gpuglass_test_total", Kind.COUNTER, {}),
        ("gpuglass_test_info", Kind.INFO, {"labels": ("model",)}),
        ("gpuglass_test_seconds", Kind.HISTOGRAM, {"unit": "seconds", "buckets": (0.1, 1.0)}),
        ("gpuglass_test", Kind.GAUGE, {"labels": ("a", "b1_c"), "optional": frozenset({"a"})}),
        ("gpuglass_test", Kind.GAUGE, {"labels": ("quantile",), "source_labels": True}),
    ],
)
def test_a_right_declaration_is_taken(name: str, kind: Kind, more: dict[str, Any]) -> None:
    assert declared(name, kind, **more).name == name


@pytest.mark.parametrize(
    ("name", "kind", "more", "reason"),
    [
        ("test_watts", Kind.GAUGE, {}, "a family's name is gpuglass_"),
        ("gpuglass_", Kind.GAUGE, {}, "a family's name is gpuglass_"),
        ("gpuglass_Test", Kind.GAUGE, {}, "a family's name is gpuglass_"),
        ("gpuglass_test:rate", Kind.GAUGE, {}, "a family's name is gpuglass_"),
        ("gpuglass_test\n", Kind.GAUGE, {}, "a family's name is gpuglass_"),
        ("gpuglass_test_mib", Kind.GAUGE, {"unit": "mib"}, "unknown unit 'mib'"),
        ("gpuglass_test", Kind.GAUGE, {"unit": "watts"}, "not the end of the name"),
        ("gpuglass_testwatts", Kind.GAUGE, {"unit": "watts"}, "not the end of the name"),
        ("gpuglass_bytes_test_total", Kind.COUNTER, {"unit": "bytes"}, "not the end of the name"),
        ("gpuglass_test_bytes", Kind.COUNTER, {"unit": "bytes"}, "end in _total"),
        ("gpuglass_test_total", Kind.GAUGE, {}, "end in _total"),
        ("gpuglass_test", Kind.INFO, {}, "end in _info"),
        ("gpuglass_test_info", Kind.GAUGE, {}, "end in _info"),
        ("gpuglass_test_count", Kind.GAUGE, {}, "belongs to the samples of histograms"),
        ("gpuglass_test_sum", Kind.GAUGE, {}, "belongs to the samples of histograms"),
        ("gpuglass_test_bucket", Kind.GAUGE, {}, "belongs to the samples of histograms"),
        ("gpuglass_test_created", Kind.GAUGE, {}, "belongs to the samples of histograms"),
        ("gpuglass_test", Kind.GAUGE, {"labels": ("Device",)}, "bad label name 'Device'"),
        ("gpuglass_test", Kind.GAUGE, {"labels": ("__name__",)}, "bad label name '__name__'"),
        ("gpuglass_test", Kind.GAUGE, {"labels": ("le",)}, "bad label name 'le'"),
        ("gpuglass_test", Kind.GAUGE, {"labels": ("quantile",)}, "bad label name 'quantile'"),
        ("gpuglass_test", Kind.GAUGE, {"labels": ("a-b",)}, "bad label name 'a-b'"),
        ("gpuglass_test_total", Kind.COUNTER, {"source_labels": True}, "only gauges"),
        ("gpuglass_test", Kind.GAUGE, {"labels": ("a", "b", "a")}, "a label is named twice"),
        ("gpuglass_test", Kind.GAUGE, {"labels": ("a",), "optional": frozenset({"b"})}, "optional labels"),
        ("gpuglass_test", Kind.GAUGE, {"help": "Power in watts"}, "help texts are sentences"),
        ("gpuglass_test", Kind.GAUGE, {"help": ""}, "help texts are sentences"),
        ("gpuglass_test", Kind.HISTOGRAM, {}, "have ascending buckets"),
        ("gpuglass_test", Kind.GAUGE, {"buckets": (1.0,)}, "have ascending buckets"),
        ("gpuglass_test", Kind.HISTOGRAM, {"buckets": (1.0, 0.1)}, "have ascending buckets"),
        ("gpuglass_test", Kind.HISTOGRAM, {"buckets": (1.0, 1.0)}, "have ascending buckets"),
        ("gpuglass_test", Kind.HISTOGRAM, {"buckets": (1.0, math.inf)}, "finite"),
        ("gpuglass_test", Kind.HISTOGRAM, {"buckets": (math.nan,)}, "finite"),
    ],
)
def test_a_wrong_declaration_is_refused_with_its_name(
    name: str, kind: Kind, more: dict[str, Any], reason: str
) -> None:
    with pytest.raises(CatalogError) as refused:
        declared(name, kind, **more)
    assert str(refused.value).startswith(f"{name}: ")
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("name", "kind", "base"),
    [
        ("gpuglass_a_bytes_total", Kind.COUNTER, "gpuglass_a_bytes"),
        ("gpuglass_a_info", Kind.INFO, "gpuglass_a"),
        ("gpuglass_a_watts", Kind.GAUGE, "gpuglass_a_watts"),
    ],
)
def test_the_base_name_lacks_what_the_type_adds(name: str, kind: Kind, base: str) -> None:
    assert declared(name, kind).base_name == base


# Samples


def test_label_values_take_the_names_in_the_familys_order() -> None:
    batch = Batch()
    batch.add(GAUGE, 70, "nvidia0", "llama")
    assert only(batch, GAUGE) == Sample(GAUGE.name, {"device": "nvidia0", "pod": "llama"}, 70)


@pytest.mark.parametrize("labels", [(), ("nvidia0",), ("nvidia0", "llama", "more")])
def test_a_wrong_number_of_labels_is_refused(labels: tuple[str, ...]) -> None:
    batch = Batch()
    with pytest.raises(CatalogError, match=r"gpuglass_test_power_watts: labels are"):
        batch.add(GAUGE, 70, *labels)
    with pytest.raises(CatalogError, match=r"labels are"):
        Batch(prefix=("nvidia0", "llama")).add(GAUGE, 70, "more")
    assert not any(batch.samples.values())


def test_a_second_sample_of_the_same_labels_is_refused_and_of_others_is_not() -> None:
    batch = Batch()
    batch.add(GAUGE, 70, "nvidia0", "llama")
    batch.add(GAUGE, 70, "nvidia1", "llama")
    with pytest.raises(CatalogError, match="second sample"):
        batch.add(GAUGE, 71, "nvidia0", "llama")
    assert [sample.value for sample in batch.samples[GAUGE].values()] == [70, 70]


def test_nan_is_no_sample_and_zero_and_infinity_are() -> None:
    batch = Batch()
    batch.add(GAUGE, math.nan, "nvidia0", "a")
    assert not batch.samples
    batch.add(GAUGE, 0, "nvidia0", "a")
    batch.add(GAUGE, math.inf, "nvidia0", "b")
    assert [sample.value for sample in batch.samples[GAUGE].values()] == [0, math.inf]


def test_an_empty_optional_label_is_left_out_and_an_empty_one_that_is_not_stays() -> None:
    batch = Batch()
    batch.add(OPTIONAL, 1, "nvidia0", "")
    batch.add(OPTIONAL, 1, "nvidia1", "llama")
    batch.add(GAUGE, 1, "nvidia0", "")
    assert [sample.labels for sample in batch.samples[OPTIONAL].values()] == [
        {"device": "nvidia0"},
        {"device": "nvidia1", "pod": "llama"},
    ]
    assert only(batch, GAUGE).labels == {"device": "nvidia0", "pod": ""}


def test_a_scope_puts_its_labels_in_front_and_fills_the_same_batch() -> None:
    batch = Batch()
    batch.scoped("nvidia0").scoped("llama").add(GAUGE, 70)
    batch.scoped("nvidia1").add(GAUGE, 71, "llama")
    assert [sample.labels["device"] for sample in batch.samples[GAUGE].values()] == ["nvidia0", "nvidia1"]
    with pytest.raises(CatalogError, match="second sample"):
        batch.add(GAUGE, 72, "nvidia0", "llama")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("x" * MAX_LABEL_VALUE, "x" * MAX_LABEL_VALUE),
        ("x" * (MAX_LABEL_VALUE + 1), "x" * MAX_LABEL_VALUE),
        ("ü" * 1000, "ü" * MAX_LABEL_VALUE),
        ("pod-\udcff", "pod-?"),
        ("\ud83d\ude00", "??"),
        ("😀", "😀"),
        ('a"b\\c\nd', 'a"b\\c\nd'),
    ],
)
def test_label_values_are_bounded_and_valid_utf8(given: str, kept: str) -> None:
    batch = Batch()
    batch.add(GAUGE, 1, "nvidia0", given)
    assert only(batch, GAUGE).labels["pod"] == kept


@given(st.text(st.characters(), max_size=2 * MAX_LABEL_VALUE))
def test_no_text_makes_a_label_value_too_long_or_undecodable(text: str) -> None:
    batch = Batch()
    batch.add(GAUGE, 1, "nvidia0", text)
    value = only(batch, GAUGE).labels["pod"]
    assert len(value) <= MAX_LABEL_VALUE
    assert value.encode().decode() == value


def test_an_exemplar_stays_with_its_sample() -> None:
    batch = Batch()
    exemplar = Exemplar({"trace_id": "abc"}, 5.0)
    batch.add(COUNTER, 5, exemplar=exemplar)
    assert only(batch, COUNTER).exemplar == exemplar


# Reuse


def test_an_unchanged_sample_is_taken_from_the_batch_before_and_a_changed_one_is_not() -> None:
    before = Batch()
    before.add(GAUGE, 70, "nvidia0", "a")
    before.add(GAUGE, 70, "nvidia0", "b")
    after = Batch(previous=before.samples)
    after.scoped("nvidia0").add(GAUGE, 70, "a")
    after.scoped("nvidia0").add(GAUGE, 71, "b")
    assert after.samples[GAUGE]["nvidia0", "a"] is before.samples[GAUGE]["nvidia0", "a"]
    assert after.samples[GAUGE]["nvidia0", "b"].value == 71
    assert before.samples[GAUGE]["nvidia0", "b"].value == 70


def test_with_a_batch_before_the_same_things_are_refused() -> None:
    before = Batch()
    before.add(GAUGE, 70, "nvidia0", "a")
    before.add_histogram(HISTOGRAM, Histogram([1, 0, 0, 0], 0.05), "nvidia0")
    after = Batch(previous=before.samples)
    after.add(GAUGE, 70, "nvidia0", "a")
    with pytest.raises(CatalogError, match="second sample"):
        after.add(GAUGE, 70, "nvidia0", "a")
    with pytest.raises(CatalogError, match="labels are"):
        after.add(GAUGE, 70, "nvidia0")
    with pytest.raises(CatalogError, match="use add_histogram"):
        after.add(HISTOGRAM, 1, "nvidia0")
    after.add(GAUGE, math.nan, "nvidia0", "b")
    assert list(after.samples[GAUGE]) == [("nvidia0", "a")]


def test_what_the_batch_before_had_and_this_one_has_not_is_gone() -> None:
    before = Batch()
    before.add(GAUGE, 70, "nvidia0", "a")
    assert not Batch(previous=before.samples).samples


# Histograms


def test_a_histogram_becomes_cumulative_buckets_a_count_and_a_sum() -> None:
    batch = Batch()
    batch.add_histogram(HISTOGRAM, Histogram([2, 3, 0, 1], 12.5), "nvidia0")
    samples = [(s.name, s.labels.get("le"), s.value) for s in batch.samples[HISTOGRAM].values()]
    assert samples == [
        ("gpuglass_test_seconds_bucket", "0.1", 2),
        ("gpuglass_test_seconds_bucket", "1.0", 5),
        ("gpuglass_test_seconds_bucket", "10.0", 5),
        ("gpuglass_test_seconds_bucket", "+Inf", 6),
        ("gpuglass_test_seconds_count", None, 6),
        ("gpuglass_test_seconds_sum", None, 12.5),
    ]


def test_each_exemplar_stands_at_its_bucket() -> None:
    batch = Batch()
    exemplar = Exemplar({"trace_id": "abc"}, 0.5, 1700000000.0)
    batch.add_histogram(HISTOGRAM, Histogram([1, 1, 0, 0], 0.55, {1: exemplar}), "nvidia0")
    with_exemplar = [s.labels["le"] for s in batch.samples[HISTOGRAM].values() if s.exemplar]
    assert with_exemplar == ["1.0"]


@pytest.mark.parametrize("counts", [[], [1, 2, 3], [1, 2, 3, 4, 5]])
def test_a_histogram_of_other_buckets_is_refused(counts: list[int]) -> None:
    with pytest.raises(CatalogError, match="not a histogram of"):
        Batch().add_histogram(HISTOGRAM, Histogram(counts, 1), "nvidia0")


def test_a_histogram_is_not_a_number_and_a_number_is_not_a_histogram() -> None:
    with pytest.raises(CatalogError, match="use add_histogram"):
        Batch().add(HISTOGRAM, 1, "nvidia0")
    with pytest.raises(CatalogError, match="not a histogram"):
        Batch().add_histogram(GAUGE, Histogram([1], 1), "nvidia0", "a")


def test_a_second_histogram_of_the_same_labels_is_refused() -> None:
    batch = Batch()
    batch.add_histogram(HISTOGRAM, Histogram([1, 0, 0, 0], 0.05), "nvidia0")
    with pytest.raises(CatalogError, match="second sample"):
        batch.add_histogram(HISTOGRAM, Histogram([1, 0, 0, 0], 0.05), "nvidia0")
