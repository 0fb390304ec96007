"""Files of columns, CSV and Parquet, as batches of one schema."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ditty import rows, tables
from ditty.datafiles import DataFile
from ditty.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

Batches = Iterator["pa.Table"]


def of_files(
    files: Sequence[DataFile], text_columns: Sequence[str]
) -> "tuple[pa.Schema, Iterator[pa.Table]]":
    """The schema of all files, and their rows one after the other.

    Args:
        text_columns: columns of a CSV file that are text whatever they look like; the types of
            others are guessed from the first 16 MB.
    Raises:
        DataError: a file cannot be read, or the types of two do not go together.
    """
    schema: pa.Schema | None = None
    for file in files:
        schema = tables.merged(schema, _read(file, text_columns)[0], file.name)
    assert schema is not None, "there is a file"

    def batches() -> "Iterator[pa.Table]":
        for file in files:
            for table in _read(file, text_columns)[1]:
                yield tables.conform(table, schema)

    return schema, batches()


def _read(file: DataFile, text_columns: Sequence[str]) -> "tuple[pa.Schema, Iterator[pa.Table]]":
    return _csv(file, text_columns) if file.format == ".csv" else _parquet(file)


def _csv(file: DataFile, text_columns: Sequence[str]) -> "tuple[pa.Schema, Iterator[pa.Table]]":
    import pyarrow as pa
    from pyarrow import csv

    try:
        reader = csv.open_csv(
            pa.input_stream(str(file.path), compression=file.compression),
            read_options=csv.ReadOptions(block_size=16 << 20),
            parse_options=csv.ParseOptions(newlines_in_values=True),
            convert_options=csv.ConvertOptions(
                column_types={name: pa.string() for name in text_columns}
            ),
        )
    except (pa.ArrowInvalid, OSError) as error:
        _refuse_bytes(file)
        raise DataError(f"{file.name}: {error}") from error
    names = reader.schema.names
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise DataError(f"{file.name} has several columns named {', '.join(double)}")
    return reader.schema, located(file.name, _checked(file, reader))


def _checked(file: DataFile, batches: "Iterable[pa.RecordBatch]") -> "Iterator[pa.RecordBatch]":
    _refuse_bytes(file)
    yield from batches


def _refuse_bytes(file: DataFile) -> None:
    """Pyarrow would make a bad byte's column binary in silence."""
    for _ in rows.text_lines(file):
        pass


def _parquet(file: DataFile) -> "tuple[pa.Schema, Iterator[pa.Table]]":
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
