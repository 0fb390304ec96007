"""Rows that cannot be used: set aside in a file of the stage's artifact, and counted by reason.

A stage reads on past such a row, and fails at its end where they are more than the spec allows.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self

from ditty.errors import DataError, cut

log = logging.getLogger(__name__)

FILE = "quarantine.jsonl"
LONGEST_EXCERPT = 200  # characters of a row: one of 10 MB leaves as little behind as any other
TOLD_REASONS = 3
TOLD_POSITIONS = 3


Describe = Callable[[Any], str]
"""A position in words: `line 7`."""


def row_number(position: int) -> str:
    """For rows that are only counted, from 0."""
    return f"row {position}"


class BadRow(NamedTuple):
    """What stands in the place of a row that cannot be used.

    Attributes:
        reason: in words that many rows share, since rows are counted by it: no values of the row.
        value: the row, or as much of it as could be read.
        detail: what is particular to this row.
    """

    reason: str
    value: Any
    detail: str = ""


class Quarantine:
    """The bad rows of one stage; use it in a `with` block, which also closes its file.

    `quarantine.jsonl` appears with the first bad row. Each of its lines is {"position", "reason",
    "detail", "excerpt"}; none depends on where the source stands on this machine.

    Attributes:
        read: rows read so far, good and bad; whoever reads them counts.
        reasons: bad rows so far by reason.
        source: what is read, for errors.
    """

    def __init__(self, folder: Path, source: str, max_bad_fraction: float):
        """
        Args:
            folder: of the artifact, where the file goes.
            source: what is read, for errors.
            max_bad_fraction: of the rows that are read.
        """
        self.read = 0
        self.reasons: Counter[str] = Counter()
        self.source = source
        self._path, self._max = folder / FILE, max_bad_fraction
        self._describe: Describe = row_number
        self._tell: Describe = row_number
        self._file: IO[str] | None = None
        self._first: dict[str, tuple[list[str], str]] = {}

    def reading(self, describe: Describe, tell: Describe) -> None:
        """How positions are told from here on; before, they are numbers of rows.

        Args:
            describe: in words that do not depend on this machine, for the file.
            tell: the same for errors, with the names of files.
        """
        self._describe, self._tell = describe, tell

    def add(self, position: Any, bad: BadRow) -> None:
        """Set a row aside. Call it in the order of positions: the file has that order."""
        # No lone surrogates: the file is UTF-8.
        excerpt = cut(_as_text(bad.value), LONGEST_EXCERPT).encode("utf-8", "replace").decode()
        record = {
            "position": self._describe(position),
            "reason": bad.reason,
            "detail": bad.detail,
            "excerpt": excerpt,
        }
        self._write(record, self._tell(position))

    def take(self, file: Path) -> None:
        """Set aside what is in the file of another one, which told positions as this one does."""
        if file.exists():
            with file.open(encoding="utf-8") as lines:
                for record in map(json.loads, lines):
                    self._write(record, record["position"])

    def _write(self, record: dict[str, str], told: str) -> None:
        if self._file is None:
            self._file = self._path.open("w", encoding="utf-8")
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.reasons[record["reason"]] += 1
        example = record["detail"] or record["excerpt"]
        places, _ = self._first.setdefault(record["reason"], ([], example))
        if len(places) < TOLD_POSITIONS:
            places.append(told)

    def where(self, position: Any) -> str:
        """A position as a person would look it up: `rows.jsonl, line 7`."""
        return f"{self.source}, {self._tell(position)}"

    def settle(self, kept: int) -> dict[str, int]:
        """The end of the stage; returns bad rows by reason.

        Args:
            kept: rows that were read and are not here.

        Raises:
            DataError: see `check`.
        """
        bad = self.reasons.total()
        assert self.read == kept + bad, (self.read, kept, self.reasons)
        self.check()
        if bad:
            reasons = ", ".join(f"{r} {n:,}" for r, n in self.reasons.most_common(TOLD_REASONS))
            log.warning(
                "%s: %d of %d rows cannot be used and are in %s of the artifact: %s",
                *(self.source, bad, self.read, FILE, reasons),
            )
        return dict(sorted(self.reasons.items()))

    def check(self) -> None:
        """Raise a DataError if more than `max_bad_fraction` of the rows so far are here.

        It says what `told` does.
        """
        bad = self.reasons.total()
        if bad > self._max * self.read:
            raise DataError(
                f"{self.source}: {bad:,} of {self.read:,} rows ({bad / self.read:.2%}) cannot be "
                f"used, data.max_bad_fraction allows {self._max:.2%}: {self.told()}. Mend or drop "
                f"these rows, or raise data.max_bad_fraction: then they are listed in {FILE} of "
                "the stage's artifact, and left out"
            )

    def told(self) -> str:
        """The commonest reasons, and where the first rows of each are."""
        return "; ".join(self._told(r, n) for r, n in self.reasons.most_common(TOLD_REASONS))

    def _told(self, reason: str, count: int) -> str:
        places, example = self._first[reason]
        more = ", ..." if count > len(places) else ""
        return f"{count:,} x {reason}, at {', '.join(places)}{more} ({example})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):  # what a function yields can be anything
        return repr(value)
    except RecursionError:
        return f"{type(value).__name__}, nested too deeply to be shown"
