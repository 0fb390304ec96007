"""The flow `evaluate`: the held-out loss of a result that is there, and of its base model."""

from typing import Any

from prefect import flow
from prefect.logging import get_run_logger

from ditty.config.spec import RunSpec
from ditty.planning import preflight
from ditty.store.artifacts import Store
from flows.frame import framed, run_name
from flows.line import prepare
from flows.measure import evaluated
from flows.mirror import need_result
from flows.tasks import Caller


@flow(name="evaluate", flow_run_name=run_name, retries=0, persist_result=False)
def evaluate(spec: RunSpec) -> dict[str, Any]:
    """Measure the held-out loss of what `finetune` made of `spec`, and of the base model.

    Returns:
        {"run": its name, "base", "trained": {"loss": nats a token, "perplexity", "tokens", "rows"}}
    Raises:
        RunError: it is not trained yet.
        DittyError: what stopped it.
    """
    return framed(Caller.of(spec, Store()), _evaluate)


def _evaluate(call: Caller) -> dict[str, Any]:
    spec, store = call.spec, call.store
    prepared = prepare(call, preflight.check(spec, store, trains=False))
    need_result(store, spec, prepared.line.need("train").key, get_run_logger())
    return {"run": spec.name, **evaluated(call, prepared.line, prepared.work)}
