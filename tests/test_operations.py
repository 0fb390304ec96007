import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow as pa
import pytest

from ditty.config.choices import OperationMethod
from ditty.config.dataspec import Operation
from ditty.dataset import functions, tables
from ditty.dataset.operations import Part, apply
from ditty.errors import DataError
from ditty.stages.stageline import operation_inputs
from ditty.store.files import canonical_json

ROWS = [{"text": "x" * (i % 10), "n": i} for i in range(2_500)]

OPS = """
    def longer(row, least=0):
        return len(row["text"]) > least

    def longer_batch(rows, least=0):
        return [len(text) > least for text in rows["text"]]

    def double(row):
        return {"twice": row["text"] * 2}

    def halves_first(row):
        return {"half": row["n"] / 2 if row["n"] < 1000 else row["n"]}

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

    def backwards(rows, step=1):
        return range(rows.num_rows - 1, -1, -step)

    def none(rows):
        return []

    def beyond(rows):
        return [0, rows.num_rows]
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
    function = f"rowops:{name}" if name else None
    operation = Operation(method=method, function=function, **options)
    facts = apply(operation, place / "source", out, Part(num_proc=num_proc))
    for folder in (out, place / "source"):
        assert [p.name for p in folder.iterdir()] == ["data.arrow"], "no temporary file stays"
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
        ("map", "halves_first", {}),
        ("map", "batch_sizes", {"batched": True, "remove_columns": ["text", "n"]}),
    ],
)
def test_more_processes_make_the_same_bytes(place, method, name, options):
    one = applied(place, method, name, **options)
    assert applied(place, method, name, num_proc=2, **options) == one


NESTED = [
    {"text": "x" * (i % 7), "n": None if i % 500 == 9 else (i * 37) % 100, "m": {"a": i}}
    for i in range(2_500)
]
BY_NAME = [
    ("cast_column", {"column": "n", "feature": "string"}),
    ("flatten", {}),
    ("remove_columns", {"column_names": ["text", "m"]}),
    ("rename_column", {"original_column_name": "text", "new_column_name": "body"}),
    ("rename_columns", {"column_mapping": {"text": "a", "n": "b"}}),
    ("select_columns", {"column_names": "n"}),
    ("shuffle", {"seed": 3}),
    ("skip", {"n": 7}),
    ("sort", {"column_names": ["text", "n"], "reverse": [True, False]}),
    ("sort", {"column_names": "n", "null_placement": "at_start"}),
    ("take", {"n": 7}),
]


@pytest.mark.parametrize(("method", "kwargs"), BY_NAME)
def test_a_method_by_name_is_that_of_datasets(place, method, kwargs):
    import datasets

    table = pa.Table.from_pylist(NESTED)
    tables.write(place / "source" / "data.arrow", [table], table.schema)
    plain = dict(kwargs)
    if method == "cast_column":
        plain["feature"] = datasets.Value(plain["feature"])
    expected = getattr(datasets.Dataset.from_list(NESTED), method)(**plain)
    one = applied(place, method, None, kwargs=kwargs)
    assert one[1] == expected.to_list() != NESTED
    assert one[0] == {
        "rows_in": 2500,
        "rows": len(expected),
        "columns": expected.column_names,
    }
    assert applied(place, method, None, num_proc=2, kwargs=kwargs) == one


def test_every_method_is_one_of_datasets_and_tested():
    import datasets

    assert all(callable(getattr(datasets.Dataset, method)) for method in OperationMethod)
    assert set(OperationMethod) == {"filter", "map", "select", *(name for name, _ in BY_NAME)}


def test_select_takes_the_rows_that_a_function_of_all_rows_names(place):
    facts, rows, _ = applied(place, "select", "backwards", kwargs={"step": 2})
    assert rows == ROWS[::-2] and facts["rows"] == 1250


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
        ("select", "beyond", {}, "select rowops:beyond returned row 2500, the data has 2500 rows"),
        ("select", "fails", {}, "select rowops:fails failed: TypeError: 'bool' object"),
        ("select", "returns_nothing", {}, "select rowops:returns_nothing failed: TypeError"),
        ("select", "none", {}, "select rowops:none leaves none of 2500 rows"),
        ("sort", None, {"kwargs": {"column_names": "x"}}, "sort x: .*the data has the columns t"),
        (
            "rename_column",
            None,
            {"kwargs": {"original_column_name": "txt", "new_column_name": "n"}},
            "rename_column txt, n: ValueError: .*; the data has the columns text, n",
        ),
        (
            "cast_column",
            None,
            {"kwargs": {"column": "text", "feature": "int64"}},
            "cast_column text, int64: ArrowInvalid: .*xx",
        ),
        ("cast_column", None, {"kwargs": {"column": "x", "feature": "int8"}}, "columns text, n"),
        ("skip", None, {"kwargs": {"n": 2500}}, "skip 2500: IndexError: .* 2500"),
        ("map", "dubble", {}, "rowops has no 'dubble'; did you mean double"),
    ],
)
def test_errors_name_operation_function_and_row(place, method, name, options, message):
    with pytest.raises(DataError, match=message):
        applied(place, method, name, **options)
    assert not list((place / "out").glob(".ditty-*"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "filter"}, "method: filter needs function: module:name or file.py:name"),
        ({"method": "select"}, "method: select needs function"),
        ({"method": "sort", "function": "a:b"}, "method: sort takes no function, but kwargs"),
        ({"method": "shuffle"}, "method: shuffle needs kwargs: seed"),
        ({"method": "shuffle", "kwargs": {"seed": None}}, "kwargs.seed is None, expected a whole"),
        ({"method": "shuffle", "kwargs": {"seed": True}}, "kwargs.seed is True, expected a whole"),
        ({"method": "shuffle", "kwargs": {"seed": -1}}, "kwargs.seed is -1, expected a whole"),
        ({"method": "take", "kwargs": {"m": 3}}, "method: take has no argument 'm': expected n"),
        (
            {"method": "sort", "kwargs": {"column_name": "a"}},
            "no argument 'column_name': did you mean column_names?",
        ),
        ({"method": "sort", "batched": True}, "batched goes with filter and map, not with"),
        ({"method": "filter", "function": "a:b", "remove_columns": ["x"]}, "goes with map"),
    ],
)
def test_what_a_method_cannot_take_is_refused(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Operation.model_validate(values)


KEYED = """
    def keep(row, file="", at_least=0):
        return True

    keep.identity = lambda file, **_: open(file).read()
"""


def test_the_key_holds_all_that_an_operation_declares(place):
    (place / "keyed.py").write_text(textwrap.dedent(KEYED))
    (place / "a.txt").write_text("a")
    (place / "b.txt").write_text("b")
    by_file = {"function": "keyed.py:keep", "kwargs": {"file": "a.txt"}}
    given = [
        {"method": "filter", **by_file},
        {"method": "filter", **by_file, "kwargs": {"file": "a.txt", "at_least": 2}},
        {"method": "select", **by_file},
        {"method": "shuffle", "kwargs": {"seed": 1}},
        {"method": "shuffle", "kwargs": {"seed": 2}},
        {"method": "skip", "kwargs": {"n": 1}},
        {"method": "take", "kwargs": {"n": 1}},
    ]
    keys = [key_of(values) for values in given]
    assert len(set(keys)) == len(keys) and keys == [key_of(values) for values in given]
    (place / "a.txt").write_text("edited")
    assert [a == b for a, b in zip(keys, map(key_of, given), strict=True)] == [False] * 3 + [
        True
    ] * 4


def test_an_identity_that_fails_names_the_operation(place):
    (place / "keyed.py").write_text(textwrap.dedent(KEYED))
    message = (
        "operation select keyed.py:keep: its `identity` .*no.txt'}: FileNotFoundError: .*no.txt"
    )
    with pytest.raises(DataError, match=message):
        key_of({"method": "select", "function": "keyed.py:keep", "kwargs": {"file": "no.txt"}})


@pytest.mark.parametrize(
    ("function", "kwargs", "message"),
    [
        (
            "rowops:longer",
            {"last": 3},
            r"no argument 'last'; after the row it takes least; did you mean least\?",
        ),
        ("rowops:double", {"k": 1}, "no argument 'k'; after the row it takes none"),
        ("rowops:double", {"row": 1}, "no argument 'row'"),
        ("ditty.recipes:chat_of_size", {}, "it needs the argument 'at_most'; .* at_most, answer_"),
        ("rowops:constant", {}, "too many positional arguments"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_anything_runs(
    place, function, kwargs, message
):
    (place / "rowops.py").open("a").write("\ndef constant():\n    return True\n")
    with pytest.raises(TypeError):
        functions.resolve(function)(ROWS[0], **kwargs)  # what the stage would have run into
    with pytest.raises(DataError, match=f"operation filter {function}: .*{message}"):
        key_of({"method": "filter", "function": function, "kwargs": kwargs})


def test_an_argument_may_be_called_as_one_of_datasets_is(place):
    names = "function, index, batched, indices_mapping"
    source = f"\ndef keep(row, {names}):\n    return row['n'] < {names.replace(', ', ' + ')}\n"
    (place / "rowops.py").open("a").write(source)
    kwargs = dict.fromkeys(names.split(", "), 2)
    _, rows, _ = applied(place, "filter", "keep", kwargs=kwargs)
    assert rows == ROWS[:8]


def key_of(values):
    operation = Operation.model_validate(values)
    return canonical_json(operation_inputs(operation))


def test_the_original_error_is_the_cause(place):
    with pytest.raises(DataError) as caught:
        applied(place, "filter", "fails")
    assert isinstance(caught.value.__cause__, KeyError)


def test_no_torch_and_nothing_in_the_home(place):
    home = place / "user"
    (place / "out").mkdir()
    code = (
        "import sys; from pathlib import Path; from ditty.dataset.operations import *;"
        " operation = Operation(method='map', function='rowops:double');"
        " apply(operation, Path('source'), Path('out'), Part());"
        " print({'torch', 'transformers'} & set(sys.modules))"
    )
    env = {**os.environ, "HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=place, env=env, capture_output=True, text=True
    )
    assert done.stdout == "set()\n", done.stderr
    assert done.stderr == "", "no progress bars"
    assert not home.exists()


@pytest.mark.parametrize("value", [None, "true"])
def test_processes_leave_the_tokenizers_threads_as_they_were(place, monkeypatch, value):
    """datasets turns them off in the real environment, which the library reads, for good."""
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if value is not None:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
    environment = os.environ
    applied(place, "filter", "longer", num_proc=2, kwargs={"least": 4})
    assert os.environ is environment
    real = subprocess.run(["printenv", "TOKENIZERS_PARALLELISM"], capture_output=True, text=True)
    assert real.stdout.strip() == (value or "")
