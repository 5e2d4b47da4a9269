"""Experts of mixture-of-experts models: which are hot, how uneven the load is, whose requests make them
hot."""

from __future__ import annotations

from dashboards import links
from dashboards.board import Board, Options, section
from dashboards.links import to
from dashboards.panels import (
    Query,
    Visual,
    bargauge,
    heatmap,
    high_is_good,
    low_is_good,
    stat,
    text,
    timeseries,
)
from dashboards.queries import by, named_row, over, quotient, rate, scoped, zero_padded
from dashboards.tables import Column, matrix, table
from gpuglass.families import engine
from recording_rules import records

LAYER = "model_name, engine, workload_pod, layer"


def board(_: Options) -> Board:
    """The dashboard."""
    return Board(
        links.EXPERTS,
        "Experts",
        "Routing of mixture-of-experts models: layers and experts, imbalance, ranks, and the tenants behind a"
        " hot expert.",
        (
            section("Now", *_now()),
            section("Layers and experts", *_matrix()),
            section("Balance over time", *_balance()),
            section("Who makes them hot", *_tenants()),
            section("How to read it", text("Reading the experts", _READING, size=(24, 6)), collapsed=True),
        ),
    )


def _now() -> tuple[Visual, ...]:
    return (
        stat(
            "Worst imbalance",
            "Busiest expert ÷ mean, in the layer where that is worst. Above 2: expert-parallel load "
            "balancing (EPLB) or redundant experts.",
            Query(by("max", "", scoped(engine.EXPERT_IMBALANCE))),
            unit="short",
            decimals=2,
            steps=low_is_good(2, 4),
            size=(5, 4),
        ),
        stat(
            "Least even layer (Jain)",
            "Jain's fairness index of the least even layer; 1 is even.",
            Query(by("min", "", scoped(engine.EXPERT_JAIN))),
            unit="short",
            decimals=2,
            steps=high_is_good(0.4, 0.7),
            size=(5, 4),
        ),
        stat(
            "Hottest expert's share",
            "Largest share of a layer's choices that fell on one expert.",
            Query(by("max", "", scoped(engine.EXPERT_HOTTEST_SHARE))),
            unit="percentunit",
            decimals=1,
            size=(5, 4),
        ),
        stat(
            "Rank imbalance",
            "Load of the busiest expert-parallel rank ÷ the mean. All ranks wait for it.",
            Query(by("max", "", scoped(records.ENGINE_EXPERT_RANK_IMBALANCE))),
            unit="short",
            decimals=2,
            steps=low_is_good(1.3, 2),
            size=(5, 4),
        ),
        stat(
            "Counted",
            "Share of tokens whose choices were counted. Below 1 everything here rests on a sample.",
            Query(by("min", "", scoped(engine.EXPERT_COUNTED))),
            unit="percentunit",
            decimals=0,
            size=(4, 4),
        ),
    )


def _matrix() -> tuple[Visual, ...]:
    chosen = by("sum", "layer, expert", rate(engine.EXPERT_MATRIX))
    share = f"{chosen} / on (layer) group_left () {by('sum', 'layer', rate(engine.EXPERT_MATRIX))}"
    cells = f'label_replace({share}, "cell", "layer $1", "layer", "(.+)")'
    hottest = f"topk (15, {cells})"
    by_layer = by("max", "layer", scoped(engine.EXPERT_HOTTEST_SHARE))
    row = named_row(zero_padded(by_layer, "layer"), "layer")
    every = by("sum", "", rate(engine.EXPERT_MATRIX))
    experts = f"{by('sum', 'expert', rate(engine.EXPERT_MATRIX))} / on () group_left () {every}"
    row_of_expert = named_row(zero_padded(experts, "expert"), "expert")
    padded = zero_padded(zero_padded(share, "layer"), "expert")
    return (
        matrix(
            "Layer × expert: share of each layer's choices",
            "A row per layer, a column per expert, darker where the expert takes more of its layer's choices"
            " now. A dark column is an expert that is hot in many layers. Needs the full matrix (see below).",
            Query(padded, instant=True, format="table"),
            rows="layer",
            columns="expert",
            unit="percentunit",
            decimals=1,
        ),
        heatmap(
            "Layer × time: share of the hottest expert",
            "A row per layer, brighter where one expert takes more of the layer's choices. A layer that stays"
            " bright has a hot expert: the table says which.",
            Query(row, "{{at}}"),
            unit="percentunit",
            limits=(0, None),
            size=(12, 11),
            decimals=1,
            points=400,
            links=[to(links.TENANTS, "Tenants")],
        ),
        heatmap(
            "Expert × time: share of all choices",
            "A row per expert, all layers together. Needs the full matrix (engines.expert_matrix in the"
            " agent's configuration).",
            Query(row_of_expert, "{{at}}"),
            unit="percentunit",
            limits=(0, None),
            size=(12, 11),
            decimals=2,
            points=400,
        ),
        table(
            "Layer × expert: hottest cells",
            "The fifteen experts with the largest shares of their layers now, from the full matrix.",
            Column("Share of the layer", hottest, "percentunit", 1, bar=True),
            labels={"cell": "Layer", "expert": "Expert"},
            hidden=("layer",),
            sort="Share of the layer",
            size=(12, 9),
        ),
        table(
            "Hottest expert of each layer",
            "The busiest expert over the last minute by layer, its share, and the layer's imbalance.",
            Column("Expert", by("max", LAYER, scoped(engine.EXPERT_HOTTEST)), "none"),
            Column(
                "Share", by("max", LAYER, scoped(engine.EXPERT_HOTTEST_SHARE)), "percentunit", 1, bar=True
            ),
            Column(
                "Imbalance",
                by("max", LAYER, scoped(engine.EXPERT_IMBALANCE)),
                "short",
                2,
                steps=low_is_good(2, 4),
            ),
            labels={"model_name": "Model", "layer": "Layer", "engine": "Engine", "workload_pod": "Pod"},
            sort="Imbalance",
            size=(12, 9),
        ),
    )


def _balance() -> tuple[Visual, ...]:
    return (
        timeseries(
            "Imbalance",
            "Busiest expert ÷ mean, worst layer of each engine. It changes with the kind of requests.",
            Query(scoped(records.ENGINE_EXPERT_IMBALANCE), "{{model_name}} {{workload_pod}}"),
            unit="short",
            steps=low_is_good(2, 4),
        ),
        timeseries(
            "Fairness",
            "Jain's index: mean and least of the layers.",
            Query(by("avg", "", scoped(engine.EXPERT_JAIN)), "mean of the layers"),
            Query(by("min", "", scoped(engine.EXPERT_JAIN)), "least even layer"),
            unit="short",
            limits=(0, 1),
        ),
        timeseries(
            "Load of the ranks",
            "Share of all choices that fell on each expert-parallel rank. The highest one sets the pace of"
            " every step.",
            Query(
                by("avg", "model_name, expert_rank", scoped(engine.EXPERT_RANK)),
                "{{model_name}} rank {{expert_rank}}",
            ),
            unit="percentunit",
        ),
        timeseries(
            "Choices",
            "Router's choices per second, by how they were counted.",
            Query(
                by("sum", "model_name, counting", rate(engine.EXPERT_SELECTIONS)),
                "{{model_name}} {{counting}}",
            ),
            unit="cps",
            size=(12, 8),
        ),
        timeseries(
            "Most uneven layers of the range",
            "Mean imbalance over the shown range, the ten worst layers.",
            Query(
                f"topk (10, {by('max', LAYER, over('avg', engine.EXPERT_IMBALANCE, '10m'))})",
                "{{model_name}} layer {{layer}}",
            ),
            unit="short",
            size=(12, 8),
        ),
    )


def _tenants() -> tuple[Visual, ...]:
    share = by("avg", "tenant, model_name", scoped(engine.EXPERT_TENANT))
    total = by("sum", "model_name", by("avg", "tenant, model_name", scoped(engine.EXPERT_TENANT)))
    return (
        table(
            "Tenants behind each layer's hottest expert",
            "Share of the choices of a layer's hottest expert by tenant, the three largest. One tenant on top"
            " of all layers: its requests are of one kind; a deployment of its own would even the rest out.",
            Column(
                "Share",
                by("max", f"{LAYER}, tenant", scoped(engine.EXPERT_TENANT)),
                "percentunit",
                0,
                bar=True,
                top=1,
            ),
            labels={"model_name": "Model", "layer": "Layer", "tenant": "Tenant"},
            hidden=("engine", "workload_pod"),
            links={"Tenant": [to(links.TENANTS, "This tenant", tenant=links.cell("Tenant"))]},
            sort="Share",
            size=(12, 9),
        ),
        bargauge(
            "Tenants, all layers",
            "Mean share over the layers.",
            Query(
                f"sort_desc ({quotient(share, total, 'model_name', many=True)})",
                "{{tenant}} {{model_name}}",
                instant=True,
            ),
            unit="percentunit",
            limits=(0, 1),
            decimals=0,
            size=(12, 9),
        ),
    )


_READING = """\
Experts are counted inside the engine from the router's own choices. *counting* says whether each step was
counted or a sample. Where routing cannot be seen (engines without the probe, or kernels that hide it)
these panels are empty, and Pack health lists the hook `experts` as unavailable with the reason.
"""
