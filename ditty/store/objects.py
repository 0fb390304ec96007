"""Objects by key, the five things a remote does with them, and the plain-folder kind of it.

`ditty.store.remote` holds the protocol (what is written in which order, and what counts as
committed); an `Objects` holds only the verbs. `Folder` is here, `Bucket` in `ditty.store.s3`.
"""

import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from ditty.errors import RemoteDenied, RemoteError, StoreError
from ditty.failpoints import fail_point
from ditty.store.files import STAGING, fsync_path, link, rename, sha256_file, unlink, write_new

STALE_S = 3600.0  # no small object takes so long to write: whoever began it is gone
_NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS}
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


class Objects(Protocol):
    """A place that keeps bytes by key. Keys are relative POSIX paths.

    Every verb raises RemoteDenied (the credentials are refused) or RemoteError (anything else
    that the place did), and StoreError for a fault of this machine's disk. Verbs that may be
    repeated are repeated inside; a key that is absent is never told from an error by guessing.
    """

    def prepare(self) -> None:
        """Make the place ready if that needs nothing but permission to write."""
        ...

    def read(self, key: str) -> bytes | None:
        """The bytes of a small object, or None where there is none."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Write a small object that does not exist yet; False: one is there, ours or not."""
        ...

    def upload(self, path: Path, key: str, sha256: str) -> None:
        """Copy a local file to `key`, whole or not at all."""
        ...

    def holds(self, key: str, size: int, sha256: str) -> bool:
        """Is an object of this size and content at `key`?"""
        ...

    def download(self, key: str, path: Path) -> bool:
        """Copy an object to the local `path`, unverified; False: there is none."""
        ...

    def keys(self, prefix: str) -> list[str]:
        """Every key that starts with `prefix`, sorted; never from a cache."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; one that is absent is fine."""
        ...

    def debris(self, prefix: str) -> list[str]:
        """Keys below `prefix` that are being written, or that a killed upload left half written."""
        ...

    def clear_debris(self, prefix: str) -> None:
        """Remove what killed uploads below `prefix` left and no listing shows."""
        ...


def permanent(error: RemoteError) -> RemoteError:
    """Mark an error that an identical attempt would meet again."""
    error.retryable = False
    return error


def _is_temporary(key: str) -> bool:
    return key.rpartition("/")[2].startswith(STAGING)


class Folder:
    """Objects as files below a folder, which may be a network mount."""

    def __init__(self, root: Path):
        self.root = root

    def prepare(self) -> None:
        """Create the folder, and remove what creates that were killed left in it."""
        with self._explained("create"):
            self.root.mkdir(parents=True, exist_ok=True)
            for path in self.root.glob(f"{STAGING}*"):
                if path.stat().st_mtime < time.time() - STALE_S:
                    unlink(path)

    def read(self, key: str) -> bytes | None:
        """The bytes of a file, or None where the folder is there and the file is not."""
        with self._explained(f"read {key} in"):
            try:
                return (self.root / key).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                self._need_root()
                return None

    def create(self, key: str, data: bytes) -> bool:
        """Write a file that does not exist yet: link(2) is exclusive and shows whole files only."""
        with self._explained(f"create {key} in"):
            path = self._parent_of(key)
            temporary = self.root / f"{STAGING}{uuid.uuid4().hex}"  # where `prepare` looks
            try:
                write_new(temporary, data, path)
                link(temporary, path)
            except FileExistsError:
                return False
            finally:
                temporary.unlink(missing_ok=True)
            fsync_path(path.parent)
            return True

    def upload(self, path: Path, key: str, sha256: str) -> None:
        """Copy under a temporary name, sync, rename."""
        with self._explained(f"write {key} in"):
            final = self._parent_of(key)
            temporary = final.with_name(f"{STAGING}{uuid.uuid4().hex}")
            try:
                fail_point("put", final)
                shutil.copyfile(path, temporary)
                fsync_path(temporary)
                rename(temporary, final)
            finally:
                temporary.unlink(missing_ok=True)
            fsync_path(final.parent)

    def holds(self, key: str, size: int, sha256: str) -> bool:
        """Compare size, then content: a file system keeps no checksum that could be asked for."""
        with self._explained(f"read {key} in"):
            path = self.root / key
            try:
                return path.stat().st_size == size and sha256_file(path) == sha256
            except (FileNotFoundError, NotADirectoryError):
                self._need_root()
                return False

    def download(self, key: str, path: Path) -> bool:
        """Copy to the local `path`."""
        with self._explained(f"read {key} in"):
            if not (self.root / key).is_file():
                self._need_root()
                return False
            fail_point("get", path)
            shutil.copyfile(self.root / key, path)
            return True

    def keys(self, prefix: str) -> list[str]:
        """Walk the folder; a folder that cannot be read is an error, not an empty one."""
        return [key for key in self._walk(prefix) if not _is_temporary(key)]

    def debris(self, prefix: str) -> list[str]:
        """Temporary files below `prefix`."""
        return [key for key in self._walk(prefix) if _is_temporary(key)]

    def _walk(self, prefix: str) -> list[str]:
        with self._explained("list"):
            self._need_root()
            top = self.root / prefix.rpartition("/")[0]
            found = []
            for folder, _, names in os.walk(top, onerror=_raise_unless_absent):
                for name in names:
                    key = (Path(folder) / name).relative_to(self.root).as_posix()
                    if key.startswith(prefix):
                        found.append(key)
            return sorted(found)

    def delete(self, key: str) -> None:
        """Remove a file."""
        with self._explained(f"delete {key} in"):
            unlink(self.root / key)

    def clear_debris(self, prefix: str) -> None:
        """Remove temporary files and empty folders below `prefix`."""
        with self._explained(f"clear {prefix} in"):
            top = self.root / prefix
            for folder, _, names in os.walk(top, topdown=False):
                for name in names:
                    if name.startswith(STAGING):
                        unlink(Path(folder) / name)
                if not any(Path(folder).iterdir()):
                    Path(folder).rmdir()

    def _parent_of(self, key: str) -> Path:
        self._need_root()
        path = self.root / key
        new = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in new:
            fsync_path(folder.parent)
        return path

    def _need_root(self) -> None:
        # An unmounted share must not look like a share that holds nothing.
        if not self.root.is_dir():
            raise permanent(
                RemoteError(
                    f"no folder {self.root}: mount or create it (mkdir -p {self.root}), "
                    "or correct upload.url"
                )
            )

    @contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            said = f"cannot {doing} {self.root}: {error}"
            if error.errno in _DISK_FULL:
                raise StoreError(f"{said}. Free some space there") from error
            if error.errno in _NO_ACCESS:
                raise RemoteDenied(
                    f"{said}. Give this user write access, or choose another upload.url"
                ) from error
            raise RemoteError(said) from error


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
