"""`python -m ditty.worker STAGE ATTEMPT`: one stage in a process of its own.

Reads attempt/job.json, does the work, and leaves attempt/result.json: the meaning of its end.
STAGE is `fetch` (convert a GGUF or .bin files), `prequantize`, `train`, `evaluate`, `harness`,
`merge`, `gguf` or `bench`.
"""

import dataclasses
import logging
import math
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ditty.config.choices import ExportDtype, FinalWeights
from ditty.config.spec import RunSpec
from ditty.errors import LESS_MEMORY, Crashed, DittyError, OutOfMemory, Preempted, RunBusy, RunError
from ditty.processes.signals import show_stack_when_asked
from ditty.runs.rundir import Result, RunDir, Status, read_job, write_result
from ditty.store.artifacts import Make, Store
from ditty.store.files import locked, write_json
from ditty.store.readahead import read_folder_ahead

log = logging.getLogger("ditty.worker")

PROGRESS_SECONDS = 5.0
LOCK_WAIT_SECONDS = 60.0  # longer than an interrupted run's grace


@dataclasses.dataclass(frozen=True)
class Job:
    """What job.json says.

    Attributes:
        home: DITTY_HOME.
        spec: the run's spec.
        key: content key of the artifact to make.
        inputs: what the key is the hash of.
        model_dir, data_dir, trained_dir: committed folders to read.
        device: "cpu" or "cuda".
    """

    home: Path
    spec: RunSpec
    key: str
    inputs: dict[str, Any]
    model_dir: Path
    data_dir: Path | None
    trained_dir: Path | None
    device: str

    @classmethod
    def read(cls, attempt: Path) -> "Job":
        """Parse attempt/job.json, as whoever launches the stage wrote it."""
        value = read_job(attempt)
        data_dir, trained_dir = value.pop("data_dir"), value.pop("trained_dir", None)
        return cls(
            home=Path(value.pop("home")),
            spec=RunSpec.model_validate(value.pop("spec")),
            model_dir=Path(value.pop("model_dir")),
            data_dir=Path(data_dir) if data_dir else None,
            trained_dir=Path(trained_dir) if trained_dir else None,
            **value,
        )


class Shown:
    """Progress of a model's tensors, in the log: every few seconds, and at the end."""

    def __init__(self, verb: str):
        self.verb, self.last = verb, time.monotonic()

    def __call__(self, done: int, total: int, name: str) -> None:
        """One more tensor; in bytes of the source."""
        now = time.monotonic()
        if done == total or now - self.last >= PROGRESS_SECONDS:
            self.last = now
            log.info("%s %.2f of %.2f GB (%s)", self.verb, done / 1e9, total / 1e9, name)


def convert(job: Job, attempt: Path) -> Result:
    """The `fetch` stage of a GGUF file, or of a folder with .bin files."""
    from ditty.conversion.modelstages import fetches

    make = fetches(job.model_dir, Shown("converted"))
    return _build(job, "fetch", make, resumable=True)


def prequantize(job: Job, attempt: Path) -> Result:
    """The `prequantize` stage."""
    from ditty.conversion.modelstages import quantizes

    dtype = job.inputs["dtype"]
    make = quantizes(job.model_dir, job.spec.model, dtype, job.device, Shown("quantized"))
    return _build(job, "prequantize", make, resumable=True)


def evaluate(job: Job, attempt: Path) -> Result:
    """The `evaluate` stage, in one process: the model fits where it is loaded."""
    from ditty.evaluation.evalstages import evaluates

    assert job.data_dir is not None, "an evaluation reads packed rows"
    make = evaluates(job.model_dir, job.trained_dir, job.data_dir, job.spec, job.device)
    return _build(job, "evaluate", make)


def harness(job: Job, attempt: Path) -> Result:
    """The `harness` stage: one task, in one process, on what `evaluate` measures."""
    from ditty.evaluation.evalstages import runs_task
    from ditty.stages.evaltasks import identified

    task = identified(job.spec.evaluate.tasks, job.inputs["task"])
    make = runs_task(job.model_dir, job.trained_dir, task, job.spec, job.device)
    return _build(job, "harness", make)


def merge(job: Job, attempt: Path) -> Result:
    """The `merge` stage: on the CPU, whatever the machine has; without an adapter it casts."""
    from ditty.conversion.export import merge as merge_into

    def make(out: Path) -> dict[str, Any]:
        found = merge_into(
            job.model_dir,
            job.trained_dir,
            out,
            job.inputs["dtype"],
            progress=Shown("merged"),
            trust_remote_code=job.spec.model.trust_remote_code,
        )
        if job.spec.data.chat_template is not None:
            _save_tokenizer(job, out)  # over the base's, which is there already
        return found

    return _build(job, "merge", make, resumable=True)


def gguf(job: Job, attempt: Path) -> Result:
    """The `gguf` stage: a whole model as one file."""
    from ditty.conversion.ggufexport import write_gguf

    def make(out: Path) -> dict[str, Any]:
        name, ends = job.inputs["name"], job.inputs["ends"]
        to = ExportDtype(job.inputs["quantized"]) if "quantized" in job.inputs else None
        shown = Shown("written")
        return write_gguf(job.model_dir, out, name, ends, quantized=to, progress=shown)

    return _build(job, "gguf", make)


def bench(job: Job, attempt: Path) -> Result:
    """The measurement that `ditty bench` asks for; all ranks run this."""
    from ditty.distributed.world import join_world, leave_world
    from ditty.planning.benchmark import REPORT

    launch = job.spec.launch
    world = join_world(job.device, launch.world_size, launch.collective_timeout_seconds)
    try:
        if job.inputs["by"] == "trl":
            from ditty.speed.bench_trl import measure_trl as measure
        else:
            from ditty.speed.bench import measure
        found = measure(job.spec, job.inputs, job.home, world)
        if world.main:
            write_json(attempt / REPORT, found)
    finally:
        leave_world()
    return Result(Status.OK)


def _build(job: Job, stage: str, make: Make, *, resumable: bool = False) -> Result:
    base_model = job.spec.model.base_model
    facts: dict[str, Any] = {"stage": stage, "inputs": job.inputs, "base_model": base_model}
    store = Store(job.home)
    # The flow holds the artifact's own lock, and may die before this process, on a cluster: then
    # another flow starts another job for it.
    with locked(store.lock(f"{stage}-job", job.key).path):
        store.build(stage, job.key, facts, make, resumable=resumable)
    return Result(Status.OK)


def train(job: Job, attempt: Path) -> Result:
    """The `train` stage: all ranks run this."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        read_folder_ahead(job.model_dir)  # while the libraries are imported
    from ditty.distributed.world import join_world, leave_world

    world = join_world(
        job.device, job.spec.launch.world_size, job.spec.launch.collective_timeout_seconds
    )
    keys = world.gather(f"{job.key[:12]}, sharded by {job.spec.train.sharding}")
    if len(set(keys)) > 1:
        raise RunError(
            f"the machines run different specs: the training's key is {keys[0]} on the first and "
            f"{next(k for k in keys if k != keys[0])} on another. Start the same on all (where "
            "their GPUs differ, name train.sharding)"
        )
    run = RunDir.named(job.spec.name, job.home)
    lock = run.training_lock()
    held = lock.acquire(LOCK_WAIT_SECONDS) if world.main else True
    if not world.from_main(held):
        raise RunBusy(f"another process trains in {run.root}; wait for it, or stop it")
    try:
        return _train(job, attempt, world, run)
    finally:
        if world.main:
            lock.release()
        leave_world()


def _train(job: Job, attempt: Path, world: Any, run: RunDir) -> Result:
    from ditty.training.hooks import OURS
    from ditty.training.trackers import reporting
    from ditty.training.trainer import Place, Trainer

    store = Store(job.home)
    done = store.find("train", job.key) if world.main else None
    if world.from_main(done is not None):
        return Result(Status.OK, job.spec.train.max_steps or 0)
    beat = _heartbeat(attempt, world.rank)
    beat("load", 0)
    module, feed, held_out = _load(job, world)
    place = Place(run, world, identity=job.inputs, heartbeat=beat)
    with reporting(job.spec, place) as reports:
        trainer = Trainer(module, feed, job.spec.train, place, held_out, reports.hooks(OURS))
        result = _fit(job, trainer, module)
        if world.main and result.status is Status.OK:
            reports.result(store.path("train", job.key), store)
    return result


def _fit(job: Job, trainer: Any, module: Any) -> Result:
    """Train, and commit what came of it."""
    from ditty.distributed.parallel import whole_weights

    outcome = trainer.fit()
    if not outcome.finished:
        return Result(
            Status.PREEMPTED,
            outcome.step,
            Preempted.__name__,
            f"stopped after step {outcome.step} by a {outcome.reason}; a rerun resumes there",
            retryable=outcome.reason != "stop file",
        )
    trainer.beat("commit", outcome.step)
    weights = whole_weights(trainer.parallel, trainer.world)
    if trainer.world.main:
        _commit(job, trainer, outcome, module, weights)
    trainer.world.gather(None)
    return Result(Status.OK, outcome.step)


def _load(job: Job, world: Any) -> tuple[Any, Any, Any]:
    from transformers import AutoTokenizer

    from ditty.data import read_rows
    from ditty.distributed.load import load_module
    from ditty.training.evaluate import HeldOut
    from ditty.training.feed import packed_feed

    spec = job.spec
    assert job.data_dir is not None, "training reads packed rows"
    module = load_module(job.model_dir, spec.model, spec.train, world)
    feed = packed_feed(read_rows(job.data_dir / "train.arrow"), spec.train, world)
    held_out = HeldOut(
        read_rows(job.data_dir / "eval.arrow"),
        AutoTokenizer.from_pretrained(job.model_dir, local_files_only=True),
        spec.train.num_samples,
        spec.train.sample_max_tokens,
    )
    return module, feed, held_out


def _heartbeat(attempt: Path, rank: int) -> Any:
    from ditty.runs.heartbeat import Heartbeat

    path = attempt / "heartbeat" / f"rank_{rank:05d}.json"
    show_stack_when_asked(path)
    return Heartbeat(path)


def _commit(job: Job, trainer: Any, outcome: Any, module: Any, weights: dict[str, Any]) -> None:
    """The trained adapter or model as an artifact, with its tokenizer and its metrics."""
    from ditty.data import read_rows
    from ditty.models.model import save_trained
    from ditty.results.package import learned_ends

    assert job.data_dir is not None, "training reads packed rows"
    records = list(trainer.run.metrics())
    facts: dict[str, Any] = {
        "stage": "train",
        "inputs": job.inputs,
        "run": job.spec.name,
        "base_model": job.spec.model.base_model,
        "steps": outcome.step,
        "eval": [{k: r[k] for k in ("step", "loss")} for r in records if r["kind"] == "eval"],
        "loss": next((r["loss"] for r in reversed(records) if _has_loss(r)), None),
        "ends": learned_ends(read_rows(job.data_dir / "train.arrow")),
    }
    if job.spec.train.final_weights is FinalWeights.BEST:
        facts["best_step"] = trainer.progress.best_step  # the one that the weights are of
    with Store(job.home).commit("train", job.key, facts) as out:
        save_trained(module, weights, job.spec.model.base_model, out)
        _save_tokenizer(job, out)


def _has_loss(record: dict[str, Any]) -> bool:
    """Whether it is of a step with a finite loss: one without may have been skipped."""
    return bool(record["kind"] == "train" and math.isfinite(record["loss"]))


def _save_tokenizer(job: Job, out: Path) -> None:
    """The base model's, with the chat template that it was trained with."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.model_dir, local_files_only=True)
    if job.spec.data.chat_template is not None:
        tokenizer.chat_template = job.spec.data.chat_template
    tokenizer.save_pretrained(out)


STAGES: dict[str, Callable[[Job, Path], Result]] = {
    "fetch": convert,
    "prequantize": prequantize,
    "train": train,
    "evaluate": evaluate,
    "harness": harness,
    "merge": merge,
    "gguf": gguf,
    "bench": bench,
}


def explain(error: BaseException) -> Result:
    """The result of an attempt that ended in `error`."""
    if _out_of_memory(error):
        message = f"{error}. It would not fit the next time either: {LESS_MEMORY}"
        return Result(Status.FAILED, kind=OutOfMemory.__name__, message=message)
    if isinstance(error, DittyError):
        name = type(error).__name__
        return Result(Status.FAILED, kind=name, message=str(error), retryable=error.retryable)
    text = "".join(traceback.format_exception_only(error)).strip()
    # A lost peer or a full network buffer passes; a bug does not.
    lost = any(
        word in text
        for word in ("NCCL", "gloo", "Connection closed by peer", "Broken pipe", "distributed.Dist")
    )
    passing = lost or isinstance(error, ConnectionError | TimeoutError)
    # Where all peers are on this machine, the lost one has crashed on it.
    here = os.environ.get("WORLD_SIZE", "1") == os.environ.get("LOCAL_WORLD_SIZE", "1")
    kind = Crashed.__name__ if lost and here else type(error).__name__
    return Result(Status.FAILED, kind=kind, message=text, retryable=passing)


def _out_of_memory(error: BaseException) -> bool:
    # By name: importing torch to ask would cost seconds in stages that do without. For a host that
    # has no more, torch has no class of its own.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _speaks(result: Result, attempt: Path) -> bool:
    """Whether this rank's result is the attempt's, which is one machine's.

    The machine's first rank tells of success. The rank that failed first knows why; the others
    only that it is gone.
    """
    if result.status is Status.FAILED:
        return not (attempt / "result.json").exists()
    return os.environ.get("LOCAL_RANK", "0") == "0"


def main(arguments: list[str]) -> int:
    """Run one stage; the exit code is 0 unless it failed."""
    stage, attempt = arguments[0], Path(arguments[1])
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    # It warns of a kernel for inference on CPUs that it did not find, as if that were missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)  # libraries to their callers, not to users
    try:
        job = Job.read(attempt)
        # What torch.compile made, for the next run: seconds in place of a minute.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(job.home / "compiled"))
        result = STAGES[stage](job, attempt)
    except Exception as error:
        traceback.print_exc()
        result = explain(error)
    if _speaks(result, attempt):
        write_result(attempt, result)
    return 0 if result.status is not Status.FAILED else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
