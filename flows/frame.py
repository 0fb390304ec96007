"""What every flow has around its stages: logs, names, cancelling, and a table at the end."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from prefect import states
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilterId
from prefect.context import FlowRunContext
from prefect.logging.handlers import APILogHandler
from prefect.runtime import flow_run

from ditty.errors import Cancelled
from ditty.store.artifacts import FLOW_RUN_VARIABLE
from flows.pages.publish import publish_stages
from flows.serving.sweep import crash_orphans
from flows.tasks import Caller


def run_name() -> str:
    """The spec's name, as the name of the flow run."""
    spec = flow_run.parameters["spec"]
    return str(spec["name"] if isinstance(spec, dict) else spec.name)


def framed(call: Caller, body: Callable[[Caller], dict[str, Any]]) -> dict[str, Any]:
    """Call `body` within a flow run; returns what it returns.

    Raises:
        DittyError: what stopped it.
    """
    _bury_earlier_attempts()
    with ditty_logs(), _named_in_artifacts():
        try:
            return body(call)
        except Cancelled as error:
            # Prefect takes a state that is returned for the state of the run.
            return states.Cancelled(message=str(error))  # type: ignore[return-value]
        finally:
            publish_stages(call.book, call.spec.name)


def _bury_earlier_attempts() -> None:
    """At a retry: what an attempt that was killed left as Running is not running."""
    if flow_run.run_count > 1 and flow_run.id is not None:
        with get_client(sync_client=True) as client:
            crash_orphans(client, FlowRunFilterId(any_=[UUID(flow_run.id)]))


@contextmanager
def _named_in_artifacts() -> Iterator[None]:
    """Within the block each artifact says which flow run made it, also one of a child process."""
    before = os.environ.get(FLOW_RUN_VARIABLE)
    os.environ[FLOW_RUN_VARIABLE] = str(flow_run.id)
    try:
        yield
    finally:
        os.environ.pop(FLOW_RUN_VARIABLE)
        if before is not None:
            os.environ[FLOW_RUN_VARIABLE] = before


@contextmanager
def ditty_logs() -> Iterator[None]:
    """Within a flow, send what the library logs to Prefect's API too."""
    handler = APILogHandler()
    handler.addFilter(lambda _: FlowRunContext.get() is not None)  # none in the library's threads
    logger = logging.getLogger("ditty")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(level or logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
