"""Tokens of beginnings, against the tokenizer's own tokens of each of them alone."""

import random
from functools import partial

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ditty.dataset.chat import encode_texts, special_tokens
from ditty.dataset.prefixes import Beginning, PrefixEncoder
from ditty.dataset.tokenization import load_tokenizer
from tests.tokenizers_for_tests import train_tokenizer

PIECES = [
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "[E]",
    "user\n",
    "\n",
    " ",
    "Hello",
    " how",
    "a",
    "im",
]


def byte_level(folder, **options):
    """With a control token that takes the spaces around it, or is none within a word."""
    tokenizer = load_tokenizer(train_tokenizer(folder))
    if options:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [AddedToken("[E]", special=True, **options)]},
            replace_extra_special_tokens=False,
        )
    return tokenizer


def first_word(folder):
    """Llama 2's way: the first word of a text, and only that, gets a mark before it."""
    vocabulary = {piece: i for i, piece in enumerate(sorted({*"▁abcdefghijklmnopqrstuvwxyzH\n"}))}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="a", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.NFC()])
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<s>")


MAKERS = {
    "plain": byte_level,
    "takes spaces": partial(byte_level, lstrip=True, rstrip=True),
    "not within a word": partial(byte_level, single_word=True),
    "first word": first_word,
}


@pytest.mark.parametrize("maker", MAKERS)
def test_beginnings_have_the_tokens_of_texts_of_their_own(tmp_path, maker):
    tokenizer, draw, given = MAKERS[maker](tmp_path), random.Random(3), []

    def encode(texts):
        given.extend(texts)
        return encode_texts(tokenizer, texts)

    encoder = PrefixEncoder(tokenizer, special_tokens(tokenizer), encode)
    for _ in range(4):
        texts = ["".join(draw.choices(PIECES, k=60)) for _ in range(30)]
        cuts = [(draw.randrange(len(texts[n % 30])), n % 30) for n in range(300)]
        beginnings = [Beginning(texts[whole][:end], whole) for end, whole in cuts]
        beginnings.append(Beginning("another", 0))
        given.clear()
        found = encoder.encode(beginnings, texts, encode_texts(tokenizer, texts))
        expected = encode_texts(tokenizer, [text for text, _ in beginnings])
        assert all(map(np.array_equal, found, expected))
    whole = sum(len(text) for text, _ in beginnings)
    if maker != "not within a word":  # where a look at the text does not tell what is split
        assert sum(map(len, given)) < 0.2 * whole


def test_a_tokenizer_that_looks_past_control_tokens_is_taken_at_its_word(tmp_path):
    """None does; if one did, its tokens of each beginning would be those that count."""
    tokenizer = byte_level(tmp_path)

    def encode(texts):
        return [np.array([len(text), *text.encode()]) for text in texts]

    encoder = PrefixEncoder(tokenizer, special_tokens(tokenizer), encode)
    text = "Hello<s>there<|im_end|>"
    for end in (12, 9):
        beginnings = [Beginning(text[:end], 0)]
        found = encoder.encode(beginnings, [text], encode_texts(tokenizer, [text]))
        assert found[0].tolist() == encode([text[:end]])[0].tolist()
