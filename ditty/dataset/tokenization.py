"""Rows -> token ids and labels, split into training and held-out rows.

Labels are not shifted; -100 marks what is not supervised. Nothing is lost without a count:
rows = train_rows + eval_rows + eval_unused + the sums of `dropped` and `quarantined`.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditty.config.choices import Overlong
from ditty.config.dataspec import DataSpec
from ditty.dataset import tables
from ditty.dataset.chat import Encoded
from ditty.dataset.columns import empty_row, find_columns, row_problem
from ditty.dataset.encoding import IGNORED, Encoder, Row, make_encoder, without_null
from ditty.dataset.quarantine import BadRow, Quarantine
from ditty.dataset.sources import DATA
from ditty.errors import DataError, RowError
from ditty.store.files import canonical_json

if TYPE_CHECKING:
    import pyarrow as pa

SHORTEST_BIN = 8
"""Tokens; the bins of lengths are powers of two from here on."""
TRAIN = "train.arrow"
EVAL = "eval.arrow"
PLACES = "places.arrow"
"""Of a part: `fraction` (float64) and `number` (int64) of each row in EVAL, see `row_fraction`."""


def tokenize(
    data: DataSpec, tokenizer_dir: Path, source: Path, out: Path, part: range | None = None
) -> dict[str, Any]:
    """Turn `source/data.arrow` into `out/train.arrow` and `out/eval.arrow`.

    Both have the columns input_ids and labels (list<int32>), 2 to `seq_len` tokens a row, in the
    order of the source. A row that cannot be read goes to `out/quarantine.jsonl`. A row is held out
    by a hash of its content, so equal rows go the same way.

    Args:
        part: tokenize these rows alone, for `ditty.stages.datashards.merge`, which checks what is
            checked of all rows; with `eval_max_rows` there is also `out/places.arrow`.
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
    encode = make_encoder(data, load_tokenizer(tokenizer_dir, data.chat_template))
    wanted = range(table.num_rows) if part is None else part
    counts, held_out = _Counts(first=wanted.start), _HeldOut(data)
    table = table.select(list(columns.values())).slice(wanted.start, len(wanted))
    with (
        quarantine_in(out, data.max_bad_fraction) as quarantine,
        tables.TableWriter(out / TRAIN, token_schema()) as train,
        tables.TableWriter(out / EVAL, token_schema()) as evaluation,
    ):
        for rows, tried in _encoded(table, columns, encode, wanted.start):
            quarantine.read += len(rows)
            kept = []
            for row, encoded in zip(rows, tried, strict=True):
                if isinstance(encoded, BadRow):
                    quarantine.add(counts.number, encoded)
                number, fitting = counts.number, counts.fit(encoded, data)
                if fitting is not None and not held_out.takes(number, row, fitting):
                    kept.append(fitting)
            train.write(_token_table(kept, counts.tokens))
            evaluation.write(_token_table(held_out.settled(), counts.eval_tokens))
        if part is not None and data.eval_max_rows is not None:
            tables.write(out / PLACES, [held_out.places()], place_schema())
        evaluation.write(_token_table(held_out.rest(), counts.eval_tokens))
        facts = counts.facts(train.rows, evaluation.rows, held_out.unused)
        facts["quarantined"] = dict(quarantine.reasons)
        if part is None:
            facts["quarantined"] = quarantine.settle(counts.rows - counts.bad)
            check_left(facts)
    return facts


def quarantine_in(out: Path, max_bad_fraction: float) -> Quarantine:
    """Of rows that cannot be tokenized."""
    return Quarantine(out, "the rows to tokenize", max_bad_fraction)


def check_left(facts: dict[str, Any]) -> None:
    """Raise a DataError if, as `tokenize` counts, no row is left to train on."""
    if facts["train_rows"] == 0:
        raise DataError(f"no row is left to train on: {facts}")


def _encoded(
    table: "pa.Table", columns: dict[str, str], encode: Encoder, first: int
) -> Iterator[tuple[list[Row], list[Encoded | BadRow]]]:
    """Rows of standard names and what they are as tokens, in batches, one ahead.

    The library that encodes leaves the interpreter to others: what is made of a batch while the
    next one is encoded costs no time.

    Args:
        first: the number of the table's first row.
    """

    def work(batch: "pa.RecordBatch", first: int) -> tuple[list[Row], list[Encoded | BadRow]]:
        rows = [dict(zip(columns, row.values(), strict=True)) for row in batch.to_pylist()]
        return rows, encode_rows(rows, columns, encode, first)

    before: Future[tuple[list[Row], list[Encoded | BadRow]]] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="ditty encode") as thread:
        for batch in table.to_batches(tables.BATCH_ROWS):
            this = thread.submit(work, batch, first)
            first += batch.num_rows
            if before is not None:
                yield before.result()
            before = this
        if before is not None:
            yield before.result()


def load_tokenizer(folder: Path, chat_template: str | None = None) -> Any:
    """The tokenizer in a folder, without the hub; imports transformers (and so torch).

    Args:
        chat_template: takes the place of the tokenizer's own.
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
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    # A tokenizer.json may carry both from its own training; every length here is ours to decide.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def encode_rows(
    rows: Sequence[Row], columns: dict[str, str], encode: Encoder, first: int
) -> list[Encoded | BadRow]:
    """The rows as tokens, or why they cannot be used.

    Args:
        columns: as `find_columns` gives them; rows have the standard names.
        first: the number of the first row.
    """
    bad = {index: p for index, row in enumerate(rows) if (p := row_problem(row, columns))}
    # Encoders number rows in their errors: in the place of a bad one they get an empty one.
    empty = empty_row(columns)
    given = [empty if index in bad else row for index, row in enumerate(rows)]
    try:
        encoded = encode(given, first)
    except RowError:  # which of them: one by one
        refused = {i: p for i, row in enumerate(given) if (p := _refusal(row, first + i, encode))}
        bad |= refused
        encoded = encode([empty if i in bad else row for i, row in enumerate(rows)], first)
    return [bad.get(index, row) for index, row in enumerate(encoded)]


def _refusal(row: Row, number: int, encode: Encoder) -> BadRow | None:
    try:
        encode([row], number)
    except RowError as error:
        return BadRow(error.reason, row, error.detail)
    return None


def drop_reason(row: Encoded, data: DataSpec) -> str | None:
    """Why a row is dropped, as `tokenize` counts it; None: it is used, cut to `seq_len`.

    `overlong` is a row that is not to be cut: where `data.overlong` is error, no row is dropped
    for it.
    """
    if row.problem is not None:
        return row.problem
    if not row.supervised[1:].any():
        return "no_supervised_token"
    if len(row.ids) <= data.seq_len:
        return None
    if data.overlong is not Overlong.TRUNCATE:
        return "overlong"
    return None if row.supervised[1 : data.seq_len].any() else "truncated_supervision"


def row_fraction(row: Row) -> float:
    """A row's place in [0, 1), by its content: rows below `eval_fraction` are held out."""
    digest = hashlib.sha256(canonical_json(without_null(row))).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def token_schema() -> "pa.Schema":
    """Of a table of tokens."""
    import pyarrow as pa

    return pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])


def place_schema() -> "pa.Schema":
    """Of the table in PLACES."""
    import pyarrow as pa

    return pa.schema([("fraction", pa.float64()), ("number", pa.int64())])


def _token_table(rows: Sequence[Encoded], tokens: Counter[str]) -> "pa.Table":
    """Rows as a table; adds what is in them to `tokens`."""
    import numpy as np
    import pyarrow as pa

    labels = [np.where(row.supervised, row.ids, IGNORED) for row in rows]
    tokens["tokens"] += sum(len(row.ids) for row in rows)
    tokens["supervised"] += sum(int(row.supervised[1:].sum()) for row in rows)
    columns = [tables.token_lists(row.ids for row in rows), tables.token_lists(labels)]
    return pa.table(columns, schema=token_schema())


@dataclass
class _Counts:
    """What became of the rows so far, which are numbered from `first`."""

    first: int = 0
    rows: int = 0
    bad: int = 0
    truncated: int = 0
    max_length: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    eval_tokens: Counter[str] = field(default_factory=Counter)

    @property
    def number(self) -> int:
        """Of the next row."""
        return self.first + self.rows

    def fit(self, row: Encoded | BadRow, data: DataSpec) -> Encoded | None:
        """The row as it is used, at most `seq_len` tokens; None: bad or dropped, and counted."""
        number = self.number
        self.rows += 1
        if isinstance(row, BadRow):
            self.bad += 1
            return None
        length = len(row.ids)
        self.max_length = max(self.max_length, length)
        self.lengths[max(SHORTEST_BIN, 1 << (length - 1).bit_length())] += 1
        reason = drop_reason(row, data)
        if reason == "overlong" and data.overlong is Overlong.ERROR:
            raise DataError(
                f"row {number} has {length} tokens, data.seq_len is {data.seq_len}: raise it, "
                "or set data.overlong to truncate or drop"
            )
        if reason is not None:
            self.dropped[reason] += 1
            return None
        if length <= data.seq_len:
            return row
        self.truncated += 1
        return Encoded(row.ids[: data.seq_len], row.supervised[: data.seq_len])

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

    def places(self) -> "pa.Table":
        """Fraction and number of the rows that `rest` would return, which are bounded here."""
        import pyarrow as pa

        settled = self.settled()
        assert not settled, "without eval_max_rows each row's place is certain"
        kept = sorted((number, fraction) for fraction, number, _ in self._held)
        columns = [[fraction for _, fraction in kept], [number for number, _ in kept]]
        return pa.table(columns, schema=place_schema())

    def rest(self) -> list[Encoded]:
        """The rows still kept here, in the order of the source."""
        rows = [encoded for _, _, encoded in sorted(self._held, key=lambda entry: entry[1])]
        self._held = []
        return rows
