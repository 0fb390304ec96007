"""The stages of the rows, carried out: each reads the artifact before it, and makes its own.

What they are called and what their keys are made of stands in `ditty.stages.stageline`.
"""

from functools import partial
from pathlib import Path
from typing import Any

from ditty.config.spec import RunSpec
from ditty.dataset import operations, packing, quarantine, sources, tokenization
from ditty.dataset.operations import Part
from ditty.errors import DataError
from ditty.stages import datashards
from ditty.stages.datashards import ShardWork
from ditty.stages.stageline import StageLine, StageRef
from ditty.store.artifacts import Manifest, Store, read_manifest


def build_data(
    ref: StageRef,
    line: StageLine,
    spec: RunSpec,
    store: Store,
    run: datashards.Run = datashards.in_turn,
) -> Manifest:
    """Make a data stage's artifact, or find it; the stage before it must be there.

    The caller holds the stage's lock.

    Args:
        run: has the shards made, where the spec asks for shards.
    """
    facts: dict[str, Any] = {"stage": ref.stage, "inputs": ref.inputs}
    if ref.operation:
        if ref.operation.function:
            facts["function"] = ref.operation.function
    elif ref.stage == "load":
        facts["source"] = ", ".join(part.source for part in spec.data.parts)
    before = line.data()[: line.data().index(ref)]
    source = store.path(before[-1].stage, before[-1].key) if before else None
    if not datashards.is_sharded(ref, spec.data):
        make = partial(_make, ref, spec, line.model_dir, source)
        return store.build(ref.stage, ref.key, facts, make)
    assert source is not None, "rows are there"
    work = ShardWork(spec.data, line.model_dir, source, store, ref.operation)
    make = partial(datashards.make, ref, work, run)
    manifest = store.build(ref.stage, ref.key, facts, make)
    datashards.clear(ref, store)
    return manifest


def check_bad_rows(line: StageLine, spec: RunSpec, store: Store) -> None:
    """The threshold is in no key: an artifact may be from when it was higher.

    Raises:
        DataError: a data stage that is made has more bad rows than `data.max_bad_fraction` allows.
    """
    for ref in line.data():
        path = store.path(ref.stage, ref.key)
        facts = read_manifest(path).facts
        bad = sum(facts.get("quarantined", {}).values())
        read = facts.get("read", facts["rows"])
        if bad > spec.data.max_bad_fraction * read:
            raise DataError(
                f"{ref.title}: {bad:,} of {read:,} rows ({bad / read:.2%}) could not be used, "
                f"data.max_bad_fraction allows {spec.data.max_bad_fraction:.2%}: see "
                f"{path / quarantine.FILE}. Mend or drop these rows, or raise it"
            )


def _make(
    ref: StageRef, spec: RunSpec, model_dir: Path | None, source: Path | None, out: Path
) -> dict[str, Any]:
    if source is None:
        return sources.load(spec.data, out, ref.inputs["source"])
    if ref.operation is not None:
        return operations.apply(ref.operation, source, out, Part(num_proc=spec.data.num_proc))
    if ref.stage == "tokenize":
        assert model_dir is not None, "the base model is fetched before rows are tokenized"
        return tokenization.tokenize(spec.data, model_dir, source, out)
    return packing.pack_tables(spec.data, source, out)
