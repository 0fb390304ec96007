"""The tasks of the flow: each makes one stage's artifact, or finds it."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prefect import State, Task, task
from prefect.blocks.system import Secret
from prefect.logging import get_run_logger

from ditty.config.spec import RunSpec
from ditty.pretrained import basemodel
from ditty.processes import launch
from ditty.results import hubpush
from ditty.results import package as packages
from ditty.results.promotion import InPlace, Promotions
from ditty.runs.rundir import RunDir
from ditty.stages import datastages, share
from ditty.stages.stageline import StageLine, StageRef
from ditty.store.artifacts import MANIFEST, Manifest, Store, read_manifest
from ditty.store.files import read_json, write_json
from ditty.store.remote import Remote, final_name
from flows.caching import Reference, cached, reference
from flows.engines import run_shards
from flows.events import Event, EventState, emit
from flows.pages.costs import StageBook
from flows.retries import Budget
from flows.slot import training_slot
from flows.training import Work, run_attempt

TOKEN_BLOCK = "hf-token"  # noqa: S105  # the name of a Secret block of Prefect's


@task(name="fetch", task_run_name="{ref.title}")
def fetch_hub(ref: StageRef, base: basemodel.BaseModelRef, store: Store) -> None:
    """Download a hub model into the hub's own cache, which is content-addressed itself."""
    basemodel.fetch(base, store)


@task(name="data", task_run_name="{ref.title}")
def make_data(ref: StageRef, line: StageLine, spec: RunSpec, store: Store) -> Reference:
    """A data stage, in this process but for its shards."""
    make = partial(datastages.build_data, ref, line, spec, store, run_shards)
    return reference(ref, share.made(ref, store, make))


@task(name="model", task_run_name="{ref.title}")
def make_model(ref: StageRef, work: Work) -> Reference:
    """`fetch` of .gguf or .bin files, `prequantize`, `merge`, `gguf`: tensors, so in a process."""
    return _in_a_process(ref, work)


@task(name="evaluate", task_run_name="{ref.title}")
def evaluate(ref: StageRef, work: Work) -> Reference:
    """A held-out loss, or a task; on the GPU, so that it waits for its turn as a training does."""
    if work.store.find(ref.stage, ref.key):
        return reference(ref, committed(ref, work.store))
    with training_slot(work.spec.launch):
        return _in_a_process(ref, work)


def evaluation(ref: StageRef, store: Store) -> dict[str, Any]:
    """What `evaluate` has found: loss (nats a supervised token), perplexity, tokens, rows; and
    samples, see `ditty.training.evaluate.complete`, where `evaluate.num_samples` asks for some."""
    folder = store.path(ref.stage, ref.key)
    found = read_json(folder / "evaluation.json")
    assert found is not None, f"{ref.title} was committed"
    samples = read_json(folder / "samples.json")
    return found if samples is None else found | {"samples": samples}


def scores(ref: StageRef, store: Store) -> dict[str, float]:
    """What `evaluate` has found of a task: "task/metric" -> value."""
    found = read_json(store.path(ref.stage, ref.key) / "scores.json")
    assert found is not None, f"{ref.title} was committed"
    return found


def _in_a_process(ref: StageRef, work: Work) -> Reference:
    log = get_run_logger()

    def make() -> Manifest:
        result = launch.run_stage(
            ref.stage,
            work.job(ref),
            launch.open_attempt(work.run, ref.stage, work.spec.launch),
            work.spec.launch,
            distributed=False,
            on_line=lambda line: log.info("%s", line),
            check=lambda: None,
        )
        launch.raise_for_result(result)
        return committed(ref, work.store)

    return reference(ref, share.made(ref, work.store, make))


@task(name="train", task_run_name="train {work.spec.name}")
def train(ref: StageRef, work: Work) -> Reference:
    """All steps of training, in processes of their own."""
    if not work.store.find(ref.stage, ref.key):
        with training_slot(work.spec.launch):
            run_attempt(ref, work)
    return reference(ref, committed(ref, work.store))


@task(name="upload", task_run_name="{ref.title}")
def upload(ref: StageRef, trained: StageRef, spec: RunSpec, store: Store) -> Reference:
    """Copy the result to the upload target, and keep a receipt.

    It counts as done for as long as the target has it: the hit asks there (caching.receipt_holds).
    """
    assert spec.upload.url is not None, "a spec without upload.url has no stage upload"
    name = final_name(spec.name, trained.key)
    digest = Remote(spec.upload.url).put(store.path(trained.stage, trained.key), name)
    receipt = {"target": spec.upload.url, "name": name, "digest": digest}

    def make(out: Path) -> dict[str, Any]:
        write_json(out / "receipt.json", receipt)
        return {}

    facts = {"stage": ref.stage, "inputs": ref.inputs, **receipt}
    return reference(ref, store.build(ref.stage, ref.key, facts, make))


@task(name="package", task_run_name="{ref.title}")
def package(ref: StageRef, made: StageRef, beside: dict[str, bytes], store: Store) -> Reference:
    """What is exported of `made`, in this process: links, and a few small files."""
    make = partial(packages.package, made, beside, store)
    facts = {"stage": ref.stage, "inputs": ref.inputs}
    return reference(ref, store.build(ref.stage, ref.key, facts, make))


@task(name="export", task_run_name="{ref.title}")
def export(ref: StageRef, source: Path, public: bool) -> str:
    """Copy an artifact to another place, verified there; its digest, or the commit's url."""
    out = ref.inputs["out"]
    if repo := hubpush.repo_of(out):
        return hubpush.push(source, repo, hub_token(), private=not public)
    url, _, name = out.rpartition("/")
    return Remote(url).put(source, name)


def hub_token() -> str | None:
    """HF_TOKEN, that of `hf auth login`, or the Secret block TOKEN_BLOCK; None: there is none."""
    from huggingface_hub import get_token

    if found := get_token():
        return found
    try:
        block = Secret.load(TOKEN_BLOCK)
    except ValueError:  # Prefect's word for: there is no such block
        return None
    assert isinstance(block, Secret), "outside of an event loop"
    return str(block.get())


@task(name="promote", task_run_name="{ref.title}")
def promote(ref: StageRef, promotions: Promotions, pointer: InPlace) -> str:
    """Put a result in place; the URI of its promotion."""
    return promotions.promote(ref, pointer)


def committed(ref: StageRef, store: Store) -> Manifest:
    """What a worker has made, verified."""
    manifest = store.find(ref.stage, ref.key)
    assert manifest is not None, f"{ref.stage} {ref.key} was to be committed by now"
    return manifest


@dataclass(frozen=True)
class Caller:
    """Calls tasks under one policy, tells listeners, and books what each stage took.

    Tasks are called directly, not submitted: a thread would not see SIGTERM.
    """

    spec: RunSpec
    store: Store
    book: StageBook
    """How the stages so far went."""

    @classmethod
    def of(cls, spec: RunSpec, store: Store) -> "Caller":
        """One with an empty book."""
        return cls(spec, store, StageBook(store))

    def __call__(self, stage_task: Task[Any, Any], ref: StageRef, *args: Any) -> Any:
        """Run a task that is not cached."""
        return self._call(self._retrying(stage_task, ref), ref, args)

    def cached(self, stage_task: Task[Any, Any], ref: StageRef, *args: Any) -> Any:
        """Run a task unless the artifact of `ref` is there, recorded and verified."""
        assert ref.key, f"the key of {ref.title} is not known"
        return self._call(cached(self._retrying(stage_task, ref), self.store), ref, args)

    def skip(self, ref: StageRef) -> None:
        """A stage whose result is there without a task being asked."""
        self.book.skip(ref)
        emit(Event(ref.title, EventState.CACHED))

    def _retrying(self, stage_task: Task[Any, Any], ref: StageRef) -> Task[Any, Any]:
        budget = Budget(self.spec.launch, RunDir.named(self.spec.name, self.store.home))
        return budget.given_to(stage_task.with_options(name=ref.stage))

    def _call(self, stage_task: Task[Any, Any], ref: StageRef, args: tuple[Any, ...]) -> Any:
        emit(Event(ref.title, EventState.STARTED))
        timing = self.book.start(ref)
        try:
            state: State[Any] = stage_task(ref, *args, return_state=True)  # type: ignore[assignment]
            result = state.result()
        except BaseException as error:
            timing.end(EventState.FAILED)
            emit(Event(ref.title, EventState.FAILED, message=str(error)))
            raise
        ended = EventState.CACHED if state.name == "Cached" else EventState.DONE
        timing.end(ended)
        emit(Event(ref.title, ended, message=summary(ref, self.store)))
        return result


def summary(ref: StageRef, store: Store) -> str:
    """What an artifact holds, for people."""
    path = store.path(ref.stage, ref.key)
    if not (path / MANIFEST).exists():
        return ""
    facts = read_manifest(path).facts
    counts = [
        f"{facts[k]:,} {k}" for k in ("rows", "tokens", "steps") if isinstance(facts.get(k), int)
    ]
    return ", ".join(counts)
