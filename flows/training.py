"""The policy of training: attempts, retries, what is reported meanwhile, and when to give up."""

import contextvars
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.context import FlowRunContext
from prefect.logging import get_run_logger

from ditty import launch
from ditty.artifacts import Store
from ditty.environment import resolve_device
from ditty.errors import Crashed, RunError
from ditty.files import read_json, write_json
from ditty.remote import Remote
from ditty.rundir import RunDir
from ditty.spec import RunSpec
from ditty.stages import StageRef
from flows.mirror import Logger, Mirror, fetch_newer, fetch_result
from flows.progress import Event, EventState, emit
from flows.watch import MetricsTail, StallWatch, level_of

REPORT_SECONDS = 10.0
# A cancel that the runner carries out is a SIGTERM within 12 s. After this, there is no runner.
CANCEL_SECONDS = 20.0

CRASH_FILE = "crashed.json"


class CancelRequested(RunError):
    """The flow run was cancelled, and no runner was there to stop it."""


@dataclass(frozen=True)
class Work:
    """Where a stage reads and writes.

    Attributes:
        model_dir: the base model: a folder, or a .gguf file for `fetch`.
        data_dir: the packed rows; None for the stages of the model.
    """

    spec: RunSpec
    store: Store
    model_dir: Path
    data_dir: Path | None = None

    @property
    def run(self) -> RunDir:
        """The run's directory."""
        return RunDir.named(self.spec.name, self.store.home)

    def job(self, ref: StageRef) -> dict[str, Any]:
        """What `ditty.worker` is to do, as JSON."""
        return {
            "home": str(self.store.home),
            "spec": self.spec.model_dump(mode="json"),
            "key": ref.key,
            "inputs": ref.inputs,
            "model_dir": str(self.model_dir),
            "data_dir": str(self.data_dir) if self.data_dir else None,
            "device": str(resolve_device(self.spec.launch)),
        }


def run_attempt(ref: StageRef, work: Work) -> None:
    """One attempt at training; returns when `store/train/<key>` is committed.

    Raises:
        DittyError: what it ended with; `retryable` says whether another attempt makes sense.
    """
    log = get_run_logger()
    run, spec = work.run, work.spec
    with ExitStack() as stack:
        if spec.upload.url and fetch_result(
            work.store, Remote(spec.upload.url), spec.name, ref.key, log
        ):
            return
        if spec.upload.url and spec.upload.checkpoints:
            remote = Remote(spec.upload.url)
            fetch_newer(run, remote, ref.inputs, log)
            stack.enter_context(Mirror(run, remote, spec.train.keep_checkpoints, log))
        attempt = run.new_attempt("train")
        reporter = Reporter(ref.title, run, attempt, log)
        stack.enter_context(reporter.in_background())
        try:
            result = launch.run_stage(
                "train",
                work.job(ref),
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


def judge_crash(error: Crashed, attempt: Path, run: RunDir) -> None:
    """Record a crash; this machine's second one since the last checkpoint is not retried."""
    step = max(run.committed_steps(), default=0)
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


def passing(task: Any, task_run: Any, state: Any) -> bool:
    """Prefect's `retry_condition_fn`: could an identical attempt succeed?"""
    return getattr(state.result(raise_on_failure=False), "retryable", False)


def retry_delays(spec: RunSpec) -> list[float]:
    """Seconds before each retry, doubling; Prefect repeats the last one."""
    return [spec.launch.retry_delay_seconds * 2**n for n in range(min(spec.launch.retries, 10))]


class Reporter:
    """Turns what a training process leaves in files into logs, events and a progress artifact."""

    def __init__(self, title: str, run: RunDir, attempt: Path, log: Logger):
        self.title, self.run, self.log = title, run, log
        self.metrics = MetricsTail(run.metrics_file)
        self.stall = StallWatch(attempt / "heartbeat")
        self.step, self.total, self.message = 0, 0, ""
        self.cancelled = threading.Event()
        self._logged = time.monotonic()

    def on_line(self, line: str) -> None:
        """A line of the worker's output."""
        level, message = level_of(line)
        self.log.log(level, "%s", message)

    def check(self) -> None:
        """Called once a second.

        Raises:
            CancelRequested: see there.
            Crashed: a rank hangs.
        """
        if self.cancelled.is_set():
            raise CancelRequested("the flow run was cancelled while nothing else could stop it")
        self.stall.check()
        steps = [r for r in self.metrics.read() if r["kind"] == "train"]
        if steps:
            self._take(steps)
            emit(Event(self.title, EventState.PROGRESS, self.step, self.total, self.message))
        if self.total and time.monotonic() >= self._logged + REPORT_SECONDS:
            self.log.info("step %d/%d: %s", self.step, self.total, self.message)
            self._logged = time.monotonic()

    def _take(self, steps: list[dict[str, Any]]) -> None:
        last = steps[-1]
        self.step, self.total = last["step"], last["total_steps"]
        self.message = f"loss {last['loss']:.4f}, {last['tokens_per_second']:,.0f} tokens/s"
        slowest = max(step["seconds"] for step in steps)
        self.stall.slowest_step = max(self.stall.slowest_step, slowest)

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
        finally:
            done.set()
            thread.join(REPORT_SECONDS)

    def _talk(self, done: threading.Event) -> None:
        artifact, cancelling_since = None, None
        finished = False
        while not finished:
            finished = done.wait(REPORT_SECONDS)
            with suppress(Exception):  # the API is away: the next round says it all
                artifact = self._show(artifact)
                if not is_cancelling():
                    cancelling_since = None
                elif cancelling_since is None:
                    cancelling_since = time.monotonic()
                elif time.monotonic() >= cancelling_since + CANCEL_SECONDS:
                    self.cancelled.set()

    def _show(self, artifact: Any) -> Any:
        if not self.total:
            return artifact
        percent = 100 * self.step / self.total
        text = f"step {self.step}/{self.total}: {self.message}"
        if artifact is None:
            key = "train-" + "".join(c if c.isalnum() else "-" for c in self.run.root.name)
            return create_progress_artifact(percent, key, text)
        update_progress_artifact(artifact, percent, text)
        return artifact


def is_cancelling() -> bool:
    """Does the API want the current flow run to end?"""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return False
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(context.flow_run.id).state
    return state is not None and state.type in (StateType.CANCELLING, StateType.CANCELLED)
