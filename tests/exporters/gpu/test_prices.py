"""Prices of GPU models: which pattern counts, what every agent says, and what a running agent exports."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from exporters.gpu.prices import create, price_list, price_of
from gpuglass import catalog
from gpuglass.config import Config, PricesConfig, load
from gpuglass.demo.scenario import H200, Scenario
from gpuglass.errors import ConfigError
from gpuglass.family import Owner, Tier
from gpuglass.part import PartContext
from gpuglass.store import Store, negotiate
from tests.support.agent import running_agent

PRICE = "gpuglass_gpu_price_per_hour"
A100_80, A100_40 = "NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB"


def prices(**per_gpu_hour: float) -> PricesConfig:
    return PricesConfig(per_gpu_hour=per_gpu_hour)


@pytest.mark.parametrize(
    ("pattern", "model", "matches"),
    [
        (A100_80, A100_80, True),
        (A100_80, A100_40, False),
        (r"NVIDIA A100.*", A100_40, True),
        (r"A100", A100_80, False),
        (r"NVIDIA A100", A100_80, False),
        (r".*A100-SXM4-(40|80)GB", A100_80, True),
        (r"NVIDIA A10", "NVIDIA A100", False),
        (r"nvidia h200", "NVIDIA H200", False),
        (r"(?i)nvidia h200", "NVIDIA H200", True),
        (r"NVIDIA A10|NVIDIA L4", "NVIDIA L40", False),
    ],
)
def test_a_pattern_has_to_match_the_whole_name(pattern: str, model: str, matches: bool) -> None:
    assert (price_of(PricesConfig(per_gpu_hour={pattern: 2.5}), model) == 2.5) is matches


def test_the_first_pattern_that_matches_counts() -> None:
    table = PricesConfig(per_gpu_hour={A100_80: 3.0, "NVIDIA A100.*": 2.0, ".*": 1.0})
    assert [price_of(table, model) for model in (A100_80, A100_40, "NVIDIA L4")] == [3, 2, 1]


def test_names_that_are_spelled_out_are_said_without_such_a_card_and_patterns_are_not() -> None:
    table = PricesConfig(per_gpu_hour={"NVIDIA H800": 4.0, "NVIDIA A100.*": 2.0, "NVIDIA L.": 1.0})
    assert price_list(table, ()) == {"NVIDIA H800": 4.0}
    assert price_list(table, {A100_80, "NVIDIA T4"}) == {"NVIDIA H800": 4.0, A100_80: 2.0}


def test_a_free_card_has_a_price_and_an_unknown_one_has_none() -> None:
    assert price_list(PricesConfig(per_gpu_hour={"NVIDIA T4": 0.0}), {"NVIDIA L4"}) == {"NVIDIA T4": 0.0}


def test_without_the_gpu_exporter_the_price_list_is_there_all_the_same() -> None:
    config = Config(prices=PricesConfig(currency="EUR", example=True, per_gpu_hour={"NVIDIA H800": 4.25}))
    store = Store(catalog.owned_by(Owner.AGENT))
    context = PartContext(config, store, lambda states: None)
    part = create(context)
    assert part is not None
    part.start()

    def exported() -> list[str]:
        text = store.exposition(frozenset({Tier.SLOW}), negotiate("")).decode()
        return [line for line in text.splitlines() if line.startswith(PRICE)]

    assert exported() == [PRICE + '{currency="EUR",example="true",model="NVIDIA H800"} 4.25']
    context.gpu_models.add("NVIDIA T4")
    part.reload(msgspec.structs.replace(config, prices=PricesConfig(per_gpu_hour={"NVIDIA (T|L)4": 0.5})))
    assert exported() == [PRICE + '{currency="USD",example="false",model="NVIDIA T4"} 0.5']
    part.reload(Config())
    assert exported() == []
    assert part.stop(0) and part.not_ready() is None


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{currency: US Dollar}", "prices.currency: must be 1 to 16 letters such as USD, is 'US Dollar'"),
        ("{per_gpu_hour: {a: -1}}", "prices.per_gpu_hour: the price of 'a' must be from 0 to below 1000000"),
        ("{per_gpu_hour: {a: .nan}}", "prices.per_gpu_hour: the price of 'a' must be from 0"),
        ("{per_gpu_hour: {a: .inf}}", "prices.per_gpu_hour: the price of 'a' must be from 0"),
        ("{per_gpu_hour: {'A100(': 1}}", "prices.per_gpu_hour: 'A100(' is no regular expression: missing )"),
        ("{per_gpu_hour: {'': 1}}", "prices.per_gpu_hour: a pattern has 1 to 128 printable characters"),
        ("{per_gpu_hour: {a: cheap}}", "prices.per_gpu_hour[...]: "),
        ("{per_gpu_hour: [1]}", "prices.per_gpu_hour: "),
        ("{example: maybe}", "prices.example: must be true or false, is 'maybe'"),
        ("{per_hour: {}}", "prices.per_hour: no such key; did you mean prices.per_gpu_hour?"),
    ],
)
def test_a_bad_price_is_refused_in_one_line_that_names_it(tmp_path: Path, text: str, line: str) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text(f"prices: {text}")
    with pytest.raises(ConfigError) as error:
        load(file, {})
    assert str(error.value).startswith(f"{file}: {line}")
    assert len(str(error.value).splitlines()) == 1


def test_too_many_patterns_are_refused() -> None:
    with pytest.raises(ValueError, match="101 patterns are more than 100"):
        prices(**{f"a{n}": 1.0 for n in range(101)})


@pytest.mark.needs("cc")
def test_a_running_agent_prices_its_cards_and_takes_other_prices_on_reload(tmp_path: Path) -> None:
    table = {"currency": "EUR", "per_gpu_hour": {"NVIDIA H2.*": 3.5, "NVIDIA H800": 2.0}}
    with running_agent(tmp_path, Scenario().gpus(1, H200), {"prices": table}) as agent:
        agent.wait(lambda: len(agent.samples(PRICE)) == 2, "both prices")
        assert agent.value(PRICE, model="NVIDIA H200", currency="EUR", example="false") == 3.5
        assert agent.value(PRICE, model="NVIDIA H800") == 2.0
        assert not agent.samples(PRICE, path="/metrics/fast")
        agent.configure({"prices": {"per_gpu_hour": {"NVIDIA H200": 3.0}, "example": True}})
        assert (
            agent.hup()
            == "configuration taken; changed: prices.currency, prices.example, prices.per_gpu_hour"
        )
        assert agent.value(PRICE, model="NVIDIA H200", currency="USD", example="true") == 3.0
        assert len(agent.samples(PRICE)) == 1
