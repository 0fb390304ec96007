"""SHA-256 of large files of the store, remembered for as long as a file is untouched.

A note keeps the inode, size and times of the file that was read. Whoever writes to a file, or puts
another one in its place, cannot choose its ctime: then it is read again, and so is every file once
after each start of the machine, since a crash may have lost what was written. What no note shows is
a disk that gives other bytes than it was given; `ditty verify` always reads.
"""

import json
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from ditty.store.files import STAGING, make_dir, sha256_bytes, sha256_file

SMALLEST = 4 << 20  # bytes; a smaller file is read in milliseconds
BOOT = Path("/proc/sys/kernel/random/boot_id")  # random(4): another one at each start


def sha256(path: Path, home: Path) -> str:
    """Hex SHA-256 of a file's content: as it was last read if the file is still that one.

    Args:
        home: of the store, where the notes are.
    """
    before = _state(path)
    if before["size"] < SMALLEST:
        return sha256_file(path)
    note = _read(_place(path, home))
    if note is not None and note["file"] == before:
        return str(note["sha256"])
    with _Note(path, home) as opened:
        digest = sha256_file(path)
        opened.keep(before, digest)
    return digest


def remember(path: Path, digest: str, home: Path) -> None:
    """Keep the digest of a file that this process has written and alone could write to."""
    state = _state(path)
    if state["size"] >= SMALLEST:
        with _Note(path, home) as opened:
            opened.keep(state, digest)


def _state(path: Path) -> dict[str, Any]:
    """What tells whether a file was touched."""
    stat = path.stat()
    return {
        "boot": BOOT.read_text().strip(),
        "inode": [stat.st_dev, stat.st_ino],
        "size": stat.st_size,
        "times": [stat.st_mtime_ns, stat.st_ctime_ns],
    }


def _place(path: Path, home: Path) -> Path:
    return home / "digests" / f"{sha256_bytes(os.fsencode(path.absolute()))[:32]}.json"


def _read(place: Path) -> Any:
    """The note, None where there is none that is whole."""
    with suppress(OSError, ValueError):
        note = json.loads(place.read_bytes())
        if isinstance(note, dict) and note.keys() == {"file", "sha256"}:
            return note
    return None


class _Note:
    """A note that is begun before a file is read: its own ctime says when, by the disk's clock.

    Not synced: after a crash another boot makes it void. One that cannot be written costs only
    that the file is read again.
    """

    def __init__(self, path: Path, home: Path):
        self._path, self._final = path, _place(path, home)
        self._temporary = self._final.with_name(f"{STAGING}{uuid.uuid4().hex[:12]}")

    def __enter__(self) -> "_Note":
        self._begun = 0
        with suppress(OSError):
            make_dir(self._final.parent)
            self._temporary.touch()
            self._begun = self._temporary.stat().st_ctime_ns
        return self

    def keep(self, state: dict[str, Any], digest: str) -> None:
        """Remember `digest` for the file in that state, if it still is, and was before.

        A file that was changed in the same tick of the clock could be changed again in it.
        """
        if state["times"][1] < self._begun and _state(self._path) == state:
            with suppress(OSError):
                self._temporary.write_text(json.dumps({"file": state, "sha256": digest}))
                self._temporary.replace(self._final)

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)
