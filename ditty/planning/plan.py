"""What a run of a spec would do: which stages are cached, which will run and why, and how long."""

import math
import os
from dataclasses import asdict, dataclass, field
from typing import Any

from ditty.config.legal import Strategy
from ditty.config.spec import RunSpec
from ditty.errors import LESS_MEMORY
from ditty.planning import preflight
from ditty.planning.fit import expected_memory, fitted
from ditty.pretrained import basemodel
from ditty.processes.environment import resolve_device
from ditty.processes.launch import backend_of
from ditty.runs.rundir import RunDir
from ditty.stages import datashards, share, stageline
from ditty.store.artifacts import Manifest, Store
from ditty.store.remote import Remote, final_name

SHOWN_FACTS = ("rows", "train_rows", "eval_rows", "tokens", "supervised_tokens", "fill_rate")


@dataclass(frozen=True)
class PlannedStage:
    """One line of a plan.

    Attributes:
        state: "cached", "will be fetched" or "will run".
        why: in a few words.
        facts: counts that the finished stage has recorded.
    """

    stage: str
    title: str
    key: str
    state: str
    why: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunPlan:
    """A plan of the whole run; `steps` and `epochs` are None while the rows are not counted.

    `place` says in one line where the stages with tensors will run.
    `strategy` says in one line what is trained, beside what, and held where; `memory`, where that
    of a GPU goes (ditty.planning.memory), or nothing where it is not predicted.
    """

    name: str
    place: str
    device: str
    num_processes: int
    strategy: str
    memory: str
    global_batch_size: int
    steps: int | None
    epochs: float | None
    stages: tuple[PlannedStage, ...]

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return asdict(self)


def make_plan(spec: RunSpec, store: Store) -> RunPlan:
    """Plan a run; reads sources and the store, starts nothing.

    Raises:
        DittyError: the run could not start; see preflight.check_inputs.
    """
    line = preflight.check_inputs(spec, store)
    planned: list[PlannedStage] = []
    manifests: dict[str, Manifest] = {}
    for ref in line.refs:
        # Before there is a result, the target need not even exist: a run creates its folder.
        waits = ref.stage == "upload" and "train" not in manifests
        manifest = None if waits else _done(ref, spec, store)
        if manifest:
            manifests[ref.stage] = manifest
        planned.append(_planned(ref, manifest, planned, spec, store))
    rows = manifests["pack"].facts["rows"] if "pack" in manifests else None
    batch = spec.global_batch_size
    steps = spec.train.max_steps or (math.ceil(spec.train.epochs * rows / batch) if rows else None)
    epochs = steps * batch / rows if rows and steps else None
    place, device = backend_of(spec.launch).describe(spec.launch), resolve_device(spec.launch)
    processes = spec.launch.world_size
    chosen, why = fitted(spec, line.model_dir)
    if spec.train.skips:
        why = ["each step waits for its numbers, which may skip it", *why]
    strategy = "; ".join([Strategy.of(chosen).describe(), *why])
    found = expected_memory(chosen, line.model_dir)
    memory = found.describe() if found else ""
    if found and not found.fits:
        memory += f". That is too much: {LESS_MEMORY}"
    work = (batch, steps, epochs, tuple(planned))
    return RunPlan(spec.name, place, device, processes, strategy, memory, *work)


def _done(ref: stageline.StageRef, spec: RunSpec, store: Store) -> Manifest | None:
    if not ref.key:
        return None
    if ref.stage == "upload":
        assert spec.upload.url
        return Remote(spec.upload.url).manifest(final_name(spec.name, ref.inputs["train"]))
    if ref.stage == "fetch":
        return _fetched(ref, spec, store)
    return store.find(ref.stage, ref.key)


def _fetched(ref: stageline.StageRef, spec: RunSpec, store: Store) -> Manifest | None:
    base = basemodel.identify(spec.model.base_model, spec.model.revision)
    if basemodel.locate(base, store) is None:
        return None
    return Manifest(facts={}, files={})


def _planned(
    ref: stageline.StageRef,
    manifest: Manifest | None,
    before: list[PlannedStage],
    spec: RunSpec,
    store: Store,
) -> PlannedStage:
    if manifest is not None:
        facts = {k: manifest.facts[k] for k in SHOWN_FACTS if k in manifest.facts}
        return PlannedStage(
            ref.stage, ref.title, ref.key, "cached", "in the store, verified", facts
        )
    if ref.key and share.there(ref):
        why = f"made by another machine, shared at {os.environ[share.VARIABLE]}"
        return PlannedStage(ref.stage, ref.title, ref.key, "will be fetched", why)
    if not ref.key:
        why = "its key needs the base model's tokenizer, which is not fetched yet"
    elif any(p.state == "will run" for p in before):
        first = next(p for p in before if p.state == "will run")
        why = f"not in the store; after {first.stage}"
    else:
        why = "not in the store"
    if datashards.is_sharded(ref, spec.data):
        why += f"; in {spec.data.shards} shards, by {spec.data.engine}"
    if ref.stage == "train":
        steps = RunDir.named(spec.name, store.home).committed_steps()
        why += f"; resumes from step {steps[-1]}" if steps else ""
    return PlannedStage(ref.stage, ref.title, ref.key, "will run", why)
