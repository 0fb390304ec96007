"""Cancelling a run in Prefect's UI where no runner is left to carry it out."""

import time

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.context import FlowRunContext

from ditty.errors import Cancelled

# A cancel that the runner carries out is a SIGTERM within 12 s. After this, there is no runner.
CANCEL_SECONDS = 20.0


class CancelRequested(Cancelled):
    """The flow run was cancelled, and no runner was there to stop it."""


class CancelWatch:
    """Looks for a cancel that nobody carries out."""

    def __init__(self) -> None:
        self._since: float | None = None

    def check(self) -> None:
        """Ask Prefect's API once.

        Raises:
            CancelRequested: the flow run should have ended CANCEL_SECONDS ago.
            httpx.HTTPError: the API is away.
        """
        if not is_cancelling():
            self._since = None
        elif self._since is None:
            self._since = time.monotonic()
        elif time.monotonic() >= self._since + CANCEL_SECONDS:
            raise CancelRequested("the flow run was cancelled while nothing else could stop it")


def is_cancelling() -> bool:
    """Does the API want the current flow run to end?"""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return False
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(context.flow_run.id).state
    return state is not None and state.type in (StateType.CANCELLING, StateType.CANCELLED)
