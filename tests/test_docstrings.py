import ast
import inspect
import json
import textwrap
from itertools import islice

import pytest

from ditty import docstrings


def rows_below(folder, monkeypatch):
    monkeypatch.setattr(docstrings, "_library", lambda: folder)
    return list(docstrings.docstrings())


def test_the_rows_are_real_functions_with_their_own_docstrings(tmp_path, monkeypatch):
    (tmp_path / "json").symlink_to(json.__path__[0], target_is_directory=True)
    rows = {row["name"]: row["messages"] for row in rows_below(tmp_path, monkeypatch)}
    question, answer = rows["json.decoder.JSONDecoder.decode"]
    original = json.decoder.JSONDecoder.decode
    assert answer == {"role": "assistant", "content": inspect.getdoc(original).strip()}
    assert question["role"] == "user"
    code = question["content"].partition("```python\n")[2].removesuffix("\n```")
    function = ast.parse(code).body[0]
    assert function.name == "decode"
    assert ast.get_docstring(function) is None
    assert ast.unparse(function.args) == ast.unparse(
        ast.parse(textwrap.dedent(inspect.getsource(original))).body[0].args
    )
    assert "json.decoder.JSONDecoder.raw_decode" in rows


def test_this_python_has_many_rows_in_a_fixed_order():
    first, second = (list(islice(docstrings.docstrings(), 300)) for _ in range(2))
    assert first == second
    assert len({row["name"] for row in first}) > 250
    for row in first:
        question, answer = (message["content"] for message in row["messages"])
        assert 20 <= len(answer) <= 800
        assert len(question) <= 1500 + 100


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ('async def f():\n    """D"""\n    return CODE', ["m.f"]),
        ('class A:\n  class B:\n    def f(self):\n      """D"""\n      CODE', ["m.A.B.f"]),
        ('if True:\n    def f():\n        """D"""\n        CODE', ["m.f"]),
        ('def f():\n    """D"""', []),
        ("def f():\n    return CODE", []),
        ('def f():\n    """short"""\n    CODE', []),
        ('def f():\n    """D"""\n    x', []),
        ("def f(:", []),
    ],
)  # fmt: skip
def test_which_functions_count(tmp_path, monkeypatch, source, names):
    text = source.replace('"D"', '"A docstring of sensible length."').replace(
        "CODE", "x + " * 30 + "1"
    )
    (tmp_path / "m.py").write_text(text)
    assert [row["name"] for row in rows_below(tmp_path, monkeypatch)] == names


def test_tests_and_installed_packages_are_left_out(tmp_path, monkeypatch):
    code = 'def f():\n    """A docstring of sensible length."""\n    return ' + "x + " * 30 + "1"
    for folder in ("pkg", "pkg/tests", "test", "site-packages", "lib2to3"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text(code)
    assert [row["name"] for row in rows_below(tmp_path, monkeypatch)] == ["pkg.f"]


def test_the_identity_follows_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings, "_library", lambda: tmp_path)
    (tmp_path / "a.py").write_text("x = 1")
    before = docstrings.docstrings.identity()
    assert docstrings.docstrings.identity() == before
    (tmp_path / "b.py").write_text("x = 1")
    assert docstrings.docstrings.identity() != before
