"""Runs in vLLM's environment: one engine, offline, that does more than generate.

In: JSON on standard input, `{"model": FOLDER, "kind": "adapters" or "pooling", "prompts": [[id, …], …],
"max_tokens": n}`. `adapters` uses a LoRA adapter for each second prompt and guesses tokens ahead by n-grams.
Out: the last line of standard output, a JSON list with the number of each request's output tokens, or of its
embedding's values.
"""

import json
import sys
import tempfile
from pathlib import Path

RANK = 8


def make_adapter(model: Path, folder: Path) -> None:
    """A LoRA adapter for the queries of all layers."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    queries = config["num_attention_heads"] * config["head_dim"]
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.ones(RANK, config["hidden_size"]) / 10
        tensors[f"{name}.lora_B.weight"] = torch.ones(queries, RANK) / 10
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    described = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 16,
        "target_modules": ["q_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(described))


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    request = json.load(sys.stdin)
    pooling = request["kind"] == "pooling"
    ahead = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    special = (
        {"runner": "pooling", "convert": "embed"}
        if pooling
        else {
            "enable_lora": True,
            "max_lora_rank": RANK,
            "speculative_config": ahead,
            "skip_tokenizer_init": True,
        }
    )
    llm = LLM(
        request["model"],
        load_format="dummy",
        enforce_eager=True,
        max_model_len=1024,
        block_size=32,
        num_gpu_blocks_override=130,
        seed=0,
        **special,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    if pooling:
        sizes = [len(output.outputs.embedding) for output in llm.embed(prompts, use_tqdm=False)]
    else:
        with tempfile.TemporaryDirectory() as folder:
            make_adapter(Path(request["model"]), Path(folder))
            adapter = LoRARequest("adapter", 1, folder)
            params = SamplingParams(
                temperature=0, max_tokens=request["max_tokens"], ignore_eos=True, detokenize=False
            )
            adapters = [adapter if number % 2 else None for number in range(len(prompts))]
            outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=adapters)
        sizes = [len(output.outputs[0].token_ids) for output in outputs]
    print()
    print(json.dumps(sizes))


if __name__ == "__main__":
    main()
