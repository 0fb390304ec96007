"""Committed directories copied to and from `s3://bucket/prefix` or `file:///folder`.

    <url>/<name>/<files of the directory>      any order
    <url>/<name>/manifest.json                 last, by exclusive create: it alone commits

A name is `<run>/checkpoints/000001/step_000000200` or `<run>/final/<key>`: content-addressed or
step-numbered, so that it never gets a second content. Without its manifest it does not exist. Two
writers of one run are kept apart by the run's lock and its lease (ditty.runs.lease); here the
slower one gets an error.
"""

import json
import logging
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from ditty.errors import ArtifactDamaged, RemoteError, SpecError, StoreError, scrub
from ditty.store.artifacts import (
    MANIFEST,
    Manifest,
    check_file,
    clear_staging,
    commit,
    read_manifest,
    staging_dir,
    verify,
)
from ditty.store.files import remove_tree
from ditty.store.objects import STALE_S, Folder, Objects, permanent
from ditty.store.s3 import Bucket, Patience

log = logging.getLogger(__name__)

PROBE = "ditty-probe-"  # then the seconds since 1970 when it was made
CHECK_S = 5.0  # seconds that `check` gives a request, and a fault to pass: a person looks on
FILES_IN_FLIGHT = 4  # that are fetched at a time
TRANSFERS = 2  # copies of a file that are made before its damage is called lasting
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.=+-]*"
_NAME = re.compile(rf"{_PART}(/{_PART})*")
_S3_URL = re.compile(rf"s3://([a-z0-9][a-z0-9.-]{{1,61}}[a-z0-9])(?:/({_NAME.pattern}))?/?")


def final_name(run_name: str, key: str) -> str:
    """Where the result of the training `key` stands below a target's url."""
    return f"{run_name}/final/{key}"


class Remote:
    """Where a run's committed directories are copied.

    Args:
        url: `s3://bucket/prefix` or `file:///folder`. Endpoint and credentials come from the
            environment (AWS_ENDPOINT_URL_S3, AWS_ACCESS_KEY_ID ...) or the machine's role.
        patience: how long faults of an S3 server are borne; a folder has none that pass.

    Every method raises RemoteError (the place cannot be reached, or did not do as asked) and
    RemoteDenied (it refuses these credentials): never is either taken for "there is nothing".
    """

    def __init__(self, url: str, patience: Patience | None = None):
        self.url = url.rstrip("/")
        self._patience = patience or Patience()
        self._objects = _open(self.url, self._patience)

    @property
    def objects(self) -> Objects:
        """The place itself, for what is no committed directory (leases)."""
        return self._objects

    def check(self) -> None:
        """Write, list, read back and delete a probe: all that a run will need, before it starts.

        Creates the folder of a `file:` url. Gives up on a dead endpoint after about CHECK_S
        seconds, on a silent one after less than a minute.
        """
        usual = self._patience
        brief = replace(
            usual, total_s=min(CHECK_S, usual.total_s), request_s=min(CHECK_S, usual.request_s)
        )
        objects = _open(self.url, brief)
        objects.prepare()
        key = f"{PROBE}{int(time.time())}-{uuid.uuid4().hex}"
        data = key.encode()
        objects.create(key, data)
        try:
            if objects.create(key, b"overwritten"):
                raise permanent(
                    RemoteError(
                        f"{self.url} overwrites an object that exists, although asked not to "
                        "(If-None-Match: *): two runs could commit over each other. "
                        "Use a server that honours it"
                    )
                )
            probes = objects.keys(PROBE)
            if objects.read(key) != data or key not in probes:
                raise RemoteError(f"{self.url} does not give back what was just written to it")
        finally:
            objects.delete(key)
        for probe in probes:  # of processes that were killed at this
            made = probe.removeprefix(PROBE).partition("-")[0]
            if made.isdecimal() and int(made) < time.time() - STALE_S:
                objects.delete(probe)

    def put(self, directory: Path, name: str) -> str:
        """Publish a committed directory as `name`; safe to repeat, and to resume after a kill.

        Files that are there already, of the right size and SHA-256, are not sent again.

        Returns:
            the digest of the manifest that now stands there.
        Raises:
            ArtifactDamaged: the directory does not match its own manifest; nothing is committed.
            RemoteError: another content is committed as `name`.
        """
        manifest = read_manifest(directory)
        _refuse_odd_paths(manifest, str(directory))
        committed = self._is_committed(name, manifest)
        for path, (size, sha256) in sorted(manifest.files.items()):
            if not self._objects.holds(f"{name}/{path}", size, sha256):
                check_file(directory / path, size, sha256, "its manifest")
                # Asked before each file: a slower writer must not damage a faster one's commit.
                self._is_committed(name, manifest)
                self._send(directory / path, f"{name}/{path}", size, sha256)
        if not committed:
            self._objects.create(f"{name}/{MANIFEST}", (directory / MANIFEST).read_bytes())
        # "There is one already" may be ours, after a lost reply: only reading it back tells.
        if not self._is_committed(name, manifest):
            raise RemoteError(f"{self.url}/{name}/{MANIFEST} is not there after it was written")
        self._tidy(name)
        return manifest.digest

    def names(self, prefix: str = "") -> list[str]:
        """Committed names below `prefix`, sorted; an empty list only if a listing said so."""
        start = f"{_checked(prefix)}/" if prefix else ""
        found = []
        for key in self._objects.keys(start):
            name, _, file = key.rpartition("/")
            if file == MANIFEST and is_name(name):
                found.append(name)
            elif file == MANIFEST:
                log.warning("%s/%r is no name of ditty's: passed over", self.url, key)
        return found

    def unfinished(self, prefix: str) -> list[str]:
        """Names below `prefix` that have files, whole or half, and no manifest, sorted: being put,
        or half gone."""
        below = f"{_checked(prefix)}/"
        keys = [*self._objects.keys(below)]
        with suppress(RemoteError):  # who may not list these is told by `_tidy`
            keys += self._objects.debris(below)
        parents = {key.rpartition("/")[0] for key in keys}
        done = self.names(prefix)
        inside = tuple(f"{name}/" for name in done)
        return sorted(p for p in parents if p not in done and not p.startswith(inside))

    def manifest(self, name: str) -> Manifest | None:
        """The manifest of `name`, or None where the server says that there is none.

        Raises:
            ArtifactDamaged: it cannot be parsed, or a path in it leaves its directory.
        """
        where = f"{self.url}/{_checked(name)}/{MANIFEST}"
        data = self._objects.read(f"{name}/{MANIFEST}")
        if data is None:
            return None
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ArtifactDamaged(f"{where} is not JSON: {error}") from error
        manifest = Manifest.from_json(value, where)
        _refuse_odd_paths(manifest, where)
        return manifest

    def get(self, name: str, final: Path) -> Manifest:
        """Fetch `name` and commit it as the directory `final`; a repeat finds it there.

        The caller sees to it that nobody else makes `final` meanwhile.

        Raises:
            ArtifactDamaged: what is there does not match its manifest; `final` does not appear.
            StoreError: no room, or `final` holds another content.
        """
        manifest = self.manifest(name)
        if manifest is None:
            raise permanent(RemoteError(f"nothing is committed as {self.url}/{name}"))
        if final.exists():
            stands = verify(final)
        else:
            clear_staging(final)
            staging = staging_dir(final)
            try:
                _need_room(staging, sum(size for size, _ in manifest.files.values()))
                with ThreadPoolExecutor(FILES_IN_FLIGHT, thread_name_prefix="ditty get") as pool:
                    # The first error that is met ends it; what has not begun is not begun.
                    fetch = partial(self._fetch, name, manifest, staging)
                    waiting = [pool.submit(fetch, path) for path in manifest.files]
                    try:
                        for file in waiting:
                            file.result()
                    finally:
                        pool.shutdown(wait=True, cancel_futures=True)
                stands = commit(staging, final, manifest.facts)
            except OSError as error:
                raise StoreError(f"cannot write {final}: {error}") from error
            finally:
                remove_tree(staging)
        if stands.digest != manifest.digest:
            raise StoreError(f"{final} holds another content than {self.url}/{name}: move it away")
        return stands

    def problems(self, name: str, scratch: Path) -> Iterator[tuple[str, bool]]:
        """What is wrong with each file of `name`, fetched into `scratch` one after the other.

        Yields:
            (a sentence, whether it is about a file that the manifest does not list)
        """
        try:
            manifest = self.manifest(name)
        except ArtifactDamaged as error:
            yield str(error), False
            return
        if manifest is None:
            raise permanent(RemoteError(f"nothing is committed as {self.url}/{name}"))
        listed = {f"{name}/{MANIFEST}"}
        for path in manifest.files:
            listed.add(f"{name}/{path}")
            try:
                self._fetch(name, manifest, scratch, path)
            except ArtifactDamaged as error:
                yield str(error), False
            (scratch / path).unlink(missing_ok=True)
        for key in self._objects.keys(f"{name}/"):
            if key not in listed:
                yield f"{self.url}/{key} is in no manifest", True

    def delete(self, name: str) -> None:
        """Remove `name`: the manifest first, so that a half-deleted one does not exist."""
        self._objects.delete(f"{_checked(name)}/{MANIFEST}")
        for key in self._objects.keys(f"{name}/"):
            self._objects.delete(key)
        self._tidy(name)

    def _tidy(self, name: str) -> None:
        """What is unfinished below a name that is committed, or gone, will never be finished."""
        try:
            self._objects.clear_debris(f"{name}/")
        except RemoteError as error:  # it costs storage and harms nothing
            log.warning("left unfinished uploads below %s/%s: %s", self.url, name, error)

    def _is_committed(self, name: str, manifest: Manifest) -> bool:
        """Is this very content committed as `name`? Raises where another one is."""
        try:
            there = self.manifest(name)
        except ArtifactDamaged as error:  # not the caller's directory is damaged
            raise permanent(RemoteError(f"{error}. Delete {self.url}/{name}")) from error
        if there is not None and there.digest != manifest.digest:
            raise permanent(
                RemoteError(
                    f"another content is committed as {self.url}/{name}: its digest is "
                    f"{there.digest[:12]}, ours {manifest.digest[:12]}. Is another run of this "
                    "name writing there? Use another run name or upload.url, or delete it"
                )
            )
        return there is not None

    def _send(self, path: Path, key: str, size: int, sha256: str) -> None:
        for _ in range(TRANSFERS):
            self._objects.upload(path, key, sha256)
            if self._objects.holds(key, size, sha256):
                return
            log.warning("%s/%s is not what was sent: sent again", self.url, key)
        raise RemoteError(f"{self.url}/{key} is not what was sent, {TRANSFERS} times in a row")

    def _fetch(self, name: str, manifest: Manifest, directory: Path, path: str) -> None:
        size, sha256 = manifest.files[path]
        local = directory / path
        where = f"{self.url}/{name}/{path}"
        local.parent.mkdir(parents=True, exist_ok=True)
        for transfer in range(1, TRANSFERS + 1):
            if not self._objects.download(f"{name}/{path}", local):
                raise ArtifactDamaged(f"{where} is missing, although its manifest lists it")
            try:
                check_file(local, size, sha256, f"the manifest of {where}")
                return
            except ArtifactDamaged as error:  # in transfer, or at rest: ask again to know
                if transfer == TRANSFERS:
                    raise ArtifactDamaged(f"{where} is damaged: {error}") from error
                log.warning("%s; fetched again", error)


def _open(url: str, patience: Patience) -> Objects:
    if re.match("file:///.", url):
        return Folder(Path(unquote(url.removeprefix("file://"))))
    if match := _S3_URL.fullmatch(url):
        return Bucket(match[1], match[2] or "", patience)
    hint = ""
    if "@" in url:
        hint = "; credentials belong into the environment (AWS_ACCESS_KEY_ID ...), not into a url"
    raise SpecError(
        f"{scrub(url)!r} (upload.url, --out or DITTY_STORE_URL) is no target; expected "
        f"s3://bucket/prefix (letters, digits, '.', '_', '=', '+' and '-') or file:///folder{hint}"
    )


def is_name(name: str) -> bool:
    """Whether a committed directory can be called so."""
    return _NAME.fullmatch(name) is not None


def _checked(name: str) -> str:
    if not is_name(name):
        raise permanent(RemoteError(f"{name!r} is no name of a committed directory"))
    return name


def _refuse_odd_paths(manifest: Manifest, where: str) -> None:
    for path in manifest.files:
        # A second manifest inside would look like a commit of its own before the first is one.
        if path.rpartition("/")[2] == MANIFEST:
            raise ArtifactDamaged(f"{where} lists {path!r} as a file: rename that file")
        if any(str(p) in manifest.files for p in PurePosixPath(path).parents):
            raise ArtifactDamaged(f"{where} lists {path!r}, which cannot be written as a file")


def _need_room(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise StoreError(f"{directory.parent} has {free} bytes free, {needed} are needed")
