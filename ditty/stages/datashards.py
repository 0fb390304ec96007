"""`filter`, `map` and `tokenize` in shards: ranges of rows, each alone by whoever, put together.

What these make of a row, or of a batch, depends on no other one, so the stage's artifact has the
same bytes as without shards, whatever their number. A shard is an artifact of its own
(`store/shard/<key>`) until the stage's is there: whoever was killed, finds those that were made.
"""

import json
import logging
import math
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditty.config.choices import Engine, OperationMethod
from ditty.config.dataspec import DataSpec, Operation
from ditty.dataset import functions, operations, tables, tokenization
from ditty.dataset.encoding import IGNORED
from ditty.dataset.quarantine import FILE
from ditty.dataset.sources import DATA
from ditty.dataset.tokenization import EVAL, PLACES, TRAIN
from ditty.errors import StoreError
from ditty.stages import stageline
from ditty.stages.stageline import StageRef
from ditty.store.artifacts import MANIFEST, Manifest, Store, read_manifest
from ditty.store.files import STAGING, locked, remove_tree, rename

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

log = logging.getLogger(__name__)

SHARDED = (OperationMethod.FILTER, OperationMethod.MAP, "tokenize")
LEFT_SECONDS = 86_400.0  # after which nobody is expected to go on with a shard

SUMS = ("rows", "train_rows", "truncated", "tokens", "supervised_tokens")
COUNTERS = ("dropped", "lengths", "quarantined")
"""What `tokenize` returns for a part, and is added up."""


@dataclass(frozen=True)
class ShardWork:
    """What the shards of one stage have in common. Every worker must see these folders.

    Attributes:
        model_dir: the tokenizer's, where it is used.
        source: the artifact whose rows are read.
        operation: None: the rows are tokenized.
        function: the digest of the operation's.
        types: what `map` is to make, see `operations.Part`.
    """

    data: DataSpec
    model_dir: Path | None
    source: Path
    store: Store
    operation: Operation | None = None
    function: str = ""
    types: Any = None

    @property
    def processes(self) -> int:
        """Of each shard: threads of one interpreter would call a function by turns."""
        one_by_one = self.operation is not None and self.data.engine is Engine.THREADS
        return self.data.num_proc if one_by_one else 1


Run = Callable[[Sequence[StageRef], ShardWork], None]
"""Has each of the shards made; see `in_turn`."""


def in_turn(shards: Sequence[StageRef], work: ShardWork) -> None:
    """One after the other, in this process."""
    for ref in shards:
        build(ref, work)


def is_sharded(ref: StageRef, data: DataSpec) -> bool:
    """Whether a stage is made in shards."""
    return ref.stage in SHARDED and data.shards > 1


def make(ref: StageRef, work: ShardWork, run: Run, out: Path) -> dict[str, Any]:
    """Make a stage in shards: its files in `out`, and its facts."""
    shards = divide(ref, read_manifest(work.source).facts["rows"], work.data.shards)
    operation = work.operation
    if operation is not None:
        work = replace(work, function=ref.inputs["function"])
        if operation.method is OperationMethod.MAP:
            work = replace(work, types=operations.first_types(operation, work.source, out))
    run(shards, work)
    parts = [work.store.path(shard.stage, shard.key) for shard in shards]
    return operations.merge(operation, parts, out) if operation else merge(work.data, parts, out)


def divide(ref: StageRef, rows: int, count: int) -> list[StageRef]:
    """The shards of a stage of so many rows: `count`, or fewer where there are few rows.

    A shard is whole batches of `tables.BATCH_ROWS` but for the last, and is named by its rows.
    """
    batches = math.ceil(rows / tables.BATCH_ROWS)
    count = min(count, batches)
    refs = []
    for number in range(count):
        first, end = (tables.BATCH_ROWS * (batches * n // count) for n in (number, number + 1))
        inputs = {ref.stage: ref.key, "rows": [first, min(end, rows)]}
        refs.append(stageline.make_ref("shard", f"{ref.title} {number + 1}/{count}", inputs))
    return refs


def build(ref: StageRef, work: ShardWork) -> Manifest:
    """Make a shard's artifact, or find it.

    Raises:
        StoreError: this machine does not see the rows or the tokenizer, or has another function.
    """
    for path in (work.source / DATA, work.model_dir):
        if path is not None and not path.exists():
            raise StoreError(
                f"there is no {path} here: the workers of data.engine: {work.data.engine} must see "
                "DITTY_HOME and the base model under the same paths as the flow does"
            )
    rows = range(*ref.inputs["rows"])

    def make(out: Path) -> dict[str, Any]:
        if work.operation is not None:
            part = operations.Part(rows, work.processes, work.types)
            return operations.apply(work.operation, work.source, out, part)
        assert work.model_dir is not None, "rows are tokenized with a tokenizer"
        return tokenization.tokenize(work.data, work.model_dir, work.source, out, rows)

    if work.operation is not None:
        _check_function(work)

    facts = {"stage": ref.stage, "inputs": ref.inputs}
    with locked(work.store.lock(ref.stage, ref.key).path):
        return work.store.build(ref.stage, ref.key, facts, make)


def _check_function(work: ShardWork) -> None:
    """Raise a StoreError where this process has another function than the one that is asked for."""
    assert work.operation is not None and work.operation.function is not None, "filter or map"
    name = work.operation.function
    if functions.digest(functions.resolve(name)) != work.function:
        raise StoreError(
            f"{name} is another function here than where the flow runs: the workers of "
            f"data.engine: {work.data.engine} must see the same files and packages, and be started "
            "again after a module was edited"
        )


def merge(data: DataSpec, parts: Sequence[Path], out: Path) -> dict[str, Any]:
    """Put parts that `tokenize` has made together, in their order: its result, and its facts.

    Raises:
        DataError: too many bad rows, or no row is left; see `tokenize`.
    """
    found = [read_manifest(part).facts for part in parts]
    facts: dict[str, Any] = {name: sum(f[name] for f in found) for name in SUMS}
    facts["max_length"] = max(f["max_length"] for f in found)
    for name in COUNTERS:
        facts[name] = dict(sum((Counter(f[name]) for f in found), Counter()))
    facts["dropped"] = dict(sorted(facts["dropped"].items()))
    facts["lengths"] = dict(sorted(facts["lengths"].items(), key=lambda entry: int(entry[0])))
    schema = tokenization.token_schema()
    batches = (batch for part in parts for batch in tables.batches(part / TRAIN))
    tables.write(out / TRAIN, batches, schema)
    chosen = _held_out(data, parts)
    facts["eval_rows"] = tables.write(out / EVAL, chosen, schema)
    facts["eval_unused"] = sum(f["eval_rows"] + f["eval_unused"] for f in found)
    facts["eval_unused"] -= facts["eval_rows"]
    facts |= _count(out / EVAL)
    with tokenization.quarantine_in(out, data.max_bad_fraction) as quarantine:
        quarantine.read = facts["rows"]
        for part in parts:
            quarantine.take(part / FILE)
        bad = sum(facts["quarantined"].values())
        facts["quarantined"] = quarantine.settle(facts["rows"] - bad)
    tokenization.check_left(facts)
    return facts


def _held_out(data: DataSpec, parts: Sequence[Path]) -> "list[pa.RecordBatch]":
    """The held-out rows; each part has those that were the first `eval_max_rows` of its own."""
    import numpy as np
    import pyarrow as pa

    held = pa.concat_tables([tables.read(part / EVAL) for part in parts])
    if data.eval_max_rows is not None:
        places = pa.concat_tables([tables.read(part / PLACES) for part in parts])
        order = np.lexsort((places["number"].to_numpy(), places["fraction"].to_numpy()))
        held = held.take(pa.array(np.sort(order[: data.eval_max_rows])))
    return held.to_batches()


def _count(path: Path) -> dict[str, int]:
    """eval_tokens and eval_supervised_tokens of a table of tokens."""
    tokens = supervised = 0
    for batch in tables.batches(path):
        labels = batch.column("labels")
        values: np.ndarray = labels.flatten().to_numpy()
        starts = labels.offsets.to_numpy()
        tokens += len(values)
        known = values != IGNORED
        supervised += int(known.sum()) - int(known[starts[:-1] - starts[0]].sum())
    return {"eval_tokens": tokens, "eval_supervised_tokens": supervised}


def clear(made: StageRef, store: Store) -> None:
    """Remove the shards of a stage that is there, and those that were left for too long.

    Whoever was killed left shards, and may have come back with another spec, or never.
    """
    for shard in store.path("shard", "").glob("[!.]*"):
        # Another one removes it, or it is no shard: no reason to fail a stage that is there.
        with suppress(OSError, ValueError, KeyError):
            facts = json.loads((shard / MANIFEST).read_bytes())["facts"]
            age = time.time() - (shard / MANIFEST).stat().st_mtime
            ((stage, key),) = {k: v for k, v in facts["inputs"].items() if k != "rows"}.items()
            lock = store.lock(stage, key)
            if key == made.key:  # whose lock the caller holds
                _remove(shard)
            elif age > LEFT_SECONDS and lock.acquire(timeout=0):  # else somebody goes on with it
                try:
                    _remove(shard)
                finally:
                    lock.release()
    _clear_halves(store)


def _clear_halves(store: Store) -> None:
    """Remove what killed makers and removers of shards left, of whatever stage."""
    for half in store.path("shard", "").glob(f"{STAGING}*"):
        key = half.name.removeprefix(STAGING).rpartition("-")[0]
        lock = store.lock("shard", key)
        if lock.acquire(timeout=0):  # else somebody makes it
            try:
                remove_tree(half)
            finally:
                lock.release()


def _remove(shard: Path) -> None:
    """Nothing of it is left under its name at any time, or all."""
    if shard.exists():
        trash = shard.with_name(f"{STAGING}{shard.name}-{uuid.uuid4().hex[:12]}")
        rename(shard, trash)
        remove_tree(trash)
