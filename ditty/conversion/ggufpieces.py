"""sentencepiece's BPE in a .gguf file: pieces with scores, of which llama.cpp makes the merges.

Read from tokenizer.json (or what transformers makes of a tokenizer.model). llama.cpp merges the
pair of pieces whose union has the highest score, whichever pair it is; so a tokenizer can be
written if its merges are all pairs that make a piece, those of one piece with the same rank.
"""

import logging
from typing import TYPE_CHECKING, Any

from gguf import TokenType

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

SPACE = "\u2581"
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]


def space_before(backend: dict[str, Any]) -> bool | None:
    """Whether a text begins with a space that is not in it; None: not sentencepiece's way.

    Args:
        backend: the content of tokenizer.json.
    """
    normal: dict[str, Any] = backend.get("normalizer") or {}
    split: dict[str, Any] = backend.get("pre_tokenizer") or {}
    steps = normal.get("normalizers") or ([normal] if normal else [])
    escapes = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if steps[-1:] == [escapes] and steps[:-1] in ([], [{"type": "Prepend", "prepend": SPACE}]):
        # A split at spaces, of which there are none by then.
        idle = not split or (split["type"], split.get("pattern")) == ("Split", {"String": " "})
        return len(steps) == 2 if idle else None
    if steps or split.get("type") != "Metaspace" or split["split"]:
        return None
    if split["prepend_scheme"] == "first":
        log.warning(
            "llama.cpp puts a space before a text that follows a special token, and this tokenizer "
            "only before the first text (prepend_scheme): prompts of several turns differ by that"
        )
    return bool(split["prepend_scheme"] != "never")


def unlike(backend: dict[str, Any], special: set[str]) -> str | None:
    """What llama.cpp would do otherwise than this tokenizer, or None.

    Args:
        special: tokens that are found in a text as they stand.
    """
    model = backend["model"]
    if model["type"] != "BPE" or not model.get("byte_fallback") or model.get("ignore_merges"):
        return f"{model['type']} without byte fallback"
    if missing := [piece for piece in BYTE_PIECES if piece not in model["vocab"]]:
        return f"no piece {missing[0]} for a byte"
    if space_before(backend) is None:
        return "another normalizer or pre-tokenizer"
    pieces = set(model["vocab"]) - special - set(BYTE_PIECES)
    pairs = {(piece[:i], piece[i:]) for piece in pieces for i in range(1, len(piece))}
    pairs = {pair for pair in pairs if pair[0] in pieces and pair[1] in pieces}
    merges = [tuple(_pair(merge)) for merge in model["merges"]]
    if not_merged := pairs - set(merges):
        return f"{' and '.join(min(not_merged))} make a piece and are not merged"
    made = [a + b for a, b in merges]
    if len(set(made)) != sum(a != b for a, b in zip(made, [None, *made], strict=False)):
        return "the merges that make a piece are not one after the other"
    return None


def pieces(
    backend: dict[str, Any], tokenizer: "PreTrainedTokenizerFast", types: list[TokenType]
) -> tuple[list[TokenType], list[float]]:
    """Types and scores by id: the piece that is merged first has the highest score.

    Args:
        types: of each id, as for any tokenizer.
    """
    vocabulary = tokenizer.get_vocab()
    found = list(types)
    for piece in BYTE_PIECES:
        found[vocabulary[piece]] = TokenType.BYTE
    if tokenizer.unk_token_id is not None:
        found[tokenizer.unk_token_id] = TokenType.UNKNOWN
    ranks: dict[str, int] = {}
    for merge in backend["model"]["merges"]:
        ranks.setdefault("".join(_pair(merge)), len(ranks))
    by_id = {i: piece for piece, i in vocabulary.items()}
    return found, [-float(ranks.get(by_id.get(i, ""), len(ranks))) for i in range(len(types))]


def _pair(merge: Any) -> list[str]:
    """Earlier tokenizer.json had "a b" for ["a", "b"]."""
    return merge.split(" ") if isinstance(merge, str) else list(merge)
