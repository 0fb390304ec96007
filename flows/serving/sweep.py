"""Task runs whose flow run is over, and which nobody told.

SIGKILL of a flow leaves its task runs Running for ever: Prefect ends the flow run alone.
"""

from datetime import UTC, datetime, timedelta

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.states import Crashed

ENDED = [StateType.COMPLETED, StateType.FAILED, StateType.CANCELLED, StateType.CRASHED]
UNDER_WAY = [StateType.RUNNING, StateType.PENDING]
# The server hears of tasks through events, which may come later than the end of their flow run.
# A state that is set here is newer than theirs, and would stay.
LATE_EVENTS = timedelta(seconds=15)


def crash_orphans(client: SyncPrefectClient, only: FlowRunFilterId | None = None) -> int:
    """Set task runs under way to Crashed where their flow run has ended for a while; how many.

    Args:
        only: instead, those of these flow runs, however they are: at the start of a retry nothing
            of the attempt before is left.
    """
    if only is None:
        state = FlowRunFilterState(type=FlowRunFilterStateType(any_=ENDED))
        ended = FlowRunFilterEndTime(before_=datetime.now(UTC) - LATE_EVENTS)
        of = FlowRunFilter(state=state, end_time=ended)
    else:
        of = FlowRunFilter(id=only)
    running = TaskRunFilterState(type=TaskRunFilterStateType(any_=UNDER_WAY))
    found = client.read_task_runs(flow_run_filter=of, task_run_filter=TaskRunFilter(state=running))
    for task_run in found:
        message = "its process was gone when the flow run ended"
        client.set_task_run_state(task_run.id, Crashed(message=message), force=True)
    return len(found)
