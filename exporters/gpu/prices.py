"""Exports what an hour of each GPU model costs, which only the operator knows.

In: `prices` of the configuration (patterns of model names) and the models that the GPU exporter has seen.
Out: `gpuglass_gpu_price_per_hour`, at each scrape. Works without the GPU exporter too: then only names that
are spelled out have a price.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from gpuglass.config import Config, PricesConfig
from gpuglass.families import prices as families
from gpuglass.family import Batch, Tier
from gpuglass.part import Part, PartContext

_SPECIAL = frozenset(r".^$*+?{}[]\|()")


def price_of(prices: PricesConfig, model: str) -> float | None:
    """Price of an hour of `model`: that of the first pattern that matches the whole name, or None."""
    return next(
        (price for pattern, price in prices.per_gpu_hour.items() if re.fullmatch(pattern, model)), None
    )


def price_list(prices: PricesConfig, models: Iterable[str]) -> dict[str, float]:
    """Prices by model, of `models` and of the names that the configuration spells out."""
    named = {pattern for pattern in prices.per_gpu_hour if not _SPECIAL & set(pattern)}
    found = {model: price_of(prices, model) for model in sorted(named | set(models))}
    return {model: price for model, price in found.items() if price is not None}


class PricesPart(Part):
    """The price list of this agent. Has no thread."""

    def __init__(self, context: PartContext) -> None:
        self._prices = context.config.prices
        self._models = context.gpu_models
        self._store = context.store

    def start(self) -> None:
        """Have the list filled in at each scrape."""
        self._store.add_live("gpu.prices", self.fill, Tier.SLOW)

    def reload(self, config: Config) -> None:
        """Take other prices."""
        self._prices = config.prices

    def stop(self, timeout: float) -> bool:
        """Nothing runs."""
        return True

    def not_ready(self) -> str | None:
        """A list that is empty is no reason to wait."""
        return None

    def fill(self, batch: Batch) -> None:
        """Add the samples."""
        prices = self._prices
        example = "true" if prices.example else "false"
        for model, price in price_list(prices, tuple(self._models)).items():
            batch.add(families.GPU_HOUR, price, model, prices.currency, example)


def create(context: PartContext) -> Part:
    """Make the part."""
    return PricesPart(context)
