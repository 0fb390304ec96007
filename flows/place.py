"""Where a copy of an artifact goes: a folder, a bucket, or a repository of the Hugging Face hub."""

from pathlib import Path

from ditty.results import hubpush
from ditty.stages import stageline
from ditty.stages.stageline import StageRef
from ditty.store.remote import Remote
from flows import tasks
from flows.tasks import Caller


def checked_place(out: str | None) -> str | None:
    """`out` as a url or `hub:ORG/NAME`, which answers: asked before anything is made for it.

    Raises:
        SpecError: it is no place.
        RemoteDenied: the hub does not let us write there.
        RemoteError: it cannot be reached.
    """
    if out is None:
        return None
    if repo := hubpush.repo_of(out):
        hubpush.check(repo, tasks.hub_token())
        return out
    url = out if "://" in out else Path(out).expanduser().absolute().as_uri()
    parent, _, name = url.rstrip("/").rpartition("/")
    Remote(parent).manifest(name)
    return f"{parent}/{name}"


def leaves_this_machine(out: str | None) -> bool:
    """Whether others see what is put there: anything but a folder."""
    return out is not None and (":" in out.partition("/")[0]) and not out.startswith("file:")


def copy_to(call: Caller, made: StageRef, place: str, *, public: bool = False) -> None:
    """Copy the artifact of `made` to a `checked_place`.

    Args:
        public: of a repository that is made at the hub.
    """
    folder = call.store.path(made.stage, made.key)
    call(tasks.export, stageline.export_ref(made, place), folder, public)
