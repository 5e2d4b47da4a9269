"""Engine records: the first layer, from the engine probe or, for engines without one, from what vLLM, SGLang,
trtllm-serve or Triton export themselves; then what models and the fleet add up to.

In: families of the vLLM exporter, metrics of the engines (units converted, what one does not give left out).
Out: one series per engine with the labels of `ENGINE`. Which dialect an engine is read in is decided once, in
`engine:engine_info:max`. An engine that is read by its own metrics is named by its target: `instance` becomes
`server`, `pod` and `namespace` its workload.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from gpuglass.families import engine
from gpuglass.promql import (
    Match,
    aggregate,
    divide,
    first_of,
    histogram_count,
    histogram_sum,
    labelled,
    not_equal,
    one_of,
    parenthesize,
    rate,
    regex,
    relabel,
    select,
)
from recording_rules import foreign as f
from recording_rules import records as r
from recording_rules.devices import renamed
from recording_rules.foreign import Foreign
from recording_rules.model import Group, Record, Rule
from recording_rules.options import Options
from recording_rules.settings import Settings

ON = f"on ({', '.join(r.ENGINE)})"
TRITON: dict[str, str | Match] = {"model": not_equal(""), "model_name": ""}
"""vLLM's metrics on Triton's endpoint: the model is called `model` there."""
VLLM: dict[str, str | Match] = {"model_name": not_equal("")}
_POD = {"workload_pod": "pod", "workload_namespace": "namespace"}


def sglang(metric: Foreign, window: float | None = None, how: str = "rate") -> str:
    """A metric of SGLang by either spelling: what it is called depends on how the scrape negotiates. Totals
    over priorities have an empty one; pipeline stages after the first repeat the first."""
    both = (metric, f.escaped(metric))
    matchers: dict[str, str | Match] = {"priority": "", "pp_rank": regex("0?")}
    if window is None:
        return first_of(*(select(one, **matchers) for one in both))
    return first_of(*(f"{how}({select(one, window, **matchers)})" for one in both))


def identity(expression: str, triton: bool = False) -> str:
    """Give a series of an engine's own metrics the labels of `ENGINE`."""
    if triton:
        expression = renamed(expression, model_name="model")
    return renamed(expression, server="instance", **_POD)


def plus(left: str, right: str) -> str:
    """Sum, where the right side may be missing."""
    return f"{parenthesize(left)} + ({parenthesize(right)} or {parenthesize(left)} * 0)"


def minus(left: str, right: str) -> str:
    """Difference of at least 0, where the right side may be missing."""
    return f"clamp_min({parenthesize(left)} - ({parenthesize(right)} or {parenthesize(left)} * 0), 0)"


class _Engines:
    """Makes the rules of one signal after the other."""

    def __init__(self, settings: Settings, options: Options) -> None:
        self.options = options
        self.window = float(settings.windows.rate)
        self.rules: list[Rule] = []

    def add(
        self,
        record: Record,
        how: str,
        probe: str = "",
        plain: Mapping[str, str] | None = None,
        extra: Sequence[str] = (),
        **labels: str,
    ) -> None:
        """A record by engine and `extra` labels. `plain` are expressions by dialect, over an engine's own
        metrics with their own labels."""
        self.put(
            record,
            aggregate(how, (*r.ENGINE, *extra), probe) if probe else "",
            {
                dialect: aggregate(how, (*r.ENGINE, *extra), identity(e, dialect.startswith("triton")))
                for dialect, e in (plain or {}).items()
            },
            **labels,
        )

    def put(self, record: Record, probe: str, plain: Mapping[str, str], **labels: str) -> None:
        """As `add`, for expressions that have the labels of `ENGINE` already."""
        theirs = [
            f"{parenthesize(e)} and {ON} {select(r.ENGINE_INFO, dialect=dialect)}"
            for dialect, e in plain.items()
        ]
        if chosen := self.options.chosen([probe] if probe else [], theirs):
            self.rules.append(Rule(record, first_of(*chosen), labels))

    def gauge(self, record: Record, probe: str, plain: Mapping[str, str]) -> None:
        """A number of requests: the probe's once, an engine's own added up over what it exports it by."""
        theirs = {
            dialect: aggregate("sum", r.ENGINE, identity(e, dialect.startswith("triton")))
            for dialect, e in plain.items()
        }
        self.put(record, aggregate("max", r.ENGINE, probe), theirs)

    def by_engine(self, expression: str, dialect: str = "") -> str:
        """Sum by engine of rates of the probe or, with a dialect, of an engine's own metrics."""
        if dialect:
            expression = identity(expression, dialect.startswith("triton"))
        return aggregate("sum", r.ENGINE, expression)


def groups(settings: Settings, options: Options) -> list[Group]:
    """The groups of engines and of models."""
    interval = float(settings.windows.interval)
    return [
        Group("gpuglass-engines.rules", interval, tuple(_engines(settings, options))),
        Group("gpuglass-models.rules", interval, tuple(_models())),
    ]


def _info(options: Options) -> str:
    """Which engines there are. An engine's own metrics count where no probe tells of it: of its pod, of its
    model without a pod, or of its model where the target names no pod. Rather none than twice."""

    def plain(metric: str, dialect: str, triton: bool = False) -> str:
        return labelled(aggregate("group", r.ENGINE, identity(metric, triton)), "dialect", dialect)

    found = first_of(
        plain(select(f.VLLM_RUNNING, **VLLM), "vllm"),
        plain(sglang(f.SGLANG_RUNNING), "sglang"),
        plain(select(f.TRTLLM_RUNNING), "trtllm"),
        plain(select(f.VLLM_OUTPUT, **TRITON), "triton_vllm", triton=True),
        plain(select(f.TRITON_TRTLLM_REQUESTS, request_type="max"), "triton_trtllm", triton=True),
    )
    if options.source == "dcgm":
        return found
    probe = labelled(aggregate("group", r.ENGINE, select(engine.INFO)), "dialect", "probe")
    if options.source == "gpuglass":
        return probe
    seen = select(engine.INFO)
    unprobed = (
        f"{parenthesize(found)}\n"
        f"unless on (cluster, model_name, workload_namespace, workload_pod) {seen}\n"
        f"unless on (cluster, model_name) {select(engine.INFO, workload_pod='')}\n"
        # With the pod's label taken away, these match only targets that name no pod either.
        "unless on (cluster, model_name, workload_pod) "
        + relabel(f"group by (cluster, model_name) ({seen})", "workload_pod", "", "", "")
    )
    return first_of(probe, unprobed)


def _engines(settings: Settings, options: Options) -> list[Rule]:
    e = _Engines(settings, options)
    w = e.window
    e.rules.append(Rule(r.ENGINE_INFO, _info(options)))
    e.add(r.ENGINE_UP, "max", select(engine.UP))
    _load(e)
    _tokens(e)
    _requests(e)
    e.add(
        r.ENGINE_PREEMPTIONS,
        "sum",
        rate(engine.PREEMPTIONS, w),
        {"vllm": rate(f.VLLM_PREEMPTIONS, w, **VLLM), "sglang": sglang(f.SGLANG_RETRACTED, w)},
    )
    hit = aggregate("sum", r.ENGINE, select(r.ENGINE_TOKENS, kind="cached"))
    prompt = aggregate("sum", r.ENGINE, select(r.ENGINE_TOKENS, kind=one_of(("input", "cached"))))
    e.rules.append(Rule(r.ENGINE_PREFIX_HIT, divide(hit, prompt)))
    _experts_and_steps(e)
    return e.rules


def _load(e: _Engines) -> None:
    """Requests and KV cache, now."""
    e.gauge(
        r.ENGINE_RUNNING,
        select(engine.REQUESTS, state="running"),
        {
            "vllm": select(f.VLLM_RUNNING, **VLLM),
            "sglang": _by_dp_rank(f.SGLANG_RUNNING),
            "trtllm": _once(f.TRTLLM_RUNNING),
            "triton_trtllm": select(f.TRITON_TRTLLM_REQUESTS, request_type="scheduled"),
        },
    )
    e.gauge(
        r.ENGINE_WAITING,
        select(engine.REQUESTS, state="waiting"),
        {
            "vllm": select(f.VLLM_WAITING, **VLLM),
            "sglang": plus(_by_dp_rank(f.SGLANG_WAITING), _by_dp_rank(f.SGLANG_GRAMMAR)),
            "trtllm": _once(f.TRTLLM_WAITING),
            "triton_vllm": select(f.TRITON_PENDING),
            "triton_trtllm": select(f.TRITON_TRTLLM_REQUESTS, request_type="waiting"),
        },
    )
    pool = aggregate("max", r.ENGINE, select(engine.KV_POOL_BLOCKS))

    def of_pool(metric: str) -> str:
        return divide(aggregate("max", r.ENGINE, metric), pool)

    plain = {
        "vllm": select(f.VLLM_KV_USED, **VLLM),
        "sglang": sglang(f.SGLANG_KV_USED),
        "trtllm": _once(f.TRTLLM_KV_USED),
        "triton_trtllm": select(f.TRITON_TRTLLM_KV, kv_cache_block_type="fraction"),
    }
    e.put(
        r.ENGINE_KV_USED,
        of_pool(select(engine.KV_USED_BLOCKS)),
        {d: aggregate("max", r.ENGINE, identity(x, d.startswith("triton"))) for d, x in plain.items()},
    )
    e.put(r.ENGINE_KV_CACHED, of_pool(select(engine.KV_CACHED_BLOCKS)), {})
    waste, size = (
        aggregate("max", r.ENGINE, select(m)) for m in (engine.KV_WASTE_BYTES, engine.KV_POOL_BYTES)
    )
    e.put(r.ENGINE_KV_WASTE, divide(waste, size), {})
    e.add(r.ENGINE_KV_HOLDER, "max", select(engine.KV_HOLDER, holder="1"), extra=("tenant",))


_TARGET = ("cluster", "instance", "pod", "namespace", "model_name", "engine", "workload_container")
"""What `identity` makes an engine's labels of."""


def _by_dp_rank(metric: Foreign) -> str:
    """A gauge of SGLang's schedulers: ranks of one data-parallel rank repeat each other."""
    return aggregate("sum", _TARGET, aggregate("max", (*_TARGET, "dp_rank"), sglang(metric)))


def _once(metric: Foreign) -> str:
    """A gauge of trtllm-serve without its `pid`: all its processes say the same."""
    return aggregate("max", _TARGET, select(metric))


def _tokens(e: _Engines) -> None:
    w = e.window
    prompt, cached, output = (
        {
            "vllm": rate(v, w, **VLLM),
            "sglang": sglang(s, w),
            "trtllm": rate(t, w),
        }
        for v, s, t in (
            (f.VLLM_PROMPT, f.SGLANG_PROMPT, f.TRTLLM_PROMPT),
            (f.VLLM_CACHED, f.SGLANG_CACHED, f.TRTLLM_CACHED),
            (f.VLLM_OUTPUT, f.SGLANG_OUTPUT, f.TRTLLM_OUTPUT),
        )
    )
    for kinds, v, t in (
        (prompt, f.VLLM_PROMPT, f.TRITON_TRTLLM_INPUT),
        (output, f.VLLM_OUTPUT, f.TRITON_TRTLLM_OUTPUT),
    ):
        kinds["triton_vllm"] = rate(v, w, **TRITON)
        kinds["triton_trtllm"] = histogram_sum(e.options.histograms, t, w)

    def ours(kind: str) -> str:
        return e.by_engine(rate(engine.TENANT_TOKENS, w, kind=kind))

    e.put(
        r.ENGINE_TOKENS,
        minus(ours("prompt"), ours("cached")),
        {
            d: minus(e.by_engine(x, d), e.by_engine(cached[d], d)) if d in cached else e.by_engine(x, d)
            for d, x in prompt.items()
        },
        kind="input",
    )
    e.put(r.ENGINE_TOKENS, ours("cached"), {d: e.by_engine(x, d) for d, x in cached.items()}, kind="cached")
    e.put(r.ENGINE_TOKENS, ours("output"), {d: e.by_engine(x, d) for d, x in output.items()}, kind="output")


def _requests(e: _Engines) -> None:
    """Requests that ended, by outcome; engines differ in what they tell apart."""
    w = e.window
    success = labelled(rate(f.TRITON_SUCCESS, w), "outcome", "ok")
    # A cancelled request is the caller's own doing.
    cancelled = labelled(rate(f.TRITON_FAILURE, w, reason="CANCELED"), "outcome", "abort")
    failed = labelled(rate(f.TRITON_FAILURE, w, reason=not_equal("CANCELED")), "outcome", "error")
    triton = first_of(success, cancelled, failed)
    e.add(
        r.ENGINE_REQUESTS,
        "sum",
        rate(engine.TENANT_REQUESTS, w),
        {
            "vllm": renamed(rate(f.VLLM_SUCCESS, w, **VLLM), outcome="finished_reason"),
            "sglang": first_of(
                labelled(sglang(f.SGLANG_REQUESTS, w), "outcome", "ok"),
                labelled(sglang(f.SGLANG_ABORTED, w), "outcome", "abort"),
            ),
            "trtllm": first_of(
                # Its own word for what the others call an abort.
                relabel(
                    renamed(rate(f.TRTLLM_SUCCESS, w), outcome="finished_reason"),
                    "outcome",
                    "abort",
                    "finished_reason",
                    "cancelled",
                ),
                labelled(rate(f.TRTLLM_ERRORS, w), "outcome", "error"),
            ),
            "triton_vllm": triton,
            "triton_trtllm": triton,
        },
        ("outcome",),
    )


def _experts_and_steps(e: _Engines) -> None:
    """What only the probe knows."""
    w = e.window
    e.add(r.ENGINE_EXPERT_IMBALANCE, "max", select(engine.EXPERT_IMBALANCE))
    ranks = aggregate("max", (*r.ENGINE, "expert_rank"), select(engine.EXPERT_RANK))
    e.put(
        r.ENGINE_EXPERT_RANK_IMBALANCE,
        divide(aggregate("max", r.ENGINE, ranks), aggregate("avg", r.ENGINE, ranks)),
        {},
    )
    worker = (*r.ENGINE, "rank", "gpu_uuid")
    form = e.options.histograms
    e.put(
        r.ENGINE_STEP_SECONDS,
        divide(
            aggregate("sum", worker, histogram_sum(form, engine.STEP, w)),
            aggregate("sum", worker, histogram_count(form, engine.STEP, w)),
        ),
        {},
    )
    e.add(r.ENGINE_FRAGMENTATION, "max", select(engine.FRAGMENTATION), extra=("rank", "gpu_uuid"))


def _models() -> Iterator[Rule]:
    yield Rule(r.MODEL_ENGINES, aggregate("count", r.MODEL, select(r.ENGINE_INFO)))
    for record, of, labels in (
        (r.MODEL_RUNNING, r.ENGINE_RUNNING, r.MODEL),
        (r.MODEL_WAITING, r.ENGINE_WAITING, r.MODEL),
        (r.MODEL_TOKENS, r.ENGINE_TOKENS, (*r.MODEL, "kind")),
        (r.MODEL_REQUESTS, r.ENGINE_REQUESTS, (*r.MODEL, "outcome")),
        (r.MODEL_PREEMPTIONS, r.ENGINE_PREEMPTIONS, r.MODEL),
        (r.FLEET_TOKENS, r.ENGINE_TOKENS, (*r.FLEET, "kind")),
        (r.FLEET_RUNNING, r.ENGINE_RUNNING, r.FLEET),
        (r.FLEET_WAITING, r.ENGINE_WAITING, r.FLEET),
    ):
        yield Rule(record, aggregate("sum", labels, select(of)))
    yield Rule(r.MODEL_KV_USED, aggregate("max", r.MODEL, select(r.ENGINE_KV_USED)))
    hit = aggregate("sum", r.MODEL, select(r.MODEL_TOKENS, kind="cached"))
    prompt = aggregate("sum", r.MODEL, select(r.MODEL_TOKENS, kind=one_of(("input", "cached"))))
    yield Rule(r.MODEL_PREFIX_HIT, divide(hit, prompt))
