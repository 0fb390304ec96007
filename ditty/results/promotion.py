"""Which result of a name is in place: the newest of its promotions, committed one after the other.

    <url>/<name>/promoted/000001/pointer.json     what is in place, and why
    <url>/<name>/promoted/000001/manifest.json    last: it alone promotes

`url` is the spec's upload target, or without one a folder in DITTY_HOME. A promotion is never
overwritten: the next one has the next number, and whoever commits a number first has it.
"""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ditty.config.spec import ModelSpec, RunSpec
from ditty.errors import ArtifactDamaged, RunError
from ditty.stages.stageline import StageRef, make_ref
from ditty.store.artifacts import Store
from ditty.store.files import locked, make_dir, read_json, write_json
from ditty.store.remote import Remote, final_name

POINTER = "pointer.json"


@dataclass(frozen=True)
class InPlace:
    """A result that was promoted.

    Attributes:
        number: of the promotion, from 1.
        run: the run that made it.
        train: content key of the training; its artifact is the result.
        model: the spec's section `model`, to load it with.
        tokenizer: digest of the tokenizer; losses of different ones cannot be compared.
        result: where its files are, a path or URI.
        loss: its held-out loss in nats a token, on the rows that were held out then.
        over: the training whose result was in place before; None: the base model was.
    """

    number: int
    run: str
    train: str
    model: dict[str, Any]
    tokenizer: str
    result: str
    loss: float
    over: str | None


class Promotions:
    """The promotions of the spec's name at the spec's target; methods raise RemoteError."""

    def __init__(self, spec: RunSpec, store: Store):
        self.name, self.store, self.margin = spec.name, store, spec.promote.margin
        self._own = None if spec.upload.url else store.home / "promoted"
        self.url = spec.upload.url or (store.home / "promoted").as_uri()

    def current(self) -> InPlace | None:
        """The result in place; None where none was ever promoted.

        Raises:
            ArtifactDamaged: the newest promotion cannot be read.
        """
        remote = self._remote()
        names = remote.names(f"{self.name}/promoted")
        if not names:
            return None
        name = max(names)
        try:
            with tempfile.TemporaryDirectory() as folder:
                remote.get(name, Path(folder) / "promotion")
                value = read_json(Path(folder) / "promotion" / POINTER)
            pointer = InPlace(**(value or {}))
            ModelSpec.model_validate(pointer.model)
        except (TypeError, ValueError) as error:
            raise ArtifactDamaged(
                f"{self.url}/{name}/{POINTER} is no promotion: {error}"
            ) from error
        return pointer

    def result_url(self, run: str, train: str) -> str:
        """Where the files of a result are for those who use it."""
        if self._own is None:
            return f"{self.url}/{final_name(run, train)}"
        return str(self.store.path("train", train))

    def fetch_result(self, pointer: InPlace) -> None:
        """Bring a result into the store, where it is not there.

        Raises:
            RunError: it is not at the target either.
        """
        name = final_name(pointer.run, pointer.train)
        with locked(self.store.lock("train", pointer.train).path):
            if self.store.find("train", pointer.train):
                return
            remote = self._remote()
            if remote.manifest(name) is None:
                raise RunError(
                    f"the result in place (promotion {pointer.number}, run {pointer.run}) is "
                    f"neither in {self.store.home} nor at {self.url}/{name}, so nothing can be "
                    "compared with it. Bring it back, or remove "
                    f"{self.url}/{self.name}/promoted to begin anew"
                )
            remote.get(name, self.store.path("train", pointer.train))

    def _remote(self) -> Remote:
        remote = Remote(self.url)
        if self._own is not None:
            make_dir(self._own)
            remote.objects.prepare()  # removes what killed ones have left there
        return remote

    def ref(self, pointer: InPlace, evaluation: str) -> StageRef:
        """The stage that promotes `pointer`, after the evaluation of that key."""
        inputs = {"train": pointer.train, "evaluation": evaluation}
        where = {"name": self.name, "number": pointer.number, "over": pointer.over or "base"}
        where["result"] = pointer.result  # another target is another promotion
        return make_ref("promote", f"promote {pointer.train[:8]}", inputs | where)

    def promote(self, ref: StageRef, pointer: InPlace) -> str:
        """Put `pointer` in place; safe to repeat. Returns the promotion's URI.

        Raises:
            RemoteError: another result was promoted meanwhile.
        """
        name = f"{self.name}/promoted/{pointer.number:06d}"

        def make(out: Path) -> dict[str, Any]:
            write_json(out / POINTER, asdict(pointer))
            return {}

        facts = {"stage": ref.stage, "inputs": ref.inputs, "run": pointer.run}
        self.store.build(ref.stage, ref.key, facts, make)
        self._remote().put(self.store.path(ref.stage, ref.key), name)
        return f"{self.url}/{name}"


@dataclass(frozen=True)
class Comparison:
    """Two held-out losses on the same rows, in nats a supervised token.

    Attributes:
        new, old: of the result that was trained, and of what is in place.
        margin: the spec's.
    """

    new: float
    old: float
    margin: float

    @property
    def better(self) -> bool:
        """Whether the new one is to be promoted; a loss that is not a number never is."""
        return self.new < self.old - self.margin

    def __str__(self) -> str:
        difference = self.old - self.new
        return (
            f"held-out loss {self.new:.4f}, in place {self.old:.4f}: "
            f"{abs(difference):.4f} {'better' if difference > 0 else 'worse'}, "
            f"margin {self.margin:g}"
        )


def candidate_name(name: str, train: str) -> str:
    """The run that trains what may be promoted: other data or options are another run.

    Raises:
        RunError: the name is too long.
    """
    if len(name) > 54:
        raise RunError(
            f"name: {name!r} has {len(name)} characters; for `refresh` at most 54, since each "
            "refresh trains in a run of its own, whose name ends with a hash of what it is made of"
        )
    return f"{name}-{train[:8]}"
