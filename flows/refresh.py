"""The flow `refresh`: train on the data as they are now; the better result is in place afterwards.

For a schedule. Where nothing has changed since the last time, every stage is cached and nothing is
promoted. Other data, or another spec, are trained in a run of their own.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from prefect import flow
from prefect.logging import get_run_logger

from ditty.config.spec import ModelSpec, RunSpec, TrainSpec
from ditty.errors import RunError
from ditty.planning import preflight
from ditty.pretrained import basemodel
from ditty.results.promotion import Comparison, InPlace, Promotions, candidate_name
from ditty.stages import stageline
from ditty.store.artifacts import Store
from flows import line, tasks
from flows.frame import framed, run_name
from flows.line import Prepared
from flows.measure import measure
from flows.pages.publish import publish_refresh
from flows.serving.automations import PROMOTED, tell
from flows.tasks import Caller


@dataclass(frozen=True)
class Outcome:
    """What a refresh came to.

    Attributes:
        run, train: what was trained, or found trained; its run and content key.
        promoted: whether it is in place now and was not before.
        why: in a sentence.
        in_place: URI or path of the result in place; None: still the base model.
        comparison: of the held-out losses; None where it was in place already.
    """

    run: str
    train: str
    promoted: bool
    why: str
    in_place: str | None
    comparison: Comparison | None


@flow(name="refresh", flow_run_name=run_name, retries=0, persist_result=False)
def refresh(spec: RunSpec) -> dict[str, Any]:
    """Train `spec` on the data as they are now, and promote the result if it is better.

    Better: its held-out loss is below that of the result in place, measured on the same held-out
    rows, by `promote.margin`. At first the base model is in place.

    Returns:
        the fields of Outcome.
    Raises:
        RunError: the result in place is gone, or has another tokenizer.
        DittyError: what stopped it.
    """
    return framed(Caller.of(spec, Store()), _refresh)


def _refresh(call: Caller) -> dict[str, Any]:
    spec, store = call.spec, call.store
    found = line.fetched(call, preflight.check(spec, store))
    train = found.need("train")
    promotions = Promotions(spec, store)
    current = promotions.current()
    unchanged = current is not None and current.train == train.key
    if current and not unchanged:
        _check_comparable(current, found, promotions)  # now, not after a training
    run = candidate_name(spec.name, train.key)
    candidate = replace(call, spec=spec.model_copy(update={"name": run}))
    preflight.check_run(candidate.spec, store)
    prepared = line.train(candidate, stageline.resolve(candidate.spec, store))
    if current and unchanged:
        why = "neither the data nor the spec has changed: its result is in place already"
        outcome = Outcome(run, train.key, False, why, current.result, None)
    else:
        outcome = _compare(candidate, prepared, promotions, current)
    get_run_logger().info("%s", outcome.why)
    publish_refresh(spec.name, asdict(outcome))
    return asdict(outcome)


def _compare(
    call: Caller, prepared: Prepared, promotions: Promotions, current: InPlace | None
) -> Outcome:
    train = prepared.line.need("train")
    new = measure(call, prepared.line, prepared.work, train.key)
    old = _measure_in_place(call, prepared, promotions, current)
    comparison = Comparison(new["loss"], old["loss"], promotions.margin)
    run, in_place = call.spec.name, current.result if current else None
    if not comparison.better:
        why = f"not promoted: {comparison}"
        return Outcome(run, train.key, False, why, in_place, comparison)
    pointer = InPlace(
        number=current.number + 1 if current else 1,
        run=run,
        train=train.key,
        model=call.spec.model.model_dump(mode="json"),
        tokenizer=_tokenizer(prepared.line),
        result=promotions.result_url(run, train.key),
        loss=new["loss"],
        over=current.train if current else None,
    )
    inputs = train.inputs
    evaluation = stageline.evaluate_ref(call.spec, inputs["data"], inputs["model"], train.key)
    call(tasks.promote, promotions.ref(pointer, evaluation.key), promotions, pointer)
    why = f"promoted: {comparison}"
    tell(PROMOTED, promotions.name, f"{why}. It is in {pointer.result}")
    return Outcome(run, train.key, True, why, pointer.result, comparison)


def _measure_in_place(
    call: Caller, prepared: Prepared, promotions: Promotions, current: InPlace | None
) -> dict[str, Any]:
    """The evaluation of what is in place, on the rows that are held out now."""
    if current is None:
        return measure(call, prepared.line, prepared.work, None)
    spec = _to_load(current, call.spec)
    old = replace(call, spec=spec)
    base = line.fetched(old, stageline.resolve_model(spec, call.store), stageline.resolve_model)
    folder, _ = line.base_model(old, base)
    work = replace(prepared.work, spec=spec, model_dir=folder).of_result(current.train)
    pack, model = prepared.line.need("pack").key, stageline.model_key(base)
    ref = stageline.evaluate_ref(spec, pack, model, current.train)
    old.cached(tasks.evaluate, ref, work)
    return tasks.evaluation(ref, call.store)


def _check_comparable(current: InPlace, found: stageline.StageLine, promotions: Promotions) -> None:
    """Raise RunError unless what is in place can be measured; its result is in the store then."""
    if current.tokenizer != _tokenizer(found):
        raise RunError(
            f"the result in place (promotion {current.number}) has another tokenizer than this "
            "spec's base model, so their losses a token cannot be compared. For another family of "
            "models choose another name"
        )
    promotions.fetch_result(current)


def _to_load(current: InPlace, spec: RunSpec) -> RunSpec:
    """`spec` with the model that is in place, in one process, which every kind of model allows.

    Raises:
        RunError: a pointer in a bucket may not switch on a stranger's code.
    """
    model = ModelSpec.model_validate(current.model)
    if model.trust_remote_code and model.base_model != spec.model.base_model:
        raise RunError(
            f"the result in place (promotion {current.number}) runs code of {model.base_model}, "
            "which this spec does not trust. Choose another name"
        )
    trusted = {"trust_remote_code": spec.model.trust_remote_code}
    alone = {"num_processes": 1, "num_machines": 1, "machine_rank": None}
    return spec.model_copy(
        update={
            "model": model.model_copy(update=trusted),
            "train": TrainSpec(precision=spec.train.precision),
            "launch": spec.launch.model_copy(update=alone),
        }
    )


def _tokenizer(found: stageline.StageLine) -> str:
    assert found.model_dir is not None, "the base model was fetched"
    return basemodel.tokenizer_digest(found.model_dir)
