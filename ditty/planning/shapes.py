"""Sizes of well-known models, to measure with random weights. Without torch."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool

    def config(self) -> dict[str, Any]:
        """Arguments of transformers' LlamaConfig."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 8192,
            "rope_theta": 500000.0,
            "dtype": "bfloat16",
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
        }

    def weights_a_token(self) -> int:
        """Weights that each token is multiplied with."""
        keys = 2 * self.hidden * self.hidden * self.kv_heads // self.heads
        block = 2 * self.hidden**2 + keys + 3 * self.hidden * self.intermediate
        return self.layers * block + self.vocabulary * self.hidden

    def attention_flops_a_token(self, seq_len: int) -> int:
        """Of both products, forward and backward, in a document of `seq_len` tokens; causal."""
        return 6 * self.layers * self.hidden * seq_len


SHAPES = {
    "tiny": Shape(64, 2, 128, 4, 2, 320, tied=True),
    "135m": Shape(576, 30, 1536, 9, 3, 49152, tied=True),  # SmolLM2-135M
    "1b": Shape(2048, 16, 8192, 32, 8, 128256, tied=True),  # Llama-3.2-1B
    "8b": Shape(4096, 32, 14336, 32, 8, 128256, tied=False),  # Llama-3.1-8B
    "70b": Shape(8192, 80, 28672, 64, 8, 128256, tied=False),  # Llama-3.1-70B
}
