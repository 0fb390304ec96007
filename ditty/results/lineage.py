"""What an artifact or a checkpoint was made from: the chain of content keys, back to the sources.

Every manifest names the inputs that its key is the hash of, and some of those are keys of earlier
artifacts. What is no longer in the store is a name without a story.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ditty.config.choices import OperationMethod
from ditty.errors import RunError
from ditty.store.artifacts import MADE_BY, MANIFEST, Manifest, Store, read_manifest
from ditty.store.remote import Remote

# The key of an input -> the stages whose key it may be; tokenize reads rows of any of the first.
INPUTS = {
    "rows": (*OperationMethod, "load"),
    "tokens": ("tokenize",),
    "data": ("pack",),
    "model": ("prequantize", "fetch"),
    "train": ("train",),
    "merge": ("merge",),
    "gguf": ("gguf",),
}
CHECKPOINT = "checkpoint"
NAMES = ("run", "base_model", "source", "function", "target")
COUNTS = ("step", "steps", "rows", "train_rows", "eval_rows", "tokens", "best_step")


@dataclass(frozen=True)
class Node:
    """One link of the chain.

    Attributes:
        kind: its stage, or `checkpoint`; what the input is called where the artifact is gone.
        key: its content key; "" of a checkpoint, which is named by its run and step.
        digest: SHA-256 of its files; "" where it is not here.
        where: path or URI; "" where it is not here.
        inputs: what else its key is the hash of: sources, functions, options.
        names: what people call it: run, base model, source, function, target.
        counts: rows, tokens, steps.
        made_by: {"ditty": version, "flow_run": id or None, "at": UTC}; empty where unknown.
        parents: the artifacts it was made from.
    """

    kind: str
    key: str
    digest: str = ""
    where: str = ""
    inputs: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    made_by: dict[str, Any] = field(default_factory=dict)
    parents: "tuple[Node, ...]" = ()

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        value = {k: v for k, v in vars(self).items() if k != "parents"}
        return {**value, "parents": [parent.to_json() for parent in self.parents]}


def lineage(where: str, store: Store) -> Node:
    """The chain that ends in a committed directory.

    Args:
        where: its path, or the `file:` or `s3:` URI of a copy, of which only the manifest is read.
        store: where earlier artifacts are looked up.
    Raises:
        RunError: there is no committed directory.
        ArtifactDamaged: its manifest cannot be read.
        RemoteError: the place cannot be reached.
    """
    if "://" in where:
        url, _, name = where.rstrip("/").rpartition("/")
        manifest = Remote(url).manifest(name)
        if manifest is None:
            raise RunError(f"{where} has no {MANIFEST}: nothing was committed there")
        return _node(manifest, name, where, store)
    path = Path(where).absolute()
    if not (path / MANIFEST).is_file():
        raise RunError(
            f"{path} has no {MANIFEST}. Expected an artifact ({store.home}/store/<stage>/<key>), a "
            f"checkpoint ({store.home}/runs/<run>/checkpoints/step_...), or the URI of a copy"
        )
    return _node(read_manifest(path), path.name, str(path), store)


def _node(manifest: Manifest, name: str, where: str, store: Store) -> Node:
    facts = manifest.facts
    stage = _kind(facts)
    inputs = inputs_of(facts)
    parents = tuple(_parents(inputs, store))
    return Node(
        kind=stage,
        key="" if stage == CHECKPOINT else name,
        digest=manifest.digest,
        where=where,
        inputs={k: v for k, v in inputs.items() if not _is_key(k, v)},
        names={k: str(facts[k]) for k in NAMES if facts.get(k)},
        counts={k: facts[k] for k in COUNTS if isinstance(facts.get(k), int)},
        made_by=dict(facts.get(MADE_BY) or {}),
        parents=parents,
    )


def inputs_of(facts: dict[str, Any]) -> dict[str, Any]:
    """What the key of an artifact, or the identity of a checkpoint, is the hash of."""
    return dict(facts.get("inputs" if _kind(facts) != CHECKPOINT else "identity") or {})


def _kind(facts: dict[str, Any]) -> str:
    return str(facts.get("stage") or (CHECKPOINT if "step" in facts else "artifact"))


def made_from(inputs: dict[str, Any], store: Store) -> Iterator[tuple[str, str, Path | None]]:
    """(name of the input, key, where its artifact is or None where it is gone)"""
    for name, key in inputs.items():
        if _is_key(name, key):
            found = (store.path(stage, key) for stage in INPUTS[name])
            yield name, key, next((p for p in found if p.is_dir()), None)


def _is_key(name: str, value: Any) -> bool:
    return name in INPUTS and isinstance(value, str)  # `train` is also a section of options


def _parents(inputs: dict[str, Any], store: Store) -> Iterator[Node]:
    for name, key, path in made_from(inputs, store):
        if path is None or not (path / MANIFEST).is_file():
            yield Node(kind=name, key=key)
        else:
            yield _node(read_manifest(path), key, str(path), store)
