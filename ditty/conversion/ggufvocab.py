"""A tokenizer as a .gguf file has it: tokens with their types, merges or scores, special tokens,
template.

llama.cpp knows how to split a text by a name, so only tokenizers whose way of splitting has one can
be written. Source: the GGUF specification (tokenizer.ggml.*), and the package gguf.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from ditty.conversion import ggufpieces
from ditty.errors import ModelError
from ditty.results.package import generation_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

BYTES = "ByteLevel"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What a tokenizer.json does before its merges -> llama.cpp's name of it (tokenizer.ggml.pre).
SPLITS = {
    (BYTES,): "gpt-2",
    ("Digits", BYTES): "smollm",
    (_WORDS % "{1,3}", BYTES): "llama-bpe",
    (_WORDS % "", BYTES): "qwen2",
}


def write_vocabulary(
    writer: GGUFWriter, folder: Path, size: int, ends: Sequence[int] = ()
) -> dict[str, Any]:
    """Put the tokenizer in `folder`, its chat template and its special tokens into `writer`.

    Args:
        size: rows of the embedding; ids without a token get one that is never used.
        ends: ids at which generation ends, besides those of tokenizer and generation config.
    Returns:
        facts: tokenizer (llama.cpp's name of how it splits a text), tokens.
    Raises:
        ModelError: llama.cpp has no such tokenizer, or it has more tokens than `size`.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{folder} has no tokenizer.json, and a .gguf file is made of one: use --to merged, or "
            "save a fast tokenizer beside the base model"
        )
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens, types = _tokens(tokenizer)
    by_bytes = _splits_bytes(backend)
    split = _split(backend, folder) if by_bytes else _check_pieces(backend, tokenizer, folder)
    if len(tokens) > size:
        raise ModelError(
            f"the tokenizer in {folder} has {len(tokens)} tokens and the model's embedding {size} "
            "rows: they do not belong together"
        )
    unused = range(len(tokens), size)
    tokens += [f"[PAD{i}]" for i in unused]
    types += [TokenType.UNUSED for _ in unused]
    writer.add_tokenizer_model("gpt2" if by_bytes else "llama")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    if not by_bytes:
        types, scores = ggufpieces.pieces(backend, tokenizer, types)
        writer.add_token_scores(scores)
        writer.add_add_space_prefix(bool(ggufpieces.space_before(backend)))
    writer.add_token_types(types)
    special = SpecialVocab(folder, load_merges=by_bytes, n_vocab=size)
    special.chat_template = tokenizer.chat_template
    special.add_special_token = _added_around(tokenizer)
    special.add_to_gguf(writer, quiet=True)
    _write_stop(writer, tokenizer, [*ends, *generation_ends(folder)])
    return {"tokenizer": split, "tokens": len(tokens) - len(unused)}


def _splits_bytes(backend: dict[str, Any]) -> bool:
    """Whether it is byte-level BPE, or else to be sentencepiece's."""
    steps = _steps(backend.get("pre_tokenizer"))
    return BYTES in steps[-1]


def _split(backend: dict[str, Any], folder: Path) -> str:
    """llama.cpp's name of how a byte-level tokenizer splits a text."""
    steps = _steps(backend["pre_tokenizer"])
    plain = backend["model"]["type"] == "BPE" and not backend["model"].get("byte_fallback")
    if not plain or steps not in SPLITS or not backend["model"]["merges"]:
        raise _unknown(folder, f"{backend['model']['type']}, {', '.join(steps)}")
    return SPLITS[steps]


def _check_pieces(
    backend: dict[str, Any], tokenizer: "PreTrainedTokenizerFast", folder: Path
) -> str:
    """llama.cpp's name of sentencepiece's way; raise ModelError where it is not this."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    if problem := ggufpieces.unlike(backend, added):
        raise _unknown(folder, problem)
    return "default"


def _unknown(folder: Path, what: str) -> ModelError:
    return ModelError(
        f"ditty does not know llama.cpp's name of how the tokenizer in {folder} splits a text "
        f"({what}); it writes byte-level BPE with merges, split as by "
        f"{', '.join(SPLITS.values())}, and sentencepiece's BPE with byte fallback. Use `--to "
        "merged`, and llama.cpp's own convert_hf_to_gguf.py on it"
    )


def _steps(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...]:
    """The steps before the merges: a regular expression, or the name of what is none."""
    steps = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    found = []
    for step in steps:
        kind = step.get("type", "")
        if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            found.append(step["pattern"].get("Regex", ""))
        elif kind == "Digits" and step["individual_digits"]:
            found.append(kind)
        elif kind == BYTES and not step["add_prefix_space"]:
            # Its own regular expression is GPT-2's; where another step splits, it must not.
            alone = all("Regex" not in s.get("pattern", {}) for s in steps)
            found.append(kind if step["use_regex"] == alone else f"{kind} with another split")
        else:
            found.append(f"another {kind}")
    return tuple(found)


def _tokens(tokenizer: "PreTrainedTokenizerFast") -> tuple[list[str], list[TokenType]]:
    """Tokens by id, and what each is."""
    vocabulary = tokenizer.get_vocab()
    added = tokenizer.added_tokens_decoder
    by_id = {i: token for token, i in vocabulary.items()}
    tokens, types = [], []
    for i in range(max(by_id) + 1):
        tokens.append(by_id.get(i, f"[PAD{i}]"))
        if i not in by_id:
            types.append(TokenType.UNUSED)
        elif i not in added:
            types.append(TokenType.NORMAL)
        else:
            types.append(TokenType.CONTROL if added[i].special else TokenType.USER_DEFINED)
    return tokens, types


def _added_around(tokenizer: "PreTrainedTokenizerFast") -> dict[str, bool]:
    """Whether the tokenizer puts its first and its last token around each text."""
    ids = tokenizer("a")["input_ids"]
    return {"bos": ids[0] == tokenizer.bos_token_id, "eos": ids[-1] == tokenizer.eos_token_id}


def _write_stop(writer: GGUFWriter, tokenizer: "PreTrainedTokenizerFast", ends: list[int]) -> None:
    """A second token at which generation ends (eot); the first is the tokenizer's own (eos)."""
    others = list(dict.fromkeys(end for end in ends if end != tokenizer.eos_token_id))
    if others:
        writer.add_eot_token_id(others[0])
    if others[1:]:
        log.warning(
            "a .gguf file holds two tokens that end a generation: %s and %s; the model also ends "
            "at %s, and llama.cpp is not told",
            *(tokenizer.eos_token, tokenizer.convert_ids_to_tokens(others[0])),
            ", ".join(tokenizer.convert_ids_to_tokens(others[1:])),
        )
