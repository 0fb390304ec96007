"""Base models: what one is, where its files are, and whether it fits the spec. Imports no torch.

A base model is named in one of three ways. A folder with config.json and safetensors is used where
it stands; one with .bin files in their place, and a .gguf file, are converted once, by
`ditty.conversion.unpickle` or `ditty.conversion.convert` in a process of its own, into
store/fetch/<key>. Anything else is an id of the Hugging Face hub, of which one commit is downloaded
into the hub's own cache, and converted likewise where it has .bin files. All end as a folder that
`from_pretrained` reads.
"""

import difflib
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from ditty.errors import ModelError, SpecError
from ditty.pretrained import hub
from ditty.pretrained.modelfolder import (
    check_folder,
    folder_digest,
    pickled_files,
    tokenizer_digest,
)
from ditty.store.artifacts import Store
from ditty.store.files import canonical_json, sha256_bytes, sha256_once

__all__ = [
    "BaseModelRef",
    "Kind",
    "check_folder",
    "fetch",
    "identify",
    "key",
    "locate",
    "pickled_snapshot",
    "tokenizer_dir",
    "tokenizer_digest",
]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class Kind(StrEnum):
    """How a base model is named."""

    HUB = "hub"
    FOLDER = "folder"
    PICKLED = "pickled"
    GGUF = "gguf"

    @property
    def converted(self) -> bool:
        """Whether what is used is made of it, once."""
        return self in CONVERSIONS


# Versions of what the conversions make of the same bytes, part of the key.
CONVERSIONS = {Kind.GGUF: {"gguf_version": 2}, Kind.PICKLED: {"pickled_version": 1}}


@dataclass(frozen=True)
class BaseModelRef:
    """One exact base model.

    Attributes:
        name: the hub id, or the absolute path.
        identity: JSON that two models share only if they are the same: {"repo", "commit"} on the
            hub, {"content"} of a folder, {"sha256"} of a .gguf file.
        revision: what the user asked for on the hub; not part of the identity.
    """

    name: str
    kind: Kind
    identity: dict[str, Any]
    revision: str | None = None


def identify(base_model: str, revision: str | None = None) -> BaseModelRef:
    """Resolve a name to one exact model; reads a local model whole, asks the hub for a commit.

    With the hub unreachable, a commit that its cache holds for the revision is used, with a
    warning in the log. A folder or file is hashed once a process for each (size, mtime).

    Raises:
        ModelError: there is no such model, or the hub cannot be asked and nothing is cached.
        SpecError: a revision of something that is not on the hub.
    """
    path = Path(base_model).expanduser()
    if path.is_dir() or path.suffix == ".gguf":
        if revision is not None:
            raise SpecError(
                f"model.revision: got {revision!r}, but {base_model} is a local path, which has "
                "no revisions: remove the key"
            )
        path = path.absolute()
        if path.is_dir():
            identity = {"content": folder_digest(path)}
            kind = Kind.PICKLED if pickled_files(path) else Kind.FOLDER
            return BaseModelRef(str(path), kind, identity)
        if not path.is_file():
            raise ModelError(_unknown_path(base_model))
        return BaseModelRef(str(path), Kind.GGUF, {"sha256": sha256_once(path)})
    if path.exists():
        raise ModelError(
            f"{base_model} is a file, expected a folder with config.json and safetensors "
            "(or .bin files), a .gguf file, or a hub id such as org/name"
        )
    if not HUB_ID.fullmatch(base_model) or ".." in base_model:
        raise ModelError(_unknown_path(base_model))
    identity = {"repo": base_model, "commit": hub.resolve(base_model, revision)}
    return BaseModelRef(base_model, Kind.HUB, identity, revision)


def key(ref: BaseModelRef) -> str:
    """The content key of the ready folder, hex SHA-256; the same for the same files."""
    made_by = CONVERSIONS.get(ref.kind, {})
    return sha256_bytes(
        canonical_json({"stage": "fetch", "kind": ref.kind, "identity": ref.identity, **made_by})
    )


def locate(ref: BaseModelRef, store: Store) -> Path | None:
    """The folder that from_pretrained can read, or None where it must be fetched first.

    Of what is converted it is the verified result in the store, of a hub model with safetensors
    the complete local snapshot.
    """
    if ref.kind is Kind.FOLDER:
        return Path(ref.name)
    if ref.kind.converted:
        found = store.find("fetch", key(ref))
        return store.path("fetch", key(ref)) if found else None
    pickled = pickled_snapshot(ref)
    return locate(pickled, store) if pickled else _snapshot(ref)


def _snapshot(ref: BaseModelRef) -> Path | None:
    return hub.snapshot(ref.name, ref.identity["commit"])


def pickled_snapshot(ref: BaseModelRef) -> BaseModelRef | None:
    """The snapshot of a hub model with .bin files, as the folder that is converted.

    None: it has safetensors, or is not there. The conversion changes no value, so that the key of
    what is made of the model is that of the hub's commit.
    """
    folder = _snapshot(ref)
    if folder is None or not pickled_files(folder):
        return None
    return BaseModelRef(str(folder), Kind.PICKLED, ref.identity)


def fetch(ref: BaseModelRef, store: Store) -> Path:
    """Download a hub model into the hub's own cache.

    `store` is not written: the hub's cache is content-addressed itself and shared with other
    programs. One that is there is not asked for again.

    Returns:
        the snapshot folder; with .bin files, it is still to be converted (`pickled_snapshot`).
    Raises:
        ModelError: the hub refuses, or the repository has no weights.
        RemoteError: the hub cannot be reached (retryable).
    """
    assert ref.kind is Kind.HUB, f"{ref.kind} is not fetched from the hub"
    found = _snapshot(ref)
    return found or hub.download(ref.name, ref.identity["commit"], ref.revision)


def tokenizer_dir(base_model: str, revision: str | None, store: Store) -> Path:
    """A folder with the model's tokenizer; of a hub model no weights are fetched for it.

    Raises:
        ModelError: there is no such model, or a .gguf file that is not converted yet.
        RemoteError: the hub cannot be reached (retryable).
    """
    folder = Path(base_model).expanduser()
    if folder.is_dir():
        return folder
    ref = identify(base_model, revision)
    if found := locate(ref, store):
        return found
    if ref.kind is not Kind.HUB:
        raise ModelError(
            f"{base_model} is not converted yet, so its tokenizer is not there: `ditty run` does "
            "that first of all, once"
        )
    return hub.download_tokenizer(ref.name, ref.identity["commit"], revision)


def _unknown_path(name: str) -> str:
    path = Path(name).expanduser().absolute()
    parent = path.parent
    while not parent.is_dir():
        parent = parent.parent
    missing = path.relative_to(parent).parts[0]
    # What the root holds is the system's: nothing there was meant.
    names = [p.name for p in parent.iterdir()] if parent != Path("/") else []
    near = difflib.get_close_matches(missing, names, n=1, cutoff=0.5)
    hint = f"; did you mean {parent / near[0]}?" if near else ""
    return f"there is no {path}: {parent} has no {missing}{hint}"
