"""A committed directory, pushed to the Hugging Face hub in one commit, and checked there.

huggingface_hub does the talking: files go up several at a time, and what the hub has already is not
sent again, so a push that was cut short goes on where it was. The hub shows a commit only when all
of its files are there.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditty.errors import RemoteDenied, RemoteError, SpecError
from ditty.store.artifacts import MANIFEST, verify
from ditty.store.files import sha256_file
from ditty.store.objects import permanent

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SCHEME = "hub:"
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WEIGHTS = (
    "*.safetensors", "*.safetensors.index.json", "*.gguf", "*.bin", "*.bin.index.json",
    "adapter_config.json",  # transformers would look for the adapter, and not for the model
)  # fmt: skip
TOKEN = "set HF_TOKEN to one with write access, log in (hf auth login), or keep it in Prefect"  # noqa: S105


def repo_of(out: str) -> str | None:
    """ORG/NAME of `hub:ORG/NAME`; None: some other place.

    Raises:
        SpecError: no name of a repository.
    """
    if not out.startswith(SCHEME):
        return None
    repo = out.removeprefix(SCHEME)
    if not REPO.fullmatch(repo) or ".." in repo or "--" in repo or len(repo) > 96:
        raise SpecError(f"--out: {out!r} is no place at the hub, expected hub:ORG/NAME")
    return repo


def check(repo: str, token: str | None) -> None:
    """Ask the hub whether this token may write to the repository's owner; nothing is made.

    Raises:
        RemoteDenied: there is no token, or it is nobody's, or the owner is another.
        RemoteError: the hub cannot be reached.
    """
    if token is None:
        raise RemoteDenied(f"there is no token for the hub, and {repo} needs one: {TOKEN}")
    owner = repo.partition("/")[0]
    try:
        who = _api(token).whoami()
    except Exception as error:
        raise _problem(error, repo) from error
    owners = [who["name"], *(org["name"] for org in who.get("orgs", []))]
    if owner not in owners:
        raise RemoteDenied(
            f"the token is of {who['name']}, who writes to {', '.join(owners)} at the hub, not to "
            f"{owner}: push to one of these, or {TOKEN}"
        )


def push(folder: Path, repo: str, token: str | None, *, private: bool = True) -> str:
    """Make `repo` hold what the committed directory `folder` does; safe to repeat.

    The repository is made where it is not there. Weights in it that `folder` has not go in the
    same commit; any other file of it stays.

    Args:
        private: of a repository that is made; one that is there stays as it is.
    Returns:
        the url of the commit.
    Raises:
        ArtifactDamaged: the directory does not match its own manifest; nothing is sent.
        RemoteDenied: the hub refuses this token.
        RemoteError: the hub cannot be reached, or does not hold what was sent.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    files = {name: sha256 for name, (_, sha256) in verify(folder).files.items()}
    files[MANIFEST] = sha256_file(folder / MANIFEST)
    api = _api(token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        stale = [CommitOperationDelete(n) for n in _stale(api.list_repo_files(repo), files)]
        adds = [CommitOperationAdd(name, str(folder / name)) for name in files]
        message = f"ditty export {folder.name[:12]}"
        commit = api.create_commit(repo, [*adds, *stale], commit_message=message)
        there = api.get_paths_info(repo, list(files), revision=commit.oid)
        wrong = _wrong({info.path: info for info in there}, folder, files)
    except Exception as error:
        raise _problem(error, repo) from error
    if wrong:
        raise RemoteError(f"{repo} at {commit.oid[:12]} does not hold {wrong} as it was sent")
    return str(commit.commit_url)


def _api(token: str | None) -> "HfApi":
    from huggingface_hub import HfApi, constants

    return HfApi(endpoint=constants.ENDPOINT, token=token)


def _stale(there: Iterable[str], files: Mapping[str, str]) -> list[str]:
    """Weights of an earlier push, which would be loaded in the place of the new ones."""
    return [n for n in there if n not in files and any(fnmatch(n, p) for p in WEIGHTS)]


def _wrong(there: Mapping[str, Any], folder: Path, files: Mapping[str, str]) -> str | None:
    """A file that the hub does not have as it is here: large ones by SHA-256, others as git."""
    for name, sha256 in files.items():
        info = there.get(name)
        if info is None:
            return name
        if info.lfs is not None:
            same = info.lfs.sha256 == sha256
        else:
            same = info.blob_id == git_blob_id(folder / name)
        if not same:
            return name
    return None


def git_blob_id(path: Path) -> str:
    """What git calls a file of this content."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _problem(error: Exception, repo: str) -> RemoteError:
    """What a failed request means; the token is in none of these texts."""
    from huggingface_hub.errors import HfHubHTTPError

    # The client's "error while uploading" has what went wrong as its cause.
    while not isinstance(error, HfHubHTTPError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    text = str(error).strip().splitlines()
    brief = f"{type(error).__name__}: {text[0] if text else '(no message)'}"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        if status in (401, 403):
            return RemoteDenied(
                f"the hub does not let this token write to {repo} ({brief}): {TOKEN}"
            )
        if 400 <= status < 500 and status not in (408, 409, 412, 429):
            return permanent(RemoteError(f"the hub refuses {repo} with status {status}: {brief}"))
    return RemoteError(
        f"the push to {repo} did not end ({brief}). Nothing of it is shown there; the same command "
        "goes on where it was"
    )
