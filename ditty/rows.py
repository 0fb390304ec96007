"""Rows as Python dicts -> one table: types are found over all rows, memory holds one batch."""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditty import tables
from ditty.errors import DataError, shown

if TYPE_CHECKING:
    import pyarrow as pa

Located = tuple[int, Any]
"""(position, row): the number of a line or of an item, for errors."""

Describe = Callable[[int], str]
"""A position as a person would look it up: `file.jsonl, line 7`."""


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text without its end) of a UTF-8 file.

    Raises:
        DataError: a line is not UTF-8; names the line, the byte and its value.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: byte {error.start + 1} of the line is "
                    f"0x{line[error.start]:02x}, which is not UTF-8: convert the file "
                    "(iconv -f latin1 -t utf-8) or drop the line"
                ) from error
            yield number, text.rstrip("\r\n")


def json_lines(path: Path) -> Iterator[Located]:
    """The JSON value on each line that is not blank.

    Raises:
        DataError: a line is not JSON, or not UTF-8.
    """
    for number, text in text_lines(path):
        if not text.strip():
            continue
        try:
            yield number, json.loads(text)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON: {error}") from error


def json_items(path: Path) -> Iterator[Located]:
    """The items of a JSON list, which is read as a whole.

    Raises:
        DataError: not JSON (with the line), or not a list.
    """
    text = "\n".join(line for _, line in text_lines(path))
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, list):
        raise DataError(f"{path} holds a {type(value).__name__}, expected a list of objects")
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
                schemas.append(_merge(schemas, table.schema, describe(batch[0][0])))
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


def _merge(known: "list[pa.Schema]", schema: "pa.Schema", where: str) -> "pa.Schema":
    """The schema of all rows up to and with a batch that starts at `where`."""
    import pyarrow as pa

    if not known:
        return schema
    try:
        return pa.unify_schemas([known[-1], schema], promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(
            f"from {where} on, a column has another type than before: {error}"
        ) from error


def _conform(spool: Path, count: int, schema: "pa.Schema") -> "Iterator[pa.Table]":
    """The spooled batches with the columns and types of all."""
    import pyarrow as pa

    with pa.memory_map(str(spool)) as source:
        for _ in range(count):
            table = pa.ipc.open_stream(source).read_all()
            columns = [
                table[field.name].cast(field.type)
                if field.name in table.column_names
                else pa.nulls(table.num_rows, field.type)
                for field in schema
            ]
            yield pa.table(columns, schema=schema)
