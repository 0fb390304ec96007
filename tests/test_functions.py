import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ditty.dataset.functions import digest, importable, resolve
from ditty.errors import DataError

OPS = """
    import re
    import string
    import pyarrow as pa
    import helpers
    from helpers import scale as rescale

    LIMIT = 3
    WORDS = frozenset({"one", "two", "three", "four", "five"})
    PATTERN = re.compile(r"a+", re.I)

    def unrelated(row):
        return row["x"] + 1

    def shorten(text, width=4):
        return text[:width]

    class Rule:
        bound = LIMIT
        def holds(self, row):
            return rescale(len(row["text"])) < self.bound

    def keep(row, least=1):
        inner = [shorten(w) for w in row["text"].split() if w in WORDS]
        punctuated = any(c in string.punctuation for c in row["text"])
        return (
            len(inner) > least and PATTERN.match(inner[0]) and not punctuated
            and helpers.check(inner) and len(pa.array(inner)) > 1 and Rule().holds(row)
        )
"""
HELPERS = """
    FACTOR = 2

    def scale(value):
        return value * FACTOR

    def check(words):
        return bool(words)

    def unrelated():
        return 0
"""

MODULES = ("ops", "helpers", "uses", "late", "thirdparty")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder of user modules, and the current directory."""
    monkeypatch.chdir(tmp_path)
    # Python's own bytecode cache misses an edit of the same length within the same second.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "ops.py").write_text(textwrap.dedent(OPS))
    (tmp_path / "helpers.py").write_text(textwrap.dedent(HELPERS))
    yield tmp_path
    for name in MODULES:
        sys.modules.pop(name, None)


def digest_elsewhere(folder: Path, ref: str, seed: str) -> str:
    """The digest in a new process with its own hash seed."""
    code = "import sys; from ditty.dataset.functions import *; print(digest(resolve(sys.argv[1])))"
    env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code, ref], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def digest_anew(ref: str) -> str:
    """The digest as a new process would see it, since nothing is imported yet."""
    for name in MODULES:
        sys.modules.pop(name, None)
    return digest(resolve(ref))


def digest_of(folder: Path, source: str) -> str:
    """The digest of the function `f` in a fresh module with this source."""
    path = folder / "fresh.py"
    path.write_text(textwrap.dedent(source))
    return digest(resolve(f"{path}:f"))


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, (old, text)
    path.write_text(text.replace(old, new))


def test_digest_is_the_same_in_every_process_and_place(project):
    first = digest_elsewhere(project, "ops:keep", seed="1")
    assert len(first) == 64
    assert digest_elsewhere(project, "ops:keep", seed="2") == first
    moved = project / "moved"
    moved.mkdir()
    for name in ("ops.py", "helpers.py"):
        (moved / name).write_text((project / name).read_text())
    assert digest_elsewhere(project, f"{moved / 'ops.py'}:keep", seed="3") == first


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("ops.py", "> least", ">= least"),
        ("ops.py", "least=1", "least=2"),
        ("ops.py", "text[:width]", "text[width:]"),
        ("ops.py", "width=4", "width=5"),
        ("ops.py", '"three", ', ""),
        ("ops.py", "re.I", "re.M"),
        ("ops.py", "LIMIT = 3", "LIMIT = 4"),
        ("ops.py", "< self.bound", "<= self.bound"),
        ("helpers.py", "FACTOR = 2", "FACTOR = 3"),
        ("helpers.py", "value * FACTOR", "value + FACTOR"),
        ("helpers.py", "bool(words)", "not words"),
    ],
)
def test_digest_sees_a_change_anywhere_below(project, file, old, new):
    before = digest_anew("ops:keep")
    replace(project / file, old, new)
    assert digest_anew("ops:keep") != before


def test_digest_ignores_what_the_function_does_not_reach(project):
    before = digest_anew("ops:keep")
    replace(project / "ops.py", 'row["x"] + 1', 'row["x"] + 2')
    replace(project / "helpers.py", "return 0", "return 1")
    replace(project / "ops.py", "LIMIT = 3", "# moves every line below\n\nLIMIT = 3")
    assert digest_anew("ops:keep") == before


def test_digest_counts_the_version_of_a_distribution(project, monkeypatch):
    site = project / "site-packages"
    info = site / "thirdparty-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "thirdparty.py").write_text("def clean(text):\n    return text\n")
    (info / "top_level.txt").write_text("thirdparty\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thirdparty\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(site)
    (project / "uses.py").write_text(
        "from thirdparty import clean\ndef f(row):\n    return clean(row)\n"
    )
    before = digest_anew("uses:f")
    (site / "thirdparty.py").write_text("def clean(text):\n    return text  # same version\n")
    assert digest_anew("uses:f") == before
    replace(info / "METADATA", "Version: 1.0", "Version: 1.1")
    assert digest_anew("uses:f") != before


def test_digest_follows_imports_inside_the_function(project):
    (project / "late.py").write_text(
        "def f(row):\n    from helpers import scale\n    return scale(row)\n"
    )
    before = digest_anew("late:f")
    replace(project / "helpers.py", "FACTOR = 2", "FACTOR = 3")
    assert digest_anew("late:f") != before


@pytest.mark.parametrize("parameters", ["row, width=WIDTH", "row, *, width=WIDTH"])
def test_default_arguments_count_by_value(tmp_path, parameters):
    source = "WIDTH = {}\ndef f({}):\n    return row[:width]\n"
    first, other = (digest_of(tmp_path, source.format(n, parameters)) for n in (4, 5))
    assert first != other


def test_digest_bears_recursion(tmp_path):
    source = """
        def f(n):
            return n and g(n - 1)
        def g(n):
            return n and f(n - {step})
    """
    assert digest_of(tmp_path, source.format(step=1)) != digest_of(tmp_path, source.format(step=2))


@pytest.mark.parametrize(
    ("constant", "other"),
    [
        ("1", "True"),
        ("1", "1.0"),
        ("0.0", "-0.0"),
        ("(1, 2)", "[1, 2]"),
        ("{'a': 1, 'b': 2}", "{'b': 2, 'a': 1}"),
        ("b'a'", "'a'"),
        ("Path('a')", "Path('b')"),
        ("Color.RED", "Color.BLUE"),
        ("Limits(1)", "Limits(2)"),
        ("len", "max"),
    ],
)
def test_constants_count_by_value_and_type(tmp_path, constant, other):
    source = """
        import enum
        from dataclasses import dataclass
        from pathlib import Path
        class Color(enum.Enum):
            RED = 1
            BLUE = 2
        @dataclass
        class Limits:
            n: int
        VALUE = {value}
        def f(row):
            return VALUE
    """
    first = digest_of(tmp_path, source.format(value=constant))
    assert digest_of(tmp_path, source.format(value=constant)) == first
    assert digest_of(tmp_path, source.format(value=other)) != first


def test_a_logger_and_a_cache_are_no_content(tmp_path):
    digest_of(
        tmp_path,
        """
        import functools, logging
        log = logging.getLogger(__name__)
        @functools.lru_cache
        def table():
            return {1: 2}
        def f(row):
            log.info("%s", row)
            return table()[row]
        """,
    )


REFUSED = {
    "f = lambda row: row": "lambda",
    "g = lambda row: row\ndef f(row): return g(row)": "f -> g is a lambda",
    "from functools import partial\nf = partial(len)": "partial.*operation.kwargs",
    "from functools import partial\ng = partial(len)\ndef f(row): return g(row)": "g is a partial",
    "f = 'a b'.split": "builtin",
    "f = len": "builtin",
    "class A:\n  def m(self, row): return 1\nf = A().m": "bound method",
    "class A:\n  def __call__(self, row): return 1\nf = A()": "expected a function",
    "def make(n):\n  def g(row): return n\n  return g\nf = make(1)": "closure over n.*kwargs",
    "handle = open(__file__)\ndef f(row): return handle": "f -> handle is a _io.TextIOWrapper",
    "box = {'a': [object()]}\ndef f(row): return box": r"f -> box\['a'\]\[0\] is a builtins.object",
    "import re\nsub = re.compile('a').sub\ndef f(row): sub('', row)": "f -> sub is a builtin",
    "def f(row): return missing": "uses 'missing'",
    "from collections import namedtuple\nP = namedtuple('P', 'a')\ndef f(row): return P(1)": (
        "0 class statements"
    ),
    "from contextlib import contextmanager\n@contextmanager\ndef g():\n  yield\ndef f(row): g()": (
        "f -> g is wrapped by a decorator"
    ),
    "import helpers\ndef f(row): return vars(helpers)": "f -> helpers is a module used as a value",
}


@pytest.mark.parametrize("body", REFUSED)
def test_what_has_no_content_is_refused(project, body):
    with pytest.raises(DataError, match=REFUSED[body]):
        digest_of(project, body)


def test_a_wrapper_from_another_package_does_not_hide_the_function(tmp_path):
    """Without functools.wraps a wrapper claims to belong to the package that made it."""
    path = tmp_path / "wrapped.py"
    path.write_text("def g(row):\n    return 1\ndef f(row):\n    return g(row)\n")
    fn = resolve(f"{path}:f")
    inner = fn.__globals__["g"]
    fn.__globals__["g"] = lambda row: inner(row)
    fn.__globals__["g"].__module__ = "json"
    with pytest.raises(DataError, match="f -> g is a builtins.function, which has no content"):
        digest(fn)


def test_a_file_edited_after_its_import_is_refused(project):
    path = project / "edited.py"
    path.write_text("LIMIT = 1\ndef f(row):\n    return row\n")
    fn = resolve(f"{path}:f")
    digest(fn)
    path.write_text("LIMIT = 1\ndef f(row):\n    return 12\n")
    with pytest.raises(DataError, match="edited after it was imported"):
        digest(fn)
    assert resolve(f"{path}:f")(0) == 12, "resolving again runs the new content"
    digest(resolve(f"{path}:f"))


def test_resolve_finds_modules_of_the_current_directory_only_meanwhile(project):
    path = list(sys.path)
    fn = resolve("ops:shorten")
    assert fn("abcdef") == "abcd"
    assert sys.path == path
    with importable():
        assert sys.path[0] == str(project)
    assert sys.path == path


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("ops", "expected module:name"),
        ("ops:", "expected module:name"),
        ("opss:keep", "no module 'opss' .*did you mean ops"),
        ("ops:kep", "ops has no 'kep'; did you mean keep"),
        ("ops:LIMIT", "is a int, expected a function"),
        ("json.nothing:f", "no module 'json.nothing'"),
        ("needy:f", "importing needy failed: No module named 'not_there_at_all'"),
        ("broken:f", "importing broken failed: ZeroDivisionError"),
        ("{}/op.py:keep", "cannot read .*/op.py: No such file.*did you mean ops.py"),
        ("{}/broken.py:f", "importing .*broken.py failed: ZeroDivisionError"),
    ],
)
def test_resolve_names_what_is_wrong(project, ref, message):
    (project / "needy.py").write_text("import not_there_at_all")
    (project / "broken.py").write_text("1 / 0")
    with pytest.raises(DataError, match=message):
        resolve(ref.format(project))
