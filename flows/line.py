"""The stages in order, as the flows call them: each made once."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ditty.config.spec import RunSpec
from ditty.planning import preflight
from ditty.pretrained import basemodel
from ditty.runs.rundir import RunDir
from ditty.stages import datastages, stageline
from ditty.stages.stageline import StageLine
from ditty.store.artifacts import Store
from ditty.store.files import GLANCE_SECONDS, FileLock, locked, make_dir, write_json
from flows import tasks
from flows.measure import NOT_CHECKED, failed_gates, gate_error
from flows.pages.publish import publish_data, publish_lineage
from flows.tasks import Caller
from flows.training import Work


@dataclass(frozen=True)
class Prepared:
    """What training and evaluation read.

    Attributes:
        line: the stages, all keys known.
        work: with the base model, quantized where the spec says so, and the packed rows.
        done: references of the artifacts so far.
    """

    line: StageLine
    work: Work
    done: tuple[Any, ...]

    def result(self) -> dict[str, Any]:
        """Of a training, as JSON: {"run": its name, "stages": references of the artifacts, "path":
        the trained adapter or model, "model_dir": the base model}"""
        ref, store = self.line.need("train"), self.work.store
        return {
            "run": self.work.spec.name,
            "stages": list(self.done),
            "path": str(store.path(ref.stage, ref.key)),
            "model_dir": str(self.line.model_dir),
        }


def train(call: Caller, line: StageLine) -> Prepared:
    """All stages of the spec; `line` as `preflight.check` has resolved it.

    Raises:
        GateFailed: the result is not what `evaluate.require` asks for: it is not uploaded.
        DittyError: what else stopped it.
    """
    spec, store = call.spec, call.store
    run = RunDir.named(spec.name, store.home)
    begin(spec, run)
    with locked(run.flow_lock, shared=True):
        preflight.check_spec(spec, run)  # another flow may have begun in between
        prepared = prepare(call, line)
        line = prepared.line
        ref = line.need("train")
        done = [*prepared.done, call.cached(tasks.train, ref, prepared.work)]
        leave_word(spec, run, ref.key, [NOT_CHECKED] if spec.evaluate.require else [])
        publish_lineage(store.path(ref.stage, ref.key), spec.name, store)
        call.book.trained = spec.name
        failed = failed_gates(call, line, prepared.work)
        leave_word(spec, run, ref.key, failed)
        if failed:
            raise gate_error(spec.name, failed, str(store.path(ref.stage, ref.key)))
        if upload := line.only("upload"):
            done.append(call.cached(tasks.upload, upload, ref, spec, store))
    return replace(prepared, done=tuple(done))


def leave_word(spec: RunSpec, run: RunDir, train: str, failed: list[str]) -> None:
    """Which training the run has finished, for `export`.

    Args:
        failed: why its result may not leave the store; see `flows.measure`.
    """
    word = {"train": train, "spec": spec.model_dump(mode="json"), "failed_gates": failed}
    write_json(run.trained_file, word)


def begin(spec: RunSpec, run: RunDir) -> None:
    """Make the run's directory with its spec, and forget a stop that was meant for an earlier run.

    Until a training has begun, a spec takes the place of an earlier one, if no flow is alive that
    works by that.

    Raises:
        RunMismatch: the name is another spec's.
    """
    make_dir(run.root)
    lock = FileLock(run.flow_lock)
    alone = lock.acquire(timeout=GLANCE_SECONDS)
    try:
        if not run.spec_file.exists() or (alone and not run.has_trained()):
            write_json(run.spec_file, spec.model_dump(mode="json"))
        if alone:
            run.clear_half_written()
    finally:
        if alone:
            lock.release()
    preflight.check_spec(spec, run)
    run.stop_file.unlink(missing_ok=True)


def prepare(call: Caller, line: StageLine) -> Prepared:
    """The stages before training."""
    spec, store = call.spec, call.store
    line = fetched(call, line)
    preflight.check_model(spec, line)
    done = [call.cached(tasks.make_data, ref, line, spec, store) for ref in line.data()]
    datastages.check_bad_rows(line, spec, store)
    publish_data(line, spec.name, store)
    model_dir, quantized = base_model(call, line)
    pack = line.need("pack")
    work = Work(spec, store, model_dir, store.path(pack.stage, pack.key))
    return Prepared(line, work, (*done, *quantized))


def base_model(call: Caller, line: StageLine) -> tuple[Path, tuple[Any, ...]]:
    """(the folder that is loaded, references of what was made for it) of a base that is here."""
    assert line.model_dir is not None, "the base model was fetched"
    ref = line.only("prequantize")
    if ref is None:
        return line.model_dir, ()
    made = call.cached(tasks.make_model, ref, Work(call.spec, call.store, line.model_dir))
    return call.store.path(ref.stage, ref.key), (made,)


Resolve = Callable[[RunSpec, Store], StageLine]


def fetched(call: Caller, line: StageLine, resolve: Resolve = stageline.resolve) -> StageLine:
    """The line with all keys known: they depend on the tokenizer, which is in the model.

    Args:
        resolve: what has made `line`.
    """
    ref = line.only("fetch")
    if ref is None:
        return line
    if line.base.kind.converted:
        call.cached(tasks.make_model, ref, Work(call.spec, call.store, Path(line.base.name)))
    elif line.model_dir is None:
        call(tasks.fetch_hub, ref, line.base, call.store)
        if pickled := basemodel.pickled_snapshot(line.base):
            work = Work(call.spec, call.store, Path(pickled.name))
            call.cached(tasks.make_model, stageline.convert_ref(pickled), work)
    else:
        call.skip(ref)
    return line if line.model_dir else resolve(call.spec, call.store)
