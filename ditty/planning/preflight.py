"""What can be known to fail before anything is started is said here, by name."""

import importlib.util
import os
import uuid
from collections.abc import Collection

from pydantic import ValidationError

from ditty.config.choices import Adapter, Device, Engine, Quantization, Tracker
from ditty.config.dataspec import DataSpec
from ditty.config.spec import RunSpec, TrainSpec
from ditty.errors import RunMismatch, SpecError, StoreError, cut, install
from ditty.pretrained import basemodel, layernames
from ditty.pretrained.tensorfiles import headers
from ditty.processes.environment import resolve_device
from ditty.processes.launch import backend_of
from ditty.runs.identity import GUARD_KEYS
from ditty.runs.rundir import RunDir
from ditty.stages import evaltasks, share, stageline
from ditty.store.artifacts import Store
from ditty.store.files import make_dir, read_json
from ditty.store.remote import Remote

CLUSTERS = {Engine.DASK: "prefect_dask", Engine.RAY: "prefect_ray"}
"""The modules of the extras of these names."""


def check(spec: RunSpec, store: Store, *, trains: bool = True) -> stageline.StageLine:
    """Look at everything that a run needs and that costs nothing to look at.

    Checks what `check_inputs` does, and that the upload target, and the place where stores are
    shared, take and give back a small object.

    Args:
        trains: whether a training may begin; else what that alone needs may be missing here.
    Returns:
        The stages, resolved.
    Raises:
        DittyError: the first thing that is wrong.
    """
    line = check_inputs(spec, store, trains=trains)
    check_places(spec.upload.url)
    return line


def check_inputs(spec: RunSpec, store: Store, *, trains: bool = True) -> stageline.StageLine:
    """`check` without the places that it writes to.

    Checks what `check_machine` does, and that sources, functions and the base model exist and fit
    the spec, and the run directory is not another spec's.
    """
    check_machine(spec, store, trains=trains)
    line = stageline.resolve(spec, store)
    check_model(spec, line)
    check_run(spec, store)
    return line


def check_machine(spec: RunSpec, store: Store, *, trains: bool = True) -> None:
    """What needs neither data nor a model: the store can be written, the launch fits this machine,
    and the packages and tasks that the spec names are there."""
    check_store(store)
    backend_of(spec.launch).check(spec.launch)
    if trains:
        check_optimizer(spec)
        check_trackers(spec.train.report_to, spec.launch.environment)
    check_engine(spec.data)
    check_tasks(spec)


def check_places(upload_url: str | None = None) -> None:
    """Raise unless the upload target, and the place where stores are shared, can be used."""
    if upload_url:
        Remote(upload_url).check()
    if shared := share.place():
        shared.check()


def check_tasks(spec: RunSpec) -> None:
    """Raise SpecError unless each of `evaluate.tasks` can be run, and measures what is required."""
    if not spec.evaluate.tasks:
        if spec.evaluate.tasks_limit is not None:
            raise SpecError("evaluate.tasks_limit goes with tasks, and there are none: remove it")
        return
    evaltasks.version()
    evaltasks.check_names(spec.evaluate.tasks)
    names = {evaltasks.identify(task)["name"] for task in spec.evaluate.tasks}
    for measure in spec.evaluate.require:
        task = measure.rpartition("/")[0]
        # A name that the harness knows may be of a group, whose tasks are measured too.
        if task and task not in names and all(map(evaltasks.is_file, spec.evaluate.tasks)):
            raise SpecError(
                f"evaluate.require names {measure}, and evaluate.tasks measures only "
                f"{', '.join(sorted(names))}"
            )


def check_optimizer(spec: RunSpec) -> None:
    """Raise SpecError where `train.optimizer` needs a GPU, and the run is on a CPU."""
    optimizer, device = spec.train.optimizer, resolve_device(spec.launch)
    if optimizer.startswith("paged_") and device == Device.CPU:
        raise SpecError(
            f"train.optimizer: {optimizer} needs a GPU, and this run is on {device}: use "
            f"{optimizer.removeprefix('paged_')}"
        )


def check_engine(data: DataSpec) -> None:
    """Raise SpecError unless `data.engine` has shards to make, and its package is installed."""
    if data.engine is not Engine.THREADS and data.shards == 1:
        raise SpecError(
            f"data.engine: {data.engine} makes shards, and data.shards is 1: set data.shards (64, "
            "say), or remove engine and engine_address"
        )
    package = CLUSTERS.get(data.engine)
    if package and importlib.util.find_spec(package) is None:
        raise SpecError(
            f"data.engine: {data.engine} needs the package prefect-{data.engine}, which is not "
            f"installed: {install(data.engine)}, and where its workers run, or remove engine and "
            "engine_address"
        )


def check_store(store: Store) -> None:
    """Raise StoreError unless a file can be made in the store's home."""
    probe = make_dir(store.home) / f".probe-{uuid.uuid4().hex[:8]}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StoreError(
            f"cannot write to {store.home}: {error.strerror}. "
            "Set DITTY_HOME to a directory that you can write to"
        ) from error


def check_trackers(trackers: Collection[Tracker], variables: Collection[str]) -> None:
    """Raise SpecError unless each tracker is installed, W&B knows whether to log in, and MLflow
    which server.

    Args:
        variables: names of those that the training will have.
    """
    for tracker in trackers:
        if importlib.util.find_spec(tracker.value) is None:
            raise SpecError(
                f"train.report_to: {tracker} needs the package {tracker}, which is not installed: "
                f"{install(tracker)}, or remove {tracker} from "
                "train.report_to"
            )
    if Tracker.WANDB in trackers and not {"WANDB_API_KEY", "WANDB_MODE"} & set(variables):
        raise SpecError(
            "train.report_to: wandb needs WANDB_API_KEY to log in, or WANDB_MODE=offline: export "
            "one of them, and name it in launch.environment"
        )
    server = "MLFLOW_TRACKING_URI"
    if Tracker.MLFLOW in trackers and server in os.environ and server not in variables:
        raise SpecError(
            f"train.report_to: mlflow would not get {server}, which is set here: name it in "
            "launch.environment, or unset it to write into the run directory"
        )


def check_model(spec: RunSpec, line: stageline.StageLine) -> None:
    """Raise unless the base model, once it is here, fits the spec."""
    if line.model_dir is None:
        return
    quantize = spec.model.quantization is not Quantization.NONE
    basemodel.check_folder(line.model_dir, spec.data.seq_len, quantize=quantize)
    if spec.model.adapter is not Adapter.NONE:
        layers = layernames.of_tensors(tensor.name for tensor in headers(line.model_dir))
        layernames.check_layers(layers, spec.model.target_modules, spec.model.modules_to_save)


def check_run(spec: RunSpec, store: Store) -> None:
    """Raise RunMismatch if this run's name was given to another spec, naming the differences.

    A name whose training never began is free, unless a flow of it is alive: a spec is mended after
    its first stages have failed.
    """
    run = RunDir.named(spec.name, store.home)
    if run.has_trained() or run.has_flow():
        check_spec(spec, run)


def check_spec(spec: RunSpec, run: RunDir) -> None:
    """Raise RunMismatch if the spec in a run directory is another one."""
    saved = read_json(run.spec_file)
    if saved is not None:
        differences = list(spec_differences(_with_defaults(saved), spec.model_dump(mode="json")))
        if differences:
            raise RunMismatch(
                f"run {spec.name} in {run.root} was started with another spec: "
                f"{'; '.join(differences)}. Choose another name, or remove that directory"
            )


def _with_defaults(saved: dict) -> dict:
    """A saved spec with the keys that have come since; as it stands where it is no spec today."""
    try:
        return RunSpec.model_validate(saved).model_dump(mode="json")
    except ValidationError:
        return saved


def spec_differences(saved: dict, now: dict) -> list[str]:
    """Keys that decide the trained weights and differ between two specs (as JSON)."""
    harmless = {("train", key) for key in stageline.HARMLESS_TRAIN_KEYS}
    harmless |= {("train", key) for key in GUARD_KEYS}  # the checkpoint itself knows better
    harmless |= {("data", key) for key in stageline.HARMLESS_DATA_KEYS}
    if not _evaluation_decides(now):
        harmless.add(("train", "eval_steps"))
    found = []
    for section in ("data", "model", "train"):
        for key in sorted(now[section].keys() | saved.get(section, {}).keys()):
            a, b = saved.get(section, {}).get(key), now[section].get(key)
            if a != b and (section, key) not in harmless:
                found.append(f"{section}.{key} was {cut(repr(a), 200)}, now {cut(repr(b), 200)}")
    batches = [_global_batch(s) for s in (saved, now)]
    if batches[0] != batches[1]:
        found.append(
            f"the global batch (micro_batch_size x gradient_accumulation_steps x num_processes) "
            f"was {batches[0]}, now {batches[1]}"
        )
    return found


def _global_batch(spec: dict) -> int:
    train = spec["train"]
    rows = train["micro_batch_size"]
    size: int = (1 if rows == "auto" else rows) * train["gradient_accumulation_steps"]
    launch = spec["launch"]
    return size * int(launch["num_processes"]) * int(launch.get("num_machines", 1))


def _evaluation_decides(spec: dict) -> bool:
    return TrainSpec.model_validate(spec["train"]).evaluation_decides
