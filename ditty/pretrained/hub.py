"""The Hugging Face hub: which commit a revision is, and its snapshot in the hub's own cache.

A request is made once, with a short timeout: a machine without network finds out in seconds.
huggingface_hub is imported where it is used, so that importing this module costs nothing.
"""

import difflib
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ditty.errors import ModelError, RemoteError
from ditty.pretrained.modelfolder import TOKENIZER, pickled_files, tokenizer_files, weight_files
from ditty.store.files import make_dir, write_atomic

log = logging.getLogger(__name__)

TIMEOUT = 5.0  # seconds to connect, and to wait for each part of the answer
COMMIT = re.compile(r"[0-9a-f]{40}")
# The top level of a repository is what from_pretrained reads; consolidated*.safetensors are a
# second copy of the weights in Mistral's own format.
ALLOW = ["*.safetensors", "*.json", "*.py", "*.jinja", "*.model", "*.tiktoken", "*.txt"]
PICKLED = ["pytorch_model*.bin"]  # only where there are no safetensors
IGNORE = ["*/*", "consolidated*.safetensors"]


def ask_commit(repo: str, revision: str | None = None) -> str:
    """Ask the hub which commit a revision is now. One request, no retries.

    Raises:
        ModelError: the hub answered that there is no such model or revision, or refused.
        RemoteError: it did not answer within TIMEOUT, or failed.
    """
    from huggingface_hub import HfApi

    try:
        sha = HfApi().model_info(repo, revision=revision, timeout=TIMEOUT).sha
    except Exception as error:  # httpx's errors share no base with OSError
        if refusal := _refusal(error, repo, revision):
            raise ModelError(refusal) from error
        raise RemoteError(f"the hub cannot be asked for {repo}: {_brief(error)}") from error
    assert sha is not None, f"the hub gave no commit for {repo}"
    return sha


def resolve(repo: str, revision: str | None = None) -> str:
    """The commit of a revision: from the hub, or from the local cache if the hub does not answer.

    Raises:
        ModelError: no such model or revision, or no answer and no complete local snapshot.
    """
    if revision and COMMIT.fullmatch(revision):
        return revision  # a commit is an identity without asking; fetch finds out if it is wrong
    try:
        return ask_commit(repo, revision)
    except RemoteError as error:
        remembered = read_ref(repo, revision)
        if remembered and snapshot(repo, remembered):
            log.warning("%s; using the commit in the local cache, %s", error, remembered)
            return remembered
        raise ModelError(
            f"{error}, and no complete snapshot of its revision {revision or 'main'} is in the "
            f"local cache ({_cache()}). Name a folder or a .gguf file in its place, or "
            f"connect this machine to the hub{_nearest_hint(repo)}"
        ) from error


def download(repo: str, commit: str, revision: str | None = None) -> Path:
    """Bring a commit (safetensors or else .bin, JSON, tokenizer, code) into the hub's cache.

    Running it twice downloads nothing the second time.

    Raises:
        ModelError: the hub refuses, or the repository has neither kind of weights.
        RemoteError: the hub cannot be reached, or the transfer broke (retryable).
    """
    folder = _download(repo, commit, revision, ALLOW)
    try:
        weight_files(folder)
    except ModelError:
        folder = _download(repo, commit, revision, [*ALLOW, *PICKLED])
        if not pickled_files(folder):
            raise
    _remember(repo, revision, commit)
    return folder


def download_tokenizer(repo: str, commit: str, revision: str | None = None) -> Path:
    """Bring a commit's tokenizer and configuration, and no weights, into the hub's cache.

    Raises:
        ModelError: the hub refuses.
        RemoteError: the hub cannot be reached, or the transfer broke (retryable).
    """
    return _download(repo, commit, revision, ["config.json", *TOKENIZER])


def _download(repo: str, commit: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    ask_commit(repo, commit)  # snapshot_download alone retries an absent hub for 23 s
    try:
        folder = snapshot_download(
            repo, revision=commit, allow_patterns=list(patterns), ignore_patterns=IGNORE
        )
    except Exception as error:  # httpx's errors share no base with OSError
        if refusal := _refusal(error, repo, revision or commit):
            raise ModelError(refusal) from error
        raise RemoteError(
            f"cannot download {repo} at {commit} from the hub: {_brief(error)}"
        ) from error
    return Path(folder)


def _refusal(error: Exception, repo: str, revision: str | None) -> str | None:
    """What to tell the user if the hub answered and an identical request is refused again."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return (
            f"{repo} is gated: accept its terms on its page at the hub, then log in (hf auth login)"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"the hub knows no model {repo}, or it is private: check the name, or log in "
            f"(hf auth login). A local model is given by its path{_nearest_hint(repo)}"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}: expected a branch, tag or commit of it"
    if isinstance(error, HFValidationError):
        return f"{repo!r} is neither a local path nor a hub id: {_brief(error)}"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        if 400 <= status < 500 and status not in (408, 429):
            return f"the hub refused {repo} with status {status}: {_brief(error)}"
    return None


def snapshot(repo: str, commit: str) -> Path | None:
    """The local snapshot of a commit, if nothing of it is missing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                repo,
                revision=commit,
                local_files_only=True,
                allow_patterns=ALLOW,
                ignore_patterns=IGNORE,
            )
        )
        # A cache that has no listing of the repository passes the above.
        if pickled_files(folder):
            tokenizer_files(folder)
        else:
            weight_files(folder)
    except (LocalEntryNotFoundError, ModelError):
        return None
    return folder if (folder / "config.json").is_file() else None


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _ref_file(repo: str, revision: str | None) -> Path:
    """Where the hub's cache remembers a revision's commit (its documented layout)."""
    from huggingface_hub import file_download

    name = file_download.repo_folder_name(repo_id=repo, repo_type="model")
    return _cache() / name / "refs" / (revision or "main")


def read_ref(repo: str, revision: str | None = None) -> str | None:
    """The commit that the hub's cache remembers for a revision."""
    try:
        text = _ref_file(repo, revision).read_text().strip()
    except OSError:
        return None
    return text if COMMIT.fullmatch(text) else None


def _remember(repo: str, revision: str | None, commit: str) -> None:
    """Note the commit of a revision, which a download by commit does not: offline it is needed."""
    if revision != commit and read_ref(repo, revision) != commit:
        path = _ref_file(repo, revision)
        make_dir(path.parent)
        write_atomic(path, commit.encode())


def _brief(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else '(no message)'}"


def _nearest_hint(repo: str) -> str:
    near = difflib.get_close_matches(repo, [*_cached_repos(), *_local_names(repo)], n=1)
    return f"; did you mean {near[0]}?" if near and near[0] != repo else ""


def _cached_repos() -> Iterator[str]:
    for folder in _cache().glob("models--*"):
        yield folder.name.removeprefix("models--").replace("--", "/", 1)


def _local_names(repo: str) -> Iterator[str]:
    """Relative paths that `repo` may have been meant as: it looks like one."""
    parent = Path(repo).parent
    if parent.is_dir():
        yield from (str(parent / entry.name) for entry in parent.iterdir())
