"""Error budgets that burn, engines that stand still, and what nearly does. After 95 minutes."""

from __future__ import annotations

from gpuglass.families import engine
from gpuglass.family import Family
from gpuglass.promql import Metric
from recording_rules import foreign
from tests.alert_rules.parts import NODES, add_engine, engine_named, of_engine, price
from tests.alert_rules.world import Values, World, gone, growing, missing, steady

MINUTES = 95
FIRST_TOKEN_BOUNDS = engine.REQUEST_FIRST_TOKEN.buckets
INTER_TOKEN_BOUNDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
"""Some of vLLM's own."""
OK = {"outcome": "stop", "preempted": "no"}


def build(world: World) -> None:
    """All cases."""
    price(world)
    _burns_of_requests(
        world, "SLOFirstTokenBurn", engine.REQUEST_FIRST_TOKEN, "first tokens come too late", 3
    )
    _burns_of_requests(world, "SLORequestDurationBurn", engine.REQUEST_DURATION, "requests take too long", 90)
    _burns_of_tokens(world)
    _burns_of_errors(world)
    _stalled(world)
    _stuck(world)


def _fires(world: World, name: str, model: str, wrong: str, rate: str, *severities: str) -> None:
    for severity in severities:
        world.fires(
            name, severity, "latency",
            f"{model}: {wrong}; the budget for it burns {rate} times as fast as it may.",
            {"model_name": model},
            traces_url=f"/d/gpuglass-requests?var-cluster=&var-model_name={model}",
        )  # fmt: skip


def _nears(world: World, name: str) -> None:
    world.near(name, "four percent miss it, and five may")
    world.near(name, "one request in five minutes, too late")
    world.near(name, "it burned in the first minutes, and is over (the page)")


def _burns_of_requests(world: World, name: str, family: Family, wrong: str, slow: float) -> None:
    """Twenty requests a second of two engines on two nodes, a share of them slow; the budget is 5 %."""

    def served(model: str, share: float, per_second: float = 10.0) -> str:
        model = f"{model}-{family.name.split('_')[2]}"
        for number, node in enumerate(NODES):
            world.histogram(
                family, {0.05: per_second * (1 - share), slow: per_second * share}, NODES[node],
                **of_engine(model, str(number)), **OK,
            )  # fmt: skip
        return model

    _fires(world, name, served("fast-burn", 0.8), wrong, "16.0", "critical", "warning")
    _fires(world, name, served("slow-burn", 0.4), wrong, "8.0", "critical", "warning")
    _fires(world, name, served("ticket", 0.2), wrong, "4.0", "warning")
    served("fine", 0.04)
    served("rare", 1.0, 0.002)
    over = f"over-{family.name.split('_')[2]}"
    labels = {**of_engine(over), **OK}
    world.histogram(family, {slow: 10.0}, NODES["node-a"], minutes=8, **labels)
    world.histogram(family, {0.05: 10.0}, NODES["node-b"], **labels)
    _nears(world, name)
    # Half of the requests of the first eight minutes: over long windows that is still too much.
    _fires(world, name, over, wrong, _OVER, "warning")


_OVER = "1.5"


def _burns_of_tokens(world: World) -> None:
    name, wrong = "SLOInterTokenBurn", "tokens follow each other too slowly"

    def served(model: str, share: float, per_second: float = 100.0) -> None:
        world.histogram_of(
            foreign.VLLM_INTER_TOKEN, INTER_TOKEN_BOUNDS,
            {0.03: per_second * (1 - share), 0.3: per_second * share},
            {"job": "vllm", "instance": "10.0.0.9:8000", "model_name": model, "engine": "0"},
        )  # fmt: skip

    for model, share, rate, severities in (
        ("fast-burn-tokens", 0.8, "16.0", ("critical", "warning")),
        ("ticket-tokens", 0.2, "4.0", ("warning",)),
    ):
        served(model, share)
        _fires(world, name, model, wrong, rate, *severities)
    world.near(name, "four percent are late, and five may be")
    served("fine-tokens", 0.04)
    world.near(name, "a token in five minutes")
    served("rare-tokens", 1.0, 0.004)


def _burns_of_errors(world: World) -> None:
    """The budget is one percent; requests that their callers gave up count neither way."""
    name, wrong = "SLOErrorsBurn", "requests fail"

    def served(model: str, tenant: str = "acme", **per_second: Values | float) -> None:
        labels = of_engine(model)
        for outcome, rate in per_second.items():
            values = rate if isinstance(rate, Values) else growing(rate)
            world.add(
                engine.TENANT_REQUESTS, values, NODES["node-a"], **labels, tenant=tenant, outcome=outcome
            )

    served("failing", stop=16, error=3, rejected=1)
    _fires(world, name, "failing", wrong, "20.0", "critical", "warning")
    served("failing-some", stop=19.2, error=0.8)
    _fires(world, name, "failing-some", wrong, "4.0", "warning")
    world.near(name, "one in two hundred")
    served("failing-few", stop=19.9, error=0.1)
    world.near(name, "callers who give up")
    served("aborted", stop=10, abort=10)
    world.near(name, "the only request fails")
    served("failing-rare", error=0.002)
    world.near(name, "the agent was restarted: counters begin again")
    served("restarted", stop=growing(10, 50).then(growing(10)), error=growing(0.01, 50).then(growing(0.01)))


def _stalled(world: World) -> None:
    name = "EngineAdmissionStalled"
    stopped = growing(100, 80).then(steady(480_000))
    add_engine(world, "stalled", running=0, waiting=5, tokens=stopped)
    add_engine(world, "stalled", "1", "node-b", running=3, waiting=5)
    world.fires(
        name, "critical", "latency",
        f"5 requests wait in {engine_named('stalled')}, none runs, and no token is made.",
        of_engine("stalled"),
    )  # fmt: skip
    world.near(name, "requests wait and others run (engine 1)")
    world.near(name, "nobody asks")
    add_engine(world, "unasked", running=0, waiting=0, tokens=stopped)
    world.near(name, "tokens stopped seven minutes ago")
    add_engine(
        world, "stalled-now", running=steady(3, 88).then(steady(0)), waiting=5,
        tokens=growing(100, 88).then(steady(528_000)),
    )  # fmt: skip
    world.near(name, "nobody tells of tokens")
    add_engine(world, "untold", running=0, waiting=5, tokens=growing(100, 70).then(gone()))
    world.near(name, "the engine is gone")
    away = steady(5, 85).then(gone())
    add_engine(
        world, "away", running=steady(0, 85).then(gone()), waiting=away, tokens=steady(9, 85).then(gone())
    )


def _stuck(world: World) -> None:
    name = "EngineStepStuck"
    stopped = growing(100, 80).then(steady(480_000))
    add_engine(world, "stuck", "1", "node-b", running=3, waiting=7, tokens=stopped)
    add_engine(world, "stuck", "0", "node-a", running=3, waiting=7)
    world.fires(
        name, "critical", "latency",
        f"3 requests run in {engine_named('stuck', '1')}, and no token is made: a step does not end.",
        of_engine("stuck", "1"),
    )  # fmt: skip
    world.near(name, "the other engine of the model works")
    world.near(name, "an engine that counts tokens when requests end, in a long generation")
    sglang = {"job": "sglang", "instance": "10.0.0.8:30000", "model_name": "long", "engine_type": "unified"}
    ranks = {"dp_rank": "0", "tp_rank": "0", "pp_rank": "0"}
    world.raw(foreign.SGLANG_RUNNING.name, {**sglang, **ranks}, steady(2))
    world.raw(foreign.SGLANG_WAITING.name, {**sglang, **ranks}, steady(0))
    world.raw(foreign.SGLANG_OUTPUT.name, sglang, steady(9000))
    world.near(name, "a scrape gap")
    gap = growing(100, 80).then(missing(8)).then(growing(100, start=528_000))
    add_engine(world, "gap", running=3, tokens=gap)
    world.near(name, "a slow engine: a token in a minute")
    add_engine(world, "slow", running=1, tokens=growing(0.02))
    # vLLM without the probe, by its own metrics.
    vllm = {"job": "vllm", "instance": "10.0.0.7:8000", "model_name": "plain", "engine": "0"}
    for metric, values in (
        (foreign.VLLM_RUNNING, steady(2)),
        (foreign.VLLM_WAITING, steady(0)),
        (foreign.VLLM_OUTPUT, steady(500)),
        (foreign.VLLM_PROMPT, steady(500)),
    ):
        one: Metric = metric
        world.raw(one.name, vllm, values)
    world.fires(
        name, "critical", "latency",
        "2 requests run in plain, engine 0, and no token is made: a step does not end.",
        {"model_name": "plain", "engine": "0", "server": "10.0.0.7:8000"},
    )  # fmt: skip
