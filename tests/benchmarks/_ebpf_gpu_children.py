"""What `ebpf_gpu.py` traces: a process that uses torch as it is told, and one that runs vLLM.

In: one JSON list per line, a function's name and its arguments. Out: its result as one JSON line on the
descriptor that the first argument names, because libraries write to standard output what they like."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MIB = 1 << 20


class Torch:
    """Holds and gives back memory of one device, cuda or cpu."""

    def __init__(self, device: str) -> None:
        import torch

        self.torch, self.device, self.cuda = torch, device, device == "cuda"
        self.held: list[Any] = []

    def _new(self, size: int) -> Any:
        return self.torch.empty(size, dtype=self.torch.uint8, device=self.device)

    def _empty_cache(self) -> None:
        if self.cuda:
            self.torch.cuda.empty_cache()

    def context(self) -> int:
        """Make the context, and nothing else that counts; gives the process id."""
        self._new(1)
        if self.cuda:
            self.torch.cuda.synchronize()
        return os.getpid()

    def grow(self, mib: float, pieces: int) -> None:
        """Hold some more."""
        self.held += [self._new(int(mib * MIB)) for _ in range(pieces)]

    def shrink(self) -> None:
        """Give all back, the cache's as well."""
        self.held.clear()
        self._empty_cache()

    def tensors(self) -> int:
        """Bytes of live tensors as PyTorch counts them; rounded up to 512 each."""
        if not self.cuda:
            return 0
        return int(self.torch.cuda.memory_allocated())

    def oom(self) -> str:
        """Ask for a TiB; gives the error's name."""
        try:
            self._new(1 << 40)
        except RuntimeError as error:
            return type(error).__name__
        return "none"

    def live(self, seconds: float, leaked_mib: float, every: float) -> float:
        """Give out and take back tensors of many sizes, and keep one each `every` seconds; MiB kept."""
        until, due, kept, sizes = time.monotonic() + seconds, time.monotonic(), 0.0, (1, 3, 6, 9, 15)
        turn = 0
        while time.monotonic() < until:
            turn += 1
            for size in (sizes[turn % 5], sizes[(turn + 2) % 5]):
                self._new(size * MIB)
            if leaked_mib and time.monotonic() >= due:
                due += every
                self.grow(leaked_mib, 1)
                kept += leaked_mib
            time.sleep(0.05)
        return kept

    def loop(self, mib: float, times: int, empty: bool) -> float:
        """Seconds per allocation and free; with `empty` each goes to the driver, else to the cache."""
        start = time.perf_counter()
        for _ in range(times):
            tensor = self._new(int(mib * MIB))
            del tensor
            if empty:
                self._empty_cache()
        return (time.perf_counter() - start) / times

    def train(self, times: int) -> float:
        """Seconds per step of a small network, forward and back."""
        torch = self.torch
        size = 2048 if self.cuda else 64
        torch.manual_seed(0)
        network = torch.nn.Sequential(*(torch.nn.Linear(size, size, device=self.device) for _ in range(6)))
        batch = torch.randn(1024 if self.cuda else 4, size, device=self.device)
        for _ in range(5):
            network(batch).square().mean().backward()
        if self.cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            network.zero_grad(set_to_none=True)
            network(batch).square().mean().backward()
        if self.cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / times


class Engine(Torch):
    """A vLLM with a model without weights, in one process."""

    def start(self, config: dict[str, Any]) -> None:
        """Load, capture graphs, warm up."""
        from vllm import LLM

        small: dict[str, Any] = {"dtype": "bfloat16", "enforce_eager": True, "max_num_batched_tokens": 256}
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            self.llm = LLM(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                max_num_seqs=32,
                max_model_len=2048,
                gpu_memory_utilization=0.8 if self.cuda else 0.3,
                **({} if self.cuda else small),
            )

    def serve(self, seconds: float) -> int:
        """Answer requests, up to 32 at a time; their number."""
        from vllm import SamplingParams

        inner, number, running = self.llm.llm_engine, 0, 0
        until = time.monotonic() + seconds
        while running or time.monotonic() < until:
            while running < 32 and time.monotonic() < until:
                number, running = number + 1, running + 1
                params = SamplingParams(max_tokens=16 + number % 64, ignore_eos=True, detokenize=False)
                prompt = {"prompt_token_ids": [1 + n % 200 for n in range(32 + number % 512)]}
                inner.add_request(str(number), prompt, params)
            running -= sum(output.finished for output in inner.step())
        return number


def main() -> None:
    """Do what the lines of standard input say, and leave at its end."""
    answers = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    device, kind = sys.argv[2:4]
    worker = Engine(device) if kind == "vllm" else Torch(device)
    print(json.dumps("ready"), file=answers)
    for line in sys.stdin:
        name, *rest = json.loads(line)
        print(json.dumps(getattr(worker, name)(*rest)), file=answers)
    answers.flush()
    os._exit(0)  # leaving an engine by the door takes half a minute


if __name__ == "__main__":
    main()
