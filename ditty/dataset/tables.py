"""Tables on disk: one Arrow IPC stream, memory-mapped on read, the same bytes for the same rows.

`datasets.Dataset.from_file` reads the same files without a copy and without its cache.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ditty.errors import DataError

if TYPE_CHECKING:  # pyarrow costs 0.14 s; the flow imports this module and reads no table
    import pyarrow as pa

BATCH_ROWS = 1000
"""Rows in a record batch of a file, however they arrived."""

DEEPEST = 64
"""Levels of a value at most: what Arrow's IPC reads."""


class TableWriter:
    """Write one table; use it in a `with` block, which also closes it after an error.

    Rows are regrouped into batches of `BATCH_ROWS` and rebuilt without what Arrow keeps beside
    them (slices, values below nulls), so equal rows make equal files.

    Attributes:
        rows: rows given so far.
    """

    def __init__(self, path: Path, schema: "pa.Schema"):
        import pyarrow as pa

        self.rows = 0
        self._schema = schema.remove_metadata()
        self._pending: list[pa.Table] = []
        self._sink = pa.OSFile(str(path), "wb")
        self._stream = pa.ipc.new_stream(self._sink, self._schema)

    def write(self, rows: "pa.Table | pa.RecordBatch") -> None:
        """Append rows; the columns are those of the schema, in its order."""
        import pyarrow as pa

        table = rows if isinstance(rows, pa.Table) else pa.Table.from_batches([rows])
        self.rows += table.num_rows
        self._pending.append(table.cast(self._schema))
        pending = pa.concat_tables(self._pending)
        while pending.num_rows >= BATCH_ROWS:
            self._emit(pending.slice(0, BATCH_ROWS))
            pending = pending.slice(BATCH_ROWS)
        self._pending = [pending] if pending.num_rows else []

    def _emit(self, table: "pa.Table") -> None:
        import pyarrow as pa

        # `take` copies exactly the rows it is asked for into new buffers.
        fresh = table.take(pa.array(range(table.num_rows), pa.int64())).combine_chunks()
        self._stream.write_table(fresh)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                for table in self._pending:
                    self._emit(table)
                self._stream.close()
        finally:
            self._sink.close()


def write(path: Path, batches: "Iterable[pa.Table | pa.RecordBatch]", schema: "pa.Schema") -> int:
    """Write all batches to a new file; returns the number of rows."""
    with TableWriter(path, schema) as writer:
        for batch in batches:
            writer.write(batch)
        return writer.rows


def read(path: Path) -> "pa.Table":
    """The table in a file, memory-mapped: pages are read as they are used."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_stream(source).read_all()


def batches(path: Path) -> "Iterator[pa.RecordBatch]":
    """The same, one batch of at most `BATCH_ROWS` rows at a time."""
    return iter(read(path).to_batches())


def merged(known: "pa.Schema | None", schema: "pa.Schema", where: str) -> "pa.Schema":
    """The schema of all rows up to and with those that start at `where`.

    Integers and floats make floats, objects with different keys one object with all keys, and a
    column that only some have is there for all.

    Raises:
        DataError: a column has two types that go into none.
    """
    import pyarrow as pa

    if known is None:
        return schema
    try:
        return unified(known, schema)
    except pa.ArrowException as error:
        raise DataError(
            f"from {where} on, a column has another type than before: {error}"
        ) from error


def unified(one: "pa.Schema", other: "pa.Schema") -> "pa.Schema":
    """`merged` with Arrow's own errors."""
    import pyarrow as pa

    return pa.unify_schemas([one, other], promote_options="permissive")


def conform(table: "pa.Table", schema: "pa.Schema", source: str) -> "pa.Table":
    """The rows with the columns and types of a schema that `merged` made of theirs and others.

    Args:
        source: of the rows, for errors.
    Raises:
        DataError: a value is none of its column's type, as an integer that is no float exactly.
    """
    import pyarrow as pa

    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.nulls(table.num_rows, field.type))
            continue
        try:
            columns.append(table[field.name].cast(field.type))
        except pa.ArrowInvalid as error:
            raise DataError(
                f"{source}: column {field.name!r} is {field.type} over all rows, and some do not "
                f"fit: {error}. Give all its values one type, that of a string for example"
            ) from error
    return pa.table(columns, schema=schema)


def token_lists(arrays: "Iterable[Any]") -> "pa.ListArray":
    """A `list<int32>` column from one integer array a row."""
    import numpy as np
    import pyarrow as pa

    rows = [np.asarray(a, dtype=np.int32) for a in arrays]
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(r) for r in rows], out=offsets[1:])
    values = np.concatenate(rows) if rows else np.empty(0, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
