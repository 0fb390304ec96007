"""Artifacts that machines share: copies of what is in the store, at `DITTY_STORE_URL`.

    <url>/<stage>/<key>/...     as ditty.store.remote commits it, manifest last

What one machine has made, the others fetch, verified, and do not make again. Results of trainings
go to a spec's `upload.url`, not here.
"""

import logging
import os
from collections.abc import Callable

from ditty.errors import ArtifactDamaged, RemoteError
from ditty.stages.stageline import DATA_STAGES, StageRef
from ditty.store.artifacts import Manifest, Store
from ditty.store.remote import Remote

log = logging.getLogger(__name__)

VARIABLE = "DITTY_STORE_URL"
SHARED = {*DATA_STAGES, "fetch", "prequantize", "merge", "gguf", "evaluate", "harness"}


def place() -> Remote | None:
    """Where artifacts are shared, or None.

    Raises:
        SpecError: the variable holds no target.
    """
    url = os.environ.get(VARIABLE)
    return Remote(url) if url else None


def there(ref: StageRef) -> Manifest | None:
    """The manifest of the shared copy of an artifact, or None where there is none.

    Raises:
        RemoteError: the place cannot be asked.
    """
    remote = _place_of(ref)
    return None if remote is None else _committed(remote, ref)


def made(ref: StageRef, store: Store, make: Callable[[], Manifest]) -> Manifest:
    """The artifact of `ref`: from the store, or fetched, or made here and then shared.

    The caller holds its lock. A copy that cannot be made is said in the log and stops nothing.

    Args:
        make: commits it to the store.
    Raises:
        RemoteError: the place cannot be asked: that is not "nobody has it".
        StoreError: no room for it.
    """
    found = store.find(ref.stage, ref.key)
    if found:
        return found
    remote = _place_of(ref)
    if remote is None:
        return make()
    if _committed(remote, ref):
        try:
            manifest = remote.get(_name(ref), store.path(ref.stage, ref.key))
            log.info("fetched %s from %s/%s", ref.title, remote.url, _name(ref))
            return manifest
        except ArtifactDamaged as error:
            log.warning("%s; made again here", error)
    manifest = make()
    try:
        remote.put(store.path(ref.stage, ref.key), _name(ref))
        log.info("shared %s as %s/%s", ref.title, remote.url, _name(ref))
    except RemoteError as error:
        log.warning("%s was made and is not shared: %s", ref.title, error)
    return manifest


def _place_of(ref: StageRef) -> Remote | None:
    return place() if ref.stage in SHARED else None


def _committed(remote: Remote, ref: StageRef) -> Manifest | None:
    try:
        return remote.manifest(_name(ref))
    except ArtifactDamaged as error:
        log.warning("%s: passed over", error)
        return None


def _name(ref: StageRef) -> str:
    return f"{ref.stage}/{ref.key}"
