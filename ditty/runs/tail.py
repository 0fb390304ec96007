"""Reading files that grow, each part once: lines of a log, records of a .jsonl file."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

READ_BYTES = 1 << 20


class LineTail:
    """The lines of a growing log, from its start or from its present end. A context manager.

    Bytes that are not UTF-8 are replaced. Of a line that carriage returns have overwritten, as
    progress bars do, there is its last state.

    Raises:
        FileNotFoundError: there is no such file.
    """

    def __init__(self, path: Path, *, at_end: bool = False):
        self._file = open(path, "rb")  # noqa: SIM115  (closed by __exit__)
        if at_end:
            self._file.seek(0, os.SEEK_END)
        self._partial = b""

    def __enter__(self) -> "LineTail":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, *, last: bool = False) -> Iterator[str]:
        """New complete lines, of READ_BYTES at most; `last`: everything up to the end."""
        while True:
            block = self._file.read(READ_BYTES)
            *lines, partial = (self._partial + block).split(b"\n")
            # A progress bar never ends its line: keep its last state only, or this would grow.
            self._partial = _last_state(partial)
            for line in lines:
                yield _text(line)
            if not last or not block:
                break
        if last and self._partial:
            line, self._partial = self._partial, b""
            yield _text(line)


def _last_state(line: bytes) -> bytes:
    """`line` without the states that a carriage return has overwritten; its last one stays."""
    return line[line.rstrip(b"\r").rfind(b"\r") + 1 :]


def _text(line: bytes) -> str:
    return _last_state(line).rstrip(b"\r").decode("utf-8", "replace")


class RecordTail:
    """The records of a growing metrics.jsonl or samples.jsonl, from its start or its present end.

    The file need not exist yet.
    """

    def __init__(self, path: Path, *, at_end: bool = False):
        self.path = path
        self._offset = path.stat().st_size if at_end and path.exists() else 0

    def read(self) -> Iterator[dict[str, Any]]:
        """New complete records that name a step; a line cut short by a crash is passed over."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    yield record
