"""Cost and truth of the engine probe on a real GPU: the deepseek-v2-lite shape with CUDA graphs, both model
runners.

Needs vLLM, a CUDA device and `gpuglass_vllm` on the path; nothing else of this project (but for part m, which
divides as the agent does), and no network. Each model runner is a process of its own (the first start
compiles: about two minutes). In it, at 4, 64 and 256 running requests:

- expert counts against tokens × top-k × layers, and against a scatter_add in every layer (mode `check`);
- GPU time of the probe's own kernels as a share of all kernel time, by torch.profiler;
- step time with hooks on and off in blocks that alternate in one process: paired medians, 95 % interval;
- CPU time of hooks and of the probe's threads as a share of step time; steps longer than their neighbours;
- over 60 s of each of two mixed loads, the probe's GPU time against the profiler's kernel time in windows of
  a repeat; the same for decode steps at each number of requests;
- (part m) memory by part: weights against the model's parameters, KV cache against what was planned, graphs
  against what their capture took from the device, and all parts against NVML's word on the device.

Ends with one JSON line. Without a GPU it says so and gives no figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EXPERTS, TOP_K, LAYERS = 64, 6, 26
CONFIG = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "torch_dtype": "bfloat16",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": LAYERS + 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 2,
    "num_experts_per_tok": TOP_K,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
TINY = {
    **CONFIG,
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
}
"""For trying the script out on a CPU (`--dry`)."""

PROMPT = 64
BLOCK, SKIP = 20, 4
"""Steps per block with hooks on or off, and how many at its begin are left out."""
WAVE = 16
"""Requests that come together in the mixed load of waves."""
WINDOWS = 8
"""Profiled windows of steps in the minute of mixed load."""
TARGETS = {
    "probe_gpu_percent": "<= 0.1",
    "hook_cpu_percent": "<= 1",
    "thread_cpu_percent": "<= 1",
    "steps_longer_percent_more": "<= 1",
    "experts_exact": ">= 1",
    "experts_like_scatter": ">= 1",
    "gpu_time_against_kernels_percent_off_waves": "<= 2",
    "memory_weights_percent_off": "<= 1",
    "memory_kv_cache_percent_off": "<= 0.1",
    "memory_graphs_bytes": ">= 1",
    "memory_parts_less_reserved_bytes": "<= 0",
    "memory_reserved_less_parts_bytes": "<= 0",
    "memory_rest_bytes": ">= 0",
    "memory_rest_percent": "<= 5",
}


def say(*words: object) -> None:
    """A line of progress, with the time since the script began."""
    print(f"[{time.monotonic() - BEGAN:6.1f} s]", *words, file=sys.stderr, flush=True)


BEGAN = time.monotonic()


# The agent's side


def receive(path: str, ready: Any = None) -> None:
    """Acknowledge every packet, as the agent does, and forget it."""
    import msgspec

    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(path)
    listening.listen(16)

    def serve(connection: socket.socket) -> None:
        with contextlib.suppress(ConnectionError):
            answer(connection)

    def answer(connection: socket.socket) -> None:
        while data := connection.recv(1 << 17):
            seq = msgspec.msgpack.decode(data)["seq"]
            if seq:
                connection.send(msgspec.msgpack.encode({"ack": seq}))

    while True:
        connection, _ = listening.accept()
        threading.Thread(target=serve, args=(connection,), daemon=True).start()


# In the engine's process


@dataclass
class Row:
    """One step as seen from outside the hooks."""

    tokens: int
    requests: int
    on: bool
    event: Any
    host_ns: int
    hook_ns: int


@dataclass
class Taps:
    """Stands around the worker's methods, outside all hooks, and sees every step begin."""

    worker: Any
    cuda: bool
    rows: list[Row] = field(default_factory=list)
    before: Callable[[int, Any], None] | None = None
    on: bool = True

    def __post_init__(self) -> None:
        self._execute = self.worker.execute_model
        self.worker.execute_model = self.execute_model
        self._hooks = [hook for hook in hook_table()._hooks.values() if hook.on]

    def switch(self, on: bool) -> None:
        """All hooks of all roles on or off."""
        if on != self.on:
            self.on = on
            for hook in self._hooks:
                hook.on = on

    def hook_ns(self) -> int:
        return sum(hook.ns for hook in self._hooks)

    def execute_model(self, output: Any, *args: Any, **kwargs: Any) -> Any:
        if output.total_num_scheduled_tokens > 0:
            if self.before is not None:
                self.before(len(self.rows), output)
            event = None
            if self.cuda:
                import torch

                event = torch.cuda.Event(enable_timing=True)
                event.record()
            self.rows.append(
                Row(
                    output.total_num_scheduled_tokens,
                    len(output.num_scheduled_tokens),
                    self.on,
                    event,
                    time.perf_counter_ns(),
                    self.hook_ns(),
                )
            )
        return self._execute(output, *args, **kwargs)

    def start(self, before: Callable[[int, Any], None] | None = None) -> None:
        self.rows = []
        self.before = before

    def periods(self, requests: int) -> list[tuple[int, bool, float, int]]:
        """(index, on, µs from begin to begin, hook ns) of decode steps with that many requests."""
        self.before = None
        synchronize(self.cuda)
        found = []
        for index, (row, following) in enumerate(zip(self.rows, self.rows[1:], strict=False)):
            if row.tokens == row.requests == requests == following.requests == following.tokens:
                if self.cuda:
                    us = row.event.elapsed_time(following.event) * 1e3
                else:
                    us = (following.host_ns - row.host_ns) / 1e3
                found.append((index, row.on, us, following.hook_ns - row.hook_ns))
        return found


class SumsTap:
    """Stands between the worker's source and its link, and adds up what is told."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self.lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        with self.lock:
            self.counts: dict[int, list[int]] = {}
            self.counted = self.seen = 0
            self.steps: dict[str, float] = {}

    def hello(self) -> dict[str, Any]:
        result: dict[str, Any] = self._source.hello()
        return result

    def states(self, everything: bool) -> Any:
        return self._source.states(everything)

    def sums(self) -> list[Any]:
        import numpy as np

        from gpuglass_vllm.records import ExpertSums, StepSums

        told = list(self._source.sums())
        with self.lock:
            for record in told:
                if isinstance(record, ExpertSums):
                    experts = self._source.hello()["experts"].experts
                    array = np.frombuffer(record.counts, dtype="<u4").reshape(-1, experts)
                    for layer, row in enumerate(array, record.first):
                        before = self.counts.get(layer, [0] * experts)
                        self.counts[layer] = [a + int(b) for a, b in zip(before, row, strict=True)]
                    if record.first == 0:
                        self.counted += record.counted_tokens
                        self.seen += record.seen_tokens
                elif isinstance(record, StepSums):
                    for name in (
                        "steps",
                        "attributed_ns",
                        "padding_ns",
                        "dummy_ns",
                        "unattributed_ns",
                        "idle_ns",
                    ):
                        self.steps[name] = self.steps.get(name, 0) + getattr(record, name)
        return told


def hook_table() -> Any:
    from gpuglass_vllm import hooks

    return hooks.table


def synchronize(cuda: bool) -> None:
    if cuda:
        import torch

        torch.cuda.synchronize()


def thread_ns() -> int:
    """CPU time of the probe's own threads so far."""
    total = 0
    for thread in threading.enumerate():
        if thread.name.startswith("gpuglass") and thread.native_id:
            total += int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[0])
    return total


class Bench:
    """An engine with the probe inside, and what is measured on it."""

    def __init__(self, arguments: argparse.Namespace, runner: str) -> None:
        self.arguments = arguments
        self.runner = runner
        self.cuda = not arguments.dry
        self.figures: dict[str, float] = {}
        self.scatter: Any = None
        self.model_config = TINY if arguments.dry else CONFIG

    def put(self, name: str, value: float, requests: int | None = None) -> None:
        key = f"{name}_v{self.runner}" + (f"_{requests}" if requests is not None else "")
        self.figures[key] = round(float(value), 5)
        say(key, "=", self.figures[key])

    def start(self, folder: Path) -> None:
        """Load vLLM, the probe and the model."""
        if self.arguments.mode == "check":
            self._scatter_in_every_layer()
        if "m" in self.arguments.parts:
            self.captured = captured_bytes()
        from vllm import LLM
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        from gpuglass_vllm import plugin, worker

        if not plugin._loaded:
            say("the entry point is not installed: loading the probe by hand")
            plugin.load()
        worker.marks.tenant_of = tenant_by_seed  # type: ignore[assignment]
        model = folder / "model"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text(json.dumps(self.model_config))
        options: dict[str, Any] = {
            "model": str(model),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "enable_prefix_caching": False,
            "max_num_seqs": max(self.arguments.batches),
            "disable_log_stats": True,
        }
        if self.arguments.dry:
            options |= {"dtype": "bfloat16", "max_model_len": 2048, "enforce_eager": True}
            options |= {"gpu_memory_utilization": 0.4}
        else:
            options |= {"max_model_len": 8192, "gpu_memory_utilization": 0.7}
        began = time.monotonic()
        self.llm = LLM(**options)
        say(f"engine ready after {time.monotonic() - began:.0f} s, runner v{self.runner}")
        core = self.llm.llm_engine.engine_core.engine_core
        self.worker = core.model_executor.driver_worker.worker
        self.probe = self.worker._gpuglass_probe
        for capability in hook_table()._hooks.values():
            say("hook", capability.name, capability.state, capability.reason)
        self.tap = SumsTap(self.probe.link._source)
        self.probe.link._source = self.tap
        self.taps = Taps(self.worker, self.cuda)
        say("held", round(self.probe.experts.routing.held_bytes / 2**20, 2), "MiB of topk_ids")
        self.generate(8, 20)

    def generate(self, requests: int, tokens: int, prompt: int = PROMPT, tenants: int = 1) -> tuple[int, int]:
        """Run so many requests to their end; (tokens computed, output tokens)."""
        from vllm import SamplingParams

        rng = random.Random(0)
        limit = self.model_config["vocab_size"] // 2
        prompts = [
            {"prompt_token_ids": [rng.randrange(limit) for _ in range(prompt)]} for _ in range(requests)
        ]
        params = [
            SamplingParams(
                max_tokens=tokens,
                ignore_eos=True,
                temperature=0,
                detokenize=False,
                extra_args={"bench_tenant": f"t{number % tenants}"},
            )
            for number in range(requests)
        ]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        made = sum(len(output.outputs[0].token_ids) for output in outputs)
        return requests * prompt + made - requests, made

    def every(self, steps: int) -> None:
        """Count one step in so many from now on."""
        experts = self.probe.experts
        experts.every, experts._position, experts._chosen = steps, 0, 0

    def settle(self) -> None:
        """Wait until all counts so far have been told."""
        synchronize(self.cuda)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            time.sleep(0.3)
            experts = self.probe.experts
            if experts._taking is None and experts._seen == experts._seen_before:
                return
        say("counts were not told in time")

    # (m)

    def memory(self) -> None:
        """Parts of the worker's memory against what others say of them."""
        sys.path.insert(0, str(Path(__file__).parents[2]))
        from exporters.vllm.memory import parts
        from gpuglass_vllm import allocator, memory
        from gpuglass_vllm.records import AllocatorState
        from tests.support.vllm_models import deepseek_parameters

        told = self.probe.memory.state(1)
        begin = time.perf_counter_ns()
        memory.Memory(self.worker, self.cuda)
        self.put("memory_read_ms", (time.perf_counter_ns() - begin) / 1e6)
        expected = deepseek_parameters(self.model_config) * 2
        self.put("memory_weights_percent_off", abs(told.weights / expected - 1) * 100)
        self.put("memory_loaded_percent_off", abs(self.probe.memory.loaded / expected - 1) * 100)
        core = self.llm.llm_engine.engine_core.engine_core
        planned = sum(tensor.size for tensor in core.scheduler.kv_cache_config.kv_cache_tensors)
        self.put("memory_kv_cache_percent_off", abs(told.kv_cache / planned - 1) * 100)
        state: AllocatorState | None = None
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self.generate(self.arguments.batches[0], 20, prompt=4096)
            synchronize(True)
            state = allocator.state(torch.cuda.memory.memory_stats_as_nested_dict(self.worker.device), 1)
            peak = torch.cuda.max_memory_allocated() - told.weights - told.kv_cache - told.graph_tensors
            self.put("memory_activation_peak_bytes", told.activation_peak)
            self.put("memory_activation_peak_seen_bytes", peak)
        found = parts(told, state)
        for part, size in found.items():
            self.put(f"memory_{part}_bytes", size)
        if state is None:
            return
        self.put("memory_graph_tensors_bytes", told.graph_tensors)
        self.put("memory_capture_took_bytes", sum(self.captured))
        whole = sum(found.values())
        self.put("memory_reserved_bytes", state.reserved)
        self.put("memory_parts_less_reserved_bytes", max(0, whole - state.reserved))
        self.put("memory_reserved_less_parts_bytes", max(0, state.reserved - whole))
        used = used_bytes(self.probe.uuid)
        self.put("memory_used_bytes", used)
        self.put("memory_rest_bytes", used - whole)
        self.put("memory_rest_percent", (used - whole) / used * 100)

    # (a)

    def exact(self, requests: int, tokens: int) -> None:
        """All steps counted: counts = tokens × top-k in each layer, for one tenant and for several."""
        self.every(1)
        top_k = self.model_config["num_experts_per_tok"]
        for tenants in (1, 3):
            self.settle()
            self.tap.reset()
            if self.scatter is not None:
                self.scatter.zero_()
            self.taps.start()
            by_outputs, _ = self.generate(requests, tokens, tenants=tenants)
            computed = sum(row.tokens for row in self.taps.rows)
            if computed != by_outputs:
                say("scheduled", computed, "tokens, prompts and outputs account for", by_outputs)
            self.settle()
            sums = [sum(row) for _, row in sorted(self.tap.counts.items())]
            exact = sums == [computed * top_k] * len(self.probe.layout.layers) and self.tap.seen == computed
            if not exact:
                say(
                    "expected",
                    computed * top_k,
                    "per layer, got",
                    sums,
                    "counted",
                    self.tap.counted,
                    self.tap.seen,
                )
            self.put("experts_exact" + ("" if tenants == 1 else "_tenants"), exact, requests)
            # The scatter counts padding too, so only batches of a captured size can be compared with it.
            if self.scatter is not None and (requests == 4 or requests % 8 == 0):
                mine = [row for _, row in sorted(self.tap.counts.items())]
                same = mine == self.scatter.cpu().tolist()
                if not same:
                    say("scatter", self.scatter.tolist()[:2], "ours", mine[:2])
                self.put("experts_like_scatter" + ("" if tenants == 1 else "_tenants"), same, requests)

    def _scatter_in_every_layer(self) -> None:
        """An independent count: one scatter_add in each layer, inside the graphs. The probe must chain to
        it."""
        import torch
        from vllm.v1.worker.gpu_worker import Worker

        bench = self
        load = Worker.load_model

        def load_model(worker: Any, *args: Any, **kwargs: Any) -> Any:
            result = load(worker, *args, **kwargs)
            from vllm.model_executor.layers.fused_moe.layer import MoERunner

            layers = [m for m in worker.model_runner.model.modules() if isinstance(m, MoERunner)]
            layers.sort(key=lambda layer: layer.layer_id)
            counts = bench.scatter = torch.zeros(
                len(layers), bench.model_config["n_routed_experts"], dtype=torch.int32, device=worker.device
            )
            for index, layer in enumerate(layers):

                def see(ids: Any, row: Any = counts[index]) -> None:
                    flat = ids.reshape(-1)
                    row.scatter_add_(0, flat.long(), torch.ones_like(flat, dtype=torch.int32))

                layer.router.set_capture_fn(see)
            return result

        Worker.load_model = load_model

    # (b)

    def decode_time(self, requests: int, steps: int) -> None:
        """Busy time of decode steps by the probe, without the profiler, against their kernels with it."""
        self.every(self.default_every)
        probe, add = self.probe, self.probe.ledger.add
        busy: list[float] = []

        def tapped(step: Any, busy_ns: float, idle_ns: float = 0.0, unattributed_ns: float = 0.0) -> None:
            busy.append(busy_ns)
            add(step, busy_ns, idle_ns, unattributed_ns)

        self.settle()
        probe.ledger.add = tapped
        self.generate(requests, steps + 60)
        self.settle()
        probe.ledger.add = add
        profiler = Profiler()

        def before(index: int, output: Any) -> None:
            if index == 20:
                profiler.start()
            elif index == 20 + steps:
                profiler.stop()

        self.taps.start(before)
        self.generate(requests, steps + 60)
        self.taps.before = None
        mine = sum(busy[20 : 20 + steps])
        kernels = profiler.result()
        seen = spans(kernels)
        say_gaps(kernels)
        self.put("decode_busy_us", mine / steps / 1e3, requests)
        for name in ("kernel_sum", "union_0us", "union_2us", "union_10us"):
            self.put(f"decode_busy_against_{name}_percent", (mine / seen[name] - 1) * 100, requests)

    def kernels(self, requests: int, every: int, steps: int) -> dict[str, float]:
        """Kernel time of some decode steps by the profiler: of all kernels, of ours, and per step (µs)."""
        self.every(every)
        profiler = Profiler()

        def before(index: int, output: Any) -> None:
            if index == 12:
                profiler.start()
            elif index == 12 + steps:
                profiler.stop()

        self.taps.start(before)
        self.generate(requests, steps + 40)
        self.taps.before = None
        seen = profiler.result()
        own = sum(end - begin for begin, end, name in seen if "gpuglass" in name)
        total = sum(end - begin for begin, end, _ in seen)
        count = sum("gpuglass" in name for _, _, name in seen)
        return {"own": own / 1e3, "total": total / 1e3, "steps": steps, "launched": count}

    # (c), (d), (e)

    def paired(self, requests: int, tokens: int, every: int, label: str = "") -> None:
        """Steps with hooks on and off in alternating blocks."""
        self.every(every)

        def before(index: int, output: Any) -> None:
            block = index // BLOCK
            self.taps.switch(block % 4 in (0, 3))

        synchronize(self.cuda)
        threads, began = thread_ns(), time.perf_counter_ns()
        spent = {hook.name: hook.ns for hook in hook_table()._hooks.values()}
        self.taps.start(before)
        self.generate(requests, tokens)
        self.taps.switch(True)
        steps = sum(row.on for row in self.taps.rows)
        for hook in hook_table()._hooks.values():
            if hook.ns - spent[hook.name] > 1000 * steps:
                say(f"  {hook.name}: {(hook.ns - spent[hook.name]) / steps / 1e3:.1f} us per step")
        threads, elapsed = thread_ns() - threads, time.perf_counter_ns() - began
        periods = self.taps.periods(requests)
        blocks: dict[int, list[float]] = {}
        state: dict[int, bool] = {}
        taken: list[int] = []
        usable: dict[bool, list[tuple[int, float]]] = {True: [], False: []}
        for index, on, us, hook_ns in periods:
            block = index // BLOCK
            if SKIP <= index % BLOCK < BLOCK - 1:
                blocks.setdefault(block, []).append(us)
                state[block] = on
                usable[on].append((index, us))
                if on:
                    taken.append(hook_ns)
        pairs = []
        for block in sorted(blocks):
            if block % 2 == 0 and block + 1 in blocks and state[block] != state[block + 1]:
                one, two = statistics.median(blocks[block]), statistics.median(blocks[block + 1])
                on, off = (one, two) if state[block] else (two, one)
                pairs.append((on - off) / off * 100)
        if not pairs or not taken:
            say("too few decode steps", len(periods))
            return
        off_us = statistics.median(us for _, us in usable[False])
        low, high = interval(pairs)
        self.put(f"step_us_off{label}", off_us, requests)
        self.put(f"step_us_on{label}", statistics.median(us for _, us in usable[True]), requests)
        self.put(f"step_percent_more{label}", statistics.median(pairs), requests)
        self.put(f"step_percent_more_low{label}", low, requests)
        self.put(f"step_percent_more_high{label}", high, requests)
        self.put(f"hook_us{label}", statistics.mean(taken) / 1e3, requests)
        self.put(f"hook_us_median{label}", statistics.median(taken) / 1e3, requests)
        self.put(f"hook_cpu_percent{label}", statistics.mean(taken) / 1e3 / off_us * 100, requests)
        self.put(f"thread_cpu_percent{label}", threads / elapsed * 100, requests)
        longer = {on: longer_than_neighbours(usable[on]) for on in (True, False)}
        self.put(f"steps_longer_percent_on{label}", longer[True], requests)
        self.put(f"steps_longer_percent_off{label}", longer[False], requests)
        self.put(f"steps_longer_percent_more{label}", max(0.0, longer[True] - longer[False]), requests)
        for on in (True, False):
            values = sorted(us for _, us in usable[on])
            word = "on" if on else "off"
            self.put(f"step_us_p99_{word}{label}", values[int(len(values) * 0.99)], requests)
            self.put(f"step_us_max_{word}{label}", values[-1], requests)
        say("pairs", len(pairs), "steps", len(usable[True]), len(usable[False]))

    # (t)

    def host_time(self, requests: int, tokens: int) -> None:
        """Where the hooks' time goes: medians of their parts. The stopwatch adds about a microsecond."""
        from gpuglass_vllm import attribution, core, experts, gpu_clock, worker

        watched: list[tuple[Any, str]] = [
            (gpu_clock.EventClock, "begin forward end poll _recorded"),
            (worker.Probe, "_changed_batch _see_padding _count_experts drain_clock"),
            (attribution.Ledger, "observe gains sums"),
            (core.CoreProbe, "on_schedule on_update states sums"),
            (experts.Experts, "begin finish drain"),
        ]
        if self.cuda:
            import torch

            watched.append((torch.cuda.Event, "record query elapsed_time"))
        spent: dict[str, list[int]] = {}
        before = []
        for owner, names in watched:
            for name in names.split():
                before.append((owner, name, getattr(owner, name)))
                setattr(owner, name, stopwatch(getattr(owner, name), spent, f"{owner.__name__}.{name}"))
        self.every(self.default_every)
        self.generate(requests, tokens)
        for owner, name, function in before:
            setattr(owner, name, function)
        for name, taken in sorted(spent.items()):
            taken.sort()
            middle, late = taken[len(taken) // 2] / 1e3, taken[int(len(taken) * 0.95)] / 1e3
            say(f"  {name:30} {len(taken):6} times, median {middle:7.1f}, 95 % {late:7.1f} us")

    # (f)

    def minute(self, seconds: float, load: str, open_requests: int = 64) -> None:
        """Mixed load: the probe's sums against the kernel time that the profiler sees.

        `load` is `waves` (prompts come sixteen at a time, and the GPU is the limit) or `one_by_one` (a prompt
        comes whenever a request ends; the host, feeding such steps piece by piece, is the limit).

        The profiler slows the host down, and what the host cannot feed the device waits for. So the load runs
        twice, step by step the same: once without the profiler, for what the probe takes as busy in each
        step, then with it for some windows of steps, for the kernels of these steps.
        """
        self.every(self.default_every)
        wave = min(WAVE, open_requests) if load == "waves" else 1
        told, busy, elapsed = self.mixed(open_requests, wave, seconds=seconds)
        gpu_ns = sum(
            told.get(name, 0) for name in ("attributed_ns", "padding_ns", "dummy_ns", "unattributed_ns")
        )
        self.put(f"minute_seconds_{load}", elapsed)
        self.put(f"minute_steps_{load}", told.get("steps", 0))
        self.put(f"minute_gpu_seconds_{load}", gpu_ns / 1e9)
        self.put(f"minute_idle_seconds_{load}", told.get("idle_ns", 0) / 1e9)
        self.put(f"minute_padding_percent_{load}", told.get("padding_ns", 0) / max(gpu_ns, 1) * 100)
        self.put(f"minute_sums_percent_off_{load}", abs(sum(busy) / gpu_ns - 1) * 100)
        if not self.cuda:
            return
        width = 25
        begins = [int(len(busy) * (number + 0.5) / WINDOWS) for number in range(WINDOWS)]
        windows: list[list[tuple[int, int, str]]] = []
        profilers: list[Profiler] = []

        def before(index: int, output: Any) -> None:
            if index in begins:
                profilers.append(Profiler())
                profilers[-1].start()
            elif index - width in begins:
                profilers[-1].stop()
                windows.append(profilers[-1].result())
                if len(windows) == 2:
                    say_gaps(windows[-1])

        self.mixed(open_requests, wave, steps=begins[-1] + width + 1, before=before)
        mine = sum(sum(busy[begin : begin + width]) for begin in begins)
        kernels: dict[str, float] = {}
        for window in windows:
            for name, value in spans(window).items():
                kernels[name] = kernels.get(name, 0.0) + value
        self.put(f"window_steps_{load}", len(windows) * width)
        self.put(f"window_busy_seconds_{load}", mine / 1e9)
        for name, value in kernels.items():
            self.put(f"window_{name}_seconds_{load}", value / 1e9)
            self.put(f"busy_against_{name}_percent_{load}", (mine / value - 1) * 100)
        self.put(f"gpu_time_against_kernels_percent_off_{load}", abs(mine / kernels["union_2us"] - 1) * 100)

    def mixed(
        self,
        open_requests: int,
        wave: int,
        seconds: float = 0.0,
        steps: int = 0,
        before: Callable[[int, Any], None] | None = None,
    ) -> tuple[dict[str, float], list[float], float]:
        """Prompts and answers of many lengths, for some seconds or steps; the same at each call. New requests
        come when there is room for so many as a wave has.

        Returns what was told in sums, the busy time of each step (ns), and the seconds it took.
        """
        from vllm import SamplingParams

        probe = self.probe
        busy: list[float] = []
        add = probe.ledger.add

        def tapped(step: Any, busy_ns: float, idle_ns: float = 0.0, unattributed_ns: float = 0.0) -> None:
            busy.append(busy_ns + unattributed_ns)
            add(step, busy_ns, idle_ns, unattributed_ns)

        self.settle()
        self.tap.reset()
        probe.ledger.add = tapped
        rng = random.Random(1)
        engine = self.llm.llm_engine
        limit = self.model_config["vocab_size"] // 2
        longest = 300 if self.arguments.dry else 2000
        begin = time.monotonic()
        self.taps.start(before)
        number = open_now = done = 0
        while True:
            going = done < steps if steps else time.monotonic() - begin < seconds
            room = going and open_now <= open_requests - wave
            while room and open_now < open_requests:
                prompt = [rng.randrange(limit) for _ in range(rng.randrange(32, longest))]
                params = SamplingParams(
                    max_tokens=rng.randrange(32, 400),
                    ignore_eos=True,
                    temperature=0,
                    detokenize=False,
                    extra_args={"bench_tenant": f"t{number % 5}"},
                )
                engine.add_request(f"load-{number}", {"prompt_token_ids": prompt}, params)
                number += 1
                open_now += 1
            if not going and not engine.has_unfinished_requests():
                break
            open_now -= sum(output.finished for output in engine.step())
            done += 1
        self.taps.before = None
        elapsed = time.monotonic() - begin
        self.settle()
        probe.ledger.add = add
        return dict(self.tap.steps), busy, elapsed

    def flush_cost(self) -> None:
        """GPU time of one copy of the counts, which happens every two seconds beside the engine's stream."""
        import torch

        from gpuglass_vllm.experts import INTERVAL

        counts = self.probe.experts._counts
        profiler = Profiler()
        profiler.start()
        for _ in range(20):
            with self.probe.experts._lock:
                counts.swap()
            while counts.collect() is None:
                pass
        torch.cuda.synchronize()
        profiler.stop()
        ns = sum(end - begin for begin, end, _ in profiler.result()) / 20
        self.put("flush_gpu_us", ns / 1e3)
        self.put("flush_gpu_percent", ns / (INTERVAL * 1e9) * 100)

    def run(self) -> None:
        """All parts that were asked for."""
        arguments = self.arguments
        parts = arguments.parts
        self.default_every = self.probe.experts.every
        self.put("default_every", self.default_every)
        quick = arguments.quick
        if arguments.mode == "check":
            for requests in (*arguments.batches, 5):
                self.exact(requests, 40 if quick else 120)
            return
        if "m" in parts:
            self.memory()
        if "b" in parts and self.cuda:
            warm = Profiler()
            warm.start()
            warm.stop()
            say("profiler started once")
        for requests in arguments.batches:
            if "a" in parts:
                self.exact(requests, 30 if quick else 60)
            if "b" in parts and self.cuda:
                steps = 40 if quick else 80
                seen = self.kernels(requests, 1, steps)
                counted = seen["own"] / seen["total"] * 100
                self.put("counted_step_gpu_percent", counted, requests)
                self.put("counted_step_gpu_us", seen["own"] / max(1, seen["launched"]), requests)
                self.put("step_kernel_us", seen["total"] / seen["steps"], requests)
                seen = self.kernels(requests, self.default_every, 2 * steps)
                self.put("probe_gpu_percent", seen["own"] / seen["total"] * 100, requests)
                self.put("smallest_every_for_0.1_percent", max(1, -(-counted // 0.1)), requests)
                self.decode_time(requests, steps)
            if "c" in parts:
                full = {4: 2400, 64: 1600, 256: 900}.get(requests, 1200)
                tokens = 60 if arguments.dry else full // 3 if quick else full
                self.paired(requests, tokens, self.default_every)
                if not quick and not arguments.dry:
                    self.paired(requests, full // 2, 1, "_every1")
            if "t" in parts:
                self.host_time(requests, 60 if arguments.dry else 400)
        if "b" in parts and self.cuda:
            self.flush_cost()
        if "f" in parts:
            for load in ("waves", "one_by_one"):
                self.minute(arguments.seconds or (12 if quick else 60), load, 4 if arguments.dry else 64)
        errors = {hook.name: hook.errors for hook in hook_table()._hooks.values() if hook.errors}
        self.put("hook_errors", sum(errors.values()))
        if errors:
            say("errors", errors)
        self.put("steps_not_counted", self.probe.experts.routing.incomplete)
        self.put("steps_not_timed", self.probe.clock.untimed)


class Profiler:
    """torch.profiler on the device's own records only."""

    def __init__(self) -> None:
        import torch

        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def start(self) -> None:
        synchronize(True)
        self._profile.start()

    def stop(self) -> None:
        synchronize(True)
        self._profile.stop()

    def result(self) -> list[tuple[int, int, str]]:
        """(begin ns, end ns, name) of every kernel, copy and fill on the device."""
        import torch

        found = []
        device = torch.autograd.DeviceType.CUDA
        for event in self._profile.profiler.kineto_results.events():
            if event.device_type() == device:
                begin = event.start_ns()
                name = event.name()
                kind = str(event.activity_type()) if hasattr(event, "activity_type") else ""
                if "sync" not in kind and "annotation" not in kind and not name.endswith("Sync"):
                    found.append((begin, begin + event.duration_ns(), name))
        found.sort()
        return found


def spans(kernels: list[tuple[int, int, str]]) -> dict[str, float]:
    """Kernel time (ns): the sum, and the union with pauses up to some µs closed (a graph's next launch)."""
    result = {"kernel_sum": float(sum(end - begin for begin, end, _ in kernels))}
    for closed in (0, 2, 5, 10, 50):
        total = 0
        until = None
        for begin, end, _ in kernels:
            if until is None:
                total += end - begin
                until = end
                continue
            pause = begin - until
            if pause > closed * 1000:
                total += end - begin
            elif end > until:
                total += end - until
            until = max(until, end)
        result[f"union_{closed}us"] = float(total)
    return result


def say_gaps(kernels: list[tuple[int, int, str]], least_us: float = 2.0) -> None:
    """Where the device waited between two kernels, most time first."""
    found: dict[tuple[str, str], list[int]] = {}
    until, name_before = kernels[0][1], kernels[0][2]
    for begin, end, name in kernels[1:]:
        if begin - until > least_us * 1e3:
            found.setdefault((name_before, name), []).append(begin - until)
        if end > until:
            until, name_before = end, name
    for (one, two), gaps in sorted(found.items(), key=lambda item: -sum(item[1]))[:8]:
        say(f"  gaps {len(gaps):5} x {statistics.median(gaps) / 1e3:8.1f} us: {one[:50]} | {two[:50]}")


def interval(values: list[float], rounds: int = 2000) -> tuple[float, float]:
    """95 % interval of the median, by resampling."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(rounds))
    return medians[int(rounds * 0.025)], medians[int(rounds * 0.975)]


def stopwatch(function: Callable[..., Any], spent: dict[str, list[int]], name: str) -> Callable[..., Any]:
    """The same function, its times noted by name and kind of thread."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter_ns()
        try:
            return function(*args, **kwargs)
        finally:
            own = threading.current_thread().name.startswith("gpuglass")
            key = f"{name} (link)" if own else name
            spent.setdefault(key, []).append(time.perf_counter_ns() - begin)

    return timed


def longer_than_neighbours(steps: list[tuple[int, float]]) -> float:
    """Percent of steps more than 1 % longer than the median of five steps on each side."""
    if not steps:
        return 0.0
    values = [us for _, us in steps]
    longer = 0
    for position, us in enumerate(values):
        around = values[max(0, position - 5) : position] + values[position + 1 : position + 6]
        if around and us > 1.01 * statistics.median(around):
            longer += 1
    return longer / len(values) * 100


def captured_bytes() -> list[int]:
    """What each capture of graphs took from the device, by vLLM's own count, as it happens."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as Runner2
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as Runner1

    took: list[int] = []

    def watch(runner: Any) -> None:
        capture = runner.capture_model

        def capture_model(*args: Any, **kwargs: Any) -> int:
            took.append(int(capture(*args, **kwargs)))
            return took[-1]

        runner.capture_model = capture_model

    for runner in (Runner1, Runner2):
        watch(runner)
    return took


def used_bytes(uuid: str) -> int:
    """Memory of the device that is used, by NVML, without what driver and firmware reserve for themselves."""
    from vllm.third_party import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    return int(pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2).used)


def tenant_by_seed(params: Any) -> str:
    """The tenant that this script gave a request (no frontend does here)."""
    return str((getattr(params, "extra_args", None) or {}).get("bench_tenant", ""))


def child(arguments: argparse.Namespace, runner: str) -> None:
    """Measure one model runner in this process; the figures go to a file after each part."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = str(folder / "agent.sock")
        receiver = subprocess.Popen([sys.executable, __file__, "--receive", path])
        try:
            while not Path(path).exists():
                if receiver.poll() is not None:
                    raise SystemExit("the receiver did not start")
                time.sleep(0.05)
            os.environ["GPUGLASS_SOCKET"] = path
            bench = Bench(arguments, runner)
            try:
                bench.start(folder)
                bench.run()
            finally:
                Path(arguments.out).write_text(json.dumps(bench.figures))
        finally:
            receiver.kill()
            receiver.wait()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # leaving the engine by the door takes half a minute


def environment(runner: str) -> dict[str, str]:
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "2" else "0",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    }


def has_gpu() -> bool:
    if not Path("/proc/driver/nvidia/version").exists() and not Path("/dev/nvidiactl").exists():
        return False
    try:
        import torch

        return bool(torch.cuda.is_available())
    except ImportError:
        return False


def missed(figures: dict[str, float], targets: dict[str, str]) -> list[str]:
    """Targets that the figures do not meet."""
    result = []
    for name, target in targets.items():
        sign, _, bound = target.partition(" ")
        value = figures[name]
        if not (value <= float(bound) if sign == "<=" else value >= float(bound)):
            result.append(name)
    return result


def targets_of(figures: dict[str, float]) -> dict[str, str]:
    """Targets for the figures there are: a figure's name without runner and batch is the target's."""
    found = {}
    for name in figures:
        base = name.rpartition("_v")[0]
        for target, bound in TARGETS.items():
            if base == target or (base == f"{target}_tenants"):
                found[name] = bound
    return found


def main() -> int:
    """Measure, report progress on standard error, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer steps, 12 s of mixed load")
    parser.add_argument("--runners", nargs="+", default=["2", "1"], choices=["1", "2"], help="model runners")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 64, 256], help="running requests")
    parser.add_argument(
        "--parts",
        default="abcf",
        help="a exact counts, b kernels, c paired steps, f the minute, m memory by part, t where the host's"
        " time goes",
    )
    parser.add_argument(
        "--mode", default="measure", choices=["measure", "check", "both"], help="check: scatter_add"
    )
    parser.add_argument("--seconds", type=float, default=0, help="of mixed load")
    parser.add_argument("--dry", action="store_true", help="a tiny model on a CPU, to try the script itself")
    parser.add_argument("--receive", help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.receive:
        receive(arguments.receive)
        return 0
    if arguments.child:
        child(arguments, arguments.child)
        return 0
    figures: dict[str, float] = {}
    machine: dict[str, Any] = {"cpus": os.cpu_count(), "python": platform.python_version()}
    failed = []
    if arguments.dry or has_gpu():
        modes = ["measure", "check"] if arguments.mode == "both" else [arguments.mode]
        for runner in arguments.runners:
            for mode in modes:
                with tempfile.NamedTemporaryFile(suffix=".json") as out:
                    command = [sys.executable, __file__, *sys.argv[1:]]
                    command += ["--child", runner, "--out", out.name, "--mode", mode]
                    say(f"runner v{runner}, {mode} …")
                    done = subprocess.run(command, env=environment(runner), stdout=sys.stderr)
                    if done.returncode:
                        failed.append(f"v{runner} {mode}")
                    text = Path(out.name).read_text()
                    figures |= json.loads(text) if text else {}
        if not arguments.dry:
            import torch

            machine["gpu"] = torch.cuda.get_device_name()
            machine["torch"] = torch.__version__
    else:
        machine["gpu"] = "none: nothing was measured"
    targets = targets_of(figures)
    result = {
        "benchmark": "engine_probe_gpu",
        "machine": machine,
        "figures": figures,
        "targets": targets,
        "missed": missed(figures, targets) + failed,
    }
    print(json.dumps(result))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
