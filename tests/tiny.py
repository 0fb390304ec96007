"""Tiny models, tokenizers and packed rows that tests make on the spot."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

VOCABULARY = 320


def make_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of about 300 tokens: every text has tokens, none is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        token: i for i, token in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    }
    vocabulary |= {c: i + len(vocabulary) for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=chat_template,
    )


def tiny_config(**changes: Any) -> LlamaConfig:
    """Two layers of hidden 64, grouped key-value heads."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    return LlamaConfig(**(settings | changes))


def make_model_folder(folder: Path, config: Any = None, tokenizer: Any = None) -> Path:
    """A folder with a random tiny model and its tokenizer; the same bytes each time."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or tiny_config())
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return folder


def random_rows(
    count: int, *, seed: int = 0, longest: int = 40, documents: int = 3
) -> list[dict[str, Any]]:
    """Packed rows of unequal length; about half of the tokens are supervised."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    rows = []
    for _ in range(count):
        lengths = [draw(4, longest) for _ in range(draw(1, documents + 1))]
        ids, labels = [], []
        for n in lengths:
            tokens = torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()
            prompt = draw(1, n)
            ids += tokens
            labels += [-100] * prompt + tokens[prompt:]
        rows.append({"input_ids": ids, "labels": labels, "lengths": lengths})
    return rows
