"""Rows as Python dicts -> one table: types are found over all rows, memory holds one batch."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditty import tables
from ditty.datafiles import DataFile
from ditty.errors import DataError, shown

if TYPE_CHECKING:
    import pyarrow as pa

Located = tuple[Any, Any]
"""(position, row): the number of a line or of an item, for errors."""

Describe = Callable[[Any], str]
"""A position as a person would look it up: `file.jsonl, line 7`."""


def of_files(files: Sequence[DataFile]) -> tuple[Iterator[Located], Describe]:
    """The rows of text files, one after the other, and how their positions are told.

    A .txt file has a row {"text"} a line; a .jsonl file a JSON value a line that is not blank, and
    so has a .json file that does not start as a list.

    Raises:
        DataError: from the iterator: a line is not UTF-8 or not JSON.
    """
    words = ["item" if _is_json_list(file) else "line" for file in files]

    def rows() -> Iterator[Located]:
        for index, file in enumerate(files):
            for number, row in _rows_of(file, words[index]):
                yield (index, number), row

    return rows(), lambda at: f"{files[at[0]].name}, {words[at[0]]} {at[1]}"


def _rows_of(file: DataFile, word: str) -> Iterator[Located]:
    if file.format == ".txt":
        return ((number, {"text": text}) for number, text in text_lines(file))
    return _json_items(file) if word == "item" else _json_lines(file)


def _is_json_list(file: DataFile) -> bool:
    """Whether a .json file starts as a list; many on the hub hold an object a line instead."""
    if file.format != ".json":
        return False
    try:
        with file.open() as stream:
            return stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    except OSError as error:
        raise DataError(_damaged(file, error)) from error


def text_lines(file: DataFile) -> Iterator[tuple[int, str]]:
    """(line number from 1, text without its end) of a UTF-8 file.

    Raises:
        DataError: a line is not UTF-8 (names the line, the byte and its value), or a compressed
            file is damaged.
    """
    number = 0
    try:
        with file.open() as stream:
            for number, raw in enumerate(stream, 1):
                line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                yield number, _decoded(line, file, number).rstrip("\r\n")
    except OSError as error:
        raise DataError(f"{_damaged(file, error)}, after line {number}") from error


def _decoded(line: bytes, file: DataFile, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file.name}, line {number}: byte {error.start + 1} of the line is "
            f"0x{line[error.start]:02x}, which is not UTF-8: convert the file "
            "(iconv -f latin1 -t utf-8) or drop the line"
        ) from error


def _damaged(file: DataFile, error: OSError) -> str:
    return f"{file.name} cannot be read, it is damaged or cut short: {error}"


def _json_lines(file: DataFile) -> Iterator[Located]:
    for number, text in text_lines(file):
        if not text.strip():
            continue
        try:
            yield number, json.loads(text)
        except ValueError as error:
            raise DataError(f"{file.name}, line {number} is not JSON: {error}") from error


def _json_items(file: DataFile) -> Iterator[Located]:
    """The items of a JSON list, which is read as a whole."""
    text = "\n".join(line for _, line in text_lines(file))
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DataError(f"{file.name} is not JSON: {error}") from error
    if not isinstance(value, list):
        raise DataError(f"{file.name} holds a {type(value).__name__}, expected a list of objects")
    yield from enumerate(value)


def write_rows(rows: Iterable[Located], path: Path, describe: Describe) -> "pa.Schema":
    """Write dict rows to the table at `path`; a missing value is null.

    A column's type is the one that holds all its values: integers and floats make floats, objects
    with different keys make one object with all keys. Nothing else is converted.

    Raises:
        DataError: a row is no dict, or a column mixes types; `describe` says where.
    """
    import pyarrow as pa

    spool = path.with_name(f".{path.name}.spool")
    schemas: list[pa.Schema] = []
    try:
        with pa.OSFile(str(spool), "wb") as sink:
            iterator = iter(rows)
            while batch := list(islice(iterator, tables.BATCH_ROWS)):
                table = _table(batch, describe)
                known = schemas[-1] if schemas else None
                schemas.append(tables.merged(known, table.schema, describe(batch[0][0])))
                with pa.ipc.new_stream(sink, table.schema) as stream:
                    stream.write_table(table)
        schema = schemas[-1] if schemas else pa.schema([])
        tables.write(path, _conform(spool, len(schemas), schema), schema)
    finally:
        spool.unlink(missing_ok=True)
    return schema


def _table(batch: list[Located], describe: Describe) -> "pa.Table":
    import pyarrow as pa

    for position, row in batch:
        if not isinstance(row, dict) or not all(isinstance(key, str) for key in row):
            raise DataError(
                f"{describe(position)} holds {shown(row)}, expected an object with named columns"
            )
    names = dict.fromkeys(name for _, row in batch for name in row)
    if not names:
        raise DataError(f"{describe(batch[0][0])} has no columns")
    columns = {}
    for name in names:
        try:
            columns[name] = pa.array([row.get(name) for _, row in batch])
        except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
            raise DataError(_blame(name, batch, describe, error)) from error
    return pa.table(columns)


def _blame(name: str, batch: list[Located], describe: Describe, error: Exception) -> str:
    """Which two values of a column do not go together, or which one cannot be stored."""
    import pyarrow as pa

    first: Located | None = None
    for position, row in batch:
        value = row.get(name)
        if value is None:
            continue
        try:
            pa.array([value])
        except (pa.ArrowException, OverflowError, UnicodeEncodeError) as own:
            return f"{describe(position)}: column {name!r} holds {shown(value)}: {own}"
        if first is None:
            first = position, value
            continue
        try:
            pa.array([first[1], value])
        except (pa.ArrowException, OverflowError):
            return (
                f"column {name!r} mixes types: {shown(first[1])} at {describe(first[0])} and "
                f"{shown(value)} at {describe(position)}"
            )
    return f"column {name!r} from {describe(batch[0][0])} on: {error}"


def _conform(spool: Path, count: int, schema: "pa.Schema") -> "Iterator[pa.Table]":
    """The spooled batches with the columns and types of all."""
    import pyarrow as pa

    with pa.memory_map(str(spool)) as source:
        for _ in range(count):
            yield tables.conform(pa.ipc.open_stream(source).read_all(), schema)
