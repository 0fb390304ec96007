"""What the stages of a flow took, and what the cache saved; as a table on the flow run's page.

Seconds are kept beside the store, not in it: what an artifact holds must not depend on time.
`DITTY_HOME/costs/<stage>-<key>.json` is {"seconds": of making the artifact, "spent": so far in
attempts that failed}; losing one loses a number in a table.
"""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ditty.errors import DittyError
from ditty.stages.stageline import StageRef
from ditty.store.artifacts import MANIFEST, Store
from ditty.store.files import make_dir, read_json, write_json
from flows.events import EventState

log = logging.getLogger(__name__)

WORDS = {EventState.CACHED: "Cached", EventState.DONE: "done", EventState.FAILED: "failed"}
LONGEST_TITLE = 120


@dataclass(frozen=True)
class Entry:
    """How one stage went.

    Attributes:
        seconds: what it took in this flow run, waiting for retries included.
        saved: what making its artifact took when it was made, where it was found and that is known.
    """

    title: str
    state: EventState
    seconds: float
    saved: float | None = None

    def row(self) -> dict[str, Any]:
        """A row of the table; seconds with one decimal."""
        return {
            "stage": self.title[:LONGEST_TITLE],
            "state": WORDS[self.state],
            "seconds": round(self.seconds, 1),
            "seconds saved by the cache": "" if self.saved is None else round(self.saved, 1),
        }


@dataclass
class StageBook:
    """The entries of one flow run, in order.

    Attributes:
        trained: the run whose result the flow run has made or found, once it has.
    """

    store: Store
    entries: list[Entry] = field(default_factory=list)
    trained: str | None = None

    def start(self, ref: StageRef) -> "Timing":
        """Call its `end` when the stage has ended."""
        return Timing(self, ref)

    def skip(self, ref: StageRef) -> None:
        """A stage whose result was there without a task being asked."""
        self.entries.append(Entry(ref.title, EventState.CACHED, 0.0, self.cost(ref)))

    def rows(self) -> list[dict[str, Any]]:
        """The table."""
        return [entry.row() for entry in self.entries]

    def summary(self) -> str:
        """A sentence above the table."""
        took = sum(entry.seconds for entry in self.entries)
        known = [entry.saved for entry in self.entries if entry.saved is not None]
        saved = f"; the cache saved {sum(known):,.1f} s" if known else ""
        return f"{len(self.entries)} stages took {took:,.1f} s{saved}"

    def cost(self, ref: StageRef) -> float | None:
        """Seconds that making the artifact of `ref` took; None: not known."""
        seconds = self._read(ref).get("seconds")
        return float(seconds) if isinstance(seconds, int | float) else None

    def add(self, ref: StageRef, seconds: float, made: bool) -> None:
        """Count an attempt: with `made`, the one that made the artifact."""
        spent = float(self._read(ref).get("spent", 0.0)) + seconds
        value = {"seconds": spent, "spent": 0.0} if made else self._read(ref) | {"spent": spent}
        try:
            make_dir(self._path(ref).parent)
            write_json(self._path(ref), value)
        except (OSError, DittyError) as error:  # bookkeeping stops no run
            log.warning("what %s took is not kept: %s", ref.title, error)

    def _path(self, ref: StageRef) -> Path:
        return self.store.home / "costs" / f"{ref.stage}-{ref.key}.json"

    def _read(self, ref: StageRef) -> dict[str, Any]:
        try:
            value = read_json(self._path(ref))
        except (OSError, ValueError) as error:
            log.warning("what %s took is not known: %s", ref.title, error)
            return {}
        return value if isinstance(value, dict) else {}


class Timing:
    """A stage that runs."""

    def __init__(self, book: StageBook, ref: StageRef):
        self.book, self.ref = book, ref
        self._began = time.monotonic()
        self._before = self._stamp()

    def end(self, state: EventState) -> None:
        """Enter how it ended; a new artifact's cost is kept."""
        seconds = time.monotonic() - self._began
        saved = None
        if state is EventState.CACHED:
            saved = self.book.cost(self.ref)
        elif state is EventState.FAILED:
            self.book.add(self.ref, seconds, made=False)
        elif self._before is None or self._stamp() != self._before:
            # Otherwise it was in the store already, only not recorded: finding it is no cost.
            self.book.add(self.ref, seconds, made=True)
        self.book.entries.append(Entry(self.ref.title, state, seconds, saved))

    def _stamp(self) -> tuple[int, int] | None:
        manifest = self.book.store.path(self.ref.stage, self.ref.key) / MANIFEST
        try:
            found = manifest.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns
