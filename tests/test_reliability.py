"""The table of the fault matrix: what has no figure is seen, and each row has a test."""

import re
from pathlib import Path

from tests.reliability import NONE, ROWS, complete, main, table

pytest_plugins = ["pytester"]


def test_every_row_has_a_test_and_every_mark_a_row() -> None:
    marks = re.compile(r'mark\.fault\("([^"]+)"\)')
    here = Path(__file__)
    texts = [path.read_text() for path in here.parent.glob("test_*.py") if path != here]
    assert {row for text in texts for row in marks.findall(text)} == ROWS.keys()
    assert len(ROWS) == 19


def record(row: str, figure: str, test: str = "t.py::test_a", passed: bool = True) -> dict:
    return {"row": row, "test": test, "figure": figure, "passed": passed}


def test_what_has_no_figure_is_seen() -> None:
    all_but_one = [record(row, f"figure of {row}") for row in ROWS if row != "hung rank"]
    lines = table(all_but_one).splitlines()[2:]
    assert [NONE in line for line in lines] == [row == "hung rank" for row in ROWS]
    assert not complete(table(all_but_one))
    assert complete(table([*all_but_one, record("hung rank", "3 s")]))
    assert not complete(table([*all_but_one, record("hung rank", "")])), "it forgot to say"
    assert not complete(table([*all_but_one, record("hung rank", "3 s", passed=False)]))


def test_figures_of_a_row_stand_together() -> None:
    (line,) = (
        line
        for line in table(
            [
                record("sigkill", "old", "t.py::test_a[x]"),
                record("sigkill", "1 lost", "t.py::test_a[x]"),
                record("sigkill", "2 lost", "t.py::test_a[y]"),
                record("sigkill", "3 s", "u.py::test_b"),
            ]
        ).splitlines()
        if "SIGKILL of a rank" in line
    )
    assert line.endswith("| 1 lost; 2 lost<br>3 s | `test_a`<br>`test_b` |")


def test_a_run_of_pytest_leaves_the_figures(pytester, capsys) -> None:
    """By the hooks of our own conftest, in a pytest of its own."""
    names = "figure, pytest_addoption, pytest_runtest_makereport"
    pytester.makeconftest(f"from tests.conftest import {names}")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.fault("racers")
        def test_good(figure):
            figure("winners 1")

        @pytest.mark.fault("disk full")
        def test_bad(figure):
            figure("bad commits 0")
            assert False

        def test_of_no_row(figure):
            figure("nothing")
        """
    )
    path = pytester.path / "figures.jsonl"
    done = pytester.runpytest_inprocess("--figures", str(path), "-p", "no:cacheprovider")
    done.assert_outcomes(passed=2, failed=1)
    assert main([str(path)]) == 1
    printed = capsys.readouterr().out
    assert "| winners 1 | `test_good` |" in printed and "| **failed** | `test_bad` |" in printed
    assert printed.count(NONE) == len(ROWS) - 2
