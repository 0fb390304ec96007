"""The flow from rows to an uploaded adapter: terminated, resumed, and then cached throughout."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from ditty.config.spec import RunSpec
from ditty.errors import Cancelled, DataError, RunError, RunMismatch
from ditty.planning import preflight
from ditty.runs.rundir import RunDir, Status, read_result
from ditty.stages import datastages, stageline
from ditty.store.artifacts import Store, verify
from ditty.store.files import read_json
from flows import line, tasks
from flows.cancel import CancelRequested
from flows.commands import cli
from flows.events import Event, EventState, listen
from flows.finetune import finetune
from tests.processes import Holder, start_flow
from tests.served import tiny_spec

ROOT = Path(__file__).parent.parent
STEPS = 40


@pytest.fixture
def spec(tmp_path: Path) -> RunSpec:
    values = tiny_spec(tmp_path, "demo", STEPS)
    values["train"] |= {"save_steps": 1000, "report_to": ["tensorboard"]}
    values["launch"] = {"device": "cpu", "threads": 1, "retry_delay_seconds": 0}
    return RunSpec.model_validate(values)


def states(spec: RunSpec) -> dict[str, EventState]:
    """Run the flow here; the last state of each stage."""
    events: list[Event] = []
    with listen(events.append):
        finetune(spec)
    return {event.stage: event.state for event in events}


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.fault("sigterm")
@pytest.mark.fault("cancelled")
def test_terminated_resumed_cached(
    spec: RunSpec, home: Path, prefect_api: str, figure: Callable[[str], None]
) -> None:
    run = RunDir.named("demo", home)
    child = start_flow(spec, home, prefect_api)
    while not any(r["step"] >= 2 for r in run.metrics()):
        assert child.poll() is None, "it ended before it trained"
        time.sleep(0.05)
    assert run.has_flow() and run.is_training()
    below = psutil.Process(child.pid).children(recursive=True)
    child.send_signal(signal.SIGTERM)
    assert child.wait() == -signal.SIGTERM
    assert not psutil.wait_procs(below, timeout=10)[1], "processes outlive the flow"
    assert not run.is_alive()
    (stopped,) = run.attempts("train")
    result = read_result(stopped)
    assert result and result.status is Status.PREEMPTED
    (saved,) = run.committed_steps()
    assert 2 <= saved < STEPS
    lost = max(record["step"] for record in run.metrics()) - saved
    figure(f"grace {spec.launch.grace_seconds:g} s: steps lost {lost}", "sigterm")
    figure("by SIGTERM, as a runner does it: processes left 0, last step saved", "cancelled")
    assert lost == 0 and result.step == saved

    upload = f"upload to {spec.upload.url}"
    assert states(spec) == {
        "load rows.jsonl": EventState.CACHED,
        "tokenize": EventState.CACHED,
        "pack": EventState.CACHED,
        "train": EventState.DONE,
        upload: EventState.DONE,
    }
    log = (run.attempts("train")[1] / "log.txt").read_text()
    assert f"training from step {saved} to {STEPS}" in log
    assert "| load rows.jsonl |" in run.data_file.read_text()
    assert json.loads(run.spec_file.read_text()) == spec.model_dump(mode="json")
    check_tensorboard(run)

    again = states(RunSpec.model_validate(spec.model_dump()))
    assert set(again.values()) == {EventState.CACHED}
    trained = next((home / "store" / "train").glob("[0-9a-f]*"))
    target = Path(spec.upload.url.removeprefix("file://")) / "demo" / "final" / trained.name
    assert verify(target).digest == verify(trained).digest

    dumped = spec.model_dump(mode="json")
    word = {"train": trained.name, "spec": dumped, "failed_gates": []}
    assert read_json(run.trained_file) == word

    shutil.rmtree(target)
    third = states(spec)
    assert third[upload] is EventState.DONE, "the receipt of an upload that is gone was believed"
    assert verify(target).digest == verify(trained).digest


def check_tensorboard(run: RunDir) -> None:
    """Both attempts told it one run, whose result it knows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (run.root / "trackers/tensorboard").iterdir()
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    told = {event.step: event.value for event in read.Scalars("train/loss")}
    losses = {r["step"]: r["loss"] for r in run.metrics() if r["kind"] == "train"}
    assert told == pytest.approx(losses, rel=1e-6) and len(read.Scalars("train/loss")) == STEPS
    assert {event.step for event in read.Scalars("eval/loss")} == {0, STEPS}
    lineage = read.Tensors("lineage/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert '"kind": "train"' in lineage and '"kind": "pack"' in lineage
    assert read.Images("losses")


def test_a_stop_meant_for_an_earlier_run_is_forgotten(
    spec: RunSpec, home: Path, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir.named("demo", home)
    run.root.mkdir(parents=True)
    run.stop_file.touch()

    def attempt(ref: Any, work: Any) -> None:
        assert not run.stop_file.exists()
        raise RunError("far enough")

    monkeypatch.setattr(tasks, "run_attempt", attempt)
    with pytest.raises(RunError, match="far enough"):
        finetune(spec.model_dump())  # as a deployment calls it
    assert not Store(home).path("train", "").exists()


def test_made_rows_are_held_to_the_threshold_of_now(spec: RunSpec, prefect_api: str) -> None:
    rows = Path(spec.data.source)
    rows.write_text(rows.read_text() + '{"text":\n')
    with pytest.raises(DataError, match=r"rows.jsonl: 1 of .* x not JSON, at line"):
        finetune(with_threshold(spec, 0.0))
    prepare_only(with_threshold(spec, 0.5))
    with pytest.raises(DataError, match=r"load rows.jsonl: 1 of .* rows .*/quarantine.jsonl"):
        finetune(with_threshold(spec, 0.0))


def test_a_mended_spec_takes_the_place_of_one_that_never_trained(
    spec: RunSpec, home: Path, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store = RunDir.named("demo", home), Store(home)
    wrong = spec.model_copy(
        update={"data": spec.data.model_copy(update={"columns": {"messages": "m"}})}
    )
    with pytest.raises(DataError, match="data.columns maps messages to 'm'"):
        finetune(wrong)
    assert json.loads(run.spec_file.read_text())["data"]["columns"] == {"messages": "m"}
    trains = []

    def attempt(ref: Any, work: Any) -> None:
        trains.append(work.run.new_attempt("train"))
        raise RunError("far enough")

    monkeypatch.setattr(tasks, "run_attempt", attempt)
    with pytest.raises(RunError, match="far enough"):
        finetune(spec)
    assert len(trains) == 1 and saved(run) == spec.model_dump(mode="json")
    for refused in (preflight.check_run, lambda s, _: line.begin(s, run)):
        with pytest.raises(RunMismatch, match="data.columns was {}, now {'messages': 'm'}"):
            refused(wrong, store)
    assert saved(run) == spec.model_dump(mode="json")


def test_a_spec_that_a_living_flow_works_by_stays(spec: RunSpec, home: Path) -> None:
    run = RunDir.named("demo", home)
    line.begin(spec, run)
    other = spec.model_copy(update={"data": spec.data.model_copy(update={"seq_len": 32})})
    with Holder(run.flow_lock, shared=True) as flow:
        for refused in (preflight.check_run, lambda s, _: line.begin(s, run)):
            with pytest.raises(RunMismatch, match="data.seq_len was .*, now 32"):
                refused(other, Store(home))
        line.begin(spec, run)
        flow.kill()
    preflight.check_run(other, Store(home))
    line.begin(other, run)
    assert saved(run) == other.model_dump(mode="json")


def saved(run: RunDir) -> Any:
    return json.loads(run.spec_file.read_text())


def with_threshold(spec: RunSpec, fraction: float) -> RunSpec:
    return spec.model_copy(
        update={"data": spec.data.model_copy(update={"max_bad_fraction": fraction})}
    )


def prepare_only(spec: RunSpec) -> None:
    """The data stages, without a flow."""
    store = Store()
    line = stageline.resolve(spec, store)
    for ref in line.data():
        datastages.build_data(ref, line, spec, store)


@pytest.mark.parametrize("error", [CancelRequested, Cancelled])
def test_a_cancel_that_no_runner_carries_out_ends_as_cancelled(
    error: type[Cancelled], spec: RunSpec, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Prefect while no runner is there, or of the job in a cluster's queue."""

    def attempt(ref: Any, work: Any) -> None:
        raise error("nobody else could stop it")

    monkeypatch.setattr(tasks, "run_attempt", attempt)
    state: Any = finetune(spec, return_state=True)
    assert state.is_cancelled() and state.message == "nobody else could stop it"
    with pytest.raises(Cancelled, match="^nobody else could stop it$"):  # `ditty run`: no traceback
        cli._returned(finetune, spec)


def test_the_form_knows_every_section() -> None:
    form = finetune.parameters
    sections = form.definitions["RunSpec"]["properties"]
    assert set(sections) == set(RunSpec.model_fields)


def test_importing_the_flow_imports_no_torch() -> None:
    code = "import flows.finetune, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
