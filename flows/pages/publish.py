"""Publishing on the pages of Prefect: the report of a training, and the table of stages.

Nothing here fails a run: an API that is away misses a report, which the next one makes good.
"""

import contextvars
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
)
from prefect.client.schemas.sorting import ArtifactSort
from prefect.context import FlowRunContext

from ditty.results.lineage import lineage
from ditty.runs.rundir import RunDir
from ditty.stages.stageline import StageLine
from ditty.store.artifacts import Store
from ditty.store.files import make_dir, write_atomic
from flows.pages.costs import StageBook
from flows.pages.datareport import data_facts, data_markdown, made_stages
from flows.pages.lineagepage import lineage_markdown
from flows.pages.markup import code, escape, fenced, shorten
from flows.pages.report import History, artifact_key, lineage_link, markdown

log = logging.getLogger(__name__)

EVERY_SECONDS = 30.0
# Reading and drawing takes a second or two; it may have this share of one core.
SHARE = 0.05
TABLE_SECONDS = 5.0  # the flow waits for the table: 0.1 s where the API is there


class LiveReport:
    """The report of one training, one artifact a flow run; a thread of its own calls it.

    Args:
        pack_dir: the packed rows; see `data_facts`.
        upload_url: see `markdown`.
    """

    def __init__(
        self,
        run: RunDir,
        pack_dir: Path | None,
        upload_url: str | None,
        log: logging.Logger | logging.LoggerAdapter[Any],
    ):
        self.history = History(run)
        self.pack_dir, self.upload_url, self.log = pack_dir, upload_url, log
        self.key = artifact_key("report", run.root.name)
        self._artifact: UUID | None = None
        self._due = 0.0
        self._warned = False

    def refresh(self, state: str, last: bool = False) -> None:
        """Publish what the run has written, not more often than EVERY_SECONDS unless it is `last`.

        Raises:
            Exception: the API is away; the next one says it all.
        """
        began = time.monotonic()
        if began < self._due and not last:
            return
        try:
            text = self._text(state, last)
        except Exception as error:  # no picture is worth a training
            if not self._warned:
                self.log.warning("the report of this training cannot be made: %r", error)
            self._warned, text = True, ""
        if self.history.step or last:
            took = time.monotonic() - began
            self._due = began + max(EVERY_SECONDS, took / SHARE)
        if text:
            self._publish(text)

    def _text(self, state: str, last: bool) -> str:
        self.history.read()
        if not self.history.step and not last:
            return ""
        return markdown(self.history, data_facts(self.pack_dir), state, self.upload_url)

    def _publish(self, text: str) -> None:
        self._artifact = self._artifact or self._earlier()
        if self._artifact is None:
            about = "written while it trains; the last version stays"
            self._artifact = create_markdown_artifact(text, self.key, about)  # type: ignore[assignment]
            return
        with get_client(sync_client=True) as client:
            try:
                # Not client.update_artifact: it puts the whole text into an event as well, and
                # the server keeps events for a week.
                client.request(
                    "PATCH",
                    "/artifacts/{id}",
                    json={"data": text},
                    path_params={"id": self._artifact},
                )
            except httpx.HTTPStatusError:
                self._artifact = None  # someone may have deleted it
                raise

    def _earlier(self) -> UUID | None:
        """The artifact of an earlier attempt of this flow run."""
        context = FlowRunContext.get()
        if context is None or context.flow_run is None:
            return None
        with get_client(sync_client=True) as client:
            found = client.read_artifacts(
                limit=1,
                sort=ArtifactSort.UPDATED_DESC,
                artifact_filter=ArtifactFilter(
                    key=ArtifactFilterKey(any_=[self.key]),
                    flow_run_id=ArtifactFilterFlowRunId(any_=[context.flow_run.id]),
                ),
            )
        return found[0].id if found else None


def publish_stages(book: StageBook, name: str) -> None:
    """The table of the stages that the flow run came to, as it ends, however it ends."""
    if book.entries:
        key, about = artifact_key("stages", name), book.summary()
        if book.trained:
            about += f". {lineage_link(book.trained)}"
        within(TABLE_SECONDS, lambda: create_table_artifact(book.rows(), key, about))


def publish_data(line: StageLine, name: str, store: Store) -> None:
    """What became of the rows, on the run's page and as a file in its directory."""
    made = made_stages(line, store)
    run = RunDir.named(name, store.home)
    make_dir(run.root)
    write_atomic(run.data_file, data_markdown(name, made, picture=False).encode())
    key = artifact_key("data", name)

    def act() -> None:
        create_markdown_artifact(
            data_markdown(name, made, picture=True), key, "what became of the rows"
        )

    within(TABLE_SECONDS, act)


def publish_lineage(result: Path, name: str, store: Store) -> None:
    """What a result was made from; the run's other pages link to it."""

    def act() -> None:
        text = lineage_markdown(lineage(str(result), store))
        create_markdown_artifact(text, artifact_key("lineage", name), "what the result is made of")

    within(TABLE_SECONDS, act)


def publish_evaluation(name: str, found: dict[str, dict[str, Any]]) -> None:
    """A table of held-out losses: what was evaluated -> what `flows.tasks` says of it."""
    rows = []
    for what, values in found.items():
        held_out = {k: v for k, v in values.items() if k not in ("tasks", "samples")}
        rows.append({"weights": what, **held_out, **values.get("tasks", {})})
    key = artifact_key("evaluation", name)
    about = "loss in nats a supervised token of the held-out rows"
    within(TABLE_SECONDS, lambda: create_table_artifact(rows, key, about))


def publish_samples(name: str, found: dict[str, dict[str, Any]]) -> None:
    """What both models write for held-out prompts; see `publish_evaluation`."""
    parts = []
    for base, trained in zip(found["base"]["samples"], found["trained"]["samples"], strict=True):
        texts = {"base": base["completion"], "trained": trained["completion"]}
        for title, text in ({"prompt": base["prompt"]} | texts).items():
            parts.append(f"**{title}**\n\n{fenced(shorten(text))}")
    key = artifact_key("samples", name)
    text = "\n\n".join(parts)
    within(TABLE_SECONDS, lambda: create_markdown_artifact(text, key, "completions, greedy"))


def publish_refresh(name: str, outcome: dict[str, Any]) -> None:
    """What a refresh came to; see `flows.refresh.Outcome`."""
    words = ["run", "train", "in_place"]
    lines = [f"**{escape(outcome['why'])}**", ""]
    lines += [f"- {word.replace('_', ' ')}: {code(str(outcome[word]))}" for word in words]
    if outcome["in_place"] is None:
        lines[-1] = "- in place: the base model, since nothing was promoted yet"
    text, key = "\n".join(lines), artifact_key("refresh", name)
    within(TABLE_SECONDS, lambda: create_markdown_artifact(text, key, "what is in place now"))


def within(seconds: float, act: Callable[[], Any]) -> None:
    """Call `act` in a thread and wait for it at most so long; a failure is only logged."""

    def run() -> None:
        try:
            act()
        except Exception as error:
            log.warning("not published: %r", error)

    # Prefect keeps settings and the current run in context variables.
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(run,), name="ditty publish", daemon=True)
    thread.start()
    thread.join(seconds)
