"""Small real tokenizers, trained on the spot: merges across words and newlines, no download."""

from pathlib import Path
from typing import Any

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>'"
    " + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's, without its default system prompt."""

MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The same text with the assistant's part marked."""

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
TEXT = [
    "Hello there, how are you? I am fine, thank you.\n\nGood to hear that.\n\n\nBye bye.",
    "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n",
] * 20


def train_pieces(folder: Path) -> Path:
    """sentencepiece's BPE with byte fallback, saved to `folder` as tokenizer.model alone."""
    import json

    import sentencepiece

    with (folder / "tokenizer.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter("\n".join(TEXT).split("\n")),
            model_writer=model,
            model_type="bpe",
            vocab_size=360,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": CHATML}
    kind = {"tokenizer_class": "LlamaTokenizer", **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    return folder


def train_tokenizer(
    folder: Path, template: str | None = CHATML, *, post: str | None = None, **special: Any
) -> Path:
    """A byte-level BPE tokenizer of 400 tokens, saved to `folder`.

    `post`: what the tokenizer adds around a text, `<s> $A </s>` for one.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if post:
        ids = [(token, tokenizer.token_to_id(token)) for token in SPECIAL]
        tokenizer.post_processor = processors.TemplateProcessing(single=post, special_tokens=ids)
    named = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"} | special
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, **named
    ).save_pretrained(folder)
    return folder
