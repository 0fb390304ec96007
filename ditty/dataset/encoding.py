"""Rows of each format -> token ids and which of them are supervised.

`conversations` are rewritten as `messages`, and `instruction` as a prompt and a completion; each
then goes the way of that format.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ditty.config.choices import DataFormat, LossOn
from ditty.config.dataspec import DataSpec
from ditty.dataset.chat import Chat, ChatEncoder, Encoded, encode_texts
from ditty.dataset.columns import SPEAKERS, tool_list
from ditty.errors import RowError

if TYPE_CHECKING:
    import numpy as np

IGNORED = -100
"""The label of a token that is not supervised (PyTorch's `ignore_index`)."""

Row = dict[str, Any]
Encoder = Callable[[Sequence[Row], int], list[Encoded]]

# The text of Alpaca (github.com/tatsu-lab/stanford_alpaca), with the newline before the response
# that most trainers have added.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


def make_encoder(data: DataSpec, tokenizer: Any) -> Encoder:
    """What encodes rows of `data.format`: (rows that `row_problem` passes, the first's number).

    Raises:
        DataError: the tokenizer has no chat template. The encoder itself raises a RowError for
            what the template or the vocabulary does not take.
    """
    if data.format in (DataFormat.MESSAGES, DataFormat.CONVERSATIONS):
        chat = ChatEncoder(tokenizer, assistant_only=data.supervised is LossOn.ASSISTANT)
        return lambda rows, first: chat.encode([_chat(row) for row in rows], first)
    if data.format is DataFormat.TEXT:
        return lambda rows, _: _encode_text(tokenizer, [row["text"] for row in rows])
    if data.format is DataFormat.TOKENS:
        size = len(tokenizer)
        return lambda rows, first: [
            _encode_tokens(row, number, size, data) for number, row in enumerate(rows, first)
        ]
    pair = _alpaca if data.format is DataFormat.INSTRUCTION else dict
    completion_only = data.supervised is LossOn.COMPLETION
    return lambda rows, _: _encode_pairs(tokenizer, [pair(row) for row in rows], completion_only)


def without_null(value: Any) -> Any:
    """Arrow fills keys that other rows have with null; they are no content."""
    if isinstance(value, dict):
        return {k: without_null(v) for k, v in value.items() if v is not None}
    return [without_null(v) for v in value] if isinstance(value, list) else value


def _chat(row: Row) -> Chat:
    tools = without_null(tool_list(row.get("tools")))
    if "messages" in row:
        return Chat(without_null(row["messages"]), tools)
    messages = []
    for turn in without_null(row["conversations"]):
        rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
        content = {"content": turn["value"]} if "value" in turn else {}
        messages.append({"role": SPEAKERS[turn["from"]], **content, **rest})
    return Chat(messages, tools)


def _alpaca(row: Row) -> Row:
    template = _WITH_INPUT if row.get("input") else _WITHOUT_INPUT
    return {"prompt": template.format_map(row), "completion": row["output"]}


def _encode_text(tokenizer: Any, texts: Sequence[str]) -> list[Encoded]:
    import numpy as np

    encoded = []
    for text, ids in zip(texts, encode_texts(tokenizer, texts, special_tokens=True), strict=True):
        whole = _with_eos(ids, tokenizer.eos_token_id)
        problem = None if text.strip() else "empty"
        encoded.append(Encoded(whole, np.ones(len(whole), dtype=bool), problem))
    return encoded


def _encode_pairs(tokenizer: Any, rows: Sequence[Row], completion_only: bool) -> list[Encoded]:
    """The prompt as a model is given it, then the completion and eos, which it is to answer."""
    import numpy as np

    prompts = encode_texts(tokenizer, [row["prompt"] for row in rows], special_tokens=True)
    if _appends_eos(tokenizer):
        prompts = [prompt[:-1] for prompt in prompts]
    completions = encode_texts(tokenizer, [row["completion"] for row in rows])
    encoded = []
    for row, prompt, completion in zip(rows, prompts, completions, strict=True):
        ids = np.concatenate([prompt, _with_eos(completion, tokenizer.eos_token_id)])
        supervised = np.arange(len(ids)) >= (len(prompt) if completion_only else 0)
        encoded.append(Encoded(ids, supervised, None if row["completion"] else "empty"))
    return encoded


def _encode_tokens(row: Row, number: int, vocabulary: int, data: DataSpec) -> Encoded:
    """Ids as they are, without what `attention_mask` says is padding."""
    import numpy as np

    ids = np.array(row["input_ids"], np.int64)
    labels = _beside(row, "labels", number)
    mask = _beside(row, "attention_mask", number)
    if mask is not None:
        real = np.flatnonzero(mask)
        span = slice(real[0], real[-1] + 1) if len(real) else slice(0, 0)
        if not mask[span].all():
            reason = "attention_mask has a 0 between its 1s, expected padding at the ends only"
            raise RowError(number, reason, f"at {span.start + np.flatnonzero(mask[span] == 0)[0]}")
        ids, labels = ids[span], None if labels is None else labels[span]
    if len(wrong := np.flatnonzero((ids < 0) | (ids >= vocabulary))):
        raise RowError(
            number,
            f"input_ids are not all 0 to {vocabulary - 1}, the vocabulary of the base model's "
            "tokenizer: tokenize the rows with that one",
            f"has {ids[wrong[0]]}",
        )
    supervised = np.ones(len(ids), dtype=bool)
    if data.supervised is LossOn.LABELS and labels is not None:
        supervised = labels != IGNORED
        if len(wrong := np.flatnonzero(supervised & (labels != ids))):
            raise RowError(
                number,
                f"labels are not those of input_ids (they are not shifted) or {IGNORED}",
                f"has {labels[wrong[0]]} where input_ids has {ids[wrong[0]]}",
            )
    return Encoded(ids.astype(np.int32), supervised, None if len(ids) else "empty")


def _beside(row: Row, name: str, number: int) -> "np.ndarray | None":
    """A column of one value a token; None where the row has none."""
    import numpy as np

    values = row.get(name)
    if values is None:
        return None
    if len(values) != len(row["input_ids"]):
        raise RowError(
            number,
            f"{name} has not as many values as input_ids",
            f"{len(values)} for {len(row['input_ids'])}",
        )
    return np.array(values, np.int64)


def _appends_eos(tokenizer: Any) -> bool:
    """Whether the tokenizer's own special tokens end a text with eos; bos may be the same id."""
    probe = encode_texts(tokenizer, ["a"], special_tokens=True)[0]
    return int(probe[-1]) == tokenizer.eos_token_id


def _with_eos(ids: "np.ndarray", eos: int) -> "np.ndarray":
    import numpy as np

    if len(ids) and ids[-1] == eos:
        return ids
    return np.append(ids, np.int32(eos))
