"""The works that tests kill: what one process does between two states of a home.

The data stages, quantizing, training, copying to a target and back, promoting; and what the flow
writes around a training.
"""

import json
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ditty.config.spec import RunSpec
from ditty.dataset import tables
from ditty.errors import Crashed
from ditty.processes import launch, local
from ditty.processes.backend import Ended
from ditty.results.promotion import InPlace, Promotions
from ditty.runs.lease import hold
from ditty.runs.rundir import RunDir
from ditty.stages import datastages, stageline
from ditty.store.artifacts import Store
from ditty.store.files import locked
from ditty.store.remote import Remote, final_name
from flows.line import begin, leave_word
from flows.mirror import Mirror, fetch_newer, fetch_result
from flows.training import Work, judge_crash
from tests.scenarios import Spy

STEPS = 3  # keep_checkpoints + 1: the last save removes the first

log = logging.getLogger(__name__)


class Place:
    """A home, and what is done there.

    Args:
        inputs: holds rows.jsonl and model/.
        s3: `s3://bucket` of the copies; none: a folder in the home.
        ranks: processes that do it together.
    """

    def __init__(self, inputs: Path, home: Path, s3: str | None = None, ranks: int = 1):
        self.inputs, self.home, self.ranks = inputs, home, ranks
        self.store = Store(home / "ditty")
        self.url = f"{s3}/{home.parent.name}" if s3 else (home / "target").as_uri()

    @property
    def spec(self) -> RunSpec:
        """A run whose every step is a checkpoint, and whose dropout shows what the RNG did."""
        return RunSpec.model_validate(
            {
                "name": "killed",
                "data": {
                    "source": str(self.inputs / "rows.jsonl"), "seq_len": 64, "eval_max_rows": 2,
                },
                "model": {
                    "base_model": str(self.inputs / "model"), "quantization": "nf4", "lora_r": 2,
                    "lora_dropout": 0.1, "attention": "sdpa",
                },
                "train": {
                    "max_steps": STEPS, "precision": "fp32", "save_steps": 1, "num_samples": 1,
                    "gradient_accumulation_steps": 1, "sample_max_tokens": 1,
                },
                "launch": {"device": "cpu", "threads": 1, "num_processes": self.ranks},
            }
        )  # fmt: skip

    @property
    def run(self) -> RunDir:
        return RunDir.named(self.spec.name, self.store.home)

    def line(self) -> stageline.StageLine:
        return stageline.resolve(self.spec, self.store)


def make_data(place: Place) -> None:
    """The data stages."""
    _data(place, place.spec)


def quantize(place: Place) -> None:
    """The stage that a killed process's heir goes on with."""
    _worker(place, "prequantize", place.inputs / "model")


def train(place: Place) -> None:
    """A whole training by the worker, its checkpoints, and its result."""
    import ditty.training.feed

    packed_feed = ditty.training.feed.packed_feed

    def spied(*args: Any) -> Spy:
        spy = Spy(packed_feed(*args), {})
        spy.seen = _Written(place.home / f"rows-of-rank-{os.environ.get('RANK', 0)}")
        return spy

    ditty.training.feed.packed_feed = spied
    ref = place.line().need("prequantize")
    _worker(place, "train", place.store.path(ref.stage, ref.key))


def copy(place: Place) -> None:
    """Checkpoint and result to the target, and from there to another machine."""
    remote, ref = Remote(place.url), place.line().need("train")
    place.run.clear_half_written()  # as the flow does that begins
    remote.check()
    if not remote.names():
        older = place.run.checkpoint(STEPS - 1)
        remote.put(older, f"killed/checkpoints/{older.name}")
    with hold(place.run, remote) as lease:
        assert lease is not None
        with Mirror(place.run, lease, 1, log):
            pass  # it copies the newest before it leaves, and removes the older one
    remote.put(place.store.path(ref.stage, ref.key), final_name("killed", ref.key))
    other = Place(place.inputs, place.home / "other")
    fetch_newer(other.run, remote, ref.inputs, log)
    other.run.clear_unfinished()  # as the training does that follows
    with locked(other.store.lock(ref.stage, ref.key).path):
        fetch_result(other.store, remote, "killed", ref.key, log)
    remote.delete(final_name("killed", ref.key))


def shards(place: Place) -> None:
    """The data stages, tokenizing in parts, which go when the whole is there."""
    tables.BATCH_ROWS = 20  # so that the few rows are three parts
    spec = place.spec
    _data(place, spec.model_copy(update={"data": spec.data.model_copy(update={"shards": 3})}))


def promote(place: Place) -> None:
    """A result in place of none."""
    promotions, train = Promotions(place.spec, place.store), place.line().need("train").key
    model = place.spec.model.model_dump(mode="json")
    pointer = InPlace(1, "killed", train, model, "t" * 64, "here", 2.5, None)
    promotions.promote(promotions.ref(pointer, "e" * 64), pointer)


def launching(place: Place) -> None:
    """What the flow writes into the run's directory around a training that ends without a word."""
    spec, run, ref = place.spec, place.run, place.line().need("train")
    begin(spec, run)
    attempt = run.new_attempt("train")
    job = Work(spec, place.store, place.inputs / "model", place.inputs).job(ref)
    local.guarded = lambda *_, **__: nullcontext(_Killed())
    result = launch.run_stage(
        "train", job, attempt, spec.launch,
        distributed=True, on_line=lambda _: None, check=lambda: None,
    )  # fmt: skip
    judge_crash(Crashed(result.message), attempt, run)
    leave_word(spec, run, ref.key, [])


class _Killed:
    """Stands in for processes that ended without a word."""

    def wait(self, seconds: float) -> Ended:
        return Ended("exit code 137 (SIGKILL)")


WORKS: dict[str, Callable[[Place], None]] = {
    work.__name__: work for work in (make_data, shards, quantize, train, copy, promote, launching)
}


class _Written(dict[int, list[int]]):
    """Rows by step, in a file that outlives us."""

    def __init__(self, path: Path):
        self.path = path

    def __setitem__(self, step: int, rows: list[int]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps([step, rows]) + "\n")


def _data(place: Place, spec: RunSpec) -> None:
    line = place.line()
    for ref in line.data():
        with locked(place.store.lock(ref.stage, ref.key).path):
            datastages.build_data(ref, line, spec, place.store)


def _worker(place: Place, stage: str, model_dir: Path) -> None:
    from ditty import worker

    line = place.line()
    ref, pack = line.need(stage), line.need("pack")
    attempt = place.run.attempts(stage)[-1]
    job = {
        "home": str(place.store.home),
        "spec": place.spec.model_dump(mode="json"),
        "key": ref.key,
        "inputs": ref.inputs,
        "model_dir": str(model_dir),
        "data_dir": str(place.store.path(pack.stage, pack.key)),
        "device": "cpu",
    }
    temporary = attempt / f"job-{os.getpid()}"  # each rank writes it, the same
    temporary.write_text(json.dumps(job))
    temporary.replace(attempt / "job.json")
    assert worker.main([stage, str(attempt)]) == 0, (attempt / "result.json").read_text()
