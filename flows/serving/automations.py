"""What Prefect does by itself for ditty: bury dead runs, and tell people what happened.

Automations are found by name. Those that are there are left as they are, so that what a person
changed in the browser stays; a notification follows the block that was named last.
"""

from datetime import timedelta
from uuid import UUID

from prefect.automations import (
    AutomationCore,
    ChangeFlowRunState,
    EventTrigger,
    Posture,
)
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events import emit_event
from prefect.events.actions import SendNotification
from prefect.events.schemas.automations import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run

from ditty.errors import SpecError

FLOWS = ["finetune", "refresh", "evaluate", "export"]

# Prefect's own minimum; a run that is silent for twice as long is taken for dead.
HEARTBEAT_SECONDS = 30
HEARTBEAT = "prefect.flow-run.heartbeat"
ENDS = ("Completed", "Failed", "Cancelled", "Crashed", "AwaitingRetry", "Paused", "Suspended")

# Events of ditty's own.
PROMOTED = "ditty.model.promoted"
STALLED = "ditty.training.stalled"

ZOMBIES = "ditty: a run whose processes are gone has crashed"
FAILED_NOTICE = "ditty: tell when a run has failed"
STALLED_NOTICE = "ditty: tell when a training has stalled"
PROMOTED_NOTICE = "ditty: tell when a model is promoted"


def tell(event: str, name: str, text: str) -> None:
    """Emit an event of ditty's about the run or model `name`; `text` is for people."""
    run = {"prefect.resource.id": f"prefect.flow-run.{flow_run.id}"}
    emit_event(
        event=event,
        resource={"prefect.resource.id": f"ditty.{name}", "prefect.resource.name": name},
        related=[run | {"prefect.resource.role": "flow-run"}],
        payload={"text": text},
    )


def bury(client: SyncPrefectClient) -> list[str]:
    """Put the automation there that ends runs without heartbeats; what was made, for people."""
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


def notify(client: SyncPrefectClient, block: str) -> list[str]:
    """Put the automations there that send a notification; what was made or changed, for people.

    Args:
        block: type and name of a notification block of the server, e.g. `slack-webhook/team`.
    Raises:
        SpecError: there is no such block.
    """
    document = _block(client, block)
    done = []
    for automation in _notices(document):
        there = client.read_automations_by_name(automation.name)
        if not there:
            client.create_automation(automation)
        elif _document(there[0]) != document:
            client.update_automation(there[0].id, automation)
        else:
            continue
        done.append(f"automation '{automation.name}', to {block}")
    return done


def _block(client: SyncPrefectClient, block: str) -> UUID:
    kind, _, name = block.partition("/")
    try:
        return client.read_block_document_by_name(name, kind).id
    except ObjectNotFound as error:
        raise SpecError(
            f"--notify {block}: this server has no such block; expected TYPE/NAME of one that "
            "sends notifications, e.g. slack-webhook/team. Make it in the browser under Blocks"
        ) from error


def _document(automation: AutomationCore) -> UUID | None:
    (action,) = automation.actions
    return action.block_document_id if isinstance(action, SendNotification) else None


def _notices(document: UUID) -> list[AutomationCore]:
    run, page = "{{ flow.name }} {{ flow_run.name }}", "{{ (flow_run|ui_url) or '' }}"
    ended = {"prefect.flow-run.Failed", "prefect.flow-run.Crashed", "prefect.flow-run.TimedOut"}
    of_ditty = {"prefect.resource.role": "flow", "prefect.resource.name": FLOWS}
    said = f"{{{{ event.resource.name }}}}: {{{{ event.payload.text }}}}\n{page}"
    return [
        _notice(
            FAILED_NOTICE,
            EventTrigger(
                expect=ended,
                match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
                match_related=ResourceSpecification(of_ditty),
                posture=Posture.Reactive,
            ),
            document,
            f"{run}: {{{{ flow_run.state.name }}}}",
            f"{{{{ flow_run.state.message }}}}\n{page}\nRetry there goes on from the newest "
            "checkpoint.",
        ),
        _notice(STALLED_NOTICE, _on(STALLED), document, f"{run}: stalled", said),
        _notice(PROMOTED_NOTICE, _on(PROMOTED), document, f"{run}: promoted", said),
    ]


def _on(event: str) -> EventTrigger:
    return EventTrigger(expect={event}, posture=Posture.Reactive)


def _notice(
    name: str, trigger: EventTrigger, document: UUID, subject: str, body: str
) -> AutomationCore:
    action = SendNotification(block_document_id=document, subject=subject, body=body)
    return AutomationCore(name=name, trigger=trigger, actions=[action])
