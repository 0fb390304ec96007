"""How far runs are, read from their directories."""

from dataclasses import dataclass
from pathlib import Path

from ditty.artifacts import Store
from ditty.errors import RunError
from ditty.rundir import RunDir, Status, read_result


@dataclass(frozen=True)
class RunStatus:
    """One run as its directory tells.

    Attributes:
        state: "training", or how the last attempt ended: ok, preempted, failed, crashed; "new"
            where training has not been started.
        loss, eval_loss: the newest.
        checkpoints: committed steps.
        message: of the last attempt's end.
    """

    name: str
    state: str
    step: int
    total_steps: int
    loss: float | None
    eval_loss: float | None
    checkpoints: list[int]
    directory: Path
    message: str = ""


def run_status(name: str, store: Store) -> RunStatus:
    """The status of one run.

    Raises:
        RunError: there is no such run; names those there are.
    """
    run = RunDir.named(name, store.home)
    if not run.root.is_dir():
        names = ", ".join(r.name for r in list_runs(store)) or "none"
        raise RunError(f"there is no run {name} in {store.home}; runs there: {names}")
    records = list(run.metrics())
    steps = [r for r in records if r["kind"] == "train"]
    losses = [r["loss"] for r in records if r["kind"] == "eval"]
    state, message = _state(run)
    return RunStatus(
        name=name,
        state=state,
        step=steps[-1]["step"] if steps else 0,
        total_steps=steps[-1]["total_steps"] if steps else 0,
        loss=steps[-1]["loss"] if steps else None,
        eval_loss=losses[-1] if losses else None,
        checkpoints=run.committed_steps(),
        directory=run.root,
        message=message,
    )


def _state(run: RunDir) -> tuple[str, str]:
    attempts = run.attempts("train")
    if not attempts:
        return "new", ""
    lock = run.training_lock()
    if lock.acquire(timeout=0):
        lock.release()
    else:
        return "training", ""
    result = read_result(attempts[-1])
    if result is None:
        return "crashed", f"the log is {attempts[-1] / 'log.txt'}"
    word = {Status.OK: "ok", Status.PREEMPTED: "preempted", Status.FAILED: "failed"}
    return word[result.status], result.message


def list_runs(store: Store) -> list[RunStatus]:
    """All runs of a store, by name."""
    folder = store.home / "runs"
    if not folder.is_dir():
        return []
    names = sorted(p.name for p in folder.iterdir() if p.is_dir())
    return [run_status(name, store) for name in names]
