"""Tiny random models of the architectures that tests try, two layers of hidden 64 each."""

from pathlib import Path
from typing import Any

from transformers import (
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.tiny import VOCABULARY, make_model_folder, tiny_config

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = {**SMALL, "num_key_value_heads": 2}
HEADS: dict[str, Any] = {**GROUPED, "head_dim": 16}
UNTIED = {"tie_word_embeddings": False}
TIED = {"tie_word_embeddings": True}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": tiny_config(),
    "llama_untied": tiny_config(**UNTIED),
    "gpt_neox": GPTNeoXConfig(**SMALL, **UNTIED),
    "gpt_neox_tied": GPTNeoXConfig(**SMALL, **TIED),
    "mistral": MistralConfig(**GROUPED, sliding_window=8),
    "qwen3": Qwen3Config(**HEADS, **TIED),
    "qwen3_untied": Qwen3Config(**HEADS, **UNTIED),
    "gemma": GemmaConfig(**HEADS),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=128,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=2,
    ),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**HEADS, **EXPERTS),
}


def make(root: Path, name: str, **changes: Any) -> Path:
    """The folder of the model `name` under `root`."""
    config = CONFIGS[name]
    changed = type(config)(**(config.to_dict() | changes)) if changes else config
    return make_model_folder(root / name, changed)
