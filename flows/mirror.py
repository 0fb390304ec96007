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

from ditty.artifacts import Store, staging_dir
from ditty.errors import ArtifactDamaged, DittyError, StoreError
from ditty.files import GLANCE_SECONDS, fsync_path, remove_tree, rename
from ditty.identity import check_identity
from ditty.remote import Remote, final_name
from ditty.rundir import STEP_NAME, RunDir, best_step, step_name

POLL_SECONDS = 2.0
RETRY_SECONDS = 30.0
LEAVING_SECONDS = 8.0  # for the last copy when a signal ends the run: 30 s are all there is

Logger = logging.Logger | logging.LoggerAdapter[Any]


def remote_name(run_name: str, step: int) -> str:
    """Where the checkpoint of `step` stands below the target's url."""
    return f"{run_name}/checkpoints/{step_name(step)}"


def remote_steps(remote: Remote, run_name: str) -> list[int]:
    """Steps with a committed checkpoint at the target, ascending."""
    names = [n.rpartition("/")[2] for n in remote.names(f"{run_name}/checkpoints")]
    return sorted(int(match[1]) for n in names if (match := STEP_NAME.fullmatch(n)))


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
    newer = [s for s in remote_steps(remote, run.root.name) if not local or s > local[-1]]
    lock = run.training_lock()
    if not newer or not lock.acquire(GLANCE_SECONDS):
        return None
    try:
        problem: ArtifactDamaged | None = None
        for step in reversed(newer):
            try:
                _fetch(run, remote, step, identity)
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


def _fetch(run: RunDir, remote: Remote, step: int, identity: dict[str, Any]) -> None:
    """Commit the checkpoint of `step` here, after the best one that it knows of.

    It waits in a staging directory, since its content tells which one that is.
    """
    there = remote_steps(remote, run.root.name)
    staging = staging_dir(run.checkpoint(step))
    waiting = staging / step_name(step)
    try:
        _get(remote, remote_name(run.root.name, step), waiting, identity)
        best = best_step(waiting)
        if best is not None and best != step and best in there:
            _get(remote, remote_name(run.root.name, best), run.checkpoint(best), identity)
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


class Mirror:
    """Within its block, a thread copies each newest committed checkpoint to the target.

    Args:
        keep: checkpoints that stay at the target, besides the best ones that they know of; older
            ones go after a newer one is committed.
        log: safe to use from a thread.
    """

    def __init__(self, run: RunDir, remote: Remote, keep: int, log: Logger):
        self.run, self.remote, self.keep, self.log = run, remote, keep, log
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
        step, run_name = steps[-1], self.run.root.name
        try:
            best = best_step(self.run.checkpoint(step))
            there = remote_steps(self.remote, run_name)
            for step in (s for s in steps if s == steps[-1] or (s == best and s not in there)):
                self.remote.put(self.run.checkpoint(step), remote_name(run_name, step))
                self.log.info("checkpoint of step %d copied to %s", step, self.remote.url)
            self._copied = step
            self._retire(best)
        except (DittyError, OSError) as error:
            if step not in self.run.committed_steps():
                # A newer one took its place while it was copied: no error, but half a copy.
                with suppress(DittyError, OSError):
                    self.remote.delete(remote_name(run_name, step))
                return self._copy_newest()
            self.log.warning("checkpoint of step %d was not copied: %s", step, error)
            return False
        return True

    def _retire(self, best: int | None) -> None:
        """Remove the oldest beyond `keep`; `best` is that of the newest, which may be gone here.

        And what is left of one whose removal was cut short.
        """
        run_name = self.run.root.name
        steps = remote_steps(self.remote, run_name)
        spared = {best, *(best_step(self.run.checkpoint(step)) for step in steps[-self.keep :])}
        for step in steps[: -self.keep]:
            if step not in spared:
                self.remote.delete(remote_name(run_name, step))
        for name in self.remote.unfinished(f"{run_name}/checkpoints"):
            if name < remote_name(run_name, steps[0]):
                self.remote.delete(name)
