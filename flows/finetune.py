"""The flow `finetune`: all stages of a spec in order, each made once."""

from typing import Any

from prefect import flow

from ditty.config.spec import RunSpec
from ditty.planning import preflight
from ditty.store.artifacts import Store
from flows import line
from flows.frame import framed, run_name
from flows.tasks import Caller


@flow(name="finetune", flow_run_name=run_name, retries=0, persist_result=False)
def finetune(spec: RunSpec) -> dict[str, Any]:
    """Fine-tune a causal language model as `spec` says; the same name resumes.

    It needs a Prefect API: see `flows.serving.server.local_server`.

    Returns:
        see `flows.line.Prepared.result`.
    Raises:
        DittyError: what stopped it.
    """
    return framed(Caller.of(spec, Store()), _finetune)


def _finetune(call: Caller) -> dict[str, Any]:
    return line.train(call, preflight.check(call.spec, call.store)).result()
