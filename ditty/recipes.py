"""Ready-made row operations, to be named in a spec as `ditty.recipes:NAME`.

Those that look at all rows are in `dedup`, and cuts by the quality of a text in `quality`.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditty.errors import DataError, shown
from ditty.store.files import sha256_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def text_of(row: dict[str, Any], column: str) -> str:
    """A column's text: of a conversation, what is said in it, a line a turn; of null, nothing.

    Raises:
        DataError: there is no text in it.
    """
    value = row[column]
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        said = [turn.get("content") or turn.get("value") or "" for turn in value]
        if other := [text for text in said if not isinstance(text, str)]:
            raise DataError(
                f"column {column!r} has a turn whose content is {shown(other[0])}, expected a "
                "string: make one of it with a `map` operation"
            )
        return "\n".join(said)
    raise DataError(
        f"column {column!r} holds {type(value).__name__}, expected a text or a list of "
        "{role, content} or {from, value}"
    )


def has_words(row: dict[str, Any], column: str = "text", at_least: int = 1) -> bool:
    """For `filter`: the column's text has at least so many words."""
    return len(text_of(row, column).split()) >= at_least


def characters(
    row: dict[str, Any], column: str = "text", at_least: int = 1, at_most: int | None = None
) -> bool:
    """For `filter`: the column's text has so many characters."""
    return _within(len(text_of(row, column)), at_least, at_most)


def tokens(
    row: dict[str, Any],
    file: str,
    column: str = "text",
    at_least: int = 1,
    at_most: int | None = None,
) -> bool:
    """For `filter`: the column's text has so many tokens, without special ones.

    Args:
        file: a tokenizer.json.
    """
    stat = Path(file).stat()
    encoded = _tokenizer(file, stat.st_mtime_ns, stat.st_size).encode(
        text_of(row, column), add_special_tokens=False
    )
    return _within(len(encoded), at_least, at_most)


def file_content(file: str, **_: Any) -> dict[str, str]:
    """The `identity` of a function with an argument `file`.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return {"sha256": sha256_file(Path(file))}
    except OSError as error:
        raise DataError(f"kwargs.file: cannot read {file}: {error.strerror}") from error


tokens.identity = file_content  # type: ignore[attr-defined]


@functools.lru_cache
def _tokenizer(file: str, *_: int) -> "Tokenizer":
    """The tokenizer in a file, read again once that has changed."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(file)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _within(value: int, at_least: int, at_most: int | None) -> bool:
    return at_least <= value and (at_most is None or value <= at_most)


def strip(row: dict[str, Any], column: str = "text") -> dict[str, str]:
    """For `map`: the column's text without white space around it."""
    return {column: text_of(row, column).strip()}


def chat_of_size(row: dict[str, Any], at_most: int, answer_at_least: int = 1) -> bool:
    """For `filter` of chat rows: characters of all messages, and of the last one."""
    sizes = [len(message["content"]) for message in row["messages"]]
    return sum(sizes) <= at_most and sizes[-1] >= answer_at_least
