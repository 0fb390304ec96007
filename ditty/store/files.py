"""The few file operations on which everything durable rests: hash, replace, sync, lock.

POSIX gives no durability without fsync of the file and of its directory, and no atomic content
change without a rename; flock(2) is freed by the kernel when its holder dies, however it dies.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ditty.errors import StoreError
from ditty.failpoints import fail_point

STAGING = ".tmp-"  # how the names of what is being made begin
GLANCE_SECONDS = 0.02  # longer than `is_held` has a lock


def canonical_json(value: Any) -> bytes:
    """`value` as JSON bytes that depend on its content only: sorted keys, no spaces, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode()


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's content, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_known: dict[tuple[int, ...], str] = {}


def sha256_once(path: Path) -> str:
    """`sha256_file`, remembered in this process for as long as the file stays as it is.

    For what this process has written or only reads; whoever looks for damage reads again.
    """
    stat = path.stat()
    file = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if file not in _known:
        _known[file] = sha256_file(path)
    return _known[file]


def fsync_path(path: Path) -> None:
    """Flush one file or directory entry table to the disk."""
    fail_point("sync", path)
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_new(temporary: Path, data: bytes, final: Path) -> None:
    """Put `data` on the disk in a new file, which is to become `final`."""
    fail_point("write", final)
    with open(temporary, "xb") as file:
        file.write(data)
        file.flush()
        fail_point("sync", final)
        os.fsync(file.fileno())


def rename(path: Path, final: Path) -> None:
    """rename(2): `final` appears whole; a file there is replaced, a directory with files is not."""
    fail_point("rename", final)
    os.rename(path, final)


def link(path: Path, final: Path) -> None:
    """link(2): `final` appears whole, unless it is there already (FileExistsError)."""
    fail_point("link", final)
    os.link(path, final)


def unlink(path: Path) -> None:
    """Remove a file; one that is absent is fine."""
    fail_point("unlink", path)
    path.unlink(missing_ok=True)


def remove_tree(directory: Path) -> None:
    """Remove a directory that nobody reads any more, as far as it can be removed."""
    fail_point("remove", directory)
    shutil.rmtree(directory, ignore_errors=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Give `path` the content `data`, or leave it as it was: never half of either."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        write_new(temporary, data, path)
        rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of readable JSON."""
    write_atomic(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> Any | None:
    """The JSON in `path`, or None where there is no such file."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def make_dir(path: Path) -> Path:
    """Create `path` with its parents.

    Raises:
        StoreError: it cannot be written; names the directory and what to change.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "not writable")
    except OSError as error:
        raise StoreError(
            f"cannot write to {path}: {error.strerror}. "
            "Set DITTY_HOME to a directory that you can write to"
        ) from error
    return path


def _try_lock(fd: int, shared: bool) -> bool:
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class FileLock:
    """A lock between processes, freed by the kernel when the holder dies.

    The file stays after release: removing it would let two holders lock two different inodes.

    Args:
        shared: held beside others that share it, and beside none that does not.
    """

    def __init__(self, path: Path, *, shared: bool = False):
        self.path, self.shared = path, shared
        self._fd: int | None = None

    def acquire(self, timeout: float | None = None, poll: float = 0.05) -> bool:
        """Take the lock within `timeout` seconds (None: wait for ever). False: not taken."""
        make_dir(self.path.parent)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                if _try_lock(fd, self.shared):
                    self._fd = fd
                    return True
                if end is not None and time.monotonic() >= end:
                    os.close(fd)
                    return False
                time.sleep(poll)
            except BaseException:
                os.close(fd)
                raise

    def release(self) -> None:
        """Give the lock back."""
        assert self._fd is not None, f"{self.path} is not held"
        os.close(self._fd)
        self._fd = None


def is_held(path: Path) -> bool:
    """Whether anybody holds the lock at `path`, shared or not; creates nothing.

    To know, it takes the lock for an instant. Who must not fail for that waits GLANCE_SECONDS.
    """
    if not path.exists():
        return False
    lock = FileLock(path)
    # Another one that asks may be in the way, for as short a time: the second try tells.
    free = lock.acquire(GLANCE_SECONDS, poll=GLANCE_SECONDS)
    if free:
        lock.release()
    return not free


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock at `path` for the block, waiting as long as it takes."""
    lock = FileLock(path, shared=shared)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()
