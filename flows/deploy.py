"""What ditty needs on a Prefect server: a work pool, a limit, automations, deployments.

`apply` may be called any number of times, and leaves alone what a person may have changed in the
browser: the limit's size, a switched-off automation.
"""

from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module, resources
from typing import Any

import prefect
import yaml
from prefect.automations import AutomationCore, ChangeFlowRunState, EventTrigger, Posture
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.deployments.runner import EntrypointType, RunnerDeployment
from prefect.events.schemas.automations import ResourceSpecification
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import get_current_settings
from prefect.workers.process import ProcessWorker

from ditty.errors import RunError

POOL = "ditty"
TRAINING_LIMIT = "ditty-training"
ZOMBIES = "ditty: a run whose processes are gone has crashed"

# Prefect's own minimum; a run that is silent for twice as long is taken for dead.
HEARTBEAT_SECONDS = 30
HEARTBEAT = "prefect.flow-run.heartbeat"
ENDS = ("Completed", "Failed", "Cancelled", "Crashed", "AwaitingRetry", "Paused", "Suspended")


@dataclass(frozen=True)
class Applied:
    """What was put on the server.

    Attributes:
        deployments: full names, flow/deployment.
        made: what was not there before, for people.
    """

    deployments: list[str]
    made: list[str]


def definitions() -> list[dict[str, Any]]:
    """The deployments of deployments/prefect.yaml, as Prefect defines that file."""
    text = resources.files("deployments").joinpath("prefect.yaml").read_text()
    found: list[dict[str, Any]] = yaml.safe_load(text)["deployments"]
    return found


def apply() -> Applied:
    """Put everything on the server that Prefect is configured for.

    Raises:
        RunError: it refuses.
        httpx.TransportError: it does not answer.
    """
    try:
        return _apply()
    except PrefectHTTPStatusError as error:
        raise RunError(
            f"the Prefect server at {get_current_settings().api.url} refused what ditty needs "
            f"there. ditty is made for Prefect {prefect.__version__}; is the server another "
            f"version? It said: {error}"
        ) from error


def _apply() -> Applied:
    made = []
    with get_client(sync_client=True) as client:
        made += _pool(client)
        made += _limit(client)
        made += _zombies(client)
    names = []
    for definition in definitions():
        deployment = _deployment(definition)
        deployment.apply()
        names.append(deployment.full_name)
    return Applied(names, made)


def _pool(client: SyncPrefectClient) -> list[str]:
    try:
        client.read_work_pool(POOL)
        return []
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(
            WorkPoolCreate(name=POOL, type="process", base_job_template=template)
        )
        return [f"work pool {POOL}"]


def _limit(client: SyncPrefectClient) -> list[str]:
    try:
        client.read_global_concurrency_limit_by_name(TRAINING_LIMIT)
        return []
    except ObjectNotFound:
        limit = GlobalConcurrencyLimitCreate(name=TRAINING_LIMIT, limit=1)
        client.create_global_concurrency_limit(limit)
        return [f"limit {TRAINING_LIMIT}: one training at a time"]


def _zombies(client: SyncPrefectClient) -> list[str]:
    if client.read_automations_by_name(ZOMBIES):
        return []
    automation = AutomationCore(
        name=ZOMBIES,
        description="No heartbeat for a while: the machine or both processes died without a word.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={HEARTBEAT},
            expect={HEARTBEAT, *(f"prefect.flow-run.{end}" for end in ENDS)},
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            for_each={"prefect.resource.id"},
            threshold=1,
            within=timedelta(seconds=2 * HEARTBEAT_SECONDS),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message=(
                    "its processes are gone, or cannot reach this server. Press Retry: it "
                    "goes on from the newest checkpoint"
                ),
            )
        ],
    )
    client.create_automation(automation)
    return [f"automation '{ZOMBIES}'"]


def _deployment(definition: dict[str, Any]) -> RunnerDeployment:
    module, _, name = definition["entrypoint"].rpartition(".")
    return RunnerDeployment.from_flow(
        getattr(import_module(module), name),
        name=definition["name"],
        description=definition.get("description"),
        tags=definition.get("tags"),
        parameters=definition.get("parameters"),
        work_pool_name=definition["work_pool"]["name"],
        job_variables=definition["work_pool"].get("job_variables"),
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
