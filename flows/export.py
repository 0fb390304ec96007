"""The flow `export`: the result of a run, merged where asked, and copied to where it is used."""

from typing import Any

from prefect import flow
from prefect.logging import get_run_logger

from ditty.config.choices import Adapter, Device, ExportDtype, ExportTo, Precision
from ditty.config.spec import RunSpec
from ditty.errors import RunError, SpecError
from ditty.pretrained import basemodel
from ditty.results.package import GENERATION_CONFIG, generation_config, package_ref, taught_ends
from ditty.runs.status import Trained, find_trained
from ditty.stages import share, stageline
from ditty.stages.stageline import StageRef
from ditty.store.artifacts import Store, read_manifest
from ditty.store.files import locked
from flows import line, tasks
from flows.card import card_files
from flows.frame import framed
from flows.measure import gate_error
from flows.mirror import need_result
from flows.place import checked_place, copy_to, leaves_this_machine
from flows.tasks import Caller
from flows.training import Work


@flow(name="export", flow_run_name="export {run}", retries=0, persist_result=False)
def export(
    run: str,
    to: ExportTo = ExportTo.ADAPTER,
    out: str | None = None,
    dtype: ExportDtype | None = None,
    license: str | None = None,
    public: bool = False,
) -> dict[str, Any]:
    """The result of a run: what was trained, or a whole model; copied to `out`.

    The copy is verified file by file, and a copy that was cut short goes on where it was.

    Args:
        run: The run's name.
        to: The adapter in peft's layout, a model with the adapter merged into its unquantized
            base, or that as a .gguf file. Where everything was trained (`model.adapter: none`),
            the first two are the model.
        out: A folder that is made, `s3://bucket/prefix/name`, or `hub:ORG/NAME`; without it, the
            result stays in the store.
        dtype: Of the weights of a whole model; without it, that of the base, or that they were
            trained in. `q8_0` and `q4_0` are for a .gguf file.
        license: For the card, an identifier of the hub's (apache-2.0); without it, that of the
            README in the base model's folder.
        public: Whether a repository that is made at the hub can be seen by all.

    Returns:
        {"run", "to", "path": in the store, "out": the place of the copy or None, "digest": SHA-256
        of its content, "base": the model beside which an adapter is loaded, or None}
    Raises:
        RunError: there is no such run, it has no result, or its base model is another by now.
        SpecError: a dtype for an adapter, or one of a .gguf file for another.
        GateFailed: the result failed `evaluate.require`, and others would see it: `out` is no
            folder here, or a whole model would go to DITTY_STORE_URL.
        RemoteError: another content is there already, or the place cannot be reached.
        DittyError: what else stopped it.
    """
    store = Store()
    trained = find_trained(store, run)
    is_adapter = to is ExportTo.ADAPTER and trained.spec.model.adapter is not Adapter.NONE
    if dtype is not None:
        _check_dtype(dtype, to, is_adapter=is_adapter)

    def body(call: Caller) -> dict[str, Any]:
        _check_gates(run, trained, store, to, out)
        url = checked_place(out)
        made = _result(call, trained, to, dtype)
        result = _package(call, made, trained.key, to, license)
        path = store.path(result.stage, result.key)
        if url is not None:
            copy_to(call, result, url, public=public)
        return {
            "run": run,
            "to": to.value,
            "path": str(path),
            "out": url,
            "digest": read_manifest(path).digest,
            "base": trained.spec.model.base_model if is_adapter else None,
        }

    # The machine that trained may have had a GPU; a merge needs none.
    launch = trained.spec.launch.model_copy(update={"device": Device.CPU})
    return framed(Caller.of(trained.spec.model_copy(update={"launch": launch}), store), body)


def _check_dtype(dtype: ExportDtype, to: ExportTo, *, is_adapter: bool) -> None:
    if is_adapter:
        raise SpecError(
            f"--dtype: got {dtype}, but an adapter is copied as it was trained (fp32): leave it "
            "out, or use `--to merged` or `--to gguf`"
        )
    if dtype.precision is None and to is not ExportTo.GGUF:
        raise SpecError(f"--dtype: {dtype} is of .gguf files: use `--to gguf`, or fp32, bf16, fp16")


def _check_gates(run: str, trained: Trained, store: Store, to: ExportTo, out: str | None) -> None:
    """Raise GateFailed if the result failed, and others would see what is made of it."""
    shared = to is not ExportTo.ADAPTER and share.place() is not None
    if trained.failed_gates and (shared or leaves_this_machine(out)):
        stays = store.path("train", trained.key)
        raise gate_error(run, list(trained.failed_gates), str(stays))


def _result(call: Caller, trained: Trained, to: ExportTo, dtype: ExportDtype | None) -> StageRef:
    """The stage whose artifact is wanted; it is in the store then.

    Raises:
        RunError: the training's result is gone, or its base model is another by now.
    """
    spec, store = call.spec, call.store
    made = _training(spec, store, trained.key)
    precision = dtype.precision if dtype else None
    if spec.model.adapter is Adapter.NONE:
        if precision is not None:
            folder = store.path(made.stage, made.key)
            cast = stageline.merge_ref(trained.key, None, stageline.TORCH_NAMES[precision])
            made = _made(call, cast, Work(spec, store, folder))
    elif to is not ExportTo.ADAPTER:
        made = _merged(call, made, precision)
    if to is ExportTo.GGUF:
        work = Work(spec, store, store.path(made.stage, made.key))
        ends = taught_ends(store.path("train", trained.key))
        quantized = None if precision else dtype
        made = _made(call, stageline.gguf_ref(made, spec.name, ends, quantized), work)
    return made


def _made(call: Caller, ref: StageRef, work: Work) -> StageRef:
    with locked(work.run.flow_lock, shared=True):
        call.cached(tasks.make_model, ref, work)
    return ref


def _merged(call: Caller, training: StageRef, dtype: Precision | None) -> StageRef:
    """The stage that merges the adapter into its base, done.

    Raises:
        RunError: the base model is another by now.
    """
    spec, store = call.spec, call.store
    base = line.fetched(call, stageline.resolve_model(spec, store), stageline.resolve_model)
    if stageline.model_key(base) != training.inputs["model"]:
        raise RunError(
            f"{spec.model.base_model} is not the model that run {spec.name} was trained upon: its "
            "files have changed since, so the adapter does not belong to them. Put the earlier "
            "files back (of a hub model: name their commit as model.revision and run the spec "
            "again), or use `--to adapter`"
        )
    assert base.model_dir is not None, "the base model was fetched"
    name = None if dtype is None else stageline.TORCH_NAMES[dtype]
    merge = stageline.merge_ref(training.key, basemodel.key(base.base), name)
    return _made(call, merge, Work(spec, store, base.model_dir).of_result(training.key))


def _package(
    call: Caller, made: StageRef, train: str, to: ExportTo, license: str | None
) -> StageRef:
    """The stage that puts a card and where to stop beside what was made, done."""
    store = call.store
    beside = card_files(call.spec, store, train, to, license)
    if to is not ExportTo.GGUF:  # which has all of it in itself
        folder = store.path(made.stage, made.key)
        ends = taught_ends(store.path("train", train))
        beside[GENERATION_CONFIG] = generation_config(folder, ends)
    ref = package_ref(made, beside)
    call.cached(tasks.package, ref, made, beside, store)
    return ref


def _training(spec: RunSpec, store: Store, key: str) -> StageRef:
    """The training of that key, its result in the store."""
    need_result(store, spec, key, get_run_logger())
    facts = read_manifest(store.path("train", key)).facts
    return StageRef("train", key, facts["inputs"], "train")
