"""Runs in vLLM's environment: generates greedily, offline, all requests queued before the first step.

In: JSON on standard input, `{"model": FOLDER, "prompts": [[id, …], …], "max_tokens": [n, …]}`. Out: the last
line of standard output, a JSON list with each request's token ids.
"""

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams

    request = json.load(sys.stdin)
    llm = LLM(
        request["model"],
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        async_scheduling=False,
        max_model_len=2048,
        block_size=16,
        num_gpu_blocks_override=130,
        max_num_batched_tokens=2048,
        seed=0,
    )
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in request["prompts"]],
        [
            SamplingParams(temperature=0, max_tokens=number, ignore_eos=True, detokenize=False)
            for number in request["max_tokens"]
        ],
        use_tqdm=False,
    )
    print()
    print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


if __name__ == "__main__":
    main()
