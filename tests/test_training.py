"""The train task's policy, with a training process that does as the test says."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect import flow

from ditty.config.spec import RunSpec
from ditty.errors import Crashed, DittyError, OutOfMemory, Preempted, RunBusy, SpecError
from ditty.runs import lease
from ditty.runs.lease import take
from ditty.runs.rundir import Result, RunDir, Status, append_record
from ditty.stages.stageline import StageRef
from ditty.store.artifacts import Store, commit_dir
from ditty.store.remote import Remote
from flows import cancel, tasks, training
from flows.events import Event, EventState, listen
from flows.mirror import remote_checkpoints
from flows.training import Work

OK = Result(Status.OK, 10)
PREEMPTED = Result(Status.PREEMPTED, 3, "Preempted", "saved step 3", retryable=True)
STOPPED = Result(Status.PREEMPTED, 3, "Preempted", "by a stop file", retryable=False)
CRASHED = Result(Status.FAILED, 0, "Crashed", "left no result", retryable=True)
NO_MEMORY = Result(Status.FAILED, 0, "OutOfMemory", "does not fit", retryable=False)

Act = Callable[["Trainings"], Result]


class Trainings:
    """Stands in for `launch.run_stage`: each attempt does what the next act says."""

    def __init__(self, home: Path, url: str | None = None, retries: int = 3):
        launch = {"retries": retries, "retry_delay_seconds": 0, "device": "cpu"}
        values = {"name": "demo", "data": {"source": "x:y"}, "model": {"base_model": "m"}}
        self.spec = RunSpec.model_validate({**values, "launch": launch, "upload": {"url": url}})
        self.store = Store(home)
        self.run = RunDir.named("demo", home)
        self.ref = StageRef("train", "a" * 64, {"data": "d"}, "train")
        self.acts: list[Act | Result] = []
        self.attempts: list[Path] = []
        self.jobs: list[dict[str, Any]] = []

    def run_stage(
        self, stage: str, job: dict[str, Any], attempt: Path, launch: Any, **hooks: Any
    ) -> Result:
        assert stage == "train" and hooks["distributed"]
        self.attempts.append(attempt)
        self.jobs.append(job)
        self.on_line, self.check = hooks["on_line"], hooks["check"]
        act = self.acts.pop(0)
        result = act if isinstance(act, Result) else act(self)
        if result.status is Status.OK:
            with self.store.commit("train", self.ref.key, {"steps": result.step}) as out:
                (out / "adapter").write_text("weights")
        return result

    def save(self, step: int) -> None:
        with commit_dir(
            self.run.checkpoint(step), {"step": step, "identity": self.ref.inputs}
        ) as out:
            (out / "weights").write_text(str(step))

    def go(self, *acts: Act | Result) -> Any:
        self.acts = list(acts)
        call = tasks.Caller.of(self.spec, self.store)
        work = Work(self.spec, self.store, Path("/model"), Path("/data"))
        result = call.cached(tasks.train, self.ref, work)
        assert self.acts == []
        return result


@pytest.fixture
def trainings(prefect_api: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> Trainings:
    made = Trainings(home)
    monkeypatch.setattr(training.launch, "run_stage", lambda *a, **k: made.run_stage(*a, **k))
    return made


def saved_then(step: int, result: Result) -> Act:
    def act(trainings: Trainings) -> Result:
        trainings.save(step)
        return result

    return act


def test_a_passing_failure_is_tried_again_in_a_new_attempt(trainings: Trainings) -> None:
    reference = trainings.go(CRASHED, saved_then(3, PREEMPTED), OK)
    assert reference["key"] == trainings.ref.key
    assert [a.name for a in trainings.attempts] == ["0001", "0002", "0003"]
    assert trainings.jobs[0]["model_dir"] == "/model" and trainings.jobs[0]["key"] == "a" * 64


@pytest.mark.parametrize(
    ("result", "error"),
    [
        pytest.param(NO_MEMORY, OutOfMemory, marks=pytest.mark.fault("out of memory"), id="memory"),
        pytest.param(STOPPED, Preempted, id="stop"),
    ],
)
def test_a_lasting_failure_is_not(
    trainings: Trainings, result: Result, error: type[DittyError], figure: Callable[[str], None]
) -> None:
    with pytest.raises(error, match=result.message):
        trainings.go(result)
    assert len(trainings.attempts) == 1
    figure(f"{result.kind}: retries {len(trainings.attempts) - 1}")


def set_launch(trainings: Trainings, **values: float) -> None:
    launch = trainings.spec.launch.model_copy(update=values)
    trainings.spec = trainings.spec.model_copy(update={"launch": launch})


def test_retries_come_from_the_spec(trainings: Trainings) -> None:
    set_launch(trainings, retries=2)
    with pytest.raises(Preempted):
        trainings.go(PREEMPTED, PREEMPTED, PREEMPTED)
    set_launch(trainings, retries=0)
    with pytest.raises(Preempted):
        trainings.go(saved_then(3, PREEMPTED))


def test_a_new_checkpoint_restores_the_retries(trainings: Trainings) -> None:
    """A run that gets on between its faults is never given up, however many there are."""
    set_launch(trainings, retries=2)
    faults = [saved_then(step, CRASHED if step % 2 else PREEMPTED) for step in range(1, 6)]
    trainings.go(*faults, PREEMPTED, saved_then(6, CRASHED), OK)
    assert len(trainings.attempts) == 8


def test_only_what_does_not_get_on_waits(
    trainings: Trainings, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_launch(trainings, retries=3, retry_delay_seconds=10)
    waits: list[float] = []
    clock = SimpleNamespace(**{**vars(time), "sleep": waits.append})
    monkeypatch.setattr("prefect.task_engine.time", clock)
    later = [saved_then(4, CRASHED), PREEMPTED, PREEMPTED, OK]
    trainings.go(PREEMPTED, PREEMPTED, PREEMPTED, *later)
    assert [round(seconds) for seconds in waits] == [10, 20, 40, 10, 20]


@pytest.mark.fault("out of memory")
def test_two_crashes_without_a_checkpoint_between_them_stop_the_run(
    trainings: Trainings, figure: Callable[[str], None]
) -> None:
    with pytest.raises(Crashed, match="without getting past step 3"):
        trainings.go(CRASHED, saved_then(3, CRASHED), CRASHED)
    assert len(trainings.attempts) == 3
    figure("killed by the kernel: retries 1 from the same checkpoint")


def test_an_error_before_the_launch_is_no_crash(trainings: Trainings) -> None:
    def refuse(_: Trainings) -> Result:
        raise SpecError("no GPU")

    with pytest.raises(SpecError):
        trainings.go(refuse)
    trainings.go(CRASHED, OK)


def test_signals_pass_through(trainings: Trainings) -> None:
    def interrupt(_: Trainings) -> Result:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainings.go(interrupt)
    trainings.go(OK)  # the lock is free


def train_record(step: int) -> dict[str, Any]:
    speed = {"tokens_per_second": 1234.5, "seconds": 0.5}
    return {"kind": "train", "step": step, "total_steps": 10, "loss": 1.5, **speed}


def test_progress_is_told_to_listeners(trainings: Trainings) -> None:
    def act(trainings: Trainings) -> Result:
        append_record(trainings.run.metrics_file, train_record(4))
        trainings.check()
        append_record(trainings.run.metrics_file, {"kind": "eval", "step": 4, "loss": 1.4})
        trainings.check()
        return OK

    events: list[Event] = []
    with listen(events.append):
        trainings.go(act)
        trainings.go()
    progress = Event("train", EventState.PROGRESS, 4, 10, "loss 1.5000, 1,234 tokens/s")
    assert progress in events
    states = [e.state for e in events if e.state is not EventState.PROGRESS]
    expected = [EventState.STARTED, EventState.DONE, EventState.STARTED, EventState.CACHED]
    assert states == expected
    assert events[-1].message == "10 steps"


def test_failure_is_told_to_listeners(trainings: Trainings) -> None:
    events: list[Event] = []
    with listen(events.append), pytest.raises(OutOfMemory):
        trainings.go(NO_MEMORY)
    assert events[-1] == Event("train", EventState.FAILED, message="does not fit")


def test_checkpoints_go_to_the_target_and_come_back(
    trainings: Trainings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"file://{tmp_path}/target"
    Remote(url).check()
    trainings.spec = Trainings(trainings.store.home, url).spec
    with pytest.raises(Preempted):
        trainings.go(saved_then(3, STOPPED))
    assert list(remote_checkpoints(Remote(url), "demo")) == [3]

    def resumed(other: Trainings) -> Result:
        assert other.run.committed_steps() == [3]
        return OK

    other = Trainings(tmp_path / "another machine", url)
    monkeypatch.setattr(training.launch, "run_stage", lambda *a, **k: other.run_stage(*a, **k))
    other.go(resumed)


def test_a_run_that_another_machine_has_is_not_begun(trainings: Trainings, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/target"
    Remote(url).check()
    other = take(Remote(url), "demo", "other", "/home/other")
    trainings.spec = Trainings(trainings.store.home, url, retries=1).spec
    with pytest.raises(RunBusy, match="/home/other"):
        trainings.go()
    other.renew(seconds=0.0)
    trainings.go(OK)
    assert [a.name for a in trainings.attempts] == ["0001"], "the loser began something"


def test_a_training_ends_when_its_name_is_taken_over(
    trainings: Trainings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"file://{tmp_path}/target"
    Remote(url).check()
    trainings.spec = Trainings(trainings.store.home, url, retries=0).spec
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.0)  # as if it had slept for a minute
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)

    def robbed(trainings: Trainings) -> Result:
        trainings.check()
        monkeypatch.setattr(lease, "LEASE_SECONDS", 60.0)
        take(Remote(url), "demo", "other", "/home/other")
        trainings.save(3)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            trainings.check()
            time.sleep(0.02)
        return OK

    with pytest.raises(RunBusy, match="was taken over by .*/home/other"):
        trainings.go(robbed)
    assert Remote(url).names() == []


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(training, "REPORT_SECONDS", 0.1)
    monkeypatch.setattr(cancel, "CANCEL_SECONDS", 0.3)
    yield


@pytest.mark.fault("cancelled")
def test_a_cancel_that_no_runner_carries_out_stops_training(
    trainings: Trainings, impatient: None, figure: Callable[[str], None]
) -> None:
    from prefect.client.orchestration import get_client
    from prefect.runtime import flow_run
    from prefect.states import Cancelling

    def act(trainings: Trainings) -> Result:
        append_record(trainings.run.metrics_file, train_record(1))
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(flow_run.id, Cancelling(), force=True)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            trainings.check()
            time.sleep(0.05)
        return OK

    @flow
    def cancelled() -> Any:
        try:
            return trainings.go(act)
        except training.CancelRequested:
            return "stopped"

    assert cancelled() == "stopped"
    assert len(trainings.attempts) == 1
    figure("without a runner: the flow sees it and ends its attempt")


def test_logs_and_progress_reach_the_api(trainings: Trainings, impatient: None) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
    from prefect.runtime import flow_run

    def act(trainings: Trainings) -> Result:
        trainings.on_line("WARNING ditty.training.checkpoint: set aside")
        trainings.on_line("INFO ditty.training.trainer: step 1/10 loss 1.5")
        append_record(trainings.run.metrics_file, train_record(4))
        trainings.check()
        time.sleep(0.3)
        append_record(trainings.run.metrics_file, train_record(5))
        trainings.check()
        return OK

    @flow
    def logged() -> Any:
        trainings.go(act)
        return flow_run.id

    run_id = logged()
    with get_client(sync_client=True) as client:
        only = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run_id]))
        end = time.monotonic() + 20
        while time.monotonic() < end:
            logs = {log.message: log.level for log in client.read_logs(only)}
            artifacts = [a for a in client.read_artifacts() if a.key == "train-demo"]
            shown = any(a.data == 50.0 for a in artifacts)  # maybe after the flow has left
            if shown and "set aside" in logs and any(m.startswith("step 5/10") for m in logs):
                break
            time.sleep(0.1)
    assert logs["set aside"] == 30
    assert "step 5/10: loss 1.5000, 1,234 tokens/s" in logs
    assert not [message for message in logs if message.startswith("step 1/10 loss")]
    assert [(a.data, a.description) for a in artifacts if str(a.flow_run_id) == run_id] == [
        (50.0, "step 5/10: loss 1.5000, 1,234 tokens/s, about 2 s left")
    ]
