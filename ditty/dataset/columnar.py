"""Files of columns, CSV and Parquet, as batches of one schema.

Arrow takes a file's word for it that text is UTF-8, and fails where it is read: rows with other
text are set aside here.
"""

import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ditty.dataset import tables
from ditty.dataset.datafiles import DataFile
from ditty.dataset.quarantine import BadRow, Quarantine
from ditty.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import csv

CSV_BLOCK_BYTES = 16 << 20


def of_files(
    files: Sequence[DataFile],
    text_columns: Sequence[str],
    max_rows: int | None,
    quarantine: Quarantine,
) -> "tuple[pa.Schema, Iterator[pa.Table]]":
    """The schema of all files, and their rows one after the other.

    Rows of a CSV file with another number of fields than its header, and rows whose text is not
    UTF-8, are set aside: (index of the file, number from 0; in a CSV file as in a spreadsheet,
    where the header is row 1).

    Args:
        text_columns: columns of a CSV file that are text whatever they look like; the types of
            others are guessed from the first 16 MB.
        max_rows: read so many of all, good and bad.
    Raises:
        DataError: a file cannot be read, or the types of two do not go together.
    """
    schema: pa.Schema | None = None
    for file in files:
        one = _open_csv(file, text_columns, {}) if file.format == ".csv" else _open_parquet(file)
        schema = tables.merged(schema, one[0], file.name)
    assert schema is not None, "there is a file"

    def batches() -> "Iterator[pa.Table]":
        before = quarantine.read  # of other sources
        for index, file in enumerate(files):
            left = None if max_rows is None else max_rows - (quarantine.read - before)
            if file.format == ".csv":
                found = _csv_rows(file, text_columns, left, quarantine, index)
            else:
                read = first(_open_parquet(file)[1], left)
                found = valid_text(read, quarantine, partial(_in_file, index))
            for table in found:
                yield tables.conform(table, schema, file.name)

    return schema, batches()


def _in_file(index: int, number: int) -> tuple[int, int]:
    return index, number


def valid_text(
    batches: "Iterable[pa.Table]",
    quarantine: Quarantine,
    place: Callable[[int], Any] = int,
) -> "Iterator[pa.Table]":
    """The rows whose text is UTF-8; the others are set aside.

    Args:
        place: the position of a row, by its number from 0.
    """
    start = 0
    for table in batches:
        quarantine.read += table.num_rows
        bad = dict(_invalid_text(table))
        for index, row in bad.items():
            quarantine.add(place(start + index), row)
        start += table.num_rows
        yield _without(table, bad)


def first(batches: "Iterable[pa.Table]", count: int | None) -> "Iterator[pa.Table]":
    """The first rows; None: all."""
    for table in batches:
        if count is None:
            yield table
        elif count > 0:
            yield table.slice(0, count)
            count -= table.num_rows
        else:
            return


def _open_csv(
    file: DataFile, text_columns: Sequence[str], skipped: dict[int, BadRow]
) -> "tuple[pa.Schema, Iterator[pa.Table]]":
    """The rows with as many fields as the header; the others get into `skipped` by number."""
    import pyarrow as pa
    from pyarrow import csv

    try:
        reader = csv.open_csv(
            pa.input_stream(str(file.path), compression=file.compression),
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
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file.name}: {error}") from error
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise DataError(f"{file.name} has several columns named {', '.join(double)}")
    return reader.schema, located(file.name, reader)


def _skip_into(skipped: dict[int, BadRow]) -> "Callable[[csv.InvalidRow], str]":
    def skip(row: "csv.InvalidRow") -> str:
        detail = f"{row.actual_columns} fields, expected {row.expected_columns}"
        skipped[row.number] = BadRow("another number of fields than the header", row.text, detail)
        return "skip"

    return skip


def _csv_rows(
    file: DataFile,
    text_columns: Sequence[str],
    max_rows: int | None,
    quarantine: Quarantine,
    index: int,
) -> "Iterator[pa.Table]":
    """The good rows of the first; `index` numbers the file."""
    skipped: dict[int, BadRow] = {}  # grows while the reader reads ahead
    done, last = 1, None if max_rows is None else max_rows + 1  # row 1 is the header
    for table in _open_csv(file, text_columns, skipped)[1]:
        numbers = _numbers(done, table.num_rows, skipped)
        if not numbers:
            continue
        until = numbers[-1] if last is None else min(numbers[-1], last)
        table = table.slice(0, sum(number <= until for number in numbers))
        invalid = dict(_invalid_text(table))
        bad = {numbers[place]: row for place, row in invalid.items()} | skipped
        for number in sorted(n for n in bad if done < n <= until):
            quarantine.add((index, number), bad[number])
        quarantine.read += until - done
        yield _without(table, invalid)
        done = until
        if done == last:
            return
    for number in sorted(n for n in skipped if done < n and (last is None or n <= last)):
        quarantine.add((index, number), skipped[number])
        quarantine.read += 1


def _numbers(after: int, count: int, skipped: "Container[int]") -> list[int]:
    """The numbers of the next `count` rows that were not skipped."""
    rows = (number for number in itertools.count(after + 1) if number not in skipped)
    return list(itertools.islice(rows, count))


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


def _open_parquet(file: DataFile) -> "tuple[pa.Schema, Iterator[pa.Table]]":
    import pyarrow as pa
    from pyarrow import parquet

    try:
        opened = parquet.ParquetFile(file.path, memory_map=True)
    except pa.ArrowInvalid as error:
        raise DataError(f"{file.name} is not a parquet file: {error}") from error
    schema = decoded(opened.schema_arrow)
    return schema, located(file.name, opened.iter_batches(batch_size=tables.BATCH_ROWS))


def decoded(schema: "pa.Schema") -> "pa.Schema":
    """The schema with categories as their values."""
    import pyarrow as pa

    fields = [
        field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
        for field in schema
    ]
    return pa.schema(fields)


def located(name: str, batches: "Iterable[pa.RecordBatch]") -> "Iterator[pa.Table]":
    """The batches as tables; an error of Arrow's says after which row it came."""
    import pyarrow as pa

    count = 0
    try:
        for batch in batches:
            yield pa.Table.from_batches([batch])
            count += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name}, after row {count}: {error}") from error
