"""Truth of spans on a real GPU: kernels of a decode step in CUDA graphs, what a long prompt does to others.

    python tests/benchmarks/otel_bridge_gpu.py [--quick]

Needs vLLM, a CUDA device, and this project with its extra `traces` in one environment; no network. Receiver,
ledger and bridge of the agent run here, the engine (deepseek-v2-lite's shape, dummy weights) in a process of
its own. It decodes with profiled steps, then takes a prompt of 32,768 tokens in while others decode. Looked
at are the spans as a collector would get them:

- the time of a profiled decode step's kernels against the time that `gpu.execute` says the device took;
- the error that is told of the device's times; children that leave their parents;
- the long request's share of the KV cache, its pieces, and how much longer the steps of others took in which
  they were computed.

Ends with one JSON line. Without a GPU it says so and gives no figures; `--dry` tries the script out on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "exporters" / "engine_probe"))

from tests.benchmarks.engine_probe_gpu import CONFIG, TINY, has_gpu, say

TARGETS = {
    "kernel_sum_percent_off": "<= 5",
    "profiled_graph_steps": ">= 1",
    "children_outside_parents": "<= 0",
    "steps_linked_to_long_prompt": ">= 1",
    "long_prompt_kv_share": ">= 0.01",
}
OTHERS, LONG = 16, 32_768
WAIT = 20
"""Seconds for the last words and the export."""


def engine(arguments: argparse.Namespace) -> None:
    """The engine's process: decodes for a while, then with a long prompt in between."""
    from vllm import LLM, SamplingParams
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from gpuglass_vllm import plugin

    if not plugin._loaded:
        plugin.load()
    dry = arguments.dry
    long, seconds = (1024, 3.0) if dry else (LONG, 15.0 if arguments.quick else 45.0)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(TINY if dry else CONFIG))
        options: dict[str, Any] = {"dtype": "bfloat16", "enforce_eager": True, "max_num_batched_tokens": 256}
        llm = LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_num_seqs=OTHERS + 1,
            max_model_len=2048 if dry else LONG + 1024,
            gpu_memory_utilization=0.4 if dry else 0.8,
            **(options if dry else {"max_num_batched_tokens": 4096}),
        )
        inner, number = llm.llm_engine, 0

        def ask(prompt: int, output: int, name: str) -> None:
            params = SamplingParams(max_tokens=output, ignore_eos=True, detokenize=False)
            inner.add_request(name, {"prompt_token_ids": [1 + n % 200 for n in range(prompt)]}, params)

        until, asked_long, open_now = time.monotonic() + 2 * seconds, False, 0
        while open_now or time.monotonic() < until:
            while open_now < OTHERS and time.monotonic() < until:
                number += 1
                ask(64, 256, f"other-{number}")
                open_now += 1
            if not asked_long and time.monotonic() > until - seconds:
                asked_long = True
                ask(long, 32, "long")
                open_now += 1
            open_now -= sum(output.finished for output in inner.step())
        time.sleep(1)  # the link's thread speaks four times a second
    sys.stdout.flush()
    os._exit(0)  # leaving the engine by the door takes half a minute


class Collected:
    """A transport that keeps the spans."""

    def __init__(self) -> None:
        self.spans: list[Any] = []

    def send(self, body: bytes, timeout: float) -> Any:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        from otel_bridge.transport import Reply

        for of in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.spans += [span for scope in of.scope_spans for span in scope.spans]
        return Reply("ok")

    def abort(self) -> None:
        """Nothing is under way."""


def told(span: Any) -> dict[str, Any]:
    """Attributes of a span or link."""
    return {p.key: getattr(p.value, p.value.WhichOneof("value")) for p in span.attributes}


def length(span: Any) -> int:
    return int(span.end_time_unix_nano - span.start_time_unix_nano)


def collect(arguments: argparse.Namespace) -> list[Any]:
    """Run the engine under an agent of our own; all spans of all its requests."""
    from exporters.vllm.part import EnginesPart
    from gpuglass import catalog
    from gpuglass.config import Config, EnginesConfig, TracesConfig
    from gpuglass.family import Owner
    from gpuglass.gpu_processes import GpuProcesses
    from gpuglass.record_hub import RecordHub
    from gpuglass.store import Store
    from otel_bridge.bridge import TracesPart

    collected, hub = Collected(), RecordHub()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/agent.sock"
        config = Config(
            engines=EnginesConfig(socket=path),
            traces=TracesConfig(endpoint="http://localhost:1", ratio=1.0, steps=32),
        )
        traces = TracesPart(config.traces, hub, collected)
        engines = EnginesPart(config, Store(catalog.owned_by(Owner.AGENT)), GpuProcesses(), hub)
        traces.start()
        engines.start()
        environment = {
            **os.environ,
            "GPUGLASS_SOCKET": path,
            "GPUGLASS_KERNELS_EVERY": "10",
            "GPUGLASS_STEPS_EVERY": "5",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "PYTHONPATH": os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")]),
        }
        flags = [flag for flag in ("--dry", "--quick") if getattr(arguments, flag[2:])]
        subprocess.run([sys.executable, __file__, "--engine", *flags], env=environment, check=True)
        exported, until = -1, time.monotonic() + WAIT
        while traces.exporter.counts.exported != exported and time.monotonic() < until:
            exported = traces.exporter.counts.exported
            time.sleep(3)
        engines.stop(5)
        traces.stop(5)
    return collected.spans


def outside(spans: list[Any]) -> int:
    """Spans that leave their parents."""
    by_id = {span.span_id: span for span in spans}
    found = 0
    for span in spans:
        parent = by_id.get(span.parent_span_id)
        if parent is not None:
            found += span.start_time_unix_nano < parent.start_time_unix_nano
            found += span.end_time_unix_nano > parent.end_time_unix_nano
    return found


def figures_of(spans: list[Any]) -> dict[str, float]:
    """What the spans say."""
    children = defaultdict(list)
    for span in spans:
        children[span.parent_span_id].append(span)
    by_id = {span.span_id: span for span in spans}
    figures: dict[str, float] = {"spans": len(spans), "children_outside_parents": outside(spans)}
    offs, graphs = [], set()
    for execute in (span for span in spans if span.name == "gpu.execute"):
        step = told(by_id[execute.parent_span_id])
        kernels = [told(span) for span in children[execute.span_id] if span.name == "gpu.kernel"]
        if kernels and step["gpuglass.step.kind"] == "graph" and step["gpuglass.phase"] == "decode":
            graphs.add(step["gpuglass.step.number"])
            total = sum(kernel["gpuglass.kernel.seconds"] for kernel in kernels)
            offs.append((total / (length(execute) / 1e9) - 1) * 100)
    figures["profiled_graph_steps"] = len(graphs)
    if offs:
        figures["kernel_sum_percent_off"] = abs(statistics.median(offs))
    errors = [told(span)["gpuglass.clock.error_seconds"] for span in spans if span.name == "gpu.execute"]
    if errors:
        figures["clock_error_us_median"] = statistics.median(errors) * 1e6
        figures["clock_error_us_max"] = max(errors) * 1e6
    figures |= _long_prompt(spans)
    return figures


def _long_prompt(spans: list[Any]) -> dict[str, float]:
    """The long request, and the steps of others with and without a piece of it."""
    (root,) = [s for s in spans if s.kind == 2 and told(s)["gpuglass.request.id"].startswith("long")]
    mine = [span for span in spans if span.trace_id == root.trace_id]
    others = [span for span in spans if span.name == "engine.step" and span.trace_id != root.trace_id]
    decode = [span for span in others if told(span)["gpuglass.phase"] == "decode"]
    slowed, free = [], []
    for span in decode:
        links = [told(link) for link in span.links]
        with_long = [
            link
            for link in links
            if link["gpuglass.request.id"].startswith("long") and link["gpuglass.phase"] == "prefill"
        ]
        busy = any(link["gpuglass.phase"] == "prefill" for link in links)
        if with_long:
            slowed.append(length(span))
        elif not busy:
            free.append(length(span))
    figures = {
        "long_prompt_kv_share": told(root).get("gpuglass.kv.peak_ratio", 0.0),
        "long_prompt_pieces": sum(span.name == "prefill.chunk" for span in mine),
        "long_prompt_gpu_seconds": told(root).get("gpuglass.gpu.seconds", 0.0),
        "steps_linked_to_long_prompt": len(slowed),
    }
    if slowed and free:
        figures["others_steps_times_longer"] = statistics.median(slowed) / statistics.median(free)
    return figures


def main() -> int:
    """Measure, report progress on standard error, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a minute of load less")
    parser.add_argument(
        "--dry", action="store_true", help="try the script out on a CPU; no figure means anything"
    )
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        engine(arguments)
        return 0
    from tests.support.bench import finish

    if not (arguments.dry or has_gpu()):
        say("no CUDA device: nothing is measured")
        return finish("otel_bridge_gpu", {}, {})
    figures = figures_of(collect(arguments))
    rounded = {name: float(f"{value:.5g}") for name, value in figures.items()}
    return finish("otel_bridge_gpu", rounded, {} if arguments.dry else TARGETS)


if __name__ == "__main__":
    raise SystemExit(main())
