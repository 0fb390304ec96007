"""`ditty verify`: everything that was committed, read again and compared with its manifest.

Runs verify what they use, when they use it, and go on without what is damaged. This looks at all of
it, here or at a target, changes nothing, and says of each fault what comes of it.
"""

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath

from ditty.errors import ArtifactDamaged, RunError
from ditty.results.lineage import inputs_of, made_from
from ditty.runs.rundir import STEP_NAME, RunDir
from ditty.runs.status import run_names
from ditty.store.artifacts import MANIFEST, Manifest, Store, check_file, read_manifest
from ditty.store.files import make_dir, read_json
from ditty.store.remote import Remote, is_name

KEY = re.compile(r"[0-9a-f]{64}")
NOT_LISTED = "it was put there after the commit: remove it"


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        what: the file, and how it differs from its manifest.
        then: what ditty does about it, or what a person has to do.
    """

    what: str
    then: str


@dataclass(frozen=True)
class Audited:
    """One committed directory that was read, and what is wrong with it.

    Attributes:
        where: its path or URI.
    """

    where: str
    faults: tuple[Fault, ...]


def audit(what: str | None, store: Store) -> Iterator[Audited]:
    """Read committed directories again, one after the other.

    Args:
        what: a run's name (its checkpoints, its result and what that was made of, and their copies
            at the spec's target); a path below which all is read; a `file:` or `s3:` URI, likewise;
            None: the whole DITTY_HOME.
    Raises:
        RunError: there is nothing of the kind.
        RemoteError: a target cannot be asked.
    """
    if what is not None and "://" in what:
        found = _copies(what, store)
    elif what is not None and what in run_names(store):
        found = _of_run(RunDir.named(what, store.home), store)
    else:
        found = _below(Path(what).absolute() if what else store.home)
    number = 0
    for number, audited in enumerate(found, start=1):  # noqa: B007
        yield audited
    if not number:
        raise RunError(
            f"nothing is committed at {what or store.home}. Expected a run's name (`ditty status` "
            f"lists them), a folder such as {store.home}, or a URI of copies, s3://... or file:///..."
        )


def _of_run(run: RunDir, store: Store) -> Iterator[Audited]:
    yield from _below(run.checkpoints)
    trained = read_json(run.trained_file)
    results = [store.path("train", trained["train"])] if trained else []
    newest = [run.checkpoint(step) for step in run.committed_steps()[-1:]]
    yield from (_audited(path) for path in dict.fromkeys(_chains(results or newest, store)))
    spec = read_json(run.spec_file) or {}
    if url := spec.get("upload", {}).get("url"):
        yield from _copies_of(Remote(url), run.root.name, store)


def _chains(paths: Iterable[Path], store: Store) -> Iterator[Path]:
    """Artifacts, and what they were made from, as far as it is here."""
    for path in paths:
        if not _is_checkpoint(path):
            yield path
        with suppress(ArtifactDamaged):  # the chain ends there
            parents = made_from(inputs_of(read_manifest(path).facts), store)
            yield from _chains((parent for *_, parent in parents if parent), store)


def _is_checkpoint(path: PurePath) -> bool:
    return STEP_NAME.fullmatch(path.name) is not None


def _below(root: Path) -> Iterator[Audited]:
    """Every directory at and below `root` that is, or should be, committed."""
    for folder, inside, names in os.walk(root):
        path = Path(folder)
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        keyed = KEY.fullmatch(path.name) or STEP_NAME.fullmatch(path.name)
        if MANIFEST in names or (keyed and (names or inside)):
            inside.clear()
            yield _audited(path)


def _audited(path: Path) -> Audited:
    if not path.exists():
        return Audited(str(path), (Fault(f"{path} is missing", _then_here(path, None)),))
    try:
        manifest = read_manifest(path)
    except ArtifactDamaged as error:
        return Audited(str(path), (Fault(str(error), _then_here(path, None)),))
    faults = []
    for name, (size, sha256) in manifest.files.items():
        try:
            check_file(path / name, size, sha256, "its manifest")
        except ArtifactDamaged as error:
            faults.append(Fault(str(error), _then_here(path, manifest)))
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if not file.is_dir() and name not in {*manifest.files, MANIFEST}:
            faults.append(Fault(f"{file} is in no manifest", NOT_LISTED))
    return Audited(str(path), tuple(faults))


def _then_here(path: Path, manifest: Manifest | None) -> str:
    if _is_checkpoint(path):
        return "a resume sets it aside and goes on from the one before"
    stage = manifest.facts.get("stage") if manifest else path.parent.name
    return f"the next run that needs it makes the stage {stage} again"


def _copies(uri: str, store: Store) -> Iterator[Audited]:
    """All below a URI, or the one copy that it names."""
    url, _, name = uri.rstrip("/").rpartition("/")
    may_be_one = is_name(name) and not re.fullmatch(r"s3:/|file://", url)
    if may_be_one and _has(Remote(url), name):
        yield _copy(Remote(url), name, store)
    else:
        yield from _copies_of(Remote(uri), "", store)


def _has(remote: Remote, name: str) -> bool:
    try:
        return remote.manifest(name) is not None
    except ArtifactDamaged:
        return True


def _copies_of(remote: Remote, prefix: str, store: Store) -> Iterator[Audited]:
    for name in remote.names(prefix):
        yield _copy(remote, name, store)


def _copy(remote: Remote, name: str, store: Store) -> Audited:
    where = f"{remote.url}/{name}"
    with tempfile.TemporaryDirectory(prefix=".verify-", dir=make_dir(store.home)) as scratch:
        problems = list(remote.problems(name, Path(scratch)))
    faults = (Fault(p, NOT_LISTED if unlisted else _then_there(where)) for p, unlisted in problems)
    return Audited(where, tuple(faults))


def _then_there(where: str) -> str:
    if _is_checkpoint(PurePath(where)):
        return "a resume passes it over and takes an older one: remove it"
    if "/final/" in where:
        return f"remove {where}/{MANIFEST}, then `ditty run` with its spec copies the result again"
    return "whoever needs it makes its stage again: remove it"
