"""Rows as Python dicts -> one table: types are found over all rows, memory holds one batch."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditty.dataset import tables
from ditty.dataset.datafiles import TEXT, DataFile
from ditty.dataset.quarantine import BadRow, Quarantine
from ditty.errors import DataError, cut

if TYPE_CHECKING:
    import pyarrow as pa

Located = tuple[Any, Any]
"""(position, row or `BadRow`). In files a position is (index of the file, number in it)."""


def position_words(files: Sequence[DataFile]) -> list[str]:
    """What numbers count in each file: lines, items of a list, or rows."""
    return [_position_word(file) for file in files]


def _position_word(file: DataFile) -> str:
    if file.format not in TEXT:
        return "row"
    return "item" if _is_json_list(file) else "line"


def of_files(files: Sequence[DataFile], words: Sequence[str]) -> Iterator[Located]:
    """The rows of text files, one after the other.

    A .txt file has a row {"text"} a line; a .jsonl file a JSON value a line that is not blank, and
    so has a .json file that does not start as a list.

    Args:
        words: see `position_words`.
    Raises:
        DataError: a file cannot be read as a whole.
    """
    for index, file in enumerate(files):
        for number, row in _rows_of(file, words[index]):
            yield (index, number), row


def _rows_of(file: DataFile, word: str) -> Iterator[Located]:
    if file.format == ".txt":
        return ((n, {"text": t} if isinstance(t, str) else t) for n, t in text_lines(file))
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


def text_lines(file: DataFile) -> Iterator[tuple[int, str | BadRow]]:
    """(line number from 1, text without its end) of a UTF-8 file.

    Raises:
        DataError: a compressed file is damaged.
    """
    number = 0
    try:
        with file.open() as stream:
            for number, raw in enumerate(stream, 1):
                line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                yield number, _decoded(line.rstrip(b"\r\n"))
    except OSError as error:
        raise DataError(f"{_damaged(file, error)}, after line {number}") from error


def _decoded(line: bytes) -> str | BadRow:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        detail = f"byte {error.start + 1} is 0x{line[error.start]:02x}"
        return BadRow("not UTF-8", line.decode("utf-8", "replace"), detail)


def _damaged(file: DataFile, error: OSError) -> str:
    return f"{file.name} cannot be read, it is damaged or cut short: {error}"


def _json_lines(file: DataFile) -> Iterator[Located]:
    """The JSON value on each line that is not blank."""
    for number, text in text_lines(file):
        if isinstance(text, BadRow):
            yield number, text
        elif text.strip():
            yield number, _parsed(text)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except RecursionError:
        return BadRow("nested too deeply", line)
    except ValueError as error:
        return BadRow("not JSON", line, str(error))


def _json_items(file: DataFile) -> Iterator[Located]:
    """The items of a JSON list, which is read as a whole.

    Raises:
        DataError: not UTF-8, not JSON (with the line), or not a list.
    """
    lines = []
    for number, line in text_lines(file):
        if isinstance(line, BadRow):
            raise DataError(
                f"{file.name}, line {number}: {line.detail} of the line, which is not UTF-8: "
                "convert the file (iconv -f latin1 -t utf-8)"
            )
        lines.append(line)
    try:
        value = json.loads("\n".join(lines))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file.name} is not JSON: {error}") from error
    if not isinstance(value, list):
        raise DataError(f"{file.name} holds a {type(value).__name__}, expected a list of objects")
    yield from enumerate(value)


def write_rows(rows: Iterable[Located], path: Path, quarantine: Quarantine) -> "pa.Schema":
    """Write dict rows to the table at `path`; a missing value is null.

    A column's type is the one that holds all its values: integers and floats make floats, objects
    with different keys make one object with all keys. Nothing else is converted: a row with
    another type goes to the quarantine, and so does one that is no dict or has no columns. What
    the type is, the rows before have said; where there are none, most of the first batch.
    """
    import pyarrow as pa

    spool = path.with_name(f".{path.name}.spool")
    schema, count = pa.schema([]), 0
    try:
        with pa.OSFile(str(spool), "wb") as sink:
            iterator = iter(rows)
            while batch := list(islice(iterator, tables.BATCH_ROWS)):
                table = _good_rows(batch, schema, quarantine)
                if table.num_rows:
                    schema, count = tables.unified(schema, table.schema), count + 1
                    with pa.ipc.new_stream(sink, table.schema) as stream:
                        stream.write_table(table)
        tables.write(path, _conform(spool, count, schema, quarantine.source), schema)
    finally:
        spool.unlink(missing_ok=True)
    return schema


def _good_rows(batch: list[Located], known: "pa.Schema", quarantine: Quarantine) -> "pa.Table":
    """A batch as a table that goes with the columns `known` so far; the rest is set aside."""
    import pyarrow as pa

    quarantine.read += len(batch)
    bad = {p: row for p, row in ((p, _unusable(row)) for p, row in batch) if row is not None}
    good = [(p, row) for p, row in batch if p not in bad]
    try:
        table = _table(good)
        tables.unified(known, table.schema)
    except _unfit():
        bad |= _misfits(good, known)
        good = [(p, row) for p, row in good if p not in bad]
        try:
            table = _table(good)
        except _unfit() as error:
            raise DataError(f"from {quarantine.where(batch[0][0])} on: {error}") from error
    for position in sorted(bad):
        quarantine.add(position, bad[position])
    return table if good else pa.table({})


def _unusable(row: Any) -> BadRow | None:
    if isinstance(row, BadRow):
        return row
    if not isinstance(row, dict) or not all(isinstance(key, str) for key in row):
        return BadRow(f"{type(row).__name__}, expected an object with named columns", row)
    return None if row else BadRow("no columns", row)


def _table(batch: list[Located]) -> "pa.Table":
    import pyarrow as pa

    names = dict.fromkeys(name for _, row in batch for name in row)
    columns = {name: pa.array([row.get(name) for _, row in batch]) for name in names}
    for column in columns.values():
        _check_depth(column.type)
    return pa.table(columns)


def _misfits(batch: list[Located], known: "pa.Schema") -> dict[Any, BadRow]:
    """By position, the rows with a value that cannot be stored, or of another type than most."""
    bad: dict[Any, BadRow] = {}
    for name in dict.fromkeys(name for _, row in batch for name in row):
        found: dict[Any, pa.DataType] = {}
        for position, row in batch:
            if row.get(name) is not None and position not in bad:
                try:
                    found[position] = _type(row[name])
                except _unfit() as error:
                    bad[position] = BadRow(f"column {name!r} cannot be stored", row, str(error))
        rows = dict(batch)
        expected = _expected(known, name, found)
        for position, got in found.items():
            try:
                expected = _unified(expected, got)
            except _unfit():
                kind = type(rows[position][name]).__name__
                reason = f"column {name!r} holds {kind}, expected {cut(str(expected), 60)}"
                bad[position] = BadRow(reason, rows[position])
    return bad


def _expected(known: "pa.Schema", name: str, found: "dict[Any, pa.DataType]") -> "pa.DataType":
    """What the rows before have in a column; where that is nothing, what most rows here have."""
    import pyarrow as pa

    before = known.field(name).type if name in known.names else pa.null()
    commonest = Counter(found.values()).most_common(1)
    return commonest[0][0] if before == pa.null() and commonest else before


def _unfit() -> tuple[type[Exception], ...]:
    """What Arrow raises for values that do not go into one column."""
    import pyarrow as pa

    return pa.ArrowException, OverflowError, UnicodeEncodeError, RecursionError


def _type(value: Any) -> "pa.DataType":
    import pyarrow as pa

    kind = pa.array([value]).type
    _check_depth(kind)
    return kind


def _check_depth(kind: "pa.DataType") -> None:
    """Raise ArrowInvalid for a type that no file of Arrow's holds."""
    import pyarrow as pa

    level = [kind]
    for _ in range(tables.DEEPEST):
        level = [inner.field(i).type for inner in level for i in range(inner.num_fields)]
        if not level:
            return
    raise pa.ArrowInvalid(f"nested deeper than {tables.DEEPEST} levels")


def _unified(one: "pa.DataType", other: "pa.DataType") -> "pa.DataType":
    import pyarrow as pa

    return tables.unified(pa.schema([("x", one)]), pa.schema([("x", other)])).field("x").type


def _conform(spool: Path, count: int, schema: "pa.Schema", source: str) -> "Iterator[pa.Table]":
    """The spooled batches with the columns and types of all."""
    import pyarrow as pa

    with pa.memory_map(str(spool)) as spooled:
        for _ in range(count):
            yield tables.conform(pa.ipc.open_stream(spooled).read_all(), schema, source)
