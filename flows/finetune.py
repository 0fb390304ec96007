"""The flow: all stages of a spec in order, each made once."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilterId
from prefect.context import FlowRunContext
from prefect.logging.handlers import APILogHandler
from prefect.runtime import flow_run
from prefect.states import Cancelled

from ditty import preflight, stages
from ditty.artifacts import FLOW_RUN_VARIABLE, Store
from ditty.files import make_dir, write_json
from ditty.rundir import RunDir
from ditty.spec import RunSpec
from ditty.stages import StageLine
from flows import tasks
from flows.publish import publish_stages
from flows.sweep import crash_orphans
from flows.training import CancelRequested, Work


def run_name() -> str:
    """The spec's name, as the name of the flow run."""
    spec = flow_run.parameters["spec"]
    return str(spec["name"] if isinstance(spec, dict) else spec.name)


@flow(name="finetune", flow_run_name=run_name, retries=0, persist_result=False)
def finetune(spec: RunSpec) -> dict[str, Any]:
    """Fine-tune a causal language model as `spec` says; the same name resumes.

    It needs a Prefect API: see `flows.server.local_server`.

    Returns:
        {"run": its name, "stages": references of the artifacts, "path": the trained adapter or
        model, "model_dir": the base model}
    Raises:
        DittyError: what stopped it.
    """
    call = tasks.Caller(spec, Store())
    _bury_earlier_attempts()
    with ditty_logs(), _named_in_artifacts():
        try:
            return _stages(call)
        except CancelRequested as error:
            # Prefect takes a state that is returned for the state of the run.
            return Cancelled(message=str(error))  # type: ignore[return-value]
        finally:
            publish_stages(call.book, spec.name)


def _stages(call: tasks.Caller) -> dict[str, Any]:
    spec, store = call.spec, call.store
    line = preflight.check(spec, store)
    _begin(RunDir.named(spec.name, store.home), spec)
    line = _fetched(call, line)
    assert line.model_dir is not None, "the base model was fetched"
    preflight.check_model(spec, line)
    done = [call.cached(tasks.make_data, ref, line, spec, store) for ref in line.data()]
    model_dir = line.model_dir
    if ref := line.only("prequantize"):
        done.append(call.cached(tasks.make_model, ref, Work(spec, store, model_dir)))
        model_dir = store.path(ref.stage, ref.key)
    pack, train = line.need("pack"), line.need("train")
    work = Work(spec, store, model_dir, store.path(pack.stage, pack.key))
    done.append(call.cached(tasks.train, train, work))
    if ref := line.only("upload"):
        done.append(call.cached(tasks.upload, ref, train, spec, store))
    return {
        "run": spec.name,
        "stages": done,
        "path": str(store.path(train.stage, train.key)),
        "model_dir": str(line.model_dir),
    }


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


def _bury_earlier_attempts() -> None:
    """At a retry: what an attempt that was killed left as Running is not running."""
    if flow_run.run_count > 1 and flow_run.id is not None:
        with get_client(sync_client=True) as client:
            crash_orphans(client, FlowRunFilterId(any_=[UUID(flow_run.id)]))


def _begin(run: RunDir, spec: RunSpec) -> None:
    make_dir(run.root)
    if not run.spec_file.exists():
        write_json(run.spec_file, spec.model_dump(mode="json"))
    run.stop_file.unlink(missing_ok=True)  # it was meant for an earlier run


def _fetched(call: tasks.Caller, line: StageLine) -> StageLine:
    """The line with all keys known: they depend on the tokenizer, which is in the model."""
    ref = line.only("fetch")
    if ref is None:
        return line
    if line.base.kind == "gguf":
        work = Work(call.spec, call.store, Path(line.base.name))
        call.cached(tasks.make_model, ref, work)
    elif line.model_dir is None:
        call(tasks.fetch_hub, ref, line.base, call.store)
    else:
        call.skip(ref)
    return line if line.model_dir else stages.resolve(call.spec, call.store)


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
