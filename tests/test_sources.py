import json
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from ditty.config.dataspec import DataSpec
from ditty.dataset import tables
from ditty.dataset.sources import identify, load
from ditty.errors import DataError

ROWS = [
    {"text": "Grüße\n", "score": 1, "messages": [{"role": "user", "content": "a"}]},
    {"text": "", "score": 2.5, "messages": []},
    {"text": "c", "score": None, "messages": [{"role": "user", "content": "b", "name": "n"}]},
]
FILLED = [
    {**row, "messages": [{"name": None, **message} for message in row["messages"]]} for row in ROWS
]


def loaded(tmp_path, source, **spec):
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    facts = load(DataSpec(source=str(source), **spec), out)
    assert [p.name for p in out.iterdir()] == ["data.arrow"], "no temporary file stays"
    rows = tables.read(out / "data.arrow").to_pylist()
    told = {"rows": len(rows), "columns": list(rows[0])}
    assert facts == {"read": len(rows), "quarantined": {}, **told}
    return rows


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# Formats


def test_jsonl(tmp_path):
    lines = "\n\n".join(json.dumps(row, ensure_ascii=i == 0) for i, row in enumerate(ROWS))
    path = write(tmp_path / "rows.jsonl", "\ufeff" + lines.replace("\n\n", "\r\n \n"))
    assert loaded(tmp_path, path) == FILLED
    assert loaded(tmp_path, path, max_rows=1)[0]["text"] == "Grüße\n"


@pytest.mark.parametrize("indent", [None, 2])
def test_json_is_a_list_or_an_object_a_line(tmp_path, indent):
    assert loaded(tmp_path, write(tmp_path / "l.json", json.dumps(ROWS, indent=indent))) == FILLED
    lines = "\n".join(json.dumps(row) for row in ROWS)
    assert loaded(tmp_path, write(tmp_path / "r.json", lines)) == FILLED


def test_csv(tmp_path):
    path = write(tmp_path / "rows.csv", 'prompt,completion,n\n007,"a\nb",7\n,"x, ""y""",\n')
    rows = loaded(tmp_path, path, format="prompt_completion")
    assert rows == [
        {"prompt": "007", "completion": "a\nb", "n": 7},
        {"prompt": "", "completion": 'x, "y"', "n": None},
    ]


def test_parquet(tmp_path):
    table = pa.table({
        "kind": pa.array(["a", "b", "a"]).dictionary_encode(),
        "messages": [row["messages"] for row in FILLED],
    })  # fmt: skip
    parquet.write_table(table, tmp_path / "rows.parquet")
    rows = loaded(tmp_path, tmp_path / "rows.parquet")
    assert [row["kind"] for row in rows] == ["a", "b", "a"]
    assert tables.read(tmp_path / "out" / "data.arrow").schema.field("kind").type == pa.string()
    assert [row["messages"] for row in rows] == [row["messages"] for row in FILLED]
    assert len(loaded(tmp_path, tmp_path / "rows.parquet", max_rows=2)) == 2


def test_txt(tmp_path):
    path = write(tmp_path / "rows.txt", "one\r\n\nthree")
    assert loaded(tmp_path, path) == [{"text": "one"}, {"text": ""}, {"text": "three"}]


def test_a_folder_saved_by_datasets(tmp_path):
    import datasets

    whole = datasets.Dataset.from_list(ROWS)
    whole.select([2, 0]).save_to_disk(tmp_path / "one")
    expected = [FILLED[2], FILLED[0]]
    assert [r["text"] for r in loaded(tmp_path, tmp_path / "one")] == [r["text"] for r in expected]
    splits = datasets.DatasetDict({"train": whole, "test": whole.select([1])})
    splits.save_to_disk(tmp_path / "several")
    assert len(loaded(tmp_path, tmp_path / "several")) == 3
    assert loaded(tmp_path, tmp_path / "several", split="test")[0]["score"] == 2.5
    with pytest.raises(DataError, match="no split 'dev', expected train or test"):
        loaded(tmp_path, tmp_path / "several", split="dev")
    (tmp_path / "one" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(DataError, match="incomplete: .*data-00000-of-00001.arrow"):
        identify(DataSpec(source=str(tmp_path / "one")))


def test_a_function(tmp_path):
    path = write(
        tmp_path / "rows.py",
        "LIMIT = 3\ndef rows():\n    for i in range(LIMIT):\n        yield {'text': str(i)}\n",
    )
    assert [row["text"] for row in loaded(tmp_path, f"{path}:rows")] == ["0", "1", "2"]
    assert len(loaded(tmp_path, f"{path}:rows", max_rows=2)) == 2


def test_types_hold_all_rows_whichever_batch_they_are_in(tmp_path):
    rows = [{"a": 1, "m": []}, *({"a": None, "m": []} for _ in range(1499))]
    rows += [{"m": [{"role": "user"}], "a": 1}, {"m": None, "a": 2.5, "late": True}]
    path = write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    back = loaded(tmp_path, path)
    assert back[:2] == [{"a": 1.0, "m": [], "late": None}, {"a": None, "m": [], "late": None}]
    assert back[1500:] == [
        {"a": 1.0, "m": [{"role": "user"}], "late": None},
        {"a": 2.5, "m": None, "late": True},
    ]


def test_integers_that_are_no_float_beside_floats_name_the_column(tmp_path):
    big = '{"text": "a", "n": 9007199254740993}\n'
    path = write(tmp_path / "rows.jsonl", big * 1000 + '{"text": "b", "n": 0.5}')
    told = "rows.jsonl: column 'n' is double over all rows, .*9007199254740993 not in range"
    with pytest.raises(DataError, match=told):
        loaded(tmp_path, path)
    write(path, big)
    write(tmp_path / "more.jsonl", '{"text": "b", "n": 0.5}')
    parts = [{"source": str(path)}, {"source": str(tmp_path / "more.jsonl")}]
    for weight in (None, 1.0):
        mixed = [{**part, "weight": weight} for part in parts]
        values = {"sources": mixed, "stopping_strategy": "all_exhausted"}
        data = DataSpec.model_validate(values)
        with pytest.raises(DataError, match=told):
            load(data, tmp_path)
    for number, content in enumerate([[9007199254740993], [0.5]]):
        parquet.write_table(pa.table({"n": content}), tmp_path / f"{number}.parquet")
    with pytest.raises(DataError, match=told.replace("rows.jsonl", "0.parquet")):
        loaded(tmp_path, tmp_path / "*.parquet")


def test_local_files_need_no_datasets_and_leave_the_home_alone(tmp_path):
    path = write(tmp_path / "rows.jsonl", '{"text": "a"}')
    home = tmp_path / "user"
    (tmp_path / "out").mkdir()
    code = (
        "import sys; from pathlib import Path; from ditty.dataset.sources import *; data ="
        " DataSpec(source=sys.argv[1]); identify(data); load(data, Path(sys.argv[2]));"
        " print({'datasets', 'torch', 'transformers'} & set(sys.modules))"
    )
    env = {**os.environ, "HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code, path, tmp_path / "out"],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "set()\n", done.stderr
    assert not home.exists()


# Identity


def test_the_identity_is_the_content_not_the_place(tmp_path):
    first = write(tmp_path / "a.jsonl", '{"text": "a"}')
    same = write(tmp_path / "b.jsonl", '{"text": "a"}')
    other = write(tmp_path / "c.jsonl", '{"text": "b"}')
    plain = write(tmp_path / "d.txt", '{"text": "a"}')
    a, b, c, d = (identify(DataSpec(source=str(p))) for p in (first, same, other, plain))
    assert a == b
    assert a != c
    assert a != d, "the same bytes are other rows in another format"
    assert identify(DataSpec(source=str(first), max_rows=1)) != a
    assert identify(DataSpec(source=str(first), seq_len=99, num_proc=2)) == a
    json.dumps(a, allow_nan=False)


def test_the_types_of_a_csv_depend_on_the_columns_that_the_format_reads(tmp_path):
    path = str(write(tmp_path / "a.csv", "text,q\n1,2\n"))
    names = [{}, {"columns": {"text": "q"}}]
    one, other = (DataSpec(source=path, format="text", **spec) for spec in names)
    assert identify(one) != identify(other)


def test_the_identity_of_a_saved_folder_outlives_saving_it_again(tmp_path):
    import datasets

    made = datasets.Dataset.from_list(ROWS)
    for name in ("a", "b"):
        made.save_to_disk(tmp_path / name)
    made.select([0]).save_to_disk(tmp_path / "c")
    a, b, c = (identify(DataSpec(source=str(tmp_path / name))) for name in "abc")
    assert a == b
    assert a != c


def test_a_function_says_what_else_its_rows_depend_on(tmp_path):
    source = "def rows():\n    yield {{'text': {!r}}}\nrows.identity = lambda: {{'version': {}}}\n"
    identities = []
    for text, version in [("a", 1), ("a", 1), ("b", 1), ("a", 2)]:
        path = write(tmp_path / "rows.py", source.format(text, version))
        identities.append(identify(DataSpec(source=f"{path}:rows")))
    a, again, other_code, other_version = identities
    assert a == again
    assert a["depends_on"] == {"version": 1}
    assert len({json.dumps(i) for i in (a, other_code, other_version)}) == 3
    path.write_text(source.format("a", "1 / 0"))
    with pytest.raises(DataError, match=r"rows.py:rows: its `identity` failed .*: ZeroDivision"):
        identify(DataSpec(source=f"{path}:rows"))


# Errors


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"1 of 2 rows .* x not JSON, at line 2 \(Expect"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": "\xff"}', r"x not UTF-8, at line 3 \(byte 8 is 0xff\)"),
        ("a.jsonl", '{"a": 1}\n[1]', r"x list, expected an object .*, at line 2 \(\[1\]\)"),
        ("a.jsonl", "\n \n", "has no rows"),
        ("a.jsonl", "", "has no rows"),
        ("a.jsonl", "{}", "x no columns, at line 1"),
        ("a.jsonl", '{"a": 1}\n{"b": 2}\n{"a": "x"}',
         "x column 'a' holds str, expected int64, at line 3"),
        ("a.jsonl", '{"a": true}\n{"a": 0}', "x column 'a' holds int, expected bool, at line 2"),
        ("a.jsonl", '{"a": 1}\n' * 10 + '{"a": "x"}', "1 of 11 rows .9.09%.* at line 11"),
        ("a.jsonl", '{"a": 1}\n{"a": 99999999999999999999999}',
         r"x column 'a' cannot be stored, at line 2 \(.*"),
        ("a.jsonl", '{"a": "\\ud800"}', "column 'a' cannot be stored, at line 1 .*surrogates"),
        ("a.json", '[{"a": 1}, 2]', "x int, expected an object .*, at item 1"),
        ("a.json", '[{"a": 1}, \n{"a"', "a.json is not JSON: .*line 2"),
        ("a.json", "[]", "has no rows"),
        ("a.csv", "", "a.csv: Empty CSV file"),
        ("a.csv", "a,b\n", "has no rows"),
        ("a.csv", "a,a\n1,2\n", "several columns named a"),
        ("a.csv", "a,b\n1,2\n1,2,3\n",
         r"x another number of fields .*, at row 3 \(3 fields, expected 2"),
        ("a.csv", b"a,b\n1,\xe9\n", r"x not UTF-8, at row 2 \(column 'b'"),
        ("a.parquet", "nope", "is not a parquet file"),
        ("a.txt", b"a\n\xc3", "x not UTF-8, at line 2 .byte 1 is 0xc3"),
        ("a.xml", "<a/>", r"suffix '.xml', expected one of .jsonl"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read_say_where(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        loaded(tmp_path, path)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "yield {'a': 1}\n    yield [2]",
            r"rows.py:rows: .*x list, expected an object .* at row 1 \(\[2\]",
        ),
        ("yield {1: 2}", "x dict, expected an object with named columns, at row 0"),
        ("yield {'a': 1}\n    1 / 0", "failed after 1 rows: ZeroDivisionError"),
        ("return 3", "failed after 0 rows: TypeError"),
        ("return []", "has no rows"),
        ("yield {'a': object()}", "x column 'a' cannot be stored, at row 0"),
    ],
)
def test_functions_that_fail_say_where(tmp_path, body, message):
    path = write(tmp_path / "rows.py", f"def rows():\n    {body}\n")
    with pytest.raises(DataError, match=message):
        loaded(tmp_path, f"{path}:rows")


def test_names_of_nothing(tmp_path):
    write(tmp_path / "rows.jsonl", "{}")
    (tmp_path / "folder").mkdir()
    for source, message in {
        f"{tmp_path}/row.jsonl": "no file or folder .*/row.jsonl; did you mean .*/rows.jsonl",
        f"{tmp_path}/no/row.jsonl": "no file or folder .*; .*/no does not exist either",
        "a/b/c": "no file or folder",
        f"{tmp_path}/folder": "holds neither rows saved by datasets .* nor files that end",
        f"{tmp_path}/*.csv": "no file matches .*/.*csv",
        f"{tmp_path}/nothing.py:rows": "cannot read .*nothing.py",
    }.items():
        with pytest.raises(DataError, match=message):
            identify(DataSpec(source=source))


# The hub


@pytest.fixture
def hub(monkeypatch):
    """A hub that knows one data set, `org/known`, whose branches have the commits given."""
    branches = OrderedDict(main="1" * 40, other="2" * 40)

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            name, _, revision = self.path.removeprefix("/api/datasets/").partition("/revision/")
            known = name == "org/known" and (revision or "main") in branches
            body = {"id": name, "sha": branches.get(revision or "main")}
            self.send_response(200 if known else 404)
            if not known:
                code = "RevisionNotFound" if name == "org/known" else "RepoNotFound"
                self.send_header("X-Error-Code", code)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(
        "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}"
    )
    yield branches
    server.shutdown()
    server.server_close()


def test_a_hub_data_set_is_identified_by_its_commit(hub):
    spec = DataSpec(source="org/known", subset="en")
    identity = identify(spec)
    assert identity["commit"] == "1" * 40
    assert (
        identify(DataSpec(source="org/known", subset="en", revision="other"))["commit"] == "2" * 40
    )
    assert identify(spec.model_copy(update={"revision": "1" * 40})) == identity
    for change in ({"subset": "de"}, {"split": "test"}, {"max_rows": 3}):
        assert identify(spec.model_copy(update=change)) != identity
    hub["main"] = "3" * 40
    assert identify(spec) != identity


def test_the_hub_has_no_such_thing(hub):
    with pytest.raises(DataError, match="org/known has no revision v9"):
        identify(DataSpec(source="org/known", revision="v9"))
    with pytest.raises(DataError, match="no file or folder of that name, and the hub has no such"):
        identify(DataSpec(source="org/unknown"))


def test_a_hub_data_set_is_loaded_at_its_commit(tmp_path, hub, monkeypatch):
    import datasets

    asked = {}

    def load_dataset(path, **options):
        asked.update(options, path=path)
        return datasets.Dataset.from_list(ROWS).select([2, 0, 1])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = loaded(tmp_path, "org/known", subset="en", split="test", max_rows=2)
    assert [row["text"] for row in rows] == ["c", "Grüße\n"]
    assert asked == {"path": "org/known", "name": "en", "split": "test", "revision": "1" * 40}


@pytest.mark.parametrize("several", [False, True])
def test_what_a_key_names_is_loaded_wherever_the_branch_is_now(tmp_path, hub, monkeypatch, several):
    import datasets

    asked = []

    def load_dataset(path, **options):
        asked.append(options["revision"])
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    parts = [{"source": "org/known"}, {"source": "org/known", "revision": "other"}]
    data = DataSpec.model_validate({"sources": parts} if several else parts[0])
    identity = identify(data)
    hub["main"] = "3" * 40
    load(data, tmp_path, identity)
    assert asked == (["1" * 40, "2" * 40] if several else ["1" * 40])


def test_a_hub_that_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rowz").write_text("")
    with pytest.raises(
        DataError, match="name; did you mean .*/rowz.*, and the hub does not answer"
    ):
        identify(DataSpec(source="rows"))
    pinned = DataSpec(source="org/known", revision="1" * 40)
    assert identify(pinned)["commit"] == "1" * 40, "a commit needs no hub"
