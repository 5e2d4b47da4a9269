"""Small models that a real vLLM serves with dummy weights: a configuration and a byte tokenizer.

In: the name of a shape. Out: the folder. No weights, no network. A token is a byte (ids 0 to 255), then come
begin, end and unknown; the rest of the vocabulary has no text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BEGIN, END, UNKNOWN = 256, 257, 258

_COMMON: Mapping[str, Any] = {
    "torch_dtype": "bfloat16",
    "vocab_size": 512,
    "hidden_size": 128,
    "hidden_act": "silu",
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    # Multi-head latent attention: blocks of 16 tokens on a CPU. One dense layer, two of experts.
    "tiny-deepseek-v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_group": 2,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "routed_scaling_factor": 2.5,
        "kv_lora_rank": 512,
        "q_lora_rank": 64,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "num_nextn_predict_layers": 0,
    },
    # Grouped-query attention: blocks of a multiple of 32 tokens on a CPU. Two layers, both of experts.
    "tiny-qwen3-moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    # Without experts: adapters (LoRA) of layers with experts need a GPU. Blocks as above.
    "tiny-qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
}


def make_model(shape: str, folder: Path) -> Path:
    """Write the model into `folder`, which is made, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**_COMMON, **SHAPES[shape]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer()))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "model_max_length": config["max_position_embeddings"],
                "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
            }
        )
    )
    return folder


def deepseek_parameters(config: Mapping[str, Any]) -> int:
    """Parameters of a DeepSeek V2 or V3 model, by its configuration alone, less the bias of its routing."""
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = (config[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    queries = heads * (nope + rope)
    low = config["q_lora_rank"]
    query = hidden * queries if low is None else hidden * low + low + low * queries
    attention = query + hidden * (rank + rope) + rank + rank * heads * (nope + value) + heads * value * hidden
    expert = 3 * hidden * config["moe_intermediate_size"]
    experts = hidden * config["n_routed_experts"]
    experts += expert * (config["n_routed_experts"] + config["n_shared_experts"])
    layers, dense = config["num_hidden_layers"], config["first_k_dense_replace"]
    body = layers * (attention + 2 * hidden) + (layers - dense) * experts
    body += dense * 3 * hidden * config["intermediate_size"]
    return int(2 * config["vocab_size"] * hidden + body + hidden)


def _tokenizer() -> dict[str, Any]:
    """A tokenizer.json of byte-pair encoding without merges."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocabulary = {letter: number for number, letter in enumerate(sorted(_letters()))}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {**vocabulary, "<s>": BEGIN, "</s>": END, "<unk>": UNKNOWN},
            "merges": [],
        },
    }


def _letters() -> list[str]:
    """The letters of byte-level encoding: visible bytes stand for themselves, others are above 255."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in visible] + [chr(0x100 + number) for number in range(256 - len(visible))]
