"""Rows of a SQL query; the oracle is the sqlite3 module."""

import sqlite3
import traceback
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from ditty.config.dataspec import DataSpec, SourceSpec
from ditty.dataset import tables
from ditty.dataset.sources import identify, load
from ditty.errors import DataError

QUERY = "SELECT id, question AS prompt, answer AS completion FROM tickets WHERE id <> 7 ORDER BY id"
ROWS = 2_500


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "rows.db"
    with sqlite3.connect(path) as opened:
        opened.execute("CREATE TABLE tickets (id INTEGER, question TEXT, answer TEXT)")
        rows = [(i, f"why {i}?", None if i == 5 else f"since {i}") for i in range(ROWS)]
        opened.executemany("INSERT INTO tickets VALUES (?, ?, ?)", rows)
    opened.close()
    monkeypatch.setenv("TICKETS", f"sqlite:///{path}")
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    return path


def execute(path: Path, statement: str) -> list[dict[str, Any]]:
    with sqlite3.connect(path) as opened:
        opened.row_factory = sqlite3.Row
        found = [dict(row) for row in opened.execute(statement)]
    opened.close()
    return found


def data_of(query: str = QUERY, **more: Any) -> DataSpec:
    given = {"source": f"sql:{query}", "connection": "TICKETS", "format": "prompt_completion"}
    return DataSpec.model_validate(given | more)


def test_the_rows_are_those_of_the_query(database: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    facts = load(data_of(), out, identify(data_of()))
    assert tables.read(out / "data.arrow").to_pylist() == execute(database, QUERY)
    assert facts["rows"] == facts["read"] == ROWS - 1
    assert [p.name for p in out.iterdir()] == ["data.arrow"] and not (tmp_path / "user").exists()
    assert load(data_of(max_rows=9), out)["rows"] == 9
    both = DataSpec(sources=[SourceSpec(source=f"sql:{QUERY}", connection="TICKETS")] * 2)
    assert load(both, out)["rows"] == 2 * (ROWS - 1)


def test_the_identity_is_the_content_of_the_rows(database: Path, tmp_path: Path) -> None:
    before, declared = identify(data_of()), identify(data_of(version="1"))
    assert identify(data_of(QUERY.lower().replace(" as ", "  as "))) == before
    execute(database, "UPDATE tickets SET answer = 'none of the query' WHERE id = 7")
    assert identify(data_of()) == before
    execute(database, "UPDATE tickets SET answer = 'another' WHERE id = 8")
    assert identify(data_of()) != before and identify(data_of(version="1")) == declared
    assert identify(data_of(version="2")) != declared != identify(data_of("SELECT 1", version="1"))
    with pytest.raises(DataError, match="gives other rows than when this run began.*ORDER BY"):
        load(data_of(), tmp_path, before)


@pytest.mark.parametrize(
    ("query", "url", "message"),
    [
        ("SELECT x FROM tickets", None, "at .TICKETS failed: .*no such column: x"),
        (QUERY, "", "the environment variable TICKETS is not set, .* sqlite:////data/rows.db"),
        (QUERY, "no://me:hunter2@host/db", r"at \$TICKETS failed: NoSuchModuleError: .*:no"),
        (QUERY, "hunter2", r"at \$TICKETS failed: ArgumentError: Could not parse"),
        (QUERY, "no+hunter2://me:hunter2@host/db", r"at \$TICKETS failed: .*:no\.\.\.\."),
        ("SELECT * FROM tickets WHERE id < 0", None, "sql:SELECT .* has no rows"),
    ],
)
def test_what_cannot_be_asked_is_told_without_the_password(
    database: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    query: str,
    url: str | None,
    message: str,
) -> None:
    if url is not None:
        monkeypatch.setenv("TICKETS", url)
    with pytest.raises(DataError, match=message) as caught:
        load(data_of(query), tmp_path)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("no://host/db?password=canary%5B2", "canary[2, canary%5B2"),
        ("no:///?odbc_connect=DRIVER%3D%7BODBC%7D%3BPWD%3Dcanary%5B2%3BUID%3Dme", "PWD=canary[2"),
        ("no://me:canary[2@host/db", "canary[2, canary%5B2"),
        ("no://me:canary%5b2@host/db", "canary[2, canary%5B2, canary%5b2"),
        ("no://me:canary[2@host:port/db", "canary[2"),
        ("no://me:ca@canary[2@host/db", "no host canary[2@host"),
    ],
)
def test_no_form_of_a_password_is_told_whatever_the_driver_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, told: str
) -> None:
    monkeypatch.setenv("TICKETS", url)
    for length in (1, 440):  # the second is cut off within the password
        error = ValueError(f"at {url}: {'x' * length} {told}")
        monkeypatch.setattr("datasets.Dataset.from_sql", Mock(side_effect=error))
        with pytest.raises(DataError, match=r"failed: ValueError: at \.\.\.: x") as caught:
            load(data_of(), tmp_path)
        assert "canary" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"connection": None}, "source: sql: needs connection: an environment variable's name"),
        ({"connection": "sqlite:///a.db"}, "connection is no name of an environment variable"),
        ({"source": "a.jsonl"}, "connection and version go with source: sql:SELECT ..., remove"),
    ],
)
def test_a_query_has_a_connection_and_nothing_else_has(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data_of(**change)
