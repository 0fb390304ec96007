"""Rows that cannot be used are set aside with place and reason, and the others stay as they are."""

import gzip
import json
import shutil
from collections import Counter

import pyarrow as pa
import pytest
from pyarrow import parquet

from ditty.config.dataspec import DataSpec
from ditty.dataset import tables
from ditty.dataset.sources import identify, load
from ditty.errors import DataError
from tests.test_sources import write


def quarantined(tmp_path, source, **spec):
    """Facts, rows and the lines of the quarantine, where there may be bad rows."""
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    facts = load(DataSpec(source=str(source), **spec), out)
    assert sorted(p.name for p in out.iterdir()) == ["data.arrow", "quarantine.jsonl"]
    rows = tables.read(out / "data.arrow").to_pylist()
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert facts["read"] == facts["rows"] + len(lines) == len(rows) + len(lines)
    assert facts["quarantined"] == Counter(line["reason"] for line in lines)
    return facts, rows, lines


def lines_with(bad, count=500):
    """JSON lines, those of `bad` (number from 1 -> bytes) in the place of good ones."""
    lines = [b'{"text": "row %d", "n": %d}' % (n, n) for n in range(1, count + 1)]
    for number, content in bad.items():
        lines[number - 1] = content
    return b"\n".join(lines)


@pytest.mark.fault("bad rows")
def test_bad_rows_are_set_aside_with_place_and_reason(tmp_path, figure):
    huge = b"x" * (10 << 20)
    bad = {
        2: b'{"text": "b\xffc"}',
        3: b'{"text": ',
        77: b"[1]",
        100: b"{}",
        250: b'{"text": 5, "n": 1}',
        251: b'{"text": "a", "n": 123456789012345678901234567890}',
        499: b'{"text": "' + huge,
    }
    path = write(tmp_path / "rows.jsonl", lines_with(bad))
    good = [{"text": f"row {n}", "n": n} for n in range(1, 501) if n not in bad]
    facts, rows, lines = quarantined(tmp_path, path, max_bad_fraction=0.02)
    assert rows == good, "as a plain loop over the good lines would have them"
    assert [line["position"] for line in lines] == [f"line {n}" for n in bad]
    assert [line["reason"] for line in lines] == [
        "not UTF-8",
        "not JSON",
        "list, expected an object with named columns",
        "no columns",
        "column 'text' holds int, expected string",
        "column 'n' cannot be stored",
        "not JSON",
    ]
    assert lines[0]["excerpt"] == '{"text": "b\N{REPLACEMENT CHARACTER}c"}'
    assert all(len(line["excerpt"]) <= 200 for line in lines)
    assert str(tmp_path) not in json.dumps(lines), "the same bytes wherever the source stands"
    with pytest.raises(DataError) as error:
        quarantined(tmp_path, path)
    message = str(error.value)
    assert message.startswith(f"{path}: 7 of 500 rows (1.40%) cannot be used, ")
    assert message.count(" x ") == 3 and "2 x not JSON, at line 3, line 499 (" in message
    assert len(message) < 1500
    kept = f"{facts['read']} rows read = {len(rows)} kept + {len(lines)} set aside"
    figure(f"{kept}, each with its line and reason; an error above the threshold")


def test_the_odd_type_out_is_the_rarer_one(tmp_path):
    """Whether it comes first, in a later batch, or deep inside."""
    odd = {1: b'{"text": ["a"], "n": 1}', 2100: b'{"text": "a", "n": "one"}'}
    path = write(tmp_path / "rows.jsonl", lines_with(odd, 2200))
    _, rows, lines = quarantined(tmp_path, path)
    assert len(rows) == 2198
    assert [(line["position"], line["reason"]) for line in lines] == [
        ("line 1", "column 'text' holds list, expected string"),
        ("line 2100", "column 'n' holds str, expected int64"),
    ]
    chat = [{"messages": [{"role": "user", "content": "a"}]} for _ in range(200)]
    chat[150] = {"messages": [{"role": "user", "content": {"parts": []}}]}
    path = write(tmp_path / "chats.jsonl", "\n".join(map(json.dumps, chat)))
    _, rows, lines = quarantined(tmp_path, path)
    assert rows == chat[:150] + chat[151:] and lines[0]["position"] == "line 151"


def test_rows_that_are_nested_too_deeply(tmp_path):
    """Deeper than Python's parser goes, than Arrow's files, and as deep as these just take."""
    nested = {
        n: b'{"text": "a", "n": 1, "x": ' + b"[" * n + b"]" * n + b"}" for n in (5000, 64, 63)
    }
    path = write(tmp_path / "rows.jsonl", lines_with({3: nested[5000], 7: nested[64]}))
    _, rows, lines = quarantined(tmp_path, path)
    assert [row["n"] for row in rows] == [n for n in range(1, 501) if n not in (3, 7)]
    assert [(line["position"], line["reason"], line["detail"]) for line in lines] == [
        ("line 3", "nested too deeply", ""),
        ("line 7", "column 'x' cannot be stored", "nested deeper than 64 levels"),
    ]
    write(path, nested[63])
    assert load(DataSpec(source=str(path)), tmp_path / "out")["rows"] == 1
    with pytest.raises(DataError, match=r"rows.json is not JSON: .*recursion"):
        quarantined(tmp_path, write(tmp_path / "rows.json", b"[" + nested[5000] + b"]"))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_max_rows_counts_the_bad_ones(tmp_path, name):
    bad = {2: b"nope", 5: b"nope", 7: b"nope", 12: b"nope"}
    text = lines_with(bad, 12)
    if name == "rows.csv":
        text = b"text,n\n" + b"\n".join(bad.get(n, b"row,%d" % n) for n in range(1, 13))
    path = write(tmp_path / name, text)
    for count in range(2, 15):
        facts, rows, _ = quarantined(tmp_path, path, max_rows=count, max_bad_fraction=0.5)
        assert facts["read"] == min(count, 12)
        assert [row["n"] for row in rows] == [
            n for n in range(1, 13) if n <= count and n not in bad
        ]


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
def test_bad_rows_of_several_columnar_files(tmp_path, suffix):
    folder = tmp_path / "parts"
    folder.mkdir()
    for part in range(3):
        texts = [b"part %d row %d" % (part, n) for n in range(10)]
        texts[part + 2] = b"\xff"
        if suffix == ".parquet":
            column = pa.array(texts, pa.binary()).view(pa.string())
            parquet.write_table(pa.table({"text": column}), folder / f"{part}.parquet")
        else:
            content = b"text\n" + b"\n".join(texts)
            write(folder / f"{part}{suffix}", gzip.compress(content) if "gz" in suffix else content)
    start = 0 if suffix == ".parquet" else 2
    for count, bad in {None: 3, 30: 3, 25: 3, 24: 2, 14: 2, 13: 1, 10: 1}.items():
        facts, rows, lines = quarantined(
            tmp_path, folder, max_rows=count, max_bad_fraction=0.5, format="text"
        )
        assert facts["read"] == (count or 30)
        places = [f"file {part + 1}, row {part + 2 + start}" for part in range(bad)]
        assert [line["position"] for line in lines] == places
        whole = [f"part {n // 10} row {n % 10}" for n in range(count or 30) if n not in (2, 13, 24)]
        assert [row["text"] for row in rows] == whole


def test_bad_rows_of_a_csv(tmp_path, monkeypatch):
    monkeypatch.setattr("ditty.dataset.columnar.CSV_BLOCK_BYTES", 1000)  # many batches
    lines = [b'"text\n%d",%d' % (n, n) for n in range(2, 1002)]
    for number, line in {2: b"a", 500: b"b,\xff", 501: b"b,1,1", 1001: b"c"}.items():
        lines[number - 2] = line
    path = write(tmp_path / "rows.csv", b"text,n\n" + b"\n".join(lines))
    _, rows, found = quarantined(tmp_path, path, columns={"text": "n"}, format="text")
    assert [line["position"] for line in found] == ["row 2", "row 500", "row 501", "row 1001"]
    assert found[1]["excerpt"] == '{"text": "b", "n": "\N{REPLACEMENT CHARACTER}"}'
    good = [n for n in range(2, 1002) if n not in (2, 500, 501, 1001)]
    assert rows == [{"text": f"text\n{n}", "n": str(n)} for n in good]


def test_text_that_a_file_only_says_is_utf8(tmp_path):
    import datasets

    texts = [f"row {n}".encode() for n in range(1200)]
    texts[1100] = b"b\xff"
    column = pa.array(texts, pa.binary()).view(pa.string())
    table = pa.table({"text": column, "n": range(1200)})
    parquet.write_table(table, tmp_path / "rows.parquet")
    datasets.Dataset(table).save_to_disk(tmp_path / "folder")
    for name in ("rows.parquet", "folder"):
        _, rows, lines = quarantined(tmp_path, tmp_path / name)
        assert [row["n"] for row in rows] == [*range(1100), *range(1101, 1200)]
        assert [(x["position"], x["reason"]) for x in lines] == [("row 1100", "not UTF-8")]


def test_the_threshold_is_no_part_of_the_identity(tmp_path):
    path = str(write(tmp_path / "a.jsonl", '{"text": "a"}'))
    identities = [identify(DataSpec(source=path, max_bad_fraction=f)) for f in (0.0, 0.5)]
    assert identities[0] == identities[1]
