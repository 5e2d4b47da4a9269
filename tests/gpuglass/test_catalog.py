"""What holds for every declared family: sentences, label names, tiers, both formats, Prometheus' linter."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from gpuglass import catalog
from gpuglass.families import engine, gpu, probe
from gpuglass.family import Batch, CatalogError, Family, Histogram, Kind, Owner, Tier
from gpuglass.store import Store, negotiate
from gpuglass_vllm import records
from tests.support.prometheus import promtool_check_metrics

FAMILIES = [pytest.param(family, id=family.name) for family in catalog.BY_NAME.values()]
every_family = pytest.mark.parametrize("family", FAMILIES)
BOTH = frozenset(Tier)
VALUE = 'a "quoted"\\path\nü'


def exposition(families: list[Family], accept: str = "") -> str:
    """All families with a sample each, every label of which holds what has to be escaped."""
    store = Store(families)
    batch = Batch()
    for family in families:
        labels = [VALUE] * len(family.labels)
        if family.kind is Kind.HISTOGRAM:
            batch.add_histogram(family, Histogram([1] * (len(family.buckets) + 1), 2.5), *labels)
        else:
            batch.add(family, 1, *labels)
    store.publish("test", batch)
    return store.exposition(BOTH, negotiate(accept)).decode()


def all_families() -> list[Family]:
    return list(catalog.BY_NAME.values())


@every_family
def test_it_comes_back_whole_from_the_openmetrics_parser(family: Family) -> None:
    (parsed,) = parse_openmetrics(exposition([family], "application/openmetrics-text;version=1.0.0"))
    assert (parsed.name, parsed.type, parsed.unit) == (family.base_name, family.kind.value, family.unit)
    assert parsed.documentation == family.help
    assert {s.name for s in parsed.samples} & {family.name, f"{family.name}_bucket"}
    assert all(s.labels.items() >= dict.fromkeys(family.labels, VALUE).items() for s in parsed.samples)


@every_family
def test_it_comes_back_whole_from_the_text_parser(family: Family) -> None:
    (parsed,) = parse_text(exposition([family]))
    in_text = {Kind.INFO: "gauge"}.get(family.kind, family.kind.value)  # the text format has no info type
    assert (parsed.type, parsed.documentation) == (in_text, family.help)
    assert {s.name for s in parsed.samples} & {family.name, f"{family.name}_bucket"}
    assert all(s.labels.items() >= dict.fromkeys(family.labels, VALUE).items() for s in parsed.samples)


@every_family
def test_help_and_absence_are_sentences(family: Family) -> None:
    for text in (family.help, family.absent):
        assert re.match(r"(1 |[A-Z])", text), text
        assert text.endswith("."), text
        assert "\n" not in text
        assert "  " not in text


@every_family
def test_families_that_the_text_names_exist(family: Family) -> None:
    for name in re.findall(r"gpuglass_[a-z0-9_]+[a-z0-9*]", f"{family.help} {family.absent}"):
        known = [other for other in catalog.BY_NAME if other == name or other.startswith(name.rstrip("*"))]
        assert known if name.endswith("*") or name.endswith("_") else name in catalog.BY_NAME, name


def of_the_node(family: Family) -> bool:
    return family in (gpu.DRIVER_UP, gpu.DRIVER_LOADS, gpu.GPUS)


@every_family
def test_what_is_of_a_gpu_starts_with_device_and_gpu_uuid_and_nothing_else_has_them(family: Family) -> None:
    of_a_gpu = family in vars(gpu).values() and not of_the_node(family)
    assert (family.labels[:2] == ("device", "gpu_uuid")) == of_a_gpu
    assert ("device" in family.labels) == of_a_gpu
    # A process's CUDA memory is on the GPU that it uses, where that is known; so is one that a sender claims.
    known = family is probe.INFO or family.name.startswith("gpuglass_cuda")
    assert known or ("gpu_uuid" in family.labels) == (of_a_gpu or of_a_worker(family))


def of_a_worker(family: Family) -> bool:
    return family.labels[: len(engine.WORKER)] == engine.WORKER


@every_family
def test_what_is_of_an_engine_starts_with_its_labels_and_a_workers_go_on_with_rank_and_card(
    family: Family,
) -> None:
    of_a_sender = family.labels[: len(probe.SENDER)] == probe.SENDER
    assert ("model_name" in family.labels) == (family.labels[: len(engine.ENGINE)] == engine.ENGINE)
    assert ("rank" in family.labels) == (of_a_worker(family) or of_a_sender)


def test_buckets_of_sums_are_those_of_the_record_stream() -> None:
    assert engine.STEP.buckets == records.STEP_SECONDS
    assert engine.BATCH.buckets == records.BATCH_REQUESTS
    assert engine.KV_EVICT.buckets == records.EVICT_SECONDS


@every_family
def test_labels_of_mig_instances_and_workloads_stand_together(family: Family) -> None:
    if family.name.startswith("gpuglass_mig_"):
        assert family.labels[:3] == ("device", "gpu_uuid", "mig_uuid")
    if "workload_pod" in family.labels:
        at = family.labels.index("workload_namespace")
        assert family.labels[at : at + 3] == ("workload_namespace", "workload_pod", "workload_container")
    if family.name.startswith(("gpuglass_process_", "gpuglass_mig_process_")):
        assert family.labels[-2:] == ("process", "pid")


@every_family
def test_no_label_has_a_name_that_scraping_or_kubernetes_uses(family: Family) -> None:
    assert not {"job", "instance", "namespace", "pod", "container", "node", "service"} & set(family.labels)


@every_family
def test_a_ratio_a_share_or_an_amount_has_its_unit_in_the_name(family: Family) -> None:
    base = family.base_name.split("_")
    units = {"bytes", "seconds", "ratio", "watts", "joules", "celsius", "hertz", "volts", "tokens"}
    assert base[-1] not in units or family.unit == base[-1]
    assert not {"percent", "mib", "ms", "mhz", "mw", "kb", "milliseconds"} & set(base)


def test_tiers_are_disjoint_and_together_everything() -> None:
    tiers = [{f.name for f in catalog.BY_NAME.values() if f.tier is tier} for tier in Tier]
    assert all(tiers)
    assert sum(map(len, tiers)) == len(set().union(*tiers)) == len(catalog.BY_NAME)


def test_every_family_has_one_owner_and_the_agent_has_some() -> None:
    owned = [set(catalog.owned_by(owner)) for owner in Owner]
    assert sum(map(len, owned)) == len(set().union(*owned)) == len(catalog.BY_NAME)
    assert gpu.UP in catalog.owned_by(Owner.AGENT)
    assert gpu.UP not in catalog.owned_by(Owner.TRACER)


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text;version=1.0.0"])
def test_all_families_together_are_one_valid_exposition(accept: str) -> None:
    parse = parse_openmetrics if accept else parse_text
    parsed = list(parse(exposition(all_families(), accept)))
    assert len(parsed) == len({family.name for family in parsed}) == len(catalog.BY_NAME)
    names = [family.samples[0].name for family in parsed]
    assert names == sorted(names)


def findings(promtool: Path) -> list[str]:
    """What promtool finds, but for the quantile of forecasts, which is spelled as a summary's on purpose."""
    said = 'non-summary metrics should not have "quantile" label'
    known = {f"{family.name} {said}" for family in all_families() if "quantile" in family.labels}
    return [
        line for line in promtool_check_metrics(exposition(all_families()), promtool) if line not in known
    ]


@pytest.mark.needs("debian-prometheus")
def test_the_distributions_promtool_finds_nothing_wrong(debian_promtool: Path) -> None:
    assert findings(debian_promtool) == []


@pytest.mark.needs("prometheus3")
def test_promtool_3_finds_nothing_wrong(promtool3: Path) -> None:
    assert findings(promtool3) == []


@pytest.mark.needs("debian-prometheus")
def test_promtool_would_find_what_is_wrong(debian_promtool: Path) -> None:
    bad = "# HELP gpuglass_power_milliwatts Power.\n# TYPE gpuglass_power_milliwatts counter\n"
    found = promtool_check_metrics(f"{bad}gpuglass_power_milliwatts 1\n", debian_promtool)
    assert any("_total" in line for line in found)


# Collecting


def module(**families: Family) -> ModuleType:
    made = ModuleType("made")
    vars(made).update(families)
    return made


def gauge(name: str) -> Family:
    return Family(name, Kind.GAUGE, "A sentence.")


def test_families_are_collected_in_the_order_of_their_declaration() -> None:
    one, two, three = (gauge(f"gpuglass_{name}") for name in ("z", "a", "m"))
    assert list(catalog.collect((module(z=one, a=two), module(m=three)))) == [one.name, two.name, three.name]


def test_a_name_that_is_declared_twice_is_refused_and_an_import_of_it_is_not() -> None:
    one = gauge("gpuglass_a")
    assert catalog.collect((module(a=one), module(imported=one))) == {one.name: one}
    with pytest.raises(CatalogError, match="gpuglass_a is declared twice"):
        catalog.collect((module(a=one), module(a=gauge("gpuglass_a"))))


def test_two_names_that_openmetrics_cannot_tell_apart_are_refused() -> None:
    info = Family("gpuglass_a_info", Kind.INFO, "A sentence.")
    assert len(catalog.collect((module(a=gauge("gpuglass_b"), b=info),))) == 2
    with pytest.raises(CatalogError, match="gpuglass_a_info and gpuglass_a are one name in OpenMetrics"):
        catalog.collect((module(a=gauge("gpuglass_a"), b=info),))
    total = Family("gpuglass_a_total", Kind.COUNTER, "A sentence.")
    with pytest.raises(CatalogError, match="one name in OpenMetrics"):
        catalog.collect((module(a=info), module(b=total)))


def test_the_catalog_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        catalog.BY_NAME["gpuglass_a"] = gauge("gpuglass_a")  # type: ignore[index]
    with pytest.raises(AttributeError):
        gpu.UP.help = "Down."  # type: ignore[misc]
