"""The catalog: every metric family of the pack, declared once.

Exporters can emit only what is declared here, rules and dashboards refer to the declarations, and `gpuglass
metrics` prints them. Declarations stand in `gpuglass/families/`, one module per exporter; this module
collects them.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType, ModuleType

from gpuglass.families import agent, anomaly, bridge, cuda, engine, gpu, prices, probe, tracer
from gpuglass.family import CatalogError, Family, Owner

MODULES: tuple[ModuleType, ...] = (gpu, prices, engine, probe, cuda, tracer, bridge, anomaly, agent)


def _declared(module: ModuleType) -> Iterator[Family]:
    return (value for value in vars(module).values() if isinstance(value, Family))


def collect(modules: tuple[ModuleType, ...]) -> dict[str, Family]:
    """Families of `modules` by name, in the order of their declaration; raises `CatalogError` for a name
    twice."""
    families: dict[str, Family] = {}
    in_openmetrics: dict[str, Family] = {}
    for module in modules:
        for family in _declared(module):
            if families.setdefault(family.name, family) is not family:
                raise CatalogError(f"{family.name} is declared twice")
            other = in_openmetrics.setdefault(family.base_name, family)
            if other is not family:
                raise CatalogError(f"{family.name} and {other.name} are one name in OpenMetrics")
    return families


BY_NAME = MappingProxyType(collect(MODULES))


def owned_by(owner: Owner) -> tuple[Family, ...]:
    """Families that one process exports."""
    return tuple(family for family in BY_NAME.values() if family.owner is owner)
