"""Checkpoints of a run, copied to its upload target while it trains, and fetched from there.

A copy that fails is said in the log and tried again; it never stops training. With each checkpoint
goes the best one that it knows of, and goes first: a resume needs both.
"""

import contextvars
import logging
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from ditty.config.spec import RunSpec
from ditty.errors import ArtifactDamaged, DittyError, RunError, StoreError
from ditty.runs.identity import check_identity
from ditty.runs.lease import Lease, counting, epoch_of, newest
from ditty.runs.rundir import STEP_NAME, RunDir, best_step, step_name
from ditty.store.artifacts import Store, read_manifest, staging_dir
from ditty.store.files import GLANCE_SECONDS, fsync_path, remove_tree, rename
from ditty.store.remote import Remote, final_name

POLL_SECONDS = 2.0
RETRY_SECONDS = 30.0
LEAVING_SECONDS = 8.0  # for the last copy when a signal ends the run: 30 s are all there is

Logger = logging.Logger | logging.LoggerAdapter[Any]


def remote_checkpoints(remote: Remote, run_name: str) -> dict[int, str]:
    """Names of the run's committed checkpoints at the target that count, by step, ascending.

    Of two of one step, that of the newer epoch.
    """
    names = counting(remote, run_name, newest(remote, run_name))
    found = {step: name for name in names if (step := _step(name)) is not None}
    return dict(sorted(found.items()))


def _step(name: str) -> int | None:
    match = STEP_NAME.fullmatch(name.rpartition("/")[2])
    return int(match[1]) if match else None


def fetch_newer(run: RunDir, remote: Remote, identity: dict[str, Any], log: Logger) -> int | None:
    """Download the newest checkpoint of the run if it is newer than the local ones.

    Skipped while another process trains in the run directory. A damaged one is passed over, and
    so is one whose best one is damaged.

    Returns:
        its step, or None where nothing was fetched.
    Raises:
        RunMismatch: the target holds checkpoints of this name from another spec.
        ArtifactDamaged: there are only damaged ones, here none.
        RemoteError: the target cannot be asked: that is not "there is nothing".
        StoreError: no room here.
    """
    local = run.committed_steps()
    there = remote_checkpoints(remote, run.root.name)
    newer = [step for step in there if not local or step > local[-1]]
    lock = run.training_lock()
    if not newer or not lock.acquire(GLANCE_SECONDS):
        return None
    try:
        problem: ArtifactDamaged | None = None
        for step in reversed(newer):
            try:
                _fetch(run, remote, there, step, identity)
            except ArtifactDamaged as error:
                log.warning("%s; an older checkpoint is used", error)
                problem = error
            else:
                log.info("fetched the checkpoint of step %d from %s", step, remote.url)
                return step
    finally:
        lock.release()
    if problem and not local:
        raise problem
    return None


def _fetch(
    run: RunDir, remote: Remote, there: dict[int, str], step: int, identity: dict[str, Any]
) -> None:
    """Commit the checkpoint of `step` here, after the best one that it knows of.

    It waits in a staging directory, since its content tells which one that is.
    """
    staging = staging_dir(run.checkpoint(step))
    waiting = staging / step_name(step)
    try:
        _get(remote, there[step], waiting, identity)
        best = best_step(waiting)
        if best is not None and best != step and best in there:
            _get(remote, there[best], run.checkpoint(best), identity)
        rename(waiting, run.checkpoint(step))
        fsync_path(run.checkpoints)
    except OSError as error:
        raise StoreError(f"cannot write {run.checkpoint(step)}: {error}") from error
    finally:
        remove_tree(staging)


def _get(remote: Remote, name: str, final: Path, identity: dict[str, Any]) -> None:
    manifest = remote.manifest(name)
    if manifest:
        check_identity(identity, manifest.facts.get("identity", {}), f"{remote.url}/{name}")
    remote.get(name, final)


def fetch_result(store: Store, remote: Remote, run_name: str, key: str, log: Logger) -> bool:
    """Download the finished result of this very training, if another machine has uploaded it.

    Returns:
        whether it is in the store now.
    """
    name = final_name(run_name, key)
    if remote.manifest(name) is None:
        return False
    remote.get(name, store.path("train", key))
    log.info("fetched the result from %s/%s: nothing is trained", remote.url, name)
    return True


def have_result(store: Store, url: str | None, run_name: str, key: str, log: Logger) -> bool:
    """Whether the result of this training is in the store, by now: from the target if need be.

    Args:
        url: the spec's upload target, or None.
    """
    if store.find("train", key):
        return True
    return url is not None and fetch_result(store, Remote(url), run_name, key, log)


def need_result(store: Store, spec: RunSpec, key: str, log: Logger) -> None:
    """Have the result of a training of `spec` in the store.

    Raises:
        RunError: it is neither there nor at the target.
    """
    url = spec.upload.url
    if not have_result(store, url, spec.name, key, log):
        raise RunError(
            f"the result of run {spec.name} (training {key[:12]}) is neither in {store.home} nor "
            f"at {url or 'an upload target, since the spec has none'}: run `finetune` with the "
            "same spec first (what is there is not made again)"
        )


class Mirror:
    """Within its block, a thread copies each newest committed checkpoint to the lease's target.

    Args:
        lease: of the run's name; nothing is copied once it is lost.
        keep: checkpoints that stay at the target, besides the best ones that they know of; older
            ones go after a newer one is committed.
        log: safe to use from a thread.
    """

    def __init__(self, run: RunDir, lease: Lease, keep: int, log: Logger):
        self.run, self.lease, self.keep, self.log = run, lease, keep, log
        self.remote = lease.remote
        self._stop = threading.Event()
        # A run logger of Prefect's finds its API through context variables.
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._work,), name="ditty mirror", daemon=True
        )
        self._copied: int | None = None

    def __enter__(self) -> "Mirror":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Wait for the last copy; not long if a signal ends the run."""
        self._stop.set()
        leaving = error is not None and not isinstance(error, Exception)
        self._thread.join(LEAVING_SECONDS if leaving else None)

    def _work(self) -> None:
        wait, stopping = POLL_SECONDS, False
        while not stopping:
            stopping = self._stop.wait(wait)
            wait = POLL_SECONDS if self._copy_newest() else RETRY_SECONDS

    def _copy_newest(self) -> bool:
        """False: it has to be tried again."""
        steps = self.run.committed_steps()
        if not steps or steps[-1] == self._copied:
            return True
        step = steps[-1]
        try:
            self.lease.check()
            best = best_step(self.run.checkpoint(step))
            there = remote_checkpoints(self.remote, self.run.root.name)
            for step in (s for s in steps if s == steps[-1] or (s == best and s not in there)):
                self.remote.put(self.run.checkpoint(step), self._name(step, there))
                self.log.info("checkpoint of step %d copied to %s", step, self.remote.url)
            self._copied = step
            self._retire(best)
        except (DittyError, OSError) as error:
            if step not in self.run.committed_steps():
                # A newer one took its place while it was copied: no error, but half a copy.
                with suppress(DittyError, OSError):
                    self.remote.delete(self.lease.checkpoint_name(step_name(step)))
                return self._copy_newest()
            self.log.warning("checkpoint of step %d was not copied: %s", step, error)
            return False
        return True

    def _name(self, step: int, there: dict[int, str]) -> str:
        """Where this very checkpoint is already, under whatever epoch, or where it is to be."""
        manifest = self.remote.manifest(there[step]) if step in there else None
        if manifest and manifest.digest == read_manifest(self.run.checkpoint(step)).digest:
            return there[step]
        return self.lease.checkpoint_name(step_name(step))

    def _retire(self, best: int | None) -> None:
        """Remove the oldest beyond `keep`; `best` is that of the newest, which may be gone here.

        And what does not count, and what is left of a removal that was cut short. What a newer
        epoch makes, should we have lost the name just now, is let alone.
        """
        run_name = self.run.root.name
        there = remote_checkpoints(self.remote, run_name)
        kept = list(there)[-self.keep :]
        spared = {best, *kept, *(best_step(self.run.checkpoint(step)) for step in kept)}
        stay = {name for step, name in there.items() if step in spared}
        below = f"{run_name}/checkpoints"
        for name in (*self.remote.names(below), *self.remote.unfinished(below)):
            of_ours = _step(name) is not None and epoch_of(name) <= self.lease.claim.epoch
            if of_ours and name not in stay:
                self.remote.delete(name)
