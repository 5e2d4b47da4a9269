"""The worker's role: GPU time per request, expert choices, the allocator, and the batch of an out-of-memory.

`install` hooks vLLM where a worker gets its device. From then on the worker's own methods are observed:
`execute_model` and `sample_tokens` enclose a step, `execute_dummy_batch` one without requests, and
`compile_or_warm_up_model` ends before anything is recorded. What a step was is taken from the scheduler's
output that the worker gets, so nothing is matched with other processes.

The engine's thread only notes (`Noted`) and puts an event on the stream; noted steps wait in the clock's
queue until the device has passed them, and the link's thread works out the rest. `WorkerSource` hands the
results to the link.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from gpuglass_vllm import allocator, cuda_events, hooks, identity, marks, memory, records, settings
from gpuglass_vllm.attribution import Batch, Ledger, Step
from gpuglass_vllm.experts import EVERY_CPU, EVERY_CUDA, Counts, Experts, HostCounts, Layout, Routing
from gpuglass_vllm.gpu_anchor import Anchors
from gpuglass_vllm.gpu_clock import EventClock, WallClock
from gpuglass_vllm.kernels import KernelSampler, TooSlow, TorchProfiler
from gpuglass_vllm.link import Link, give_way
from gpuglass_vllm.step_samples import UNKNOWN as NO_SPAN
from gpuglass_vllm.step_samples import Noted, Span, StepSamples
from gpuglass_vllm.tenants import OpenTenants
from gpuglass_vllm.work_model import BY_TOKENS, UNKNOWN, WorkModel, device_by_name, fit

logger = logging.getLogger("gpuglass_vllm")

ROLE = "worker"
STEPS = hooks.table.hook("worker.steps")
"""GPU time per request."""
EXPERTS = hooks.table.hook("worker.experts")
ALLOCATOR = hooks.table.hook("worker.allocator")
OUT_OF_MEMORY = hooks.table.hook("worker.out_of_memory")
PADDING = hooks.table.hook("worker.padding")
WORK_MODEL = hooks.table.hook("worker.work_model")
"""Whether time is split by the engine's own model of work, or by tokens."""
SAMPLES = hooks.table.hook("worker.samples")
"""Some steps one by one."""
ANCHORS = hooks.table.hook("worker.anchors")
"""When the device had such a step, on the host's clock."""
KERNELS = hooks.table.hook("worker.kernels")
KERNELS.apart = True

ALLOCATOR_INTERVAL = 5.0
"""Seconds between statistics of the allocator."""

_GRAPH_SIZES = 4096
_AT_ONCE = 4
"""Steps worked out before the link's thread lets the engine's have the interpreter."""

_PROBE = "_gpuglass_probe"
_HELD = "_gpuglass_held"


def install() -> None:
    """Hook the worker of this process, whichever class it will be. Does nothing a second time."""
    try:
        from vllm.v1.worker.worker_base import WorkerWrapperBase
    except ImportError as error:
        STEPS.unavailable(f"this version has no worker wrapper: {error}")
        return
    if STEPS.activate():
        hooks.wrap(WorkerWrapperBase, "init_device", STEPS, before=_attach)


def _attach(wrapper: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The worker exists and is about to get its device: observe its class."""
    worker = wrapper.worker
    EXPERTS.activate()
    memory.watch_loading()
    if getattr(worker, _PROBE, None) is None:
        setattr(worker, _PROBE, Probe(worker))
        _wrap_methods(type(worker))


def _defining(cls: type, name: str) -> type:
    """The class that a method of `cls` comes from; `cls` itself if there is none."""
    return next((base for base in cls.__mro__ if name in vars(base)), cls)


def _wrap(cls: type, name: str, hook: hooks.Hook, **calls: Callable[..., Any]) -> None:
    """Put methods of the probe around a worker's method."""
    hooks.wrap(_defining(cls, name), name, hook, holder=_PROBE, **calls)


def _wrap_methods(cls: type) -> None:
    """All but `sample_tokens`: what is called there depends on the clock."""
    _wrap(cls, "compile_or_warm_up_model", EXPERTS, before=Probe.bind_experts)
    _wrap(cls, "compile_or_warm_up_model", STEPS, before=Probe.warm_up, after=Probe.start)
    _wrap(cls, "execute_model", STEPS, before=Probe.execute, after=Probe.executed, on_error=Probe.failed)
    _wrap(cls, "execute_dummy_batch", STEPS, before=Probe.dummy, after=Probe.sampled, on_error=Probe.cancel)


def _wrap_sampling(cls: type, clock: str) -> None:
    # Only a clock of the host has to know when it comes back to the step.
    comes_back = {"before": Probe.sample} if clock == WallClock.kind else {}
    _wrap(cls, "sample_tokens", STEPS, after=Probe.sampled, on_error=Probe.sampling_failed, **comes_back)


class Probe:
    """What is known about one worker. Methods up to `sampled` run on the engine's thread."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self.live = False
        self.link: Link | None = None
        self.clock: EventClock[Noted] | WallClock[Noted] = WallClock()
        self.ledger = Ledger()
        """Used by the link's thread."""
        self.samples = StepSamples()
        """Used by the link's thread."""
        self.anchors: Anchors | None = None
        """Used by the link's thread."""
        self.kernels: KernelSampler | None = None
        self.memory: memory.Memory | None = None
        self.tenants = OpenTenants()
        """Used by the engine's thread."""
        self.tid = 0
        """The engine's thread, as gettid(2) names it."""
        self.experts: Experts | None = None
        self.layout: Layout | None = None
        self.expert_ranks = 1
        self.expert_placement = "linear"
        self.on_cuda = False
        self.uuid = ""
        self.device_name = ""
        self.peak_flops = 0.0
        self.step: Noted | None = None
        self._output: Any = None
        self._number = 0
        self.chosen = False
        self.replays = 0
        """Captured graphs replayed in the step."""
        self._shape_tokens = self._shape_replays = self._shape_padded = 0
        """Tokens and replays of the last step whose padding was looked at, and its padding."""
        self._graph_sizes: set[int] = set()
        """Numbers of tokens whose steps replay captured graphs."""
        self._ended: tuple[str, ...] = ()
        """Requests whose end could not be noted yet."""

    # Start

    def warm_up(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The engine compiles and captures: nothing that runs now is recorded."""
        self.live = False

    def start(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, token: Any) -> None:
        """The engine is ready to serve: tell who we are, and record from now on."""
        if self.link is None:
            self._describe_device()
            model = self._work_model()
            self.clock = self._new_clock()
            _wrap_sampling(type(self.worker), self.clock.kind)
            self.ledger = Ledger(model)
            rank = int(getattr(self.worker, "rank", 0))
            self.samples = StepSamples(settings.current().steps_every, chunks=rank == 0)
            for hook in (OUT_OF_MEMORY, PADDING, SAMPLES):
                hook.activate()
            if self.on_cuda:
                ALLOCATOR.activate()
            else:
                ALLOCATOR.unavailable("the engine runs on a CPU")
            if self.on_cuda:
                _watch_replays(self)
            self._place_on_host_clock()
            self._profile_kernels()
            self.memory = memory.Memory(self.worker, self.on_cuda)
            self.link = Link(ROLE, WorkerSource(self))
            self.link.start()
        if self.experts is not None:
            self.experts.routing.capture_end()  # also if a capture failed on the way
        elif EXPERTS.on:
            EXPERTS.unavailable("the model's layers could not be bound: an error of the probe, see the log")
        self.live = True

    def _describe_device(self) -> None:
        import torch

        device = getattr(self.worker, "device", None)
        self.on_cuda = getattr(device, "type", "") == "cuda"
        config = self.worker.vllm_config
        if self.on_cuda:
            properties = torch.cuda.get_device_properties(device)
            self.device_name = properties.name
            uuid = str(getattr(properties, "uuid", ""))
            self.uuid = uuid if not uuid or uuid.startswith("GPU-") else f"GPU-{uuid}"
        else:
            self.device_name = getattr(device, "type", "cpu") or "cpu"
        known = device_by_name(self.device_name)
        if known is not None:
            self.peak_flops = known.flops8 if _is_8_bits(config) else known.flops

    def _place_on_host_clock(self) -> None:
        """Get ready to tell when the device had a step."""
        if not isinstance(self.clock, EventClock):
            ANCHORS.unavailable("steps are timed by the host's clock")
        elif ANCHORS.activate():
            self.anchors = ANCHORS.run(_anchors, self.worker.device)

    def _profile_kernels(self) -> None:
        """Get ready to profile steps, if that was asked for."""
        every = settings.current().kernels_every
        if not every:
            KERNELS.not_wanted("GPUGLASS_KERNELS_EVERY is 0")
        elif not self.on_cuda:
            KERNELS.unavailable("the engine runs on a CPU")
        elif KERNELS.activate():
            sampler = KernelSampler(TorchProfiler(self.worker.device), every)
            try:
                sampler.warm_up()
            except Exception as error:
                KERNELS.unavailable(f"the profiler cannot be started: {error!r}"[:200])
            else:
                self.kernels = sampler

    def _new_clock(self) -> EventClock[Noted] | WallClock[Noted]:
        if not self.on_cuda:
            return WallClock()
        try:
            record = cuda_events.recorder(self.worker.device)
            return EventClock(cuda_events.new_event, record, cuda_events.query())
        except Exception as error:
            logger.warning("steps are timed by the host's clock, CUDA events cannot be had: %r", error)
            return WallClock()

    def _work_model(self) -> WorkModel:
        WORK_MODEL.activate()
        try:
            config = self.worker.vllm_config
            known = device_by_name(self.device_name)
            model = fit(_VllmAnalytic(config), known or UNKNOWN, _is_8_bits(config))
        except Exception as error:
            WORK_MODEL.unavailable(f"split by tokens: {type(error).__name__}: {error}"[:200])
            return BY_TOKENS
        return model

    def bind_experts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is loaded and its graphs are not captured yet: look into its routers."""
        if self.experts is not None:
            return
        every = settings.current().experts_every
        if every == 0:
            EXPERTS.unavailable("GPUGLASS_EXPERTS_EVERY is 0")
            return
        try:
            found = find_routers(self.worker)
        except Exception as error:
            found = f"the model's layers are built otherwise: {error!r}"[:200]
        if isinstance(found, str):
            EXPERTS.unavailable(found)
            return
        layout, routers = found
        config = self.worker.vllm_config
        cuda = getattr(self.worker.device, "type", "") == "cuda"
        counts: Counts = HostCounts(layout)
        default = EVERY_CPU
        if cuda:
            from gpuglass_vllm.expert_kernel import DeviceCounts

            limit = int(config.scheduler_config.max_num_batched_tokens)
            counts = device_counts = DeviceCounts(layout, limit, self.worker.device)
            device_counts.warm_up()
            default = EVERY_CUDA
        routing = Routing(layout)
        self.experts = Experts(routing, counts, default if every < 0 else every)
        if cuda:
            _watch_graphs(self)
        for index, router in enumerate(routers):
            router.set_capture_fn(routing.capture_fn(index, router.capture_fn))
        self.layout = layout
        parallel = config.parallel_config
        if getattr(parallel, "enable_expert_parallel", False):
            self.expert_ranks = parallel.tensor_parallel_size * parallel.data_parallel_size
        placement = str(getattr(parallel, "expert_placement_strategy", "linear"))
        self.expert_placement = "unknown" if getattr(parallel, "enable_eplb", False) else placement

    # Steps

    def execute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A step begins."""
        if not self.live:
            return
        output = args[0] if args else kwargs["scheduler_output"]
        total = output.total_num_scheduled_tokens
        cached = output.scheduled_cached_reqs
        if (
            output.scheduled_new_reqs
            or output.finished_req_ids
            or self._ended
            or not (total and cached.req_ids)
        ):
            batch = self._changed_batch(output)
            if not batch.runs:
                self._leave(Noted(batch, self._number))
                return
        else:
            batch = Batch(
                (),
                cached.req_ids,
                cached.num_computed_tokens,
                getattr(cached, "resumed_req_ids", ()),
                (),
                output.num_scheduled_tokens,
                total,
            )
        if not self.tid:
            self.tid = threading.get_native_id()
        self._number = number = self._number + 1
        noted = self.step = Noted(batch, number, time.monotonic_ns())
        self.replays = 0
        self._output = output
        if self.kernels is not None and self.kernels.due():
            noted.profiled = self._profile(self.kernels.begin)
        if not self.clock.begin(noted, total in self._graph_sizes):
            self._forget(noted)
        experts = self.experts
        self.chosen = experts is not None and EXPERTS.on and experts.begin(total)

    def _changed_batch(self, output: Any) -> Batch:
        """Requests came or went."""
        batch = Batch.of(output, marks.tenant_of)
        if self.experts is not None:
            self._follow(batch)
        if self._ended:
            batch.finished = (*self._ended, *batch.finished)
            self._ended = ()
        return batch

    def _follow(self, batch: Batch) -> None:
        for request_id in batch.finished:
            self.tenants.end(request_id)
        for new in batch.new:
            self.tenants.begin(new.id, new.tenant)

    def executed(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, token: Any) -> None:
        """The forward pass is queued; sampling follows unless there is a result already."""
        noted = self.step
        if noted is None or noted.batch is None:
            return
        replays = noted.replays = self.replays
        tokens = noted.batch.total
        if tokens == self._shape_tokens and replays == self._shape_replays:
            noted.padded = self._shape_padded
        else:
            self._note_shape(noted, tokens, replays)
        if self.chosen:
            EXPERTS.guard(self._count_experts, noted.batch, self._output)
        if result is None:
            if self.clock.kind == WallClock.kind:
                self.clock.pause()
        else:
            self.sampled(args, kwargs, result, token)

    def _note_shape(self, noted: Noted, tokens: int, replays: int) -> None:
        """Other tokens than before, or run another way: look at the padding, and whether graphs ran."""
        if not replays:
            self._graph_sizes.discard(tokens)
        elif len(self._graph_sizes) < _GRAPH_SIZES:
            self._graph_sizes.add(tokens)
        PADDING.guard(self._see_padding, noted, tokens)
        self._shape_tokens, self._shape_replays, self._shape_padded = tokens, replays, noted.padded

    def sample(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Sampling begins."""
        if self.step is not None:
            self.clock.resume()

    def dummy(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A step without requests begins: others of a data-parallel group have some."""
        if not self.live:
            return
        self._number += 1
        self.step = Noted(None, self._number, time.monotonic_ns())
        self.replays = 0
        self.chosen = False
        if not self.clock.begin(self.step, False):
            self._forget(self.step)

    def sampled(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, token: Any) -> None:
        """All of the step is queued."""
        noted = self.step
        if noted is not None:
            self.step = self._output = None
            noted.end_ns = time.monotonic_ns()
            self.clock.end()
            if noted.profiled and self.kernels is not None:
                self._profile(self.kernels.end, noted.number)

    def _profile(self, function: Callable[..., None], *args: Any) -> bool:
        """Call the profiler; whether that went well. Its time is kept apart from the probe's own."""
        start = time.perf_counter_ns()
        try:
            KERNELS.check()
            function(*args)
            return True
        except TooSlow as error:
            KERNELS.unavailable(str(error))
        except Exception as error:
            KERNELS.failed(error)
        finally:
            took = time.perf_counter_ns() - start
            KERNELS.ns += took
            STEPS.ns -= took
            if not KERNELS.on:
                self.kernels = None
        return False

    def _leave(self, noted: Noted) -> None:
        """Note a batch for which there is no time."""
        noted.timed = False
        if not self.clock.note(noted):
            self._forget(noted)

    def _forget(self, noted: Noted) -> None:
        """There is no room: as if its requests never began, but those that ended must not stay for ever."""
        if noted.batch is not None:
            self._ended += noted.batch.finished

    def cancel(self, args: tuple[Any, ...], kwargs: dict[str, Any], error: BaseException, token: Any) -> None:
        """The engine failed in this step."""
        noted, self.step, self._output = self.step, None, None
        self.clock.cancel()
        if noted is not None and noted.profiled and self.kernels is not None:
            self._profile(self.kernels.cancel)
        if noted is not None:
            self._leave(noted)
        if self.experts is not None:
            self.experts.cancel()

    def failed(self, args: tuple[Any, ...], kwargs: dict[str, Any], error: BaseException, token: Any) -> None:
        """`execute_model` raised: if memory ran out, tell which batch it was."""
        output = args[0] if args else kwargs.get("scheduler_output")
        OUT_OF_MEMORY.guard(self._tell_out_of_memory, error, output)
        self.cancel(args, kwargs, error, token)

    def sampling_failed(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], error: BaseException, token: Any
    ) -> None:
        """`sample_tokens` raised."""
        OUT_OF_MEMORY.guard(self._tell_out_of_memory, error, self._output)
        self.cancel(args, kwargs, error, token)

    def _tell_out_of_memory(self, error: BaseException, output: Any) -> None:
        # By name: torch has one for the device's memory, and older versions have it elsewhere.
        known = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
        if self.link is None or output is None or not known:
            return
        tokens_of = {
            identity.short_id(request_id): tokens
            for request_id, tokens in list(output.num_scheduled_tokens.items())
        }
        self.link.event(allocator.out_of_memory(error, tokens_of, time.monotonic_ns()))

    def _see_padding(self, noted: Noted, tokens: int) -> None:
        state = getattr(self.worker.model_runner, "execute_model_state", None)
        if state is None:
            return
        batch = getattr(state, "input_batch", None)
        if batch is not None:
            rows = batch.num_tokens_after_padding
        else:
            hidden = getattr(state, "hidden_states", None)
            rows = hidden.shape[0] if hidden is not None else tokens
        noted.padded = max(0, rows - tokens)

    def _count_experts(self, batch: Batch, output: Any) -> None:
        experts = self.experts
        if experts is None:
            return

        def spans() -> list[tuple[str, int]]:
            ids = batch_order(self.worker.model_runner, len(batch.new) + len(batch.ids))
            tokens_of = output.num_scheduled_tokens
            return [
                (tenant, tokens_of.get(i, 0)) for tenant, i in zip(self.tenants.of(ids), ids, strict=True)
            ]

        experts.finish(batch.total, self.tenants.single, spans)

    # On the link's thread

    def _deliver(self, noted: Noted, busy_ns: float, idle_ns: float, unattributed_ns: float) -> None:
        step = Step(None) if noted.batch is None else self.ledger.observe(noted.batch)
        if not noted.timed:
            self.ledger.end(step)
            return
        step.padded = noted.padded
        step.host_fed = self.on_cuda and noted.batch is not None and noted.replays != 1
        self.ledger.add(step, busy_ns, idle_ns, unattributed_ns)
        if SAMPLES.on:
            self.samples.see(noted, step, busy_ns, self._span)

    def _span(self) -> Span:
        """When the device had the step that is being delivered."""
        span, anchors = self.clock.span, self.anchors
        if span is None or anchors is None:
            return NO_SPAN
        found: Span | None = ANCHORS.guard(anchors.place, *span)
        return found or NO_SPAN

    def drain_clock(self) -> None:
        """Work out the steps that the device has passed."""
        while self.clock.poll(self._deliver, _AT_ONCE):
            give_way()

    def take_samples(self) -> list[records.StepSample]:
        """Steps to be told one by one."""
        return self.samples.take(self.tid, self.on_cuda, give_way)

    def take_kernels(self) -> records.StepKernels | None:
        """What ran in a profiled step."""
        return self.kernels.take() if self.kernels is not None else None


class WorkerSource:
    """What the link asks for."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._next_allocator = 0.0

    def hello(self) -> dict[str, Any]:
        """Who this worker is."""
        probe = self._probe
        fields = identity.of(probe.worker.vllm_config)
        fields.update(
            rank=int(getattr(probe.worker, "rank", 0)),
            gpu_uuid=probe.uuid,
            device_name=probe.device_name[:64],
            peak_flops=probe.peak_flops,
        )
        if probe.layout is not None and probe.experts is not None:
            fields["experts"] = records.Experts(
                layers=list(probe.layout.layers),
                experts=probe.layout.experts,
                top_k=probe.layout.top_k,
                every=probe.experts.every,
                ranks=probe.expert_ranks,
                placement=probe.expert_placement,
            )
        return fields

    def states(self, everything: bool) -> Iterable[records.Record]:
        """GPU time of requests, and now and then the allocator's statistics."""
        probe = self._probe
        at = time.monotonic_ns()
        result: list[records.Record] = []
        if probe.anchors is not None:
            ANCHORS.guard(probe.anchors.refresh)
        STEPS.guard(probe.drain_clock)
        result += probe.ledger.gains(everything).records(at)
        give_way()
        self._tell_steps(probe)
        now = time.monotonic()
        if ALLOCATOR.on and (everything or now >= self._next_allocator):
            self._next_allocator = now + ALLOCATOR_INTERVAL
            state = ALLOCATOR.guard(self._allocator_state, at)
            if state is not None:
                result.append(state)
        if probe.memory is not None:
            result += probe.memory.states(at, everything)
        return result

    @staticmethod
    def _tell_steps(probe: Probe) -> None:
        """Steps that are told one by one; a step before its kernels."""
        if probe.link is None:
            return
        for sample in SAMPLES.guard(probe.take_samples) or ():
            probe.link.event(sample)
        for chunks in SAMPLES.guard(probe.samples.take_chunks) or ():
            probe.link.event(chunks)
        if probe.kernels is not None and (found := KERNELS.guard(probe.take_kernels)) is not None:
            probe.link.event(found)

    def sums(self) -> Iterable[records.Record]:
        """Time of tenants and steps, and expert counts when it is time for them."""
        probe = self._probe
        STEPS.guard(probe.drain_clock)
        result: list[records.Record] = list(probe.ledger.sums(probe.clock.kind))
        if probe.experts is not None and EXPERTS.on:
            last = probe.link is not None and probe.link.stopping
            drained = EXPERTS.guard(probe.experts.drain, time.monotonic_ns(), last)
            if drained is not None:
                sums, hot = drained
                result += sums
                if hot is not None and probe.link is not None:
                    probe.link.event(hot)
        return result

    def _allocator_state(self, at: int) -> records.AllocatorState:
        import torch

        return allocator.state(torch.cuda.memory.memory_stats_as_nested_dict(self._probe.worker.device), at)


# What is read from vLLM


def find_routers(worker: Any) -> tuple[Layout, list[Any]] | str:
    """The routers of the model's expert layers in order, or why they cannot be observed."""
    try:
        from vllm.model_executor.layers.fused_moe.layer import MoERunner
        from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
    except ImportError as error:
        return f"this version's expert layers are built otherwise: {error}"
    model = worker.model_runner.model
    if re.search(r"deepseek_?v41", type(model).__module__ + type(model).__name__, re.IGNORECASE):
        return "observing the routing would switch off this model's fused decode path"
    runners = [module for module in model.modules() if isinstance(module, MoERunner)]
    if not runners:
        return "the model has no expert layers"
    config = worker.vllm_config
    parallel = config.parallel_config
    if worker.rank % max(1, parallel.tensor_parallel_size) != 0:
        return "counted on the first rank of the tensor-parallel group"
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        return "prefill context parallelism spreads the tokens over ranks"
    if getattr(parallel, "use_ubatching", False):
        return "micro-batches split the step"
    cuda = getattr(worker.device, "type", "") == "cuda"
    if not cuda and int(getattr(config.compilation_config, "mode", 0) or 0) != 0:
        return "on a CPU the compiler would see the observation: start the engine with --enforce-eager"
    routers = []
    layers = []
    shape: tuple[int, int] | None = None
    for runner in runners:
        reason = _why_not(runner, BaseRouter)
        if reason:
            return reason
        router = runner.router
        here = (int(router.global_num_experts), int(router.top_k))
        logical = getattr(getattr(runner, "moe_config", None), "num_logical_experts", None)
        if isinstance(logical, int) and logical > 0:
            here = (logical, here[1])
        if shape is not None and here != shape:
            return "layers differ in their number of experts"
        shape = here
        routers.append(router)
        layers.append(int(runner.layer_id))
    if shape is None:
        return "the model has no expert layers"
    order = sorted(range(len(layers)), key=lambda index: layers[index])
    layout = Layout(tuple(layers[index] for index in order), *shape)
    return layout, [routers[index] for index in order]


def _why_not(runner: Any, base_router: type) -> str:
    """Why the routing of one expert layer cannot be seen; empty if it can."""
    if getattr(runner, "is_monolithic", False):
        return "a monolithic kernel routes inside itself"
    if not isinstance(runner.router, base_router) or not hasattr(runner.router, "capture_fn"):
        return f"{type(runner.router).__name__} cannot be observed"
    if getattr(runner, "do_naive_dispatch_combine", False):
        return "tokens of all data-parallel ranks are gathered before routing"
    if getattr(getattr(runner, "moe_config", None), "is_sequence_parallel", False):
        return "sequence parallelism spreads the tokens over ranks"
    return ""


def batch_order(runner: Any, requests: int) -> list[str]:
    """Request ids in the order in which their tokens lie in the batch that was just run."""
    state = getattr(runner, "execute_model_state", None)
    batch = getattr(state, "input_batch", None)
    if batch is None:
        batch = runner.input_batch
    return list(batch.req_ids[:requests])


def _is_8_bits(config: Any) -> bool:
    name = str(getattr(config.model_config, "quantization", None) or "").lower()
    return "fp8" in name or "int8" in name or "w8a8" in name


class _VllmAnalytic:
    """vLLM's own model of its work, on one rank."""

    def __init__(self, config: Any) -> None:
        from vllm.v1.metrics.perf import ExecutionContext, ModelMetrics

        self._metrics = ModelMetrics(config)
        if not self._metrics.is_enabled():
            raise ValueError("vLLM has no model of this architecture")
        self._context = ExecutionContext.from_single_request

    def flops(self, tokens: int, context: int, prefill: bool) -> float:
        return float(self._metrics.get_num_flops(self._context(tokens, context, prefill)))

    def bytes(self, tokens: int, context: int, prefill: bool) -> float:
        batch = self._context(tokens, context, prefill)
        return float(self._metrics.get_read_bytes(batch) + self._metrics.get_write_bytes(batch))


# Captured graphs

_probe_of_graphs: Probe | None = None
"""The process's worker; graphs do not know theirs."""


def _anchors(device: Any) -> Anchors:
    """Anchors on a stream of their own; the first one is taken at once."""
    import torch

    stream = torch.cuda.Stream(device)

    def pass_event(event: Any) -> None:
        event.record(stream)
        event.synchronize()

    anchors = Anchors(cuda_events.new_event, pass_event)
    anchors.refresh()
    return anchors


def _watch_replays(probe: Probe) -> None:
    """See captured graphs as they are replayed."""
    import torch

    global _probe_of_graphs
    _probe_of_graphs = probe

    def replay(graph: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """In a step, the first graph begins the forward pass."""
        current = _probe_of_graphs
        if current is None or current.step is None:
            return
        current.replays += 1
        if current.replays == 1:
            current.clock.forward(time.monotonic_ns())
        if current.chosen and current.experts is not None:
            held = getattr(graph, _HELD, None)
            if held is not None:
                current.experts.routing.replayed(held)

    def replayed(graph: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, token: Any) -> None:
        current = _probe_of_graphs
        if current is not None and current.clock.launching:
            current.clock.launched()

    hooks.wrap(torch.cuda.CUDAGraph, "replay", STEPS, before=replay, after=replayed)


def _watch_graphs(probe: Probe) -> None:
    """Let captured graphs keep their layers' choices."""
    import torch

    global _probe_of_graphs
    _probe_of_graphs = probe

    def routing() -> Routing | None:
        current = _probe_of_graphs
        return current.experts.routing if current is not None and current.experts is not None else None

    def begin(graph: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (current := routing()) is not None:
            setattr(graph, _HELD, current.capture_begin())

    def end(graph: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (current := routing()) is not None:
            current.capture_end()

    hooks.wrap(torch.cuda.CUDAGraph, "capture_begin", EXPERTS, before=begin)
    hooks.wrap(torch.cuda.CUDAGraph, "capture_end", EXPERTS, before=end)
