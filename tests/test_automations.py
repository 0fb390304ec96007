"""Notifications, as an HTTP server receives them that a block of Prefect's server posts to."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from prefect import flow
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import SyncPrefectClient

from ditty.errors import SpecError
from flows.serving import automations
from flows.serving.automations import PROMOTED, STALLED, tell


@pytest.fixture
def inbox() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(address, what was posted there)"""
    received: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            received.append(json.loads(self.rfile.read(length)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", received
    server.shutdown()


def block(name: str, url: str) -> str:
    """The slug of a block that posts {subject, body} to `url`."""
    CustomWebhookNotificationBlock(
        name=name, url=url, json_data={"subject": "{{subject}}", "body": "{{body}}"}
    ).save(name, overwrite=True)
    return f"custom-webhook/{name}"


@flow(name="finetune", flow_run_name="my-run")
def fails() -> None:
    raise ValueError("the disk is full")


@flow(name="refresh", flow_run_name="my-run")
def tells() -> None:
    tell(PROMOTED, "my-model", "promoted: it is 0.2 better")
    tell(STALLED, "my-run", "rank 1 stands still")


@flow(name="something-else")
def not_ours() -> None:
    raise ValueError("not ditty's")


def test_people_are_told(prefect_api: str, inbox: tuple[str, list[dict[str, Any]]]) -> None:
    url, received = inbox
    with SyncPrefectClient(prefect_api) as client:
        assert len(automations.notify(client, block("mine", url))) == 3
        assert automations.notify(client, "custom-webhook/mine") == []
        time.sleep(3)  # the server reads its automations every so often
        for one in (not_ours, fails, tells):
            one(return_state=True)
        end = time.monotonic() + 60
        while len(received) < 3 and time.monotonic() < end:
            time.sleep(0.2)
        found = {message["subject"]: message["body"] for message in received}
        assert set(found) == {
            "finetune my-run: Failed",
            "refresh my-run: stalled",
            "refresh my-run: promoted",
        }, found
        assert "None" not in "".join(found.values())
        assert "the disk is full" in found["finetune my-run: Failed"]
        assert "my-model: promoted: it is 0.2 better" in found["refresh my-run: promoted"]
        assert "rank 1 stands still" in found["refresh my-run: stalled"]

        other = block("other", f"{url}elsewhere")
        assert len(automations.notify(client, other)) == 3, "the new block was not taken"
        assert automations.notify(client, other) == []
        assert len(client.read_automations_by_name(automations.FAILED_NOTICE)) == 1


def test_a_block_that_is_not_there(prefect_api: str) -> None:
    with SyncPrefectClient(prefect_api) as client:
        for wrong in ("slack-webhook/nobody", "nonsense"):
            with pytest.raises(SpecError, match="expected TYPE/NAME"):
                automations.notify(client, wrong)
