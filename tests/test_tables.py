import random

import numpy as np
import pyarrow as pa
import pytest

from ditty.dataset import tables

ROWS = [
    {
        "number": None if i % 7 == 0 else i,
        "text": None if i % 5 == 0 else "x" * (i % 9),
        "turns": [{"role": "u", "content": None if i % 3 else "c"} for _ in range(i % 4)],
        "flag": i % 2 == 0,
        "floats": None if i % 11 == 0 else [1.5] * (i % 3),
    }
    for i in range(2_357)
]


def written(path, batches, schema):
    tables.write(path, batches, schema)
    return path.read_bytes()


def test_the_same_rows_make_the_same_bytes_however_they_arrive(tmp_path):
    more = pa.Table.from_pylist(ROWS + ROWS)
    n = len(ROWS)
    expected = written(tmp_path / "a", [pa.Table.from_pylist(ROWS, more.schema)], more.schema)
    order = list(range(len(more)))
    random.Random(0).shuffle(order)
    back = [order.index(i) for i in range(n)]
    arrivals = {
        "a slice": [more.slice(0, n)],
        "thirteen at a time": [more.slice(i, min(13, n - i)) for i in range(0, n, 13)],
        "record batches": more.slice(0, n).to_batches(17),
        "shuffled and back": [more.take(order).take(back)],
        "with metadata": [more.slice(0, n).replace_schema_metadata({"pandas": "7"})],
    }
    for name, batches in arrivals.items():
        assert written(tmp_path / "b", batches, more.schema) == expected, name


def test_what_arrow_keeps_below_nulls_is_not_written(tmp_path):
    def column(below_null):
        values = pa.py_buffer(np.array([1, 2, below_null, 4], dtype=np.int64))
        return pa.Array.from_buffers(pa.int64(), 4, [pa.py_buffer(b"\x0b"), values])

    first, second = (pa.table({"x": column(value)}) for value in (77, 99))
    assert first.equals(second)
    assert written(tmp_path / "a", [first], first.schema) == written(
        tmp_path / "b", [second], second.schema
    )


def test_datasets_reads_the_file_as_it_is(tmp_path):
    import datasets

    table = pa.Table.from_pylist(ROWS)
    assert tables.write(tmp_path / "t.arrow", [table], table.schema) == len(ROWS)
    dataset = datasets.Dataset.from_file(str(tmp_path / "t.arrow"))
    assert dataset.to_list() == ROWS
    assert tables.read(tmp_path / "t.arrow").to_pylist() == ROWS
    sizes = [batch.num_rows for batch in tables.batches(tmp_path / "t.arrow")]
    assert sizes == [1000, 1000, 357]


def test_reading_maps_the_file_instead_of_copying_it(tmp_path):
    column = tables.token_lists([np.arange(1000)] * 5000)
    table = pa.table({"input_ids": column})
    tables.write(tmp_path / "t.arrow", [table], table.schema)
    before = pa.total_allocated_bytes()
    back = tables.read(tmp_path / "t.arrow")
    assert back.nbytes >= 20_000_000
    assert pa.total_allocated_bytes() - before < 1_000_000


def test_a_table_without_rows_keeps_its_schema(tmp_path):
    import datasets

    schema = pa.schema([("input_ids", pa.list_(pa.int32()))])
    assert tables.write(tmp_path / "t.arrow", [], schema) == 0
    assert tables.read(tmp_path / "t.arrow").schema == schema
    assert datasets.Dataset.from_file(str(tmp_path / "t.arrow")).num_rows == 0


def test_a_table_with_other_columns_is_refused(tmp_path):
    schema = pa.schema([("x", pa.int64())])
    with pytest.raises(ValueError, match="match"):
        tables.write(tmp_path / "t.arrow", [pa.table({"y": [1]})], schema)


def test_token_lists():
    column = tables.token_lists([np.array([1, 2]), [3], np.array([], dtype=np.int64)])
    assert column.to_pylist() == [[1, 2], [3], []]
    assert column.type == pa.list_(pa.int32())
    assert tables.token_lists([]).to_pylist() == []
