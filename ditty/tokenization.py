"""Rows -> token ids and labels, split into training and held-out rows.

Labels are not shifted; -100 marks what is not supervised. Nothing is lost without a count:
rows = train_rows + eval_rows + eval_unused + the sums of `dropped` and `quarantined`.
"""

import difflib
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditty import tables
from ditty.chat import ChatEncoder, Encoded, encode_texts
from ditty.choices import DataFormat, LossOn, Overlong
from ditty.dataspec import DataSpec
from ditty.errors import DataError, RowError
from ditty.files import canonical_json
from ditty.quarantine import BadRow, Quarantine
from ditty.sources import DATA

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

IGNORED = -100
"""The label of a token that is not supervised (PyTorch's `ignore_index`)."""
SHORTEST_BIN = 8
"""Tokens; the bins of lengths are powers of two from here on."""
TRAIN = "train.arrow"
EVAL = "eval.arrow"

Row = dict[str, Any]
Encoder = Callable[[Sequence[Row], int], list[Encoded]]

_COLUMNS = {
    DataFormat.MESSAGES: ("messages",),
    DataFormat.PROMPT_COMPLETION: ("prompt", "completion"),
    DataFormat.TEXT: ("text",),
}


def tokenize(data: DataSpec, tokenizer_dir: Path, source: Path, out: Path) -> dict[str, Any]:
    """Turn `source/data.arrow` into `out/train.arrow` and `out/eval.arrow`.

    Both have the columns input_ids and labels (list<int32>), 2 to `seq_len` tokens a row, in the
    order of the source. A row that cannot be read goes to `out/quarantine.jsonl`. A row is held out
    by a hash of its content, so equal rows go the same way.

    Returns:
        rows, train_rows, eval_rows, eval_unused (held out beyond eval_max_rows), dropped (reason
        -> rows: `empty`, `overlong`, `no_supervised_token`, `truncated_supervision`,
        `split_token`), quarantined (reason -> rows, see `row_problem`), truncated (rows cut and
        kept), max_length (tokens of the longest row before any cut), lengths (power of two -> rows
        of at most so many tokens before any cut, and more than half), tokens and supervised_tokens
        of the training rows, eval_tokens and eval_supervised_tokens. A row's first token is never
        predicted, so it never counts as supervised.

    Raises:
        DataError: the tokenizer or the columns do not fit `data.format`, more rows do not than
            `data.max_bad_fraction` allows, or no row is left to train on.
    """
    table = tables.read(source / DATA)
    columns = find_columns(data, table.column_names)
    encode = _encoder(data, load_tokenizer(tokenizer_dir))
    counts, held_out = _Counts(), _HeldOut(data)
    with (
        Quarantine(out, "the rows to tokenize", "row") as quarantine,
        tables.TableWriter(out / TRAIN, token_schema()) as train,
        tables.TableWriter(out / EVAL, token_schema()) as evaluation,
    ):
        for batch in table.select(list(columns.values())).to_batches(tables.BATCH_ROWS):
            rows = [dict(zip(columns, row.values(), strict=True)) for row in batch.to_pylist()]
            readable = _encode_good(rows, columns, encode, quarantine)
            kept = []
            for row, encoded in zip(rows, readable, strict=True):
                fitting = counts.fit(encoded, data)
                if fitting is not None and not held_out.takes(counts.rows, row, fitting):
                    kept.append(fitting)
            train.write(_token_table(kept, counts.tokens))
            evaluation.write(_token_table(held_out.settled(), counts.eval_tokens))
        evaluation.write(_token_table(held_out.rest(), counts.eval_tokens))
        facts = counts.facts(train.rows, evaluation.rows, held_out.unused)
        readable_rows = counts.rows - counts.bad
        facts["quarantined"] = quarantine.settle(readable_rows, data.max_bad_fraction)
    if train.rows == 0:
        raise DataError(f"no row is left to train on: {facts}")
    return facts


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, without the hub; imports transformers (and so torch).

    Raises:
        DataError: there is none, it is not backed by the tokenizers library, or has no eos token.
    """
    if not folder.is_dir():
        raise DataError(f"there is no tokenizer folder {folder}")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # a dozen kinds, none of them its own
        raise DataError(f"{folder} holds no tokenizer that transformers can load: {error}") from (
            error
        )
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"{folder} holds a {type(tokenizer).__name__}, expected a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer in {folder} has no eos_token, so a model would never learn to stop: "
            "set eos_token in its tokenizer_config.json"
        )
    # A tokenizer.json may carry both from its own training; every length here is ours to decide.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def find_columns(data: DataSpec, present: Sequence[str]) -> dict[str, str]:
    """Standard name -> the column's name in the data, for what the format reads.

    Raises:
        DataError: a column is missing; lists those there are.
    """
    columns = {name: data.columns.get(name, name) for name in _COLUMNS[data.format]}
    for standard, name in columns.items():
        if name not in present:
            close = difflib.get_close_matches(name, present, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}? " if close else ""
            raise DataError(
                f"format: {data.format} needs a column {name!r}, the data has "
                f"{', '.join(present)}: {hint}Set data.columns: {{{standard}: <its name>}}, or "
                "another data.format"
            )
    return columns


def _encode_good(
    rows: Sequence[Row], columns: dict[str, str], encode: Encoder, quarantine: Quarantine
) -> list[Encoded | None]:
    """The rows as tokens; None: it is in the quarantine."""
    first = quarantine.read
    quarantine.read += len(rows)
    bad = {index: p for index, row in enumerate(rows) if (p := row_problem(row, columns))}
    # Encoders number rows in their errors: in the place of a bad one they get an empty one.
    empty: Row = {name: [] if name == "messages" else "" for name in columns}
    given = [empty if index in bad else row for index, row in enumerate(rows)]
    try:
        encoded = encode(given, first)
    except RowError:  # which of them: one by one
        refused = {i: p for i, row in enumerate(given) if (p := _refusal(row, first + i, encode))}
        bad |= refused
        encoded = encode([empty if i in bad else row for i, row in enumerate(rows)], first)
    for index, problem in sorted(bad.items()):
        quarantine.add(first + index, problem)
    return [None if index in bad else row for index, row in enumerate(encoded)]


def _refusal(row: Row, number: int, encode: Encoder) -> BadRow | None:
    try:
        encode([row], number)
    except RowError as error:
        return BadRow(error.reason, row, error.detail)
    return None


def row_problem(row: Row, columns: dict[str, str]) -> BadRow | None:
    """Why a row cannot be read: a value is missing, or of another type than the format reads.

    Args:
        row: by standard names.
        columns: standard name -> the column's name in the data.
    """
    for standard, value in row.items():
        name = columns[standard]
        if value is None:
            return BadRow(f"column {name!r} is null", row)
        if standard == "messages":
            if problem := _chat_problem(value):
                return BadRow(f"column {name!r} {problem[0]}", row, problem[1])
        elif not isinstance(value, str):
            return BadRow(f"column {name!r} holds {_kind(value)}, expected a string", row)
    return None


def _chat_problem(value: Any) -> tuple[str, str] | None:
    """(what is wrong, where)."""
    expected = "expected a list of {role, content}"
    if not isinstance(value, list):
        return f"holds {_kind(value)}, {expected}", ""
    for turn, message in enumerate(value):
        if not isinstance(message, dict):
            return f"has a turn that is {_kind(message)}, {expected}", f"turn {turn}"
        for key in ("role", "content"):
            # A turn that only calls tools has no content.
            if message.get(key) is None and key == "content" and message.get("tool_calls"):
                continue
            if not isinstance(message.get(key), str):
                got = _kind(message.get(key))
                return f"has a turn whose {key} is {got}, expected a string", f"turn {turn}"
    return None


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def row_fraction(row: Row) -> float:
    """A row's place in [0, 1), by its content: rows below `eval_fraction` are held out."""
    digest = hashlib.sha256(canonical_json(_without_null(row))).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _without_null(value: Any) -> Any:
    """Arrow fills keys that other rows have with null; they are no content."""
    if isinstance(value, dict):
        return {k: _without_null(v) for k, v in value.items() if v is not None}
    return [_without_null(v) for v in value] if isinstance(value, list) else value


def token_schema() -> "pa.Schema":
    """Of a table of tokens."""
    import pyarrow as pa

    return pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])


def _token_table(rows: Sequence[Encoded], tokens: Counter[str]) -> "pa.Table":
    """Rows as a table; adds what is in them to `tokens`."""
    import numpy as np
    import pyarrow as pa

    labels = [np.where(row.supervised, row.ids, IGNORED) for row in rows]
    tokens["tokens"] += sum(len(row.ids) for row in rows)
    tokens["supervised"] += sum(int(row.supervised[1:].sum()) for row in rows)
    columns = [tables.token_lists(row.ids for row in rows), tables.token_lists(labels)]
    return pa.table(columns, schema=token_schema())


def _encoder(data: DataSpec, tokenizer: Any) -> Encoder:
    if data.format is DataFormat.MESSAGES:
        chat = ChatEncoder(tokenizer, assistant_only=data.supervised is LossOn.ASSISTANT)
        return lambda rows, first: chat.encode([row["messages"] for row in rows], first)
    if data.format is DataFormat.TEXT:
        return lambda rows, _: _encode_text(tokenizer, [row["text"] for row in rows])
    return lambda rows, _: _encode_pairs(tokenizer, rows, data.supervised is LossOn.COMPLETION)


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


def _appends_eos(tokenizer: Any) -> bool:
    """Whether the tokenizer's own special tokens end a text with eos; bos may be the same id."""
    probe = encode_texts(tokenizer, ["a"], special_tokens=True)[0]
    return int(probe[-1]) == tokenizer.eos_token_id


def _with_eos(ids: "np.ndarray", eos: int) -> "np.ndarray":
    import numpy as np

    if len(ids) and ids[-1] == eos:
        return ids
    return np.append(ids, np.int32(eos))


@dataclass
class _Counts:
    """What became of the rows so far."""

    rows: int = 0
    bad: int = 0
    truncated: int = 0
    max_length: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    eval_tokens: Counter[str] = field(default_factory=Counter)

    def fit(self, row: Encoded | None, data: DataSpec) -> Encoded | None:
        """The row as it is used, at most `seq_len` tokens; None: dropped, and counted.

        Args:
            row: None: it is in the quarantine.
        """
        number = self.rows
        self.rows += 1
        if row is None:
            self.bad += 1
            return None
        length = len(row.ids)
        self.max_length = max(self.max_length, length)
        self.lengths[max(SHORTEST_BIN, 1 << (length - 1).bit_length())] += 1
        problem = row.problem or (None if _has_target(row) else "no_supervised_token")
        if problem is None and length > data.seq_len:
            if data.overlong is Overlong.ERROR:
                raise DataError(
                    f"row {number} has {length} tokens, data.seq_len is {data.seq_len}: raise it, "
                    "or set data.overlong to truncate or drop"
                )
            row = Encoded(row.ids[: data.seq_len], row.supervised[: data.seq_len])
            if data.overlong is Overlong.DROP:
                problem = "overlong"
            elif not _has_target(row):
                problem = "truncated_supervision"
            else:
                self.truncated += 1
        if problem is not None:
            self.dropped[problem] += 1
            return None
        return row

    def facts(self, train_rows: int, eval_rows: int, eval_unused: int) -> dict[str, Any]:
        """The counts as `tokenize` returns them."""
        used = train_rows + eval_rows + eval_unused
        assert self.rows == used + self.dropped.total() + self.bad, (self, used)
        assert self.rows == self.lengths.total() + self.bad, self
        return {
            "rows": self.rows,
            "train_rows": train_rows,
            "eval_rows": eval_rows,
            "eval_unused": eval_unused,
            "dropped": dict(sorted(self.dropped.items())),
            "truncated": self.truncated,
            "max_length": self.max_length,
            "lengths": {str(upto): self.lengths[upto] for upto in sorted(self.lengths)},
            "tokens": self.tokens["tokens"],
            "supervised_tokens": self.tokens["supervised"],
            "eval_tokens": self.eval_tokens["tokens"],
            "eval_supervised_tokens": self.eval_tokens["supervised"],
        }


def _has_target(row: Encoded) -> bool:
    return bool(row.supervised[1:].any())


class _HeldOut:
    """Chooses the rows to hold out; with `eval_max_rows`, those with the smallest hashes.

    Attributes:
        unused: rows held out from training, but beyond `eval_max_rows`.
    """

    def __init__(self, data: DataSpec):
        self.unused = 0
        self._fraction = data.eval_fraction
        self._limit = data.eval_max_rows
        self._held: list[tuple[float, int, Encoded]] = []

    def takes(self, number: int, row: Row, encoded: Encoded) -> bool:
        """Whether the row is held out; if so it is kept here."""
        fraction = row_fraction(row)
        if fraction >= self._fraction:
            return False
        self._held.append((fraction, number, encoded))
        return True

    def settled(self) -> list[Encoded]:
        """Rows that are held out whatever comes; bounds what is kept here."""
        if self._limit is None:
            return self.rest()
        self._held.sort(key=lambda entry: entry[:2])
        self.unused += len(self._held[self._limit :])
        del self._held[self._limit :]
        return []

    def rest(self) -> list[Encoded]:
        """The rows still kept here, in the order of the source."""
        rows = [encoded for _, _, encoded in sorted(self._held, key=lambda entry: entry[1])]
        self._held = []
        return rows
