"""How far runs are, read from their directories."""

import difflib
import math
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditty.config.spec import RunSpec
from ditty.config.specfile import parse_spec
from ditty.errors import RunError
from ditty.runs.rundir import CRASH_FILE, RunDir, Status, read_result
from ditty.runs.tail import RecordTail
from ditty.runs.timeleft import RECENT_STEPS, seconds_left
from ditty.store.artifacts import Store
from ditty.store.files import read_json


@dataclass(frozen=True)
class RunStatus:
    """One run as its directory tells.

    Attributes:
        state: "training"; "starting" where a flow has begun an attempt that does not train yet; or
            how the last attempt ended: ok, preempted, failed, crashed; "new" where training has
            not been started.
        alive: a flow of it, or its training, is there; more may come.
        step, loss, eval_loss: the newest.
        tokens_per_second, seconds_left: by the recent steps, while training; else None.
        checkpoints: committed steps.
        message: of the last attempt's end.
    """

    name: str
    state: str
    alive: bool
    step: int
    total_steps: int
    loss: float | None
    eval_loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    checkpoints: list[int]
    directory: Path
    message: str = ""


class Runs:
    """One run of a store, or all of them by name; each `read` takes only what is new.

    Raises:
        RunError: there is no run `name`; names those there are.
    """

    def __init__(self, store: Store, name: str | None = None):
        self.store, self.name = store, name
        self._readers: dict[str, _Reader] = {}
        if name:
            find_run(store, name)

    def read(self) -> list[RunStatus]:
        """How far they are now."""
        names = [self.name] if self.name else run_names(self.store)
        self._readers = {
            name: self._readers.get(name) or _Reader(RunDir.named(name, self.store.home))
            for name in names
        }
        return [reader.read() for reader in self._readers.values()]


def run_names(store: Store) -> list[str]:
    """The names of a store's runs, sorted."""
    folder = store.home / "runs"
    return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


def find_run(store: Store, name: str) -> RunDir:
    """The directory of a run that is there.

    Raises:
        RunError: there is no such run; names the nearest, or those there are.
    """
    run = RunDir.named(name, store.home)
    if not run.root.is_dir():
        names = run_names(store)
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"runs there: {', '.join(names) or 'none'}."
        raise RunError(
            f"there is no run {name} in {store.home} (DITTY_HOME); {hint} Start one with "
            "`ditty run SPEC`, or set DITTY_HOME to where it ran"
        )
    return run


@dataclass(frozen=True)
class Trained:
    """The newest finished training of a run.

    Attributes:
        spec: what was trained.
        key: its content key; its artifact may be elsewhere.
        failed_gates: why it may not leave this machine; see `flows.measure`.
    """

    spec: RunSpec
    key: str
    failed_gates: tuple[str, ...]


def find_trained(store: Store, name: str) -> Trained:
    """What a run's directory says of its newest finished training.

    Raises:
        RunError: there is no such run, or it has not finished a training.
        SpecError: what it says is no spec of this ditty.
    """
    path = find_run(store, name).trained_file
    found = read_json(path)
    if found is None:
        raise RunError(
            f"run {name} has no result yet: its training has not finished (`ditty status {name}`). "
            "Run its spec again: it goes on where it was"
        )
    spec = parse_spec(found["spec"], where=str(path))
    return Trained(spec, found["train"], tuple(found.get("failed_gates", ())))


class _Reader:
    """One run; keeps of its metrics what a status shows."""

    def __init__(self, run: RunDir):
        self.run = run
        self._metrics = RecordTail(run.metrics_file)
        self._last: dict[str, Any] = {}
        self._eval_loss: float | None = None
        self._recent: deque[dict[str, Any]] = deque(maxlen=RECENT_STEPS)

    def read(self) -> RunStatus:
        # First: what is not alive by now has written all that it will.
        has_flow, training = self.run.has_flow(), self.run.is_training()
        self._read_metrics()
        state, message = _state(self.run, has_flow, training)
        step, total = self._last.get("step", 0), self._last.get("total_steps", 0)
        seconds, speeds = self._known("seconds"), self._known("tokens_per_second")
        return RunStatus(
            name=self.run.root.name,
            state=state,
            alive=has_flow or training,
            step=step,
            total_steps=total,
            loss=self._last.get("loss"),
            eval_loss=self._eval_loss,
            tokens_per_second=statistics.median(speeds) if training and speeds else None,
            seconds_left=seconds_left(step, total, seconds) if training else None,
            checkpoints=self.run.committed_steps(),
            directory=self.run.root,
            message=message,
        )

    def _read_metrics(self) -> None:
        for record in self._metrics.read():
            if record["kind"] == "eval":
                self._eval_loss = record["loss"]
            elif record["kind"] == "train":
                if record["step"] <= self._last.get("step", 0):
                    self._recent.clear()  # resumed, maybe on another machine
                self._last = record
                self._recent.append(record)

    def _known(self, name: str) -> list[float]:
        return [r[name] for r in self._recent if math.isfinite(r.get(name, math.nan))]


def _state(run: RunDir, has_flow: bool, training: bool) -> tuple[str, str]:
    attempts = run.attempts("train")
    if training:
        return "training", ""
    if not attempts:
        return "new", ""
    newest = attempts[-1]
    result = read_result(newest)
    if result is None:
        # The first heartbeat follows the training lock.
        begun = (newest / "heartbeat").exists() or (newest / CRASH_FILE).exists()
        if has_flow and not begun:
            return "starting", ""
        return "crashed", f"the log is {newest / 'log.txt'}"
    word = {Status.OK: "ok", Status.PREEMPTED: "preempted", Status.FAILED: "failed"}
    return word[result.status], result.message
