"""The flow `evaluate`: the held-out loss of a result that is there, and of its base model."""

from typing import Any

from prefect import flow
from prefect.logging import get_run_logger

from ditty import preflight
from ditty.artifacts import Store
from ditty.errors import RunError
from ditty.spec import RunSpec
from flows.frame import framed, run_name
from flows.line import Prepared, prepare
from flows.measure import evaluated
from flows.mirror import have_result
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
    _find_result(spec, store, prepared)
    return {"run": spec.name, **evaluated(call, prepared.line, prepared.work)}


def _find_result(spec: RunSpec, store: Store, prepared: Prepared) -> None:
    key = prepared.line.need("train").key
    url = spec.upload.url
    if have_result(store, url, spec.name, key, get_run_logger()):
        return
    where = f"{store.home}{f' nor at {url}' if url else ''}"
    raise RunError(
        f"run {spec.name} has no result of this spec to evaluate (training {key[:12]} is not in "
        f"{where}): run `finetune` with the same spec first"
    )
