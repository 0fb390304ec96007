"""Tiny random models of the architectures that tests try: two layers of hidden 64."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.tiny import VOCABULARY, make_model_folder, tiny_config

ENDS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 2}
SMALL: dict[str, Any] = {
    **ENDS,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED: dict[str, Any] = {**SMALL, "num_key_value_heads": 2}
HEADS: dict[str, Any] = {**GROUPED, "head_dim": 16}
OLDER: dict[str, Any] = {**ENDS, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}

# Trained in test_architectures.py
TRAINED: dict[str, PretrainedConfig] = {
    "llama": tiny_config(),
    "llama_untied": tiny_config(**UNTIED),
    "gpt_neox": GPTNeoXConfig(**SMALL, **UNTIED),
    "gpt_neox_tied": GPTNeoXConfig(**SMALL, **TIED),
    "mistral": MistralConfig(**GROUPED, sliding_window=8),
    "qwen3": Qwen3Config(**HEADS, **TIED),
    "qwen3_untied": Qwen3Config(**HEADS, **UNTIED),
    "gemma": GemmaConfig(**HEADS),
    "gpt2": GPT2Config(**OLDER),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4),
}


def _rope(kind: str, **options: Any) -> PretrainedConfig:
    scaling = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **options}
    return tiny_config(rope_parameters=scaling)


# Read and built in test_weights.py: more buffers, more layouts
BUILT: dict[str, PretrainedConfig] = {
    **TRAINED,
    # Enough experts that their order by name is not that by number.
    "qwen3_moe": Qwen3MoeConfig(**HEADS, **EXPERTS, num_experts=12),
    "deepseek_v3": DeepseekV3Config(
        **SMALL,
        **EXPERTS,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    ),
    "gemma3": Gemma3TextConfig(**HEADS),
    "gpt_j": GPTJConfig(**OLDER, rotary_dim=8),
    "gpt_neo": GPTNeoConfig(
        **ENDS,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        max_position_embeddings=128,
        attention_types=[[["global", "local"], 1]],
    ),
    "rope_llama3": _rope(
        "llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    ),
    "rope_linear": _rope("linear"),
    "rope_yarn": _rope("yarn", original_max_position_embeddings=128),
    "rope_dynamic": _rope("dynamic"),
}


def make(root: Path, name: str) -> Path:
    """The folder of the model `name` under `root`."""
    return make_model_folder(root / name, BUILT[name])


def rewrite(folder: Path, change: Any) -> Path:
    """`folder`, after the tensors of its one file went through `change` (in place)."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
