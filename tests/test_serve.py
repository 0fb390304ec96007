"""`ditty serve`: the machine dies in the middle of a training, comes back, and Retry goes on."""

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
import yaml
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling

from ditty.config.spec import RunSpec
from ditty.planning.demo import demo_spec
from ditty.runs.rundir import RunDir, Status, read_result
from flows.serving import automations, deploy
from tests.postgres import postgres
from tests.processes import ROOT
from tests.served import COMMAND, Serving, serving, tiny_spec


def test_each_deployment_is_a_flow_with_parameters_that_fit() -> None:
    for definition in deploy.definitions():
        name = definition["name"]
        assert definition["entrypoint"] == f"flows.{name}.{name}" and name in automations.FLOWS
        assert definition["work_pool"]["name"] == deploy.POOL
        values = definition["work_pool"]["job_variables"]["env"]
        assert values == {"DITTY_TRAINING_LIMIT": deploy.TRAINING_LIMIT}
        if spec := definition["parameters"].get("spec"):
            assert RunSpec.model_validate(spec).name == "demo"


def test_the_default_of_the_form_is_the_demo() -> None:
    demo = yaml.safe_load((Path(demo_spec.__code__.co_filename).parent / "demo.yaml").read_text())
    specs = [d["parameters"].get("spec") for d in deploy.definitions()]
    assert [s for s in specs if s] == [demo] * 3


def test_deploying_twice_changes_nothing_that_a_person_changed(prefect_api: str) -> None:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate

    with SyncPrefectClient(prefect_api) as client:
        with pytest.raises(ObjectNotFound):
            client.read_work_pool(deploy.POOL)
        first = deploy.apply()
        assert len(first.made) == 3
        before = client.read_deployment_by_name("refresh/refresh")
        (nightly,) = before.schedules
        assert (nightly.active, nightly.schedule.timezone) == (False, "UTC")
        mine = {"spec": {**before.parameters["spec"], "name": "mine"}}
        client.update_deployment(before.id, DeploymentUpdate(parameters=mine))
        client.update_deployment_schedule(before.id, nightly.id, active=True)
        client.update_global_concurrency_limit(
            deploy.TRAINING_LIMIT, GlobalConcurrencyLimitUpdate(limit=4)
        )
        again = deploy.apply()
        assert again.made == [] and again.deployments == first.deployments
        after = client.read_deployment_by_name("refresh/refresh")
        assert (after.id, after.parameters) == (before.id, mine)
        assert [s.active for s in after.schedules] == [True]
        assert client.read_global_concurrency_limit_by_name(deploy.TRAINING_LIMIT).limit == 4
        assert len(client.read_automations_by_name(automations.ZOMBIES)) == 1


def test_another_server_is_not_taken_for_ones_own(tmp_path: Path) -> None:
    own = {"PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "serve", "--port", "9998"],
        cwd=ROOT, env={**os.environ, **own}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "ditty deploy" in done.stderr and "http://127.0.0.1:9/api" in done.stderr


@pytest.mark.service
@pytest.mark.parametrize("database", ["postgresql", pytest.param("sqlite", marks=pytest.mark.slow)])
def test_the_machine_dies_and_retry_goes_on(tmp_path: Path, database: str) -> None:
    if database == "sqlite":
        _die_and_retry(Serving(tmp_path), "SQLite")
        return
    with postgres() as url:
        variables = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": url}
        _die_and_retry(Serving(tmp_path, variables), "PostgreSQL at 127.0.0.1")


def _die_and_retry(served: Serving, database: str) -> None:
    try:
        printed = served.start()
        assert database in printed and "✓ work pool ditty" in printed
        spec = tiny_spec(served.folder, "walk", steps=800)
        flow_run = served.trigger(spec)
        run = RunDir.named("walk", served.home)
        served.wait(lambda: run.committed_steps(), 120)
        assert served.training(), "it was not training"
        served.kill()
        (saved, *_) = run.committed_steps()
        assert run.committed_steps()[-1] < 800

        printed = served.start()
        assert "✓ work pool" not in printed, "made again what was there"
        assert served.state(flow_run) == "Running", "nobody is left to say otherwise"
        served.wait(lambda: served.state(flow_run) == "Crashed", 120)
        served.wait(lambda: served.tasks(flow_run)["train", "Crashed"] == 1, 60)
        assert "Retry" in str(served.run(flow_run).state)
        served.retry(flow_run)
        served.wait(lambda: served.state(flow_run) in ("Completed", "Failed", "Crashed"), 150)
        assert served.state(flow_run) == "Completed", served.logs()
        log = (run.attempts("train")[1] / "log.txt").read_text()
        assert saved > 0 and "training from step 0 " not in log
        with served.client() as client:
            assert client.read_flow_run(flow_run).run_count == 2
        states = served.ended_tasks(flow_run)
        for stage in ("load", "tokenize", "pack"):
            assert states[stage, "Cached"] == 1, states
        _is_done_again_when_due(served, spec)
    finally:
        served.stop()


def _is_done_again_when_due(served: Serving, spec: dict[str, Any]) -> None:
    """A schedule in a time zone: the run comes by itself, and finds all stages made."""
    due = datetime.now(UTC) + timedelta(seconds=5)
    daily = IntervalSchedule(interval=timedelta(days=1), anchor_date=due, timezone="Europe/Berlin")
    with served.client() as client:
        deployment = client.read_deployment_by_name("finetune/finetune")
        client.update_deployment(deployment.id, DeploymentUpdate(parameters={"spec": spec}))
        client.create_deployment_schedules(deployment.id, [(daily, True)])

    def ended() -> list[FlowRun]:
        with served.client() as client:
            return [r for r in client.read_flow_runs() if r.auto_scheduled and r.end_time]

    served.wait(ended, 240)  # Prefect looks at schedules once a minute; then a worker, a flow
    (run,) = ended()
    assert run.state and run.state.name == "Completed", served.logs()
    assert run.expected_start_time and run.expected_start_time >= due - timedelta(seconds=1)
    states = served.ended_tasks(run.id)
    assert {state for _, state in states} == {"Cached"} and len(states) == 5, states


WORKER = ["-m", "prefect", "worker"]


@pytest.mark.fault("cancelled")
@pytest.mark.service
@pytest.mark.slow
def test_every_way_to_stop_a_run_ends_it_in_the_right_state(tmp_path: Path, figure: Any) -> None:
    """The table of ways in which a run ends early; each time the same name goes on."""
    with serving(tmp_path) as served:
        spec = tiny_spec(tmp_path, "stopped", steps=20000)
        waiting = tiny_spec(tmp_path, "waiting", steps=10)

        first = _training(served, spec)
        queued = served.trigger(waiting)
        served.wait(lambda: served.tasks(queued)["train", "Running"], 90)
        assert not RunDir.named("waiting", served.home).attempts("train"), "it had a slot"
        _cancelled(served, queued)
        assert served.state(first) == "Running", "the wrong one was cancelled"
        _cancelled(served, first)
        _is_saved_and_gone(served, "stopped", attempts=1)
        figure("processes left 0, a checkpoint of the last step")

        second = _training(served, spec)
        _flow_process(served, second).terminate()
        served.wait(lambda: served.state(second) == "Crashed", 60)
        _is_saved_and_gone(served, "stopped", attempts=2)
        assert served.ended_tasks(second)["train", "Crashed"] == 1

        third = _training(served, spec)
        _flow_process(served, third).kill()
        served.wait(lambda: served.state(third) == "Crashed", 60)
        _is_saved_and_gone(served, "stopped", attempts=3)
        assert served.ended_tasks(third)["train", "Crashed"] == 1

        fourth = _training(served, spec)
        (worker,) = [p for p in served.processes() if p.cmdline()[1:4] == WORKER]
        worker.kill()
        assert served.process and served.process.wait(90) == 1, "nobody noticed"
        assert "the worker ended with" in (tmp_path / "serve.txt").read_text()
        served.start()
        _is_saved_and_gone(served, "stopped", attempts=4)
        assert served.state(fourth) == "Crashed"


def _training(served: Serving, spec: dict[str, Any]) -> UUID:
    """A run of `spec` that takes steps by now."""
    run = RunDir.named(spec["name"], served.home)
    before = len(run.attempts("train"))
    flow_run = served.trigger(spec)

    def trains() -> bool:
        attempts = run.attempts("train")
        return len(attempts) > before and "step " in (attempts[-1] / "log.txt").read_text()

    served.wait(trains, 90)
    return flow_run


def _cancelled(served: Serving, flow_run: UUID) -> None:
    with served.client() as client:
        client.set_flow_run_state(flow_run, Cancelling())
    served.wait(lambda: served.state(flow_run) == "Cancelled", 30)
    ended = served.ended_tasks(flow_run)
    assert not ended["train", "Completed"] and ended["load", "Completed"] + ended["load", "Cached"]


def _flow_process(served: Serving, flow_run: UUID) -> psutil.Process:
    """The process of a flow: the child of the worker's that has the training below it."""
    found = [p for p in served.processes() if "prefect" in " ".join(p.cmdline())]
    flows = [p for p in found if p.environ().get("PREFECT__FLOW_RUN_ID") == str(flow_run)]
    assert flows, [p.cmdline() for p in found]
    return flows[-1]


def _is_saved_and_gone(served: Serving, name: str, attempts: int) -> None:
    """No process of the training is left, and it has left a checkpoint of its last step."""
    run = RunDir.named(name, served.home)
    served.wait(lambda: not run.is_alive() and not served.training(), 30)
    assert len(run.attempts("train")) == attempts
    result = read_result(run.attempts("train")[-1])
    assert result and result.status is Status.PREEMPTED, result
    assert run.committed_steps()[-1] == result.step > 0
