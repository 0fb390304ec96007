import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow as pa
import pytest

from ditty import tables
from ditty.dataspec import Operation
from ditty.errors import DataError
from ditty.operations import apply

ROWS = [{"text": "x" * (i % 10), "n": i} for i in range(2_500)]

OPS = """
    def longer(row, least=0):
        return len(row["text"]) > least

    def longer_batch(rows, least=0):
        return [len(text) > least for text in rows["text"]]

    def double(row):
        return {"twice": row["text"] * 2}

    def twice_each(rows):
        return {"half": [n / 2 for n in rows["n"] for _ in range(2)]}

    def batch_sizes(rows):
        return {"size": [len(rows["n"])]}

    def fails(row):
        if row["n"] == 1234:
            raise KeyError("body")
        return True

    def fails_batch(rows):
        if 1234 in rows["n"]:
            raise KeyError("body")
        return rows

    def returns_nothing(row):
        pass

    def returns_text(row):
        return "text"

    def too_few(rows):
        return [True]

    def mixed(row):
        return {"x": 1 if row["n"] < 2000 else [1]}

    def never(row):
        return False
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rowops.py").write_text(textwrap.dedent(OPS))
    (tmp_path / "source").mkdir()
    table = pa.Table.from_pylist(ROWS)
    tables.write(tmp_path / "source" / "data.arrow", [table], table.schema)
    yield tmp_path
    sys.modules.pop("rowops", None)


def applied(place, method, name, num_proc=1, **options):
    """Facts, rows and bytes of the result."""
    out = place / "out"
    out.mkdir(exist_ok=True)
    operation = Operation(method=method, function=f"rowops:{name}", **options)
    facts = apply(operation, place / "source", out, num_proc)
    assert [p.name for p in out.iterdir()] == ["data.arrow"], "no temporary file stays"
    path = out / "data.arrow"
    return facts, tables.read(path).to_pylist(), path.read_bytes()


@pytest.mark.parametrize("batched", [False, True])
def test_filter(place, batched):
    name = "longer_batch" if batched else "longer"
    facts, rows, _ = applied(place, "filter", name, batched=batched, kwargs={"least": 4})
    assert rows == [row for row in ROWS if len(row["text"]) > 4]
    assert facts == {"rows_in": 2500, "rows": 1250, "columns": ["text", "n"]}


def test_map(place):
    facts, rows, _ = applied(place, "map", "double", remove_columns=["text"])
    assert rows == [{"n": row["n"], "twice": row["text"] * 2} for row in ROWS]
    assert facts["columns"] == ["n", "twice"]


def test_a_batched_map_may_change_the_number_of_rows(place):
    _, rows, _ = applied(place, "map", "twice_each", batched=True, remove_columns=["text", "n"])
    assert rows == [{"half": n / 2} for n in range(2500) for _ in range(2)]


@pytest.mark.parametrize(
    ("method", "name", "options"),
    [
        ("filter", "longer", {"kwargs": {"least": 4}}),
        ("map", "double", {}),
        ("map", "batch_sizes", {"batched": True, "remove_columns": ["text", "n"]}),
    ],
)
def test_more_processes_make_the_same_bytes(place, method, name, options):
    one = applied(place, method, name, **options)
    assert applied(place, method, name, num_proc=2, **options) == one


def test_no_cache_answers_for_an_edited_function(place):
    applied(place, "map", "double")
    ops = place / "rowops.py"
    ops.write_text(ops.read_text().replace("* 2}", "* 3}   # edited"))
    sys.modules.pop("rowops")
    _, rows, _ = applied(place, "map", "double")
    assert rows[3]["twice"] == "x" * 9


@pytest.mark.parametrize(
    ("method", "name", "options", "message"),
    [
        ("filter", "fails", {}, "filter rowops:fails failed at row 1234: KeyError: 'body'"),
        ("filter", "fails", {"num_proc": 2}, "filter rowops:fails failed at row 1234: KeyError"),
        ("map", "fails_batch", {"batched": True}, "failed at rows 1000 to 1999: KeyError: 'body'"),
        ("map", "double", {"kwargs": {"k": 1}}, "failed at row 0: TypeError: .*unexpected keyword"),
        ("filter", "returns_nothing", {}, "at row 0: returned NoneType None, expected true or"),
        ("map", "returns_nothing", {}, "at row 0: returned NoneType None, expected a dict"),
        ("map", "returns_text", {}, "at row 0: returned str text, expected a dict"),
        ("filter", "too_few", {"batched": True}, "returned 1 values for 1000 rows"),
        ("map", "mixed", {}, "map rowops:mixed: "),
        ("map", "twice_each", {"batched": True}, "map rowops:twice_each: .*length"),
        ("filter", "never", {}, "filter rowops:never leaves none of 2500 rows"),
        (
            "map",
            "double",
            {"remove_columns": ["txt"]},
            "names 'txt', the data has text, n; did you",
        ),
        ("map", "dubble", {}, "rowops has no 'dubble'; did you mean double"),
    ],
)
def test_errors_name_operation_function_and_row(place, method, name, options, message):
    with pytest.raises(DataError, match=message):
        applied(place, method, name, **options)
    assert not list((place / "out").glob(".ditty-*"))


def test_the_original_error_is_the_cause(place):
    with pytest.raises(DataError) as caught:
        applied(place, "filter", "fails")
    assert isinstance(caught.value.__cause__, KeyError)


def test_no_torch_and_nothing_in_the_home(place):
    home = place / "user"
    (place / "out").mkdir()
    code = (
        "import sys; from pathlib import Path; from ditty.operations import *;"
        " apply(Operation(method='map', function='rowops:double'), Path('source'), Path('out'), 1);"
        " print({'torch', 'transformers'} & set(sys.modules))"
    )
    env = {**os.environ, "HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=place, env=env, capture_output=True, text=True
    )
    assert done.stdout == "set()\n", done.stderr
    assert done.stderr == "", "no progress bars"
    assert not home.exists()
