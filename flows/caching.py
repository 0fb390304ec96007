"""When a stage's task is not run again: its artifact is in the store, verifies, and was recorded.

A task of a stage takes a parameter `ref` (a `StageRef` of ditty.stages.stageline) and returns a
`Reference`. Its Prefect cache key is the stage's own content key, so a hit does not depend on the
task's code or on the run. The lock of the Prefect transaction is the store's lock of that artifact:
flows and users of the library exclude each other, and a killed holder's lock frees itself. The body
of a task therefore runs with the lock held and must not take it again.

Records live below `DITTY_HOME/prefect`: `records/<key>.json` (Prefect's metadata) and
`results/<key>` (the reference). A hit is trusted only after its artifact has been verified.
"""

import inspect
import json
import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import anyio
from prefect import Task
from prefect.cache_policies import CacheKeyFnPolicy, CachePolicy
from prefect.context import TaskRunContext
from prefect.filesystems import WritableFileSystem
from prefect.serializers import JSONSerializer
from pydantic import PrivateAttr

from ditty.stages.stageline import StageRef
from ditty.store.artifacts import Manifest, Store
from ditty.store.files import FileLock, make_dir, read_json, write_atomic
from ditty.store.remote import Remote

log = logging.getLogger(__name__)

UPLOAD = "upload"  # the one stage whose artifact, a receipt, stands for something elsewhere


class Reference(TypedDict):
    """What a stage's task returns: which artifact, and the digest of its content."""

    stage: str
    key: str
    digest: str


def reference(ref: StageRef, manifest: Manifest) -> Reference:
    """The result of a stage's task."""
    return {"stage": ref.stage, "key": ref.key, "digest": manifest.digest}


def cache_key(context: TaskRunContext | None, parameters: dict[str, Any]) -> str | None:
    """`<stage>-<key>`, which is also the name of the store's lock; None: its key is not known."""
    ref = parameters["ref"]
    return f"{ref.stage}-{ref.key}" if ref.key else None


def cached(task: Task[Any, Any], store: Store) -> Task[Any, Any]:
    """`task` with its results in `store`; it must have a parameter `ref`."""
    # Prefect logs an error in a key function and goes on without a cache: it must not raise.
    assert "ref" in inspect.signature(task.fn).parameters, f"{task.name} has no parameter ref"
    return task.with_options(
        cache_policy=stage_cache_policy(store),
        persist_result=True,
        result_storage=_results(store),
        result_serializer="json",
    )


def stage_cache_policy(store: Store) -> CachePolicy:
    """Keyed by content, verified at the hit, computed once however many processes ask."""
    locks = StageLocks(store.home)
    return CacheKeyFnPolicy(cache_key_fn=cache_key).configure(
        key_storage=StageRecords.of(store, locks),
        isolation_level="SERIALIZABLE",
        lock_manager=locks,
    )


def _results(store: Store) -> Path:
    # Prefect records resolved paths.
    return make_dir(store.home / "prefect" / "results").resolve()


def receipt_holds(receipt: dict[str, Any]) -> bool:
    """Whether what a receipt of `upload` names is still committed at the target.

    Args:
        receipt: {"target": url, "name": below it, "digest": of its files}
    Raises:
        RemoteError: the target cannot be asked.
    """
    manifest = Remote(receipt["target"]).manifest(receipt["name"])
    return manifest is not None and manifest.digest == receipt["digest"]


@dataclass
class _Hold:
    holder: str
    lock: FileLock
    verified: bytes | None = None


class StageLocks:
    """Prefect's `LockManager` on the store's locks (flock, freed by the kernel).

    Prefect deep-copies policies and pickles them for other processes: copies share this object,
    and an unpickled one holds nothing.
    """

    def __init__(self, home: Path):
        self.home = home
        self._holds: dict[str, _Hold] = {}
        self._mutex = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"home": self.home}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["home"])  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> "StageLocks":
        return self

    def _lock(self, key: str) -> FileLock:
        stage, _, content_key = key.rpartition("-")
        return Store(self.home).lock(stage, content_key)

    def acquire_lock(
        self,
        key: str,
        holder: str,
        acquire_timeout: float | None = None,
        hold_timeout: float | None = None,
    ) -> bool:
        """Take the lock within `acquire_timeout` seconds (None: wait for ever)."""
        if hold_timeout is not None:
            raise ValueError("a lock on flock(2) has no expiry: it ends with its holder")
        if self.is_lock_holder(key, holder):
            return True
        lock = self._lock(key)
        if not lock.acquire(0):
            log.info("%s is being made by another process: waiting for it", key)
            if not lock.acquire(acquire_timeout):
                return False
        with self._mutex:
            self._holds[key] = _Hold(holder, lock)
        return True

    async def aacquire_lock(
        self,
        key: str,
        holder: str,
        acquire_timeout: float | None = None,
        hold_timeout: float | None = None,
    ) -> bool:
        """`acquire_lock` in a thread."""
        return await anyio.to_thread.run_sync(
            self.acquire_lock, key, holder, acquire_timeout, hold_timeout
        )

    def release_lock(self, key: str, holder: str) -> None:
        """Give the lock back; only its holder may."""
        with self._mutex:
            if not self.is_lock_holder(key, holder):
                raise ValueError(f"{holder} does not hold the lock of {key}")
            hold = self._holds.pop(key)
        hold.lock.release()

    def is_locked(self, key: str) -> bool:
        """Does anyone hold it, in this process or another?"""
        return not self.wait_for_lock(key, 0)

    def is_lock_holder(self, key: str, holder: str) -> bool:
        """Does `holder` hold it in this process?"""
        hold = self._holds.get(key)
        return hold is not None and hold.holder == holder

    def wait_for_lock(self, key: str, timeout: float | None = None) -> bool:
        """Wait until nobody holds it; False: somebody still does after `timeout` seconds."""
        lock = self._lock(key)
        if not lock.path.exists():
            return True
        free = lock.acquire(timeout)
        if free:
            lock.release()
        return free

    async def await_for_lock(self, key: str, timeout: float | None = None) -> bool:
        """`wait_for_lock` in a thread."""
        return await anyio.to_thread.run_sync(self.wait_for_lock, key, timeout)

    def hold(self, key: str) -> _Hold | None:
        """This process's hold on `key`."""
        return self._holds.get(key)


class StageRecords(WritableFileSystem):
    """Prefect's key storage: a record exists only if its artifact verifies.

    Prefect calls `read_path` to ask whether there is a hit, and takes any exception for a miss.
    What it then reads names a serializer (by default pickle) and a file, so nothing of a record
    is handed on that `cached` would not have written itself.
    """

    _block_type_name = "ditty stage records"

    home: str
    _locks: StageLocks = PrivateAttr()

    @classmethod
    def of(cls, store: Store, locks: StageLocks) -> "StageRecords":
        """The records of `store`, which are verified once in each hold of `locks`."""
        records = cls(home=str(store.home))
        records._locks = locks
        return records

    def _record(self, key: str) -> Path:
        assert "/" not in key, key
        return Path(self.home) / "prefect" / "records" / f"{key}.json"

    def read_path(  # type: ignore[override]  # as LocalFileSystem does
        self, path: str, _sync: bool | None = None
    ) -> bytes:
        """The record of the cache key `path`.

        Raises:
            FileNotFoundError: there is none, its result is gone or foreign, or its artifact is
                missing or damaged.
        """
        hold = self._locks.hold(path)
        if hold is not None and hold.verified is not None:
            return hold.verified
        content = self._verify(path)
        if hold is not None:
            # Prefect asks, then reads, under one lock: hashing a model once is enough.
            hold.verified = content
        return content

    def _verify(self, key: str) -> bytes:
        content = self._record(key).read_bytes()
        metadata = json.loads(content)
        payload = _results(Store(Path(self.home))) / key
        if metadata["storage_key"] != str(payload):
            raise FileNotFoundError(f"the record of {key} points to {metadata['storage_key']}")
        if metadata["serializer"] != JSONSerializer().model_dump(mode="json"):
            raise FileNotFoundError(f"the result of {key} is not plain JSON")
        stage, _, content_key = key.rpartition("-")
        manifest = Store(Path(self.home)).find(stage, content_key)
        if manifest is None:
            raise FileNotFoundError(f"{key} is not in the store")
        expected = {"stage": stage, "key": content_key, "digest": manifest.digest}
        if read_json(payload) != expected:
            raise FileNotFoundError(f"the result of {key} is not {expected}")
        if stage == UPLOAD and not receipt_holds(manifest.facts):
            raise FileNotFoundError(f"{manifest.facts['name']} is no longer at the target")
        return content

    async def aread_path(self, path: str) -> bytes:
        """`read_path` in a thread."""
        return await anyio.to_thread.run_sync(self.read_path, path)

    def write_path(  # type: ignore[override]
        self, path: str, content: bytes, _sync: bool | None = None
    ) -> None:
        """Record `content` under the cache key `path`."""
        hold = self._locks.hold(path)
        if hold is not None:
            hold.verified = None
        make_dir(self._record(path).parent)
        write_atomic(self._record(path), content)

    async def awrite_path(self, path: str, content: bytes) -> None:
        """`write_path` in a thread."""
        await anyio.to_thread.run_sync(self.write_path, path, content)
