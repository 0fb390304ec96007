"""What ditty needs on a Prefect server: a work pool, a limit, automations, deployments.

`apply` may be called any number of times, and leaves alone what a person may have changed in the
browser: the limit's size, a deployment's spec and schedules, a switched-off automation.
"""

from dataclasses import dataclass
from importlib import import_module, resources
from typing import Any

import prefect
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import (
    DeploymentScheduleCreate,
    DeploymentUpdate,
    GlobalConcurrencyLimitCreate,
    WorkPoolCreate,
)
from prefect.client.schemas.schedules import CronSchedule
from prefect.deployments.runner import EntrypointType, RunnerDeployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import get_current_settings
from prefect.utilities.callables import parameter_schema
from prefect.workers.process import ProcessWorker

from ditty.errors import RunError
from flows.serving import automations

POOL = "ditty"
TRAINING_LIMIT = "ditty-training"


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


def apply(notify: str | None = None) -> Applied:
    """Put everything on the server that Prefect is configured for.

    Args:
        notify: see `automations.notify`; None: notifications stay as they are.
    Raises:
        SpecError: there is no such block.
        RunError: it refuses.
        httpx.TransportError: it does not answer.
    """
    try:
        return _apply(notify)
    except PrefectHTTPStatusError as error:
        raise RunError(
            f"the Prefect server at {get_current_settings().api.url} refused what ditty needs "
            f"there. ditty is made for Prefect {prefect.__version__}; is the server another "
            f"version? It said: {error}"
        ) from error


def _apply(notify: str | None) -> Applied:
    made = []
    with get_client(sync_client=True) as client:
        made += _pool(client)
        made += _limit(client)
        made += automations.bury(client)
        if notify:
            made += automations.notify(client, notify)
        names = [_put(client, definition) for definition in definitions()]
    return Applied(names, made)


def _put(client: SyncPrefectClient, definition: dict[str, Any]) -> str:
    """Make a deployment, or bring it up to date: its spec, schedules and pause stay."""
    deployment = _deployment(definition)
    try:
        there = client.read_deployment_by_name(deployment.full_name)
    except ObjectNotFound:
        deployment.schedules = [_schedule(value) for value in definition["schedules"]]
        deployment.apply()
    else:
        # Not `apply`, which would set all of it.
        ours = DeploymentUpdate(
            entrypoint=deployment.entrypoint,
            description=deployment.description,
            tags=deployment.tags,
            work_pool_name=deployment.work_pool_name,
            job_variables=deployment.job_variables,
            parameter_openapi_schema=parameter_schema(_flow(definition)).model_dump(),
        )
        client.update_deployment(there.id, ours)
    return deployment.full_name


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


def _deployment(definition: dict[str, Any]) -> RunnerDeployment:
    return RunnerDeployment.from_flow(
        _flow(definition),
        name=definition["name"],
        description=definition.get("description"),
        tags=definition.get("tags"),
        parameters=definition.get("parameters"),
        work_pool_name=definition["work_pool"]["name"],
        job_variables=definition["work_pool"].get("job_variables"),
        entrypoint_type=EntrypointType.MODULE_PATH,
    )


def _flow(definition: dict[str, Any]) -> Any:
    module, _, name = definition["entrypoint"].rpartition(".")
    return getattr(import_module(module), name)


def _schedule(value: dict[str, Any]) -> DeploymentScheduleCreate:
    cron = CronSchedule(cron=value["cron"], timezone=value["timezone"])
    return DeploymentScheduleCreate(schedule=cron, active=value["active"])
