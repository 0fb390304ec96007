"""The evaluation of a result and of its base model, and whether the result may be uploaded."""

from typing import Any

from ditty.config.gates import failures
from ditty.config.spec import EvaluateSpec
from ditty.errors import GateFailed
from ditty.stages import stageline
from ditty.stages.stageline import StageLine
from ditty.store.files import locked
from flows import tasks
from flows.pages.publish import publish_evaluation, publish_samples
from flows.tasks import Caller
from flows.training import Work

NOT_CHECKED = "evaluate.require was not checked: the run ended before"


def measure(call: Caller, line: StageLine, work: Work, trained: str | None) -> dict[str, Any]:
    """The held-out loss of one result of this spec; None: of its base model."""
    inputs = line.need("train").inputs
    ref = stageline.evaluate_ref(call.spec, inputs["data"], inputs["model"], trained)
    with locked(work.run.flow_lock, shared=True):
        call.cached(tasks.evaluate, ref, work.of_result(trained))
    return tasks.evaluation(ref, call.store)


def score(call: Caller, line: StageLine, work: Work, trained: str | None) -> dict[str, float]:
    """What one result scores in `evaluate.tasks`, each a stage; None: the base model."""
    found: dict[str, float] = {}
    for ref in stageline.harness_refs(call.spec, line.need("train").inputs["model"], trained):
        with locked(work.run.flow_lock, shared=True):
            call.cached(tasks.evaluate, ref, work.of_result(trained))
        found |= tasks.scores(ref, call.store)
    return found


def evaluated(call: Caller, line: StageLine, work: Work) -> dict[str, dict[str, Any]]:
    """The evaluations of the base model and of the result, on the run's page too."""
    spec, key = call.spec, line.need("train").key
    found: dict[str, dict[str, Any]] = {"base": {}, "trained": {}}
    for what, trained in (("base", None), ("trained", key)):
        if spec.data.eval_fraction or not spec.evaluate.tasks:
            found[what] |= measure(call, line, work, trained)
        if spec.evaluate.tasks:
            found[what]["tasks"] = score(call, line, work, trained)
    publish_evaluation(spec.name, found)
    if "samples" in found["trained"]:
        publish_samples(spec.name, found)
    return found


def failed_gates(call: Caller, line: StageLine, work: Work) -> list[str]:
    """What the result fails of `evaluate.require`, with the figures; nothing is measured if that
    section of the spec asks for nothing."""
    if call.spec.evaluate == EvaluateSpec():
        return []
    found = evaluated(call, line, work)
    return failures(call.spec.evaluate.require, found["trained"], found["base"])


def gate_error(run: str, failed: list[str], result: str) -> GateFailed:
    """What a user is told of a result that is not uploaded.

    Args:
        result: where it is in the store.
    """
    return GateFailed(
        f"the result of run {run} is not uploaded: {'; '.join(failed)} (evaluate.require). It "
        f"stays in {result}; train otherwise under another name, or change evaluate.require and "
        "run again"
    )
