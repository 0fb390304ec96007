"""The line of stages of a spec: what each is called, its content key, and what the key is made of.

A key is the SHA-256 of the stage's version, the part of the spec that changes its result, and the
keys of its inputs. Raise a stage's version when its code starts to give other bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from ditty.config.choices import ExportDtype, OnAnomaly, OperationMethod, Precision, Quantization
from ditty.config.dataspec import DataSpec, Operation
from ditty.config.spec import RunSpec
from ditty.dataset import functions, sources
from ditty.errors import cut
from ditty.pretrained import basemodel
from ditty.stages import evaltasks
from ditty.store.artifacts import Store
from ditty.store.files import canonical_json, sha256_bytes

VERSIONS: dict[str, int] = {
    "fetch": 1,
    "load": 2,
    **dict.fromkeys(OperationMethod, 1),
    "tokenize": 2,
    "shard": 1,
    "pack": 1,
    "prequantize": 3,
    "train": 2,
    "upload": 1,
    "evaluate": 1,
    "harness": 1,
    "promote": 1,
    "merge": 2,
    "gguf": 1,
    "package": 1,
    "export": 1,
}

DATA_STAGES = ("load", *OperationMethod, "tokenize", "pack")

# Keys of `train` that leave the trained weights as they are, but for rounding (sharding in bf16,
# recomputation of compiled blocks): a rerun may change them and resume.
# The batch keys enter as their product, so that accumulation may be traded for processes.
# `eval_steps` counts where evaluations decide: see `training_identity`.
HARMLESS_TRAIN_KEYS = {
    "micro_batch_size",
    "gradient_accumulation_steps",
    "save_steps",
    "keep_checkpoints",
    "sharding",
    "shard_size",
    "cpu_offload",
    "offload_gpu_gb",
    "deterministic",
    "activation_checkpointing",
    "max_memory_gb",
    "num_samples",
    "sample_steps",
    "sample_max_tokens",
    "report_to",
}

# Keys of `data` that leave the rows as they are.
HARMLESS_DATA_KEYS = {"num_proc", "max_bad_fraction", "shards", "engine", "engine_address"}


@dataclass(frozen=True)
class StageRef:
    """One stage of one spec.

    Attributes:
        stage: its name, and its folder in the store.
        key: content key (64 hex digits), or "" while an input is not known yet.
        inputs: what the key is the hash of.
        title: what people read, e.g. "map ops.py:clean".
        operation: the row operation, where the stage is one.
    """

    stage: str
    key: str
    inputs: dict[str, Any]
    title: str
    operation: Operation | None = field(default=None, repr=False)


@dataclass(frozen=True)
class StageLine:
    """The stages of a spec in order.

    Attributes:
        base: the base model's identity.
        model_dir: the base model's folder, or None while it has not been fetched; then the keys
            of the stages after the row operations are not known, since the tokenizer is not.
        refs: the stages.
    """

    base: basemodel.BaseModelRef
    model_dir: Path | None
    refs: tuple[StageRef, ...]

    def only(self, stage: str) -> StageRef | None:
        """The one ref of `stage`, or None where the spec has no such stage."""
        found = [ref for ref in self.refs if ref.stage == stage]
        assert len(found) <= 1, f"{len(found)} stages {stage}"
        return found[0] if found else None

    def need(self, stage: str) -> StageRef:
        """The ref of a stage that every spec has."""
        ref = self.only(stage)
        assert ref is not None, f"no stage {stage}"
        return ref

    def data(self) -> tuple[StageRef, ...]:
        """The data stages, each of which reads the artifact of the one before."""
        return tuple(ref for ref in self.refs if ref.stage in DATA_STAGES)


def make_ref(
    stage: str, title: str, inputs: dict[str, Any], operation: Operation | None = None
) -> StageRef:
    """A ref whose key is the hash of `inputs`; unknown where an input's key is unknown."""
    known = "" not in inputs.values()
    content = {"stage": stage, "version": VERSIONS[stage], "inputs": inputs}
    key = sha256_bytes(canonical_json(content)) if known else ""
    return StageRef(stage, key, inputs, title, operation)


def resolve(spec: RunSpec, store: Store) -> StageLine:
    """The stages of `spec`, with keys as far as they are known.

    Reads the sources' identity (hashing local files, asking the hub for a commit); starts nothing.

    Raises:
        DittyError: a source, function or base model cannot be used.
    """
    rows = _row_refs(spec.data)  # first: what is wrong here is told without asking the hub
    model = resolve_model(spec, store)
    refs = [ref for ref in model.refs if ref.stage == "fetch"]
    digest = "" if model.model_dir is None else basemodel.tokenizer_digest(model.model_dir)
    refs += [*rows, *_token_refs(spec.data, rows[-1].key, digest)]
    identity = training_identity(spec, model_key(model), refs[-1].key)
    refs += [ref for ref in model.refs if ref.stage == "prequantize"]
    refs.append(make_ref("train", "train", identity))
    if spec.upload.url:
        inputs = {"train": refs[-1].key, "url": spec.upload.url, "name": spec.name}
        refs.append(make_ref("upload", f"upload to {spec.upload.url}", inputs))
    return StageLine(model.base, model.model_dir, tuple(refs))


def resolve_model(spec: RunSpec, store: Store) -> StageLine:
    """The stages of the base model alone: what a training's result is loaded upon.

    Raises:
        DittyError: the base model cannot be used.
    """
    base = basemodel.identify(spec.model.base_model, spec.model.revision)
    refs = list(_fetch_refs(base))
    if prequantizes(spec):
        refs.append(_prequantize_ref(spec, basemodel.key(base)))
    return StageLine(base, basemodel.locate(base, store), tuple(refs))


def model_key(line: StageLine) -> str:
    """The content key of what training loads: the quantized base, or the base as it is."""
    ref = line.only("prequantize")
    return ref.key if ref else basemodel.key(line.base)


def _fetch_refs(base: basemodel.BaseModelRef) -> Iterator[StageRef]:
    if base.kind != "folder":
        title = f"fetch {_short(base.name)}"
        yield StageRef("fetch", basemodel.key(base), dict(base.identity), title)


def convert_ref(pickled: basemodel.BaseModelRef) -> StageRef:
    """The stage that converts the .bin files of a hub model; see basemodel.pickled_snapshot."""
    title = f"convert {pickled.identity['repo']}"
    return StageRef("fetch", basemodel.key(pickled), dict(pickled.identity), title)


def _row_refs(data: DataSpec) -> list[StageRef]:
    named = _short(data.source) if data.source else f"{len(data.sources)} sources"
    title = f"load {cut(named, 60)}"
    refs = [make_ref("load", title, {"source": sources.identify(data)})]
    for operation in data.bound_operations:
        inputs = {"rows": refs[-1].key, **operation_inputs(operation)}
        refs.append(make_ref(operation.method.value, operation.describe(), inputs, operation))
    return refs


def _token_refs(data: DataSpec, rows: str, tokenizer: str) -> Iterator[StageRef]:
    fields = {"format", "columns", "seq_len", "overlong", "eval_fraction", "eval_max_rows"}
    inputs: dict[str, Any] = {
        "rows": rows,
        "tokenizer": tokenizer,
        "supervised": data.supervised.value,
        "options": data.model_dump(mode="json", include=fields),
    }
    if data.chat_template:
        inputs["chat_template"] = sha256_bytes(data.chat_template.encode())
    tokenized = make_ref("tokenize", "tokenize", inputs)
    yield tokenized
    inputs = {"tokens": tokenized.key, "seq_len": data.seq_len, "packing": data.packing.value}
    yield make_ref("pack", "pack", inputs)


def operation_inputs(operation: Operation) -> dict[str, Any]:
    """What an operation's result depends on beside the rows.

    A function may say what else that is (the content of a file that its kwargs name), see
    `functions.depends_on`.

    Raises:
        DataError: the function cannot be found, or does not take the kwargs.
    """
    inputs: dict[str, Any] = {"options": operation.model_dump(mode="json", exclude={"function"})}
    if operation.function is not None:
        function = functions.resolve(operation.function)
        inputs["function"] = functions.digest(function)
        label = f"operation {operation.describe()}"
        functions.check_call(function, [operation.given], operation.kwargs, label)
        inputs |= functions.depends_on(function, operation.kwargs, label)
    elif operation.method is OperationMethod.SHUFFLE:
        inputs["numpy"] = metadata.version("numpy")  # whose generator it is
    return inputs


def _short(reference: str) -> str:
    """`/a/b/ops.py:clean` -> `ops.py:clean`."""
    return Path(reference).name if reference.startswith("/") else reference


def prequantizes(spec: RunSpec) -> bool:
    """Whether the base is quantized once, in a stage; int8 with offload is at each load."""
    offloads = spec.train.cpu_offload and spec.model.quantization is Quantization.INT8
    return spec.model.quantization is not Quantization.NONE and not offloads


def _prequantize_ref(spec: RunSpec, model_key: str) -> StageRef:
    """The stage that quantizes the base model `model_key` once."""
    to = spec.model.quantization
    inputs = {"model": model_key, "quantization": to.value, "dtype": base_dtype(spec)}
    if to is not Quantization.FP8:
        inputs["bitsandbytes"] = metadata.version("bitsandbytes")  # whose bits they are
    return make_ref("prequantize", f"prequantize {to}", inputs)


def evaluate_ref(spec: RunSpec, pack_key: str, model_key: str, trained: str | None) -> StageRef:
    """The stage that measures a held-out loss.

    Args:
        pack_key: of the packed rows, whose held-out part is taken.
        model_key: of the base model, as in `training_identity`.
        trained: of the training whose result is measured; None: the base model itself.
    """
    inputs: dict[str, Any] = {
        "model": model_key,
        "data": pack_key,
        "precision": spec.train.precision.value,
        "attention": spec.model.attention.value,
    }
    if spec.evaluate.num_samples:
        inputs["samples"] = [spec.evaluate.num_samples, spec.train.sample_max_tokens]
    if trained:
        inputs["train"] = trained
    title = f"evaluate {trained[:8]}" if trained else "evaluate the base model"
    return make_ref("evaluate", title, inputs)


def harness_refs(spec: RunSpec, model_key: str, trained: str | None) -> list[StageRef]:
    """The stages that run a task of `evaluate.tasks` each; arguments as of `evaluate_ref`.

    Raises:
        SpecError: the harness is not installed, or a task's file cannot be read.
    """
    of = trained[:8] if trained else "the base model"
    refs = []
    for task in spec.evaluate.tasks:
        inputs: dict[str, Any] = {
            "model": model_key,
            "precision": spec.train.precision.value,
            "attention": spec.model.attention.value,
            "task": evaltasks.identify(task),
            "limit": spec.evaluate.tasks_limit,
            "lm_eval": evaltasks.version(),
        }
        if trained:
            inputs["train"] = trained
        refs.append(make_ref("harness", f"task {inputs['task']['name']} of {of}", inputs))
    return refs


def merge_ref(trained: str, model_key: str | None, dtype: str | None = None) -> StageRef:
    """The stage that folds a trained adapter into its base, or casts what was trained whole.

    Args:
        trained: of the training.
        model_key: of the base model as it is, not quantized (`basemodel.key`); None: the training
            gave a whole model.
        dtype: torch's name, of the result; None: that of the base.
    """
    inputs = {"train": trained, "model": model_key, "dtype": dtype}
    title = f"merge {trained[:8]} into its base" if model_key else f"cast {trained[:8]} to {dtype}"
    return make_ref("merge", title, inputs)


def gguf_ref(
    made: StageRef, name: str, ends: list[int], quantized: ExportDtype | None = None
) -> StageRef:
    """The stage that writes a whole model as a .gguf file.

    Args:
        made: a training of all weights, or a merge.
        name: of the model, in the file.
        ends: ids of the tokens with which the model has learned to end, besides those it has.
        quantized: llama.cpp's type of the matrices; None: that of the model.
    """
    inputs: dict[str, Any] = {made.stage: made.key, "name": name, "ends": ends}
    if quantized:
        inputs |= {"quantized": quantized.value, "gguf": metadata.version("gguf")}
    return make_ref("gguf", f"write {made.key[:8]} as .gguf", inputs)


def export_ref(made: StageRef, out: str) -> StageRef:
    """The stage that copies the artifact of `made` to the url `out`."""
    return make_ref("export", f"export to {out}", {made.stage: made.key, "out": out})


TORCH_NAMES = {
    Precision.FP32: "float32",
    Precision.BF16: "bfloat16",
    Precision.FP16: "float16",
}


def base_dtype(spec: RunSpec) -> str:
    """The torch name of the frozen base's dtype; trained weights are fp32 always."""
    return TORCH_NAMES[spec.train.precision]


def training_identity(spec: RunSpec, model_key: str, pack_key: str) -> dict[str, Any]:
    """All that decides the trained weights: a checkpoint resumes only under the same identity."""
    train = spec.train.model_dump(mode="json", exclude=HARMLESS_TRAIN_KEYS | _idle_guards(spec))
    if not spec.train.evaluation_decides:
        del train["eval_steps"]
    excluded = {"base_model", "revision"} | ({"quantization"} if prequantizes(spec) else set())
    model = spec.model.model_dump(mode="json", exclude=excluded)
    return {
        "version": VERSIONS["train"],  # a checkpoint of earlier code may not be what ours gives
        "model": model_key,
        "data": pack_key,
        "train": train,
        "adapter": model,
        "global_batch_size": spec.global_batch_size,
    }


def _idle_guards(spec: RunSpec) -> set[str]:
    """The keys of the guards that leave the weights as they are: all that skip nothing."""
    idle = set()
    if spec.train.on_spike is not OnAnomaly.SKIP:
        idle |= {"on_spike", "spike_threshold", "spike_window"}
    if spec.train.on_non_finite is not OnAnomaly.SKIP:
        idle.add("on_non_finite")
    return idle
