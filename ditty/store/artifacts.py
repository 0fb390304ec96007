"""Committed directories: nothing exists until its manifest does, and what exists can be verified.

An artifact is a directory with a `manifest.json` that lists each file's size and SHA-256. It
appears by one rename, after everything in it is on the disk. The store keeps artifacts at
`DITTY_HOME/store/<stage>/<key>`; checkpoints use the same protocol in the run directory.
"""

import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ditty.errors import ArtifactDamaged, StoreError
from ditty.failpoints import fail_point
from ditty.store import digests
from ditty.store.files import (
    STAGING,
    FileLock,
    canonical_json,
    fsync_path,
    make_dir,
    read_json,
    remove_tree,
    rename,
    sha256_bytes,
    sha256_file,
    sha256_once,
    write_json,
)
from ditty.version import __version__

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
SHA256 = re.compile(r"[0-9a-f]{64}")
NAME_BYTES, PATH_LENGTH = 255, 512  # of a name on Linux; an S3 key has 1,024 bytes in all

MADE_BY = "made_by"  # the fact that says what made an artifact
FLOW_RUN_VARIABLE = "DITTY_FLOW_RUN"  # id of the Prefect flow run, set by it for all below it

Make = Callable[[Path], dict[str, Any]]  # fills a folder, and returns facts
Read = Callable[[Path], str]


@dataclass(frozen=True)
class Manifest:
    """What a committed directory holds.

    Attributes:
        facts: what its maker says of it (rows, tokens, step, identity ...); JSON values.
        files: relative POSIX path -> (size in bytes, hex SHA-256), without the manifest itself.
    """

    facts: dict[str, Any]
    files: dict[str, tuple[int, str]]

    @property
    def digest(self) -> str:
        """SHA-256 of the content alone: equal for equal files, whatever the facts say."""
        return sha256_bytes(canonical_json(sorted((p, *e) for p, e in self.files.items())))

    def to_json(self) -> dict[str, Any]:
        """The manifest as it is written to `manifest.json`."""
        files = [{"path": p, "size": s, "sha256": h} for p, (s, h) in sorted(self.files.items())]
        return {"version": MANIFEST_VERSION, "facts": self.facts, "files": files}

    @classmethod
    def from_json(cls, value: Any, where: str) -> "Manifest":
        """Parse a manifest from any source, trusted or not; `where` names it in errors.

        Raises:
            ArtifactDamaged: not a manifest, or a path in it leaves its directory.
        """
        try:
            if value["version"] != MANIFEST_VERSION:
                raise ValueError(f"version {value['version']!r}, expected {MANIFEST_VERSION}")
            files = {f["path"]: (f["size"], f["sha256"]) for f in value["files"]}
            for path, (size, sha256) in files.items():
                _check_relative(path)
                if type(size) is not int or size < 0 or not SHA256.fullmatch(sha256):
                    raise ValueError(f"{path!r} has size {size!r} and SHA-256 {sha256!r}")
            if not isinstance(value["facts"], dict):
                raise ValueError(f"facts are {type(value['facts']).__name__}")
            return cls(facts=value["facts"], files=files)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactDamaged(f"{where} is not a manifest of ditty's: {error!r}") from error


def _check_relative(path: str) -> None:
    pure = PurePosixPath(path)
    if pure.is_absolute() or not pure.parts or ".." in pure.parts or str(pure) != path:
        raise ValueError(f"path {path!r} leaves its directory")
    long = max(len(part.encode()) for part in pure.parts) > NAME_BYTES or len(path) > PATH_LENGTH
    if long or "\\" in path or not path.isprintable():
        raise ValueError(f"path {path[:PATH_LENGTH]!r} cannot be a file everywhere")


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a committed directory, its files unread.

    Raises:
        ArtifactDamaged: there is none, or it cannot be parsed.
    """
    try:
        value = read_json(directory / MANIFEST)
    except (ValueError, RecursionError) as error:
        raise ArtifactDamaged(f"{directory / MANIFEST} is not JSON: {error}") from error
    if value is None:
        raise ArtifactDamaged(f"{directory} has no {MANIFEST}: it was never committed")
    return Manifest.from_json(value, str(directory / MANIFEST))


def verify(directory: Path, read: Read = sha256_file) -> Manifest:
    """Re-read every file of a committed directory and compare it with the manifest.

    Args:
        read: gives a file's SHA-256.
    Raises:
        ArtifactDamaged: names the first file that is missing, is a link, or differs.
    """
    manifest = read_manifest(directory)
    for name, (size, digest) in manifest.files.items():
        check_file(directory / name, size, digest, "its manifest", read)
    return manifest


def check_file(path: Path, size: int, sha256: str, by: str, read: Read = sha256_file) -> None:
    """Raise ArtifactDamaged unless a file is what `by`, its manifest's name in errors, says."""
    if path.is_symlink() or not path.is_file():
        raise ArtifactDamaged(f"{path} is missing or not a plain file")
    got = path.stat().st_size
    if got != size:
        raise ArtifactDamaged(f"{path} has {got} bytes, {by} says {size}")
    if read(path) != sha256:
        raise ArtifactDamaged(f"{path} does not match the SHA-256 in {by}")


def describe(directory: Path, facts: dict[str, Any]) -> Manifest:
    """Hash every file below `directory`.

    Raises:
        StoreError: something in it is not a plain file.
    """
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise StoreError(f"{path} is neither a file nor a directory: it cannot be committed")
        if path.is_file():
            name = path.relative_to(directory).as_posix()
            files[name] = (path.stat().st_size, sha256_once(path))
    return Manifest(facts=facts, files=files)


def made_by() -> dict[str, Any]:
    """What commits here and now: ditty's version, the flow run if there is one, the time."""
    return {
        "ditty": __version__,
        "flow_run": os.environ.get(FLOW_RUN_VARIABLE),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def staging_dir(final: Path) -> Path:
    """A new empty directory beside `final`, to be filled and given to `commit`."""
    make_dir(final.parent)
    staging = final.parent / f"{STAGING}{final.name}-{uuid.uuid4().hex[:12]}"
    fail_point("make", staging)
    staging.mkdir()
    return staging


def clear_staging(final: Path) -> None:
    """Remove what makers of `final` left that were killed; no other one may be at work."""
    for stale in final.parent.glob(f"{STAGING}{final.name}-*"):
        remove_tree(stale)


def commit(staging: Path, final: Path, facts: dict[str, Any]) -> Manifest:
    """Make `staging` durable and rename it to `final`; the last act of every artifact.

    If another process committed `final` meanwhile, theirs stays and ours is removed: a key
    names one content, and a committed directory is never overwritten.

    Returns:
        the manifest of what now stands at `final`.
    """
    manifest = describe(staging, {MADE_BY: made_by(), **facts})
    # safetensors and peft make files that only their owner can read; the directory that `mkdir`
    # made under the user's umask says who may.
    mode = staging.stat().st_mode & 0o666
    for path in staging.rglob("*"):
        if path.is_file():
            path.chmod(mode)
        fsync_path(path)
    write_json(staging / MANIFEST, manifest.to_json())
    try:
        rename(staging, final)
    except OSError:
        if not final.is_dir():
            raise
        theirs = verify(final)
        remove_tree(staging)
        return theirs
    fsync_path(final.parent)
    return manifest


@contextmanager
def commit_dir(final: Path, facts: dict[str, Any]) -> Iterator[Path]:
    """Yield a staging directory that becomes `final` only if the block succeeds.

    `facts` is read at the end, so the block may add to it what it counted.
    """
    staging = staging_dir(final)
    try:
        yield staging
        commit(staging, final, facts)
    except BaseException:
        remove_tree(staging)
        raise


def set_aside(directory: Path) -> Path:
    """Rename a damaged directory so that nothing reads it and a person can look at it."""
    aside = directory.with_name(f".bad-{directory.name}-{int(time.time())}-{uuid.uuid4().hex[:4]}")
    rename(directory, aside)
    return aside


def default_home() -> Path:
    """`DITTY_HOME`, or `~/.cache/ditty`."""
    return Path(os.environ.get("DITTY_HOME") or "~/.cache/ditty").expanduser().absolute()


class Store:
    """Content-addressed artifacts below `home/store`."""

    def __init__(self, home: Path | None = None):
        self.home = (home or default_home()).absolute()

    def path(self, stage: str, key: str) -> Path:
        """Where the artifact `key` of `stage` stands, or will."""
        return self.home / "store" / stage / key

    def find(self, stage: str, key: str) -> Manifest | None:
        """The verified manifest of an artifact, or None where it must be (re)built.

        A large file that nobody has touched since it was read is not read again, see `digests`. A
        damaged artifact is set aside, said in the log, and counts as absent.
        """
        path = self.path(stage, key)
        if not path.exists():
            return None
        try:
            return verify(path, partial(digests.sha256, home=self.home))
        except ArtifactDamaged as error:
            log.warning("%s; set aside at %s and rebuilt", error, set_aside(path))
            return None

    def build(
        self, stage: str, key: str, facts: dict[str, Any], make: Make, *, resumable: bool = False
    ) -> Manifest:
        """The artifact `key` of `stage`, made if it is not there; the caller holds its lock.

        Args:
            facts: what is known of it before.
            make: fills the folder that it is given, and returns further facts.
            resumable: see `commit`.
        """
        found = self.find(stage, key)
        if found:
            return found
        facts = dict(facts)
        with self.commit(stage, key, facts, resumable=resumable) as out:
            facts.update(make(out))
        return read_manifest(self.path(stage, key))

    @contextmanager
    def commit(
        self, stage: str, key: str, facts: dict[str, Any], *, resumable: bool = False
    ) -> Iterator[Path]:
        """`commit_dir` at the artifact's place; the caller holds `lock(stage, key)`.

        Under that lock, staging directories of the same key have dead makers: they go first.

        Args:
            resumable: the block is given what an earlier one, however it ended, has left behind,
                and makes only what is missing.
        """
        final = self.path(stage, key)
        clear_staging(final)
        if not resumable:
            with commit_dir(final, facts) as staging:
                yield staging
            self._remember(final)
            return
        part = make_dir(final.with_name(f".part-{final.name}"))
        try:
            yield part
        except BaseException:
            with suppress(OSError):  # nothing to go on with
                part.rmdir()
            raise
        commit(part, final, facts)
        self._remember(final)

    def _remember(self, made: Path) -> None:
        """Its first hit is as quick as any other."""
        for name, (_, digest) in read_manifest(made).files.items():
            digests.remember(made / name, digest, self.home)

    def lock(self, stage: str, key: str) -> FileLock:
        """The lock of whoever builds this artifact."""
        return FileLock(self.home / "locks" / f"{stage}-{key}.lock")
