"""Rows of columnar sources, whose text Arrow takes for UTF-8 until it is read; and .csv files."""

import itertools
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditty.errors import DataError
from ditty.quarantine import BadRow, Quarantine

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import csv

CSV_BLOCK_BYTES = 16 << 20


def valid_text(batches: "Iterable[pa.Table]", quarantine: Quarantine) -> "Iterator[pa.Table]":
    """The rows whose text is UTF-8; the others are set aside, numbered from 0."""
    first = 0
    for table in batches:
        quarantine.read += table.num_rows
        bad = dict(_invalid_text(table))
        for index, row in bad.items():
            quarantine.add(first + index, row)
        first += table.num_rows
        yield _without(table, bad)


def tables_of(path: Path, batches: "Iterable[pa.RecordBatch]") -> "Iterator[pa.Table]":
    """Batches as tables, with errors that say where.

    Raises:
        DataError: a batch cannot be read.
    """
    import pyarrow as pa

    count = 0
    try:
        for batch in batches:
            yield pa.Table.from_batches([batch])
            count += batch.num_rows
    except pa.ArrowException as error:
        raise DataError(f"{path}, after row {count}: {error}") from error


def csv_file(
    path: Path, text_columns: list[str], max_rows: int | None, quarantine: Quarantine
) -> "tuple[pa.Schema, Iterator[pa.Table]]":
    """The columns and the rows of a .csv file with a header.

    Rows with another number of fields, or text that is not UTF-8, are set aside, numbered as in a
    spreadsheet: the header is row 1.

    Args:
        text_columns: read as text; the types of others are guessed from the first 16 MB.
        max_rows: read so many, good and bad.

    Raises:
        DataError: no CSV, or two columns of one name.
    """
    import pyarrow as pa
    from pyarrow import csv

    skipped: dict[int, BadRow] = {}
    try:
        reader = csv.open_csv(
            path,
            # Rows that are skipped have their numbers in one thread only.
            read_options=csv.ReadOptions(block_size=CSV_BLOCK_BYTES, use_threads=False),
            parse_options=csv.ParseOptions(
                newlines_in_values=True, invalid_row_handler=_skip_into(skipped)
            ),
            convert_options=csv.ConvertOptions(
                column_types={name: pa.string() for name in text_columns},
                check_utf8=False,  # or a column with a bad byte is binary, in silence
            ),
        )
        names = reader.schema.names
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from error
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise DataError(f"{path} has several columns named {', '.join(double)}")
    last = None if max_rows is None else max_rows + 1
    return reader.schema, _csv_rows(tables_of(path, reader), skipped, last, quarantine)


def _skip_into(skipped: dict[int, BadRow]) -> "Callable[[csv.InvalidRow], str]":
    def skip(row: "csv.InvalidRow") -> str:
        detail = f"{row.actual_columns} fields, expected {row.expected_columns}"
        skipped[row.number] = BadRow("another number of fields than the header", row.text, detail)
        return "skip"

    return skip


def _csv_rows(
    batches: "Iterator[pa.Table]",
    skipped: dict[int, BadRow],
    last: int | None,
    quarantine: Quarantine,
) -> "Iterator[pa.Table]":
    """The good rows up to number `last`; `skipped` grows while the reader reads ahead."""
    done = 1  # the header
    for table in batches:
        numbers = _numbers(done, table.num_rows, skipped)
        if not numbers:
            continue
        until = numbers[-1] if last is None else min(numbers[-1], last)
        table = table.slice(0, sum(number <= until for number in numbers))
        invalid = dict(_invalid_text(table))
        bad = {numbers[index]: row for index, row in invalid.items()}
        _set_aside(bad | skipped, done, until, quarantine)
        quarantine.read += until - done
        yield _without(table, invalid)
        done = until
        if done == last:
            return
    end = max((n for n in skipped if last is None or n <= last), default=done)
    if end > done:
        _set_aside(skipped, done, end, quarantine)
        quarantine.read += end - done


def _numbers(after: int, count: int, skipped: "Container[int]") -> list[int]:
    """The numbers of the next `count` rows that were not skipped."""
    rows = (number for number in itertools.count(after + 1) if number not in skipped)
    return list(itertools.islice(rows, count))


def _set_aside(bad: dict[int, BadRow], after: int, until: int, quarantine: Quarantine) -> None:
    """The bad rows of a range."""
    for number in sorted(bad):
        if after < number <= until:
            quarantine.add(number, bad[number])


def _without(table: "pa.Table", bad: "Container[int]") -> "pa.Table":
    import pyarrow as pa

    good = [index not in bad for index in range(table.num_rows)]
    return table if all(good) else table.filter(pa.array(good))


def _invalid_text(table: "pa.Table") -> Iterator[tuple[int, BadRow]]:
    """(index, row) of each row with text that is not UTF-8."""
    import pyarrow as pa

    try:
        table.validate(full=True)
    except pa.ArrowInvalid:
        for index in range(table.num_rows):
            row = table.take([index])
            wrong = [name for name in row.column_names if not _is_valid(row[name])]
            if wrong:
                shown = {name: _printable(row[name]) for name in row.column_names}
                yield index, BadRow("not UTF-8", shown, f"column {wrong[0]!r}")


def _is_valid(column: "pa.ChunkedArray") -> bool:
    import pyarrow as pa

    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _printable(column: "pa.ChunkedArray") -> Any:
    """The one value of a column, as far as it can be shown."""
    import pyarrow as pa

    if _is_valid(column):
        return column[0].as_py()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column[0].cast(pa.binary()).as_py().decode("utf-8", "replace")
    return "(not UTF-8)"
