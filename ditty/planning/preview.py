"""The first rows of a spec as they would be trained on: every token, and whether it is learned.

Goes the way of the data stages, on the first rows alone, and keeps nothing.
"""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ditty.config.choices import Overlong
from ditty.config.dataspec import DataSpec, SourceSpec
from ditty.config.spec import RunSpec
from ditty.dataset import operations, sources, tables
from ditty.dataset.chat import Encoded
from ditty.dataset.columns import find_columns
from ditty.dataset.encoding import make_encoder
from ditty.dataset.quarantine import BadRow
from ditty.dataset.tokenization import drop_reason, encode_rows, load_tokenizer
from ditty.errors import DataError
from ditty.pretrained import basemodel
from ditty.store.artifacts import Store
from ditty.store.files import make_dir

Limited = TypeVar("Limited", DataSpec, SourceSpec)
SOURCE_ROWS = 1000
"""Rows of the source (of each) that are read: operations may drop most of them."""


@dataclass(frozen=True)
class Token:
    """One token. `text` is "" where its character ends in a later one."""

    id: int
    text: str
    supervised: bool


@dataclass(frozen=True)
class PreviewRow:
    """One row, as it is after the operations.

    Attributes:
        number: of the row, from 0.
        tokens: at most `data.seq_len`.
        fate: what becomes of it, where it is not used as it is: "dropped: empty". A row that is
            set aside has no tokens.
    """

    number: int
    tokens: list[Token]
    fate: str | None

    @property
    def supervised(self) -> int:
        """How many tokens are learned; the first is never predicted."""
        return sum(token.supervised for token in self.tokens[1:])


def preview(spec: RunSpec, store: Store, count: int) -> list[PreviewRow]:
    """The first `count` rows that the operations leave of the source's first SOURCE_ROWS.

    `store` is only asked for the base model. Imports transformers.

    Raises:
        DittyError: what would stop the stages, in those rows.
    """
    data = spec.data
    folder = basemodel.tokenizer_dir(spec.model.base_model, spec.model.revision, store)
    columns, rows = _first_rows(data, count)
    tokenizer = load_tokenizer(folder, data.chat_template)
    tried = encode_rows(rows, columns, make_encoder(data, tokenizer), 0)
    return [_shown(number, row, tokenizer, data) for number, row in enumerate(tried)]


def _first_rows(data: DataSpec, count: int) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """What the columns are called (see `find_columns`), and rows of standard names."""
    few = _limited(data).model_copy(update={"sources": list(map(_limited, data.sources))})
    with tempfile.TemporaryDirectory(prefix="ditty-preview-") as scratch:
        folder = make_dir(Path(scratch) / "0")
        sources.load(few, folder)
        for number, operation in enumerate(data.bound_operations, 1):
            out = make_dir(Path(scratch) / str(number))
            try:
                operations.apply(operation, folder, out, operations.Part())
            except DataError as error:
                raise DataError(f"in the source's first {SOURCE_ROWS} rows: {error}") from error
            folder = out
        table = tables.read(folder / sources.DATA)
        columns = find_columns(data, table.column_names)
        found = table.select(list(columns.values())).slice(0, count).to_pylist()
    return columns, [dict(zip(columns, row.values(), strict=True)) for row in found]


def _limited(section: Limited) -> Limited:
    limit = min(section.max_rows or SOURCE_ROWS, SOURCE_ROWS)
    return section.model_copy(update={"max_rows": limit})


def _shown(number: int, row: Encoded | BadRow, tokenizer: Any, data: DataSpec) -> PreviewRow:
    if isinstance(row, BadRow):
        detail = f" ({row.detail})" if row.detail else ""
        return PreviewRow(number, [], f"set aside: {row.reason}{detail}")
    ids, supervised = row.ids[: data.seq_len].tolist(), row.supervised[: data.seq_len].tolist()
    texts = token_texts(tokenizer, ids)
    tokens = [Token(*values) for values in zip(ids, texts, supervised, strict=True)]
    return PreviewRow(number, tokens, _fate(row, data))


def _fate(row: Encoded, data: DataSpec) -> str | None:
    reason = drop_reason(row, data)
    if len(row.ids) <= data.seq_len:
        return f"dropped: {reason}" if reason else None
    long = f"{len(row.ids):,} tokens, more than data.seq_len"
    if reason is None:
        return f"cut: {long}"
    if reason == "overlong" and data.overlong is Overlong.ERROR:
        return f"an error: {long}"
    return f"dropped: {reason}, {long}"


def token_texts(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """The text that each token adds; "" where its character ends in a later one."""
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(tokenizer.backend_tokenizer, token) or "" for token in ids]
