"""Files that grow are read once and whole."""

from pathlib import Path

from ditty.runs.rundir import append_record
from ditty.runs.tail import RecordTail


def test_records_are_read_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_record(path, {"step": 1})  # of an earlier attempt
    tail = RecordTail(path, at_end=True)
    assert list(tail.read()) == []
    append_record(path, {"step": 2})
    with path.open("a") as file:
        file.write('{"step": 3')
    assert list(tail.read()) == [{"step": 2}]
    assert list(tail.read()) == []
    append_record(path, {"step": 3})  # after a crash in mid-line: on a fresh line
    assert list(tail.read()) == [{"step": 3}]
    assert list(RecordTail(path).read()) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_records_of_a_run_that_has_none_yet(tmp_path: Path) -> None:
    tail = RecordTail(tmp_path / "metrics.jsonl", at_end=True)
    assert list(tail.read()) == []
    append_record(tail.path, {"step": 1})
    assert list(tail.read()) == [{"step": 1}]
