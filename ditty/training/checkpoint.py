"""Checkpoints that are whole or absent, and a resume that continues bit by bit.

A checkpoint is a committed directory (ditty.store.artifacts) below the run's `checkpoints`:

    shard_00000.safetensors   one a process: its parts of the trained weights and of the optimizer
    rng_00000.safetensors     one a process: torch, CUDA, numpy and Python generators
    state.json                step, world size, and the trainer's own state

Parts are ranges of flattened tensors (pieces.py), so that any number of processes under any
sharding reads what any other wrote. The schedule and the position in the data are functions of the
step, so they need no state.

PyTorch's distributed checkpoint does the same for tensors that it has cut itself. It describes them
in a pickle, which must not be read from a bucket that others can write to, and has no place for
DeepSpeed's ranges.
"""

import json
import logging
import math
import shutil
import threading
from collections import deque
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ditty.distributed.parallel import Parallel, Part
from ditty.distributed.world import World
from ditty.errors import ArtifactDamaged, RunMismatch, StoreError
from ditty.runs.identity import check_identity
from ditty.runs.rundir import RunDir, best_step
from ditty.store.artifacts import MANIFEST, commit, read_manifest, set_aside, staging_dir, verify
from ditty.store.files import fsync_path, read_json, remove_tree, sha256_bytes, unlink, write_json
from ditty.training.pieces import Pieces, piece_name, write_pieces
from ditty.training.rng import rng_state, seed_all, set_rng_state

log = logging.getLogger(__name__)

HEADROOM = 1.2  # free space needed before a save, in sizes of the last checkpoint

State = dict[str, Any]


class Checkpointer:
    """Saves and restores one training.

    A save copies the state and returns; a thread writes it, talking to the other processes in a
    group of its own. Two saves are never on their way at once.

    Args:
        identity: all that decides the trained weights; a checkpoint under another is refused.
        keep: committed checkpoints that stay, besides the best one.
    """

    def __init__(self, run: RunDir, world: World, identity: dict[str, Any], *, keep: int):
        self.run, self.world, self.identity, self.keep = run, world, identity, keep
        self.aside = world.aside()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.committed: deque[int] = deque()  # steps, for who wants to know; taken by the reader

    def save(self, step: int, parallel: Parallel, state: State) -> None:
        """Begin to commit the state after `step` steps; `wait` ends it.

        Args:
            state: the trainer's own, JSON values; `best_step` names a checkpoint that stays.
        Raises:
            StoreError: no space; or the save before this one failed, see `wait`.
        """
        self.wait()
        staging: Path | None = None
        problem = None
        if self.world.main:
            try:
                self._check_space()
                staging = staging_dir(self.run.checkpoint(step))
            except (OSError, StoreError) as error:
                problem = str(error)
        staging, problem = self.world.from_main((staging, problem))
        if problem is not None:
            raise self._failed(step, problem)
        assert staging is not None
        files = {
            "shard": shard_tensors(parallel),
            "rng": {k: v.clone() for k, v in rng_state().items()},
        }
        state = {"step": step, "world_size": self.world.world_size, **state}
        self._thread = threading.Thread(
            target=self._commit, args=(staging, step, files, state), name="ditty checkpoint"
        )
        self._thread.start()

    def wait(self) -> None:
        """Return when no save is on its way.

        Raises:
            StoreError: the last one failed; on every process, and nothing of it is left.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _failed(self, step: int, problem: str) -> StoreError:
        return StoreError(
            f"the checkpoint of step {step} was not written: {problem}. "
            "The one before it stays; set that right, and run again to resume from it"
        )

    def _commit(
        self, staging: Path, step: int, files: dict[str, dict[str, torch.Tensor]], state: State
    ) -> None:
        """The thread: write this process's part, and let rank 0 commit when all have."""
        try:
            problem = _non_finite(files["shard"]) or self._write(staging, files, state)
            problems = [p for p in self.aside.gather(problem) if p]
            if not problems and self.world.main:
                try:
                    facts = {"step": step, "identity": self.identity}
                    commit(staging, self.run.checkpoint(step), facts)
                except (OSError, StoreError) as error:
                    problems = [str(error)]
            problems = self.aside.from_main(problems)
            if problems:
                if self.world.main:
                    remove_tree(staging)
                raise self._failed(step, problems[0])
            if self.world.main:
                self.committed.append(step)
                self._retire()
        except BaseException as error:
            self._error = error

    def _write(
        self, staging: Path, files: dict[str, dict[str, torch.Tensor]], state: State
    ) -> str | None:
        """This process's files; returns what went wrong."""
        number = f"{self.world.rank:05d}.safetensors"
        try:
            write_pieces(staging / f"shard_{number}", files["shard"])
            write_pieces(staging / f"rng_{number}", files["rng"])
            for name in (f"shard_{number}", f"rng_{number}"):
                if (staging / name).exists():
                    fsync_path(staging / name)
            if self.world.main:
                write_json(staging / "state.json", state)
        except (OSError, SafetensorError) as error:  # the latter where the disk is full
            return f"rank {self.world.rank}: {error}"
        return None

    def _check_space(self) -> None:
        steps = self.run.committed_steps()
        if not steps:
            return
        last = self.run.checkpoint(steps[-1])
        needed = HEADROOM * sum(size for size, _ in read_manifest(last).files.values())
        free = shutil.disk_usage(self.run.checkpoints).free
        if free < needed:
            raise StoreError(f"{free} bytes are free, and a checkpoint needs about {needed:.0f}")

    def _retire(self) -> None:
        """Remove the oldest checkpoints beyond `keep`, their manifests first.

        Each that stays keeps the best one it knows of: a run may have to go back to it.
        """
        steps = self.run.committed_steps()
        try:
            best = {best_step(self.run.checkpoint(step)) for step in steps[-self.keep :]}
            for step in steps[: -self.keep]:
                if step not in best:
                    path = self.run.checkpoint(step)
                    unlink(path / MANIFEST)
                    fsync_path(path)
                    remove_tree(path)
        except (OSError, ArtifactDamaged) as error:
            log.warning("old checkpoints in %s stay: %s", self.run.checkpoints, error)

    def clear_staging(self) -> None:
        """Remove what was cut short when this run ended before."""
        self.run.clear_unfinished()

    def restore(self, parallel: Parallel) -> tuple[int, State]:
        """Load the newest checkpoint that verifies; (its step, the trainer's state), or (0, {}).

        A damaged one is set aside and the one before it tried.

        Raises:
            ArtifactDamaged: there are checkpoints, and none verifies.
            RunMismatch: the newest one belongs to another identity.
        """
        found = self._newest() if self.world.main else None
        step, digest, problem = self.world.from_main(found)
        if problem:
            raise ArtifactDamaged(problem)
        if not digest:
            return 0, {}
        path = self.run.checkpoint(step)
        facts = read_manifest(path).facts
        check_identity(self.identity, facts.get("identity"), str(path))
        if step == 0:  # the start, kept because it may be the best: made anew, the same
            return 0, {}
        digests = self.world.gather(sha256_bytes((path / MANIFEST).read_bytes()))
        assert set(digests) == {digest}, f"ranks see different checkpoints at {path}: {digests}"
        self._load_weights(step, parallel)
        pieces = Pieces(path)
        parallel.load_optimizer_state(optimizer_states(pieces, parallel.parts))
        state = read_json(path / "state.json")
        assert state is not None, f"{path} was verified"
        self._restore_rng(path, state)
        return int(step), state

    def restore_weights(self, step: int, parallel: Parallel) -> None:
        """Load the trained weights of a committed checkpoint, and nothing else.

        Raises:
            ArtifactDamaged: it is not there, or does not verify.
        """
        problem = None
        if self.world.main:
            try:
                verify(self.run.checkpoint(step))
            except ArtifactDamaged as error:
                problem = str(error)
        problem = self.world.from_main(problem)
        if problem:
            raise ArtifactDamaged(problem)
        self._load_weights(step, parallel)

    def _load_weights(self, step: int, parallel: Parallel) -> None:
        path = self.run.checkpoint(step)
        pieces = Pieces(path)
        odd = sorted(pieces.names("weight/") ^ {part.name for part in parallel.parts})
        if odd:
            raise RunMismatch(f"{path} holds other weights than the model trains, e.g. {odd[0]}")
        with torch.no_grad():
            for part in parallel.parts:
                name, size = f"weight/{part.name}", part.value.numel()
                whole = torch.Size(part.shape).numel()
                if pieces.size(name) != whole:
                    raise RunMismatch(
                        f"{path} holds {pieces.size(name)} elements of {part.name}, "
                        f"the model has {whole}"
                    )
                if size:
                    value = pieces.read(name, part.start, part.start + size)
                    assert value.dtype == part.value.dtype, f"{part.name}: {value.dtype}"
                    part.value.copy_(value.view(part.value.shape))
        parallel.weights_changed()

    def _newest(self) -> tuple[int, str, str | None]:
        """(step, hash of the manifest, problem)"""
        steps = self.run.committed_steps()
        for step in reversed(steps):
            path = self.run.checkpoint(step)
            try:
                verify(path)
            except ArtifactDamaged as error:
                log.warning("%s; set aside at %s, an older one is tried", error, set_aside(path))
                continue
            return step, sha256_bytes((path / MANIFEST).read_bytes()), None
        problem = (
            f"none of the checkpoints in {self.run.checkpoints} verifies; they are set aside as "
            f".bad-*. To train from the start all the same, remove {self.run.checkpoints}"
        )
        return 0, "", problem if steps or any(self.run.checkpoints.glob(".bad-*")) else None

    def _restore_rng(self, path: Path, state: State) -> None:
        if state["world_size"] == self.world.world_size:
            set_rng_state(load_file(path / f"rng_{self.world.rank:05d}.safetensors"))
            return
        # Another number of processes: the old generators belong to nobody. Dropout goes on from
        # a new seed that depends on the step; the order of samples does not use generators.
        log.warning(
            "resuming with %d processes a run saved with %d: dropout draws anew",
            self.world.world_size,
            state["world_size"],
        )
        identity = json.dumps(self.identity, sort_keys=True)
        text = f"ditty rng {identity} {state['step']} {self.world.rank}"
        seed_all(int(sha256_bytes(text.encode())[:8], 16))


def shard_tensors(parallel: Parallel) -> dict[str, torch.Tensor]:
    """This process's parts as flat tensors on the CPU that training no longer touches, by piece
    name.

    `weight/<name>`; of the optimizer `state/<key>/<name>` for a value an element,
    `scalar/...` and `int/...` for one a parameter, `block/...` for anything else (scales of 8-bit
    states), which belongs to exactly this part.
    """
    tensors = {}
    for part in parallel.parts:
        if not part.owned or not part.value.numel():
            continue
        tensors[piece_name(f"weight/{part.name}", part.start)] = _copy(part.value)
        for key, value in parallel.optimizer_state(part).items():
            kind = _kind(value, part)
            name = piece_name(f"{kind}/{key}/{part.name}", part.start)
            tensors[name] = _copy(torch.as_tensor(value), flat=kind != "block")
    return tensors


def _non_finite(tensors: dict[str, torch.Tensor]) -> str | None:
    """What is wrong with weights or optimizer state that are not finite: no run goes on from there.

    A step with a finite loss and finite gradients may make them so.
    """
    for name, tensor in tensors.items():
        # In fp64 a sum of finite fp32 values is finite, and takes no second copy of them.
        if tensor.is_floating_point() and not math.isfinite(tensor.sum(dtype=torch.float64)):
            return (
                f"{name} is not finite: lower train.learning_rate, with another name, or look at "
                "the data of the steps before"
            )
    return None


def _copy(value: torch.Tensor, *, flat: bool = True) -> torch.Tensor:
    value = value.detach().reshape(-1) if flat else value.detach().contiguous()
    return value.clone() if value.device.type == "cpu" else value.cpu()


def _kind(value: Any, part: Part) -> str:
    if isinstance(value, int):
        return "int"
    if value.ndim == 0:
        return "scalar"
    return "state" if value.numel() == part.value.numel() else "block"


def optimizer_states(pieces: Pieces, parts: list[Part]) -> list[dict[str, Any]]:
    """What `shard_tensors` wrote of the optimizer, for each part, however the parts were then."""
    names: dict[str, list[tuple[str, str]]] = {}
    for kind in ("state", "scalar", "int", "block"):
        for name in sorted(pieces.names(f"{kind}/")):
            names.setdefault(name.partition("/")[2], []).append((kind, name))
    states = []
    for part in parts:
        # None of any weight: in fp16 all steps until then may have been skipped.
        if names and part.value.numel() and part.name not in names:
            raise RunMismatch(f"{pieces.folder} has no optimizer state for {part.name}")
        found = names.get(part.name, []) if part.value.numel() else []
        states.append({n.partition("/")[0]: _value(pieces, kind, n, part) for kind, n in found})
    return states


def _value(pieces: Pieces, kind: str, name: str, part: Part) -> Any:
    full = f"{kind}/{name}"
    if kind == "state":
        value = pieces.read(full, part.start, part.start + part.value.numel())
        return value.view(part.value.shape)
    if kind == "block":
        return _block(pieces, full, part)
    value = pieces.first(full)[0]
    return int(value) if kind == "int" else value


def _block(pieces: Pieces, full: str, part: Part) -> torch.Tensor:
    value = pieces.read_exact(full, part.start)
    same = pieces.length(f"weight/{part.name}", part.start) == part.value.numel()
    if value is None or not same:
        raise RunMismatch(
            f"{pieces.folder}: the optimizer's 8-bit state of {part.name} was cut for another "
            "number of processes. Resume with that number and train.sharding, or train again with "
            "train.optimizer: adamw"
        )
    return value
