"""Every key of a spec, changed before a resume: refused, unless it is known to be harmless.

What is harmless is listed here by hand: a key that is added to the spec has to be thought about.
"""

from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, get_args

import pytest

from ditty.config.spec import DataSpec, ModelSpec, RunSpec, TrainSpec
from ditty.errors import RunMismatch
from ditty.planning import preflight
from ditty.runs.identity import GUARD_KEYS, check_identity
from ditty.runs.rundir import RunDir
from ditty.stages import stageline
from ditty.store.artifacts import Store
from ditty.store.files import make_dir, write_json
from tests.test_bad_input import make_spec

SECTIONS = {"data": DataSpec, "model": ModelSpec, "train": TrainSpec}
# They say how often, where or how fast, and not what.
HARMLESS = {
    "data.engine", "data.max_bad_fraction", "data.num_proc", "data.shards",
    "train.activation_checkpointing", "train.deterministic", "train.eval_steps",
    "train.keep_checkpoints", "train.max_memory_gb", "train.num_samples", "train.report_to",
    "train.sample_max_tokens", "train.sample_steps", "train.save_steps", "train.sharding",
}  # fmt: skip
# Keys that do nothing, or may not be there, in a spec with one local source and one process.
IDLE = {
    "data.connection", "data.version", "data.engine_address", "data.seed",
    "data.stopping_strategy", "data.sources", "data.subset", "data.split",
    "data.revision", "model.revision", "model.trust_remote_code", "train.shard_size",
    "train.cpu_offload", "train.offload_gpu_gb",
}  # fmt: skip
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
VALUES = {
    "data.format": "conversations",
    "data.columns": {"messages": "talk"},
    "data.loss_on": "all",
    "data.chat_template": TEMPLATE,
    "data.operations": [{"method": "sort", "kwargs": {"column_names": "messages"}}],
    "data.eval_fraction": 0.3,
    "data.seq_len": 48,
    "model.target_modules": ["q_proj"],
    "model.modules_to_save": ["lm_head"],
    "train.schedule_options": {"num_cycles": 2},
    "train.compile": True,
    "train.micro_batch_size": 2,
    "train.report_to": ["tensorboard"],
}


def other(key: str, annotation: Any, value: Any) -> Any:
    """Another value of a key: of VALUES, the next member of an enum, or a number more."""
    if key in VALUES:
        return VALUES[key]
    kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
    if enums := [kind for kind in kinds if issubclass(kind, Enum)]:
        return next(member for member in enums[0] if member != value)
    if isinstance(value, bool):
        return not value
    assert int in kinds or float in kinds, f"say in VALUES what else {key} may be"
    return (value or 1) * 2 if int in kinds else (value or 0.4) / 2


def changes(spec: RunSpec) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, that section with another value) of every key that does something here."""
    for section, model in SECTIONS.items():
        values = getattr(spec, section).model_dump(mode="json")
        for name, field in model.model_fields.items():
            key = f"{section}.{name}"
            # What became of a step out of the ordinary is for the checkpoint to tell: test_anomaly.
            if key in IDLE | {"data.source", "model.base_model"} or name in GUARD_KEYS:
                continue
            changed = {**values, name: other(key, field.annotation, values[name])}
            if name in ("early_stopping_patience", "final_weights"):
                changed["eval_steps"] = 5
            if name == "engine":
                changed["shards"] = 5
            yield key, changed


@pytest.mark.fault("changed spec")
def test_every_key_that_changes_the_weights_is_seen(
    tmp_path: Path, home: Path, figure: Callable[[str], None]
) -> None:
    """By the identity of a checkpoint, and by the run's name before anything starts."""
    spec, store = make_spec(tmp_path), Store(home)
    was = stageline.resolve(spec, store).need("train").inputs
    run = RunDir.named(spec.name, home)
    write_json(make_dir(run.root) / "spec.json", spec.model_dump(mode="json"))
    run.new_attempt("train")  # before it another spec may take the name
    refused = set()
    for key, section in changes(spec):
        values = {**spec.model_dump(mode="json"), key.partition(".")[0]: section}
        changed = RunSpec.model_validate(values)
        now = stageline.resolve(changed, store).need("train").inputs
        seen = now != was
        assert seen == (key not in HARMLESS), f"{key}: the identity of a checkpoint"
        if seen:
            refused.add(key)
            with pytest.raises(RunMismatch):
                check_identity(now, was, "a checkpoint")
            with pytest.raises(RunMismatch):
                preflight.check_run(changed, store)
    kept = len(HARMLESS)
    figure(f"undetected 0 of {len(refused)} keys changed in turn; {kept} harmless ones pass")


def test_keys_that_have_come_since_a_run_began_are_no_change(tmp_path: Path, home: Path) -> None:
    source = {"source": str(tmp_path / "rows.jsonl"), "weight": 1.0}
    values = make_spec(tmp_path).model_dump(mode="json")
    values["data"] |= {"source": None, "sources": [source, source]}
    spec = RunSpec.model_validate(values)
    run = RunDir.named(spec.name, home)
    was = spec.model_dump(mode="json")
    for entry in was["data"]["sources"]:
        del entry["connection"], entry["version"]
    write_json(make_dir(run.root) / "spec.json", was)
    preflight.check_spec(spec, run)
    was["data"]["sources"][0]["weight"] = 2.0
    write_json(run.spec_file, was)
    with pytest.raises(RunMismatch, match="data.sources was"):
        preflight.check_spec(spec, run)
