"""Several files as one source, and compressed ones: against what `datasets` reads of them."""

import bz2
import gzip
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from ditty.config.dataspec import DataSpec
from ditty.dataset.sources import identify
from ditty.errors import DataError
from tests.test_bad_rows import quarantined
from tests.test_sources import FILLED, ROWS, loaded, write


def by_datasets(tmp_path, kind, files):
    """The rows as `datasets` reads the same files."""
    import datasets

    names = sorted(str(path) for path in files)
    made = datasets.load_dataset(kind, data_files=names, split="train", cache_dir=tmp_path / "hf")
    return made.to_list()


COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files(tmp_path, suffix):
    compress = COMPRESS[suffix]
    lines = "\n".join(json.dumps({"text": f"line {i}", "n": i}) for i in range(2500)).encode()
    path = write(tmp_path / f"rows.jsonl{suffix}", compress(lines))
    rows = loaded(tmp_path, path)
    assert rows == [{"text": f"line {i}", "n": i} for i in range(2500)]
    if suffix != ".zst":  # for which it wants another package
        assert rows == by_datasets(tmp_path, "json", [path])
    listed = write(tmp_path / f"l.json{suffix}", compress(json.dumps(ROWS).encode()))
    assert loaded(tmp_path, listed) == FILLED
    plain = write(tmp_path / f"t.txt{suffix}", compress("a\nÜ".encode()))
    assert loaded(tmp_path, plain) == [{"text": "a"}, {"text": "Ü"}]
    table = write(tmp_path / f"t.csv{suffix}", compress(b"text,n\n007,7\n"))
    assert loaded(tmp_path, table, format="text") == [{"text": "007", "n": 7}]
    cut = write(tmp_path / f"cut.jsonl{suffix}", compress(lines)[:-50])
    with pytest.raises(DataError, match="cut.jsonl.* damaged or cut short: .*, after line"):
        loaded(tmp_path, cut)
    other = write(tmp_path / f"other.jsonl{suffix}", lines)
    with pytest.raises(DataError, match="other.jsonl.* cannot be read"):
        loaded(tmp_path, other)
    with pytest.raises(DataError, match=f"suffix '{suffix}', expected one of"):
        loaded(tmp_path, write(tmp_path / f"rows.parquet{suffix}", b""))


@pytest.mark.parametrize("named", ["data", "data/*.jsonl*", "d*/**/part-*"])
def test_a_folder_or_a_pattern_is_its_files_in_order(tmp_path, monkeypatch, named):
    folder = tmp_path / "data"
    folder.mkdir()
    parts = [[{"a": i, "b": f"row {i}"} for i in range(start, start + 3)] for start in (0, 3, 6)]
    files = []
    for number, part in reversed(list(enumerate(parts))):
        text = "\n".join(map(json.dumps, part)).encode()
        name = f"part-{number}.jsonl" + (".gz" if number == 1 else "")
        files.append(write(folder / name, gzip.compress(text) if number == 1 else text))
    write(folder / "README.md", "# Rows")
    write(folder / ".hidden.jsonl", "no json")
    monkeypatch.chdir(tmp_path)
    rows = loaded(tmp_path, named)
    assert [row["a"] for row in rows] == list(range(9))
    assert rows == by_datasets(tmp_path, "json", files)
    assert len(loaded(tmp_path, named, max_rows=4)) == 4


def test_columns_of_several_files_have_one_type(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    tables_of = [
        {"a": [1, 2], "m": [[{"x": 1}], []]},
        {"a": [2.5], "m": [[{"y": "b"}]]},
        {"c": ["z"]},
    ]
    for number, columns in enumerate(tables_of):
        parquet.write_table(pa.table(columns), folder / f"{number}.parquet")
    rows = loaded(tmp_path, folder)
    assert [row["a"] for row in rows] == [1.0, 2.0, 2.5, None]
    assert rows[0] == {"a": 1.0, "m": [{"x": 1, "y": None}], "c": None}
    assert rows[2:] == [
        {"a": 2.5, "m": [{"x": None, "y": "b"}], "c": None}, {"a": None, "m": None, "c": "z"},
    ]  # fmt: skip
    parquet.write_table(pa.table({"a": ["text"]}), folder / "3.parquet")
    with pytest.raises(DataError, match="from .*3.parquet on, a column has another type"):
        loaded(tmp_path, folder)


def test_lines_of_several_files_are_told_by_their_own_file(tmp_path):
    write(tmp_path / "a.jsonl", '{"a": 1}\n')
    write(tmp_path / "b.jsonl", '\n{"a": "x"}\n')
    source = tmp_path / "*.jsonl"
    with pytest.raises(DataError, match="holds str, expected int64, at .*/b.jsonl, line 2 "):
        loaded(tmp_path, source)
    _, _, lines = quarantined(tmp_path, source, max_bad_fraction=0.5)
    assert lines[0]["position"] == "file 2, line 2", "no names: the key does not hold them"
    write(tmp_path / "c.csv", "a\n1\n")
    with pytest.raises(DataError, match=r"several formats, .csv and .jsonl: .*, .*/\*.csv for"):
        loaded(tmp_path, tmp_path)


def test_the_identity_of_several_files_is_their_contents_in_order(tmp_path):
    for name, content in {"a/1.txt": "x", "a/2.txt": "y", "b/p.txt": "x", "b/q.txt": "y",
                          "c/1.txt": "y", "c/2.txt": "x", "d/1.txt": "x"}.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, content)
    a, b, c, d = (identify(DataSpec(source=str(tmp_path / name))) for name in "abcd")
    assert a == b == identify(DataSpec(source=str(tmp_path / "a/*.txt")))
    assert len({json.dumps(i) for i in (a, c, d)}) == 3
    assert d == identify(DataSpec(source=str(tmp_path / "d/1.txt")))
