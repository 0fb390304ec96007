"""The policy of training: attempts, what is reported meanwhile, and when to give up."""

import contextvars
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger

from ditty.config.spec import RunSpec
from ditty.errors import Crashed
from ditty.planning.fit import fitted
from ditty.processes import launch
from ditty.processes.environment import resolve_device
from ditty.runs.lease import Lease, hold
from ditty.runs.rundir import CRASH_FILE, RunDir
from ditty.runs.tail import RecordTail
from ditty.runs.timeleft import RECENT_STEPS, duration, seconds_left
from ditty.stages.stageline import StageRef
from ditty.store.artifacts import Store
from ditty.store.files import read_json, write_json
from ditty.store.remote import Remote
from flows.cancel import CancelRequested, CancelWatch
from flows.events import Event, EventState, emit
from flows.mirror import Logger, Mirror, fetch_newer, fetch_result
from flows.pages.publish import LiveReport
from flows.pages.report import artifact_key
from flows.serving.automations import STALLED, tell
from flows.watch import StallWatch, level_of

REPORT_SECONDS = 10.0
LEAVING_SECONDS = 10.0  # for the last report; the API answers in 0.1 s, drawing takes a second


@dataclass(frozen=True)
class Work:
    """Where a stage reads and writes.

    Attributes:
        model_dir: the base model: a folder, or a .gguf file for `fetch`.
        data_dir: the packed rows; None for the stages of the model.
        trained_dir: a training's result, for `evaluate` and `merge`.
    """

    spec: RunSpec
    store: Store
    model_dir: Path
    data_dir: Path | None = None
    trained_dir: Path | None = None

    @property
    def run(self) -> RunDir:
        """The run's directory."""
        return RunDir.named(self.spec.name, self.store.home)

    def of_result(self, trained: str | None) -> "Work":
        """The same, for the result of the training of that key."""
        folder = self.store.path("train", trained) if trained else None
        return replace(self, trained_dir=folder)

    def job(self, ref: StageRef) -> dict[str, Any]:
        """What `ditty.worker` is to do, as JSON."""
        return {
            "home": str(self.store.home),
            "spec": self.spec.model_dump(mode="json"),
            "key": ref.key,
            "inputs": ref.inputs,
            "model_dir": str(self.model_dir),
            "data_dir": str(self.data_dir) if self.data_dir else None,
            "trained_dir": str(self.trained_dir) if self.trained_dir else None,
            "device": str(resolve_device(self.spec.launch)),
        }


def run_attempt(ref: StageRef, work: Work) -> None:
    """One attempt at training; returns when `store/train/<key>` is committed.

    Raises:
        DittyError: what it ended with; `retryable` says whether another attempt makes sense.
    """
    log = get_run_logger()
    run, spec = work.run, work.spec
    chosen, why = fitted(spec, work.model_dir)
    for line in why:
        log.info("%s", line)
    with ExitStack() as stack:
        if spec.upload.url and fetch_result(
            work.store, Remote(spec.upload.url), spec.name, ref.key, log
        ):
            return
        lease = _held(work, stack)
        if lease and spec.upload.checkpoints:
            fetch_newer(run, lease.remote, ref.inputs, log)
            stack.enter_context(Mirror(run, lease, spec.train.keep_checkpoints, log))
        attempt = launch.open_attempt(run, "train", spec.launch)
        reporter = Reporter(ref.title, work, attempt, log, lease)
        stack.enter_context(reporter.in_background())
        try:
            result = launch.run_stage(
                "train",
                replace(work, spec=chosen).job(ref),
                attempt,
                spec.launch,
                distributed=True,
                on_line=reporter.on_line,
                check=reporter.check,
            )
            launch.raise_for_result(result)
        except Crashed as error:
            judge_crash(error, attempt, run)
            raise


def _held(work: Work, stack: ExitStack) -> Lease | None:
    """The run's name at its target, held until `stack` ends; None: no target, or not by us."""
    url = work.spec.upload.url
    return stack.enter_context(hold(work.run, Remote(url))) if url else None


def judge_crash(error: Crashed, attempt: Path, run: RunDir) -> None:
    """Record a crash; this machine's second one since the last checkpoint is not retried."""
    step = run.newest_step()
    machine = (read_json(attempt / "launch.json") or {}).get("machine_rank", 0)
    crashes = [read_json(a / CRASH_FILE) for a in run.attempts(attempt.parent.name)]
    crash = {"step": step, "machine_rank": machine}
    write_json(attempt / CRASH_FILE, crash)
    if crash in crashes:
        error.retryable = False
        error.args = (
            f"{error}\nIt crashed before without getting past step {step}, the last checkpoint: "
            "not tried again. If the machine ran out of memory, lower train.micro_batch_size",
        )


class Reporter:
    """Turns what a training process leaves in files into logs, events, progress and a report."""

    def __init__(
        self, title: str, work: Work, attempt: Path, log: Logger, lease: Lease | None = None
    ):
        self.title, self.run, self.log, self.lease = title, work.run, log, lease
        self.report = LiveReport(self.run, work.data_dir, work.spec.upload.url, log)
        self.state = "training"
        self.recent: deque[float] = deque(maxlen=RECENT_STEPS)  # seconds a step
        self.metrics = RecordTail(self.run.metrics_file, at_end=True)
        self.stall = StallWatch(attempt / "heartbeat")
        self.step, self.total, self.message = 0, 0, ""
        self.cancelled: CancelRequested | None = None
        self._logged = time.monotonic()

    def on_line(self, line: str) -> None:
        """A line of the worker's output."""
        level, message = level_of(line)
        self.log.log(level, "%s", message)

    def check(self) -> None:
        """Called once a second.

        Raises:
            CancelRequested: see there.
            RunBusy: the run's name was taken over: what is trained here counts nowhere.
            Crashed: a rank hangs.
        """
        if self.cancelled:
            raise self.cancelled
        if self.lease and self.lease.lost:
            raise self.lease.lost
        try:
            self.stall.check()
        except Crashed as error:
            tell(STALLED, self.run.root.name, str(error))
            raise
        if self._read():
            emit(Event(self.title, EventState.PROGRESS, self.step, self.total, self.message))
        if self.total and time.monotonic() >= self._logged + REPORT_SECONDS:
            self.log.info("step %d/%d: %s", self.step, self.total, self.message)
            self._logged = time.monotonic()

    def _read(self) -> bool:
        """Take the new steps; were there any?"""
        steps = [r for r in self.metrics.read() if r["kind"] == "train"]
        if not steps:
            return False
        last = steps[-1]
        self.step, self.total = last["step"], last["total_steps"]
        self.message = f"loss {last['loss']:.4f}, {last['tokens_per_second']:,.0f} tokens/s"
        self.recent.extend(step["seconds"] for step in steps)
        slowest = max(step["seconds"] for step in steps)
        self.stall.slowest_step = max(self.stall.slowest_step, slowest)
        return True

    @contextmanager
    def in_background(self) -> Iterator[None]:
        """Within the block a thread talks to Prefect's API: an outage there delays nothing here."""
        done = threading.Event()
        # Prefect keeps settings and the current run in context variables.
        context = contextvars.copy_context()
        thread = threading.Thread(
            target=context.run, args=(self._talk, done), name="ditty reporter", daemon=True
        )
        thread.start()
        try:
            yield
            self.state = "done"
        except BaseException as error:
            self.state = f"ended with {type(error).__name__}" + (f": {error}" if str(error) else "")
            raise
        finally:
            done.set()
            thread.join(LEAVING_SECONDS)

    def _talk(self, done: threading.Event) -> None:
        artifact, cancel = None, CancelWatch()
        finished = False
        while not finished:
            finished = done.wait(REPORT_SECONDS)
            with suppress(Exception):  # the API is away: the next round says it all
                if finished:
                    self._read()  # nobody calls `check` any more
                artifact = self._show(artifact)
                try:
                    cancel.check()
                except CancelRequested as error:
                    self.cancelled = error
            with suppress(Exception):
                self.report.refresh(self.state, last=finished)

    def _show(self, artifact: Any) -> Any:
        if not self.total:
            return artifact
        percent = 100 * self.step / self.total
        text = f"step {self.step}/{self.total}: {self.message}"
        if left := seconds_left(self.step, self.total, list(self.recent)):
            text += f", about {duration(left)} left"
        if artifact is None:
            key = artifact_key("train", self.run.root.name)
            return create_progress_artifact(percent, key, text)
        update_progress_artifact(artifact, percent, text)
        return artifact
