"""Tenant records and quotas: two agents that say the same quota, a tenant that was there for an hour only."""

from __future__ import annotations

from gpuglass.families import engine
from recording_rules import records as r
from recording_rules.settings import parse
from tests.recording_rules.promtool import (
    LAYOUTS,
    Bench,
    Case,
    Check,
    Series,
    counter,
    nothing,
    series,
    values,
)
from tests.recording_rules.test_engines import probed

WANTED = ("tenants", "quotas")


def quota(tenant: str, gpu_seconds: float, kv: float) -> list[Series]:
    """A quota, as the agents of two nodes export it."""
    return [
        one
        for node in ("a", "b")
        for one in (
            series(engine.TENANT_GPU_QUOTA, gpu_seconds, 1300, tenant=tenant, instance=f"{node}:9955"),
            series(engine.TENANT_KV_QUOTA, kv, 1300, tenant=tenant, instance=f"{node}:9955"),
        )
    ]


CASES = [
    Case(
        "two tenants on two engines",
        [
            *(
                counter(engine.TENANT_GPU, rate, **probed(n), tenant=tenant)
                for n in (1, 2)
                for tenant, rate in (("a", 0.3), ("b", 0.1))
            ),
            *(
                series(engine.TENANT_KV_SHARE, share, **probed(n), tenant="a")
                for n, share in ((1, 0.2), (2, 0.4))
            ),
            *(
                counter(engine.TENANT_TOKENS, 10, **probed(1), tenant="a", kind=kind)
                for kind in ("prompt", "output")
            ),
            counter(engine.TENANT_REQUESTS, 0.5, **probed(1), tenant="a", outcome="stop"),
            counter(engine.WASTED, 0.05, **probed(1), tenant="b", reason="abort"),
            *quota("a", 3600, 0.5),
            *quota("idle", 3600, 0.5),
        ],
        [
            values(
                r.TENANT_GPU_SECONDS,
                ("tenant", "model_name"),
                {("a", "deepseek"): 0.6, ("b", "deepseek"): 0.2},
            ),
            values(r.TENANT_GPU_SHARE, ("tenant",), {"a": 0.75, "b": 0.25}),
            values(r.TENANT_KV, ("tenant",), {"a": 0.4}),
            values(r.TENANT_KV_QUOTA_USED, ("tenant",), {"a": 0.8}),
            values(r.TENANT_TOKENS, ("kind",), {"input": 10, "output": 10}),
            values(r.TENANT_REQUESTS, ("outcome",), {"stop": 0.5}),
            values(r.FLEET_WASTED_GPU_SECONDS, ("tenant", "reason"), {("b", "abort"): 0.05}),
            # Nothing is known of a tenant that did nothing, and of one without a quota.
            nothing(f"{r.TENANT_GPU_QUOTA_USED.name}{{tenant!='a'}}"),
        ],
        LAYOUTS,
    ),
]


def test_tenants(bench: Bench) -> None:
    bench.run(CASES, WANTED)


def test_a_day_counts_what_was_used_and_not_how_long_the_tenant_was_there(bench: Bench) -> None:
    """An hour at 0.5 GPU is 1,800 GPU-seconds, the first minutes apart in which the rate is not known yet."""
    case = Case(
        "an hour of a day",
        [
            counter(engine.TENANT_GPU, 0.5, 60, **probed(1), tenant="a"),
            counter(engine.TENANT_GPU, 0.5, 60, **probed(2), tenant="b"),
            *quota("a", 3600, 0.5),
        ],
        [
            nothing(
                "tenant:gpu_seconds:day{tenant='a'} < 1700 or tenant:gpu_seconds:day > 1900", minute=1200
            ),
            Check("round(tenant:gpu_quota_used:ratio, 0.05)", [({"tenant": "a"}, 0.5)], 1200),
            nothing("abs(tenant:gpu_quota_used:ratio - tenant:gpu_seconds:day / 3600) > 0.001", minute=1200),
            values(r.TENANT_GPU_QUOTA_USED, ("tenant",), {}, minute=1700),
        ],
        layouts=("pair",),
    )
    coarse = parse({"windows": {"interval": 30}}, "test")
    Bench(bench.promtool, bench.folder, settings=coarse).run([case], WANTED)
