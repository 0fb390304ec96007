"""Checkpoints that are whole or absent, and a resume that continues bit by bit.

A checkpoint is a committed directory (artifacts.py) below the run's `checkpoints`:

    trainable.safetensors   trained weights by parameter name
    optimizer.safetensors   "<state>/<parameter name>", e.g. "exp_avg/..."
    rng_00000.safetensors   one a rank: torch, CUDA, numpy and Python generators
    state.json              step, world size, identity

The schedule and the position in the data are functions of the step, so they need no state.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ditty.artifacts import (
    MANIFEST,
    commit,
    read_manifest,
    set_aside,
    staging_dir,
    verify,
)
from ditty.errors import ArtifactDamaged, RunMismatch, StoreError
from ditty.files import fsync_path, read_json, sha256_bytes, write_json
from ditty.identity import check_identity
from ditty.model import trainable
from ditty.rng import rng_state, seed_all, set_rng_state
from ditty.rundir import RunDir
from ditty.world import World

log = logging.getLogger(__name__)

HEADROOM = 1.2  # free space needed before a save, in sizes of the last checkpoint


class Checkpointer:
    """Saves and restores one training.

    Args:
        identity: all that decides the trained weights; a checkpoint under another is refused.
        keep: committed checkpoints that stay.
    """

    def __init__(self, run: RunDir, world: World, identity: dict[str, Any], *, keep: int):
        self.run, self.world, self.identity, self.keep = run, world, identity, keep

    def save(self, step: int, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Commit the state after `step` steps, or raise on every rank and leave nothing behind.

        Raises:
            StoreError: no space, or a rank could not write.
        """
        final = self.run.checkpoint(step)
        staging: Path | None = None
        problem = None
        if self.world.main:
            try:
                self._check_space()
                staging = staging_dir(final)
            except (OSError, StoreError) as error:
                problem = str(error)
        staging, problem = self.world.from_main((staging, problem))
        if problem is None:
            assert staging is not None
            problem = self._write(staging, step, module, optimizer)
        problems = [p for p in self.world.gather(problem) if p]
        if not problems and self.world.main:
            try:
                commit(staging, final, {"step": step, "identity": self.identity})
            except OSError as error:
                problems = [str(error)]
        problems = self.world.from_main(problems)
        if problems:
            if self.world.main and staging:
                shutil.rmtree(staging, ignore_errors=True)
            raise StoreError(
                f"the checkpoint of step {step} was not written: {problems[0]}. "
                "The one before it stays; free space, and run again to resume from it"
            )
        if self.world.main:
            self._retire()

    def _write(
        self, staging: Path, step: int, module: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> str | None:
        """This rank's part; returns what went wrong."""
        try:
            save_file(rng_state(), staging / f"rng_{self.world.rank:05d}.safetensors")
            if self.world.main:
                parameters = trainable(module)
                weights = {n: p.detach().cpu().contiguous() for n, p in parameters.items()}
                save_file(weights, staging / "trainable.safetensors")
                save_file(
                    optimizer_tensors(parameters, optimizer), staging / "optimizer.safetensors"
                )
                state = {"step": step, "world_size": self.world.world_size}
                write_json(staging / "state.json", state)
        except OSError as error:
            return f"rank {self.world.rank}: {error}"
        return None

    def _check_space(self) -> None:
        steps = self.run.committed_steps()
        if not steps:
            return
        last = self.run.checkpoint(steps[-1])
        size = sum(p.stat().st_size for p in last.iterdir())
        free = shutil.disk_usage(last).free
        if free < HEADROOM * size:
            raise StoreError(
                f"{self.run.checkpoints} has {free} bytes free, "
                f"a checkpoint needs about {int(HEADROOM * size)}"
            )

    def _retire(self) -> None:
        """Remove all but the newest `keep` checkpoints, the manifest first."""
        for step in self.run.committed_steps()[: -self.keep]:
            path = self.run.checkpoint(step)
            (path / MANIFEST).unlink()
            fsync_path(path)
            shutil.rmtree(path)

    def clear_staging(self) -> None:
        """Remove what a killed process left half-made; the caller holds the run's lock."""
        if self.run.checkpoints.is_dir():
            for path in self.run.checkpoints.iterdir():
                half_made = path.name.startswith(".tmp-") or not (path / MANIFEST).exists()
                if half_made and not path.name.startswith(".bad-"):
                    shutil.rmtree(path, ignore_errors=True)

    def restore(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Load the newest checkpoint that verifies; returns its step, 0 for a fresh start.

        A damaged one is set aside and the one before it tried.

        Raises:
            ArtifactDamaged: there are checkpoints, and none verifies.
            RunMismatch: the newest one belongs to another identity.
        """
        found = self._newest() if self.world.main else None
        step, digest, problem = self.world.from_main(found)
        if problem:
            raise ArtifactDamaged(problem)
        if step == 0:
            return 0
        path = self.run.checkpoint(step)
        facts = read_manifest(path).facts
        check_identity(self.identity, facts["identity"], str(path))
        digests = self.world.gather(sha256_bytes((path / MANIFEST).read_bytes()))
        assert set(digests) == {digest}, f"ranks see different checkpoints at {path}: {digests}"
        parameters = trainable(module)
        _load_weights(parameters, load_file(path / "trainable.safetensors"), path)
        load_optimizer(parameters, optimizer, load_file(path / "optimizer.safetensors"), path)
        self._restore_rng(path, step)
        return int(step)

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

    def _restore_rng(self, path: Path, step: int) -> None:
        state = read_json(path / "state.json")
        assert state is not None, f"{path} was verified"
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
        text = f"ditty rng {json.dumps(self.identity, sort_keys=True)} {step} {self.world.rank}"
        seed_all(int(sha256_bytes(text.encode())[:8], 16))


def _load_weights(
    parameters: dict[str, torch.nn.Parameter], tensors: dict[str, torch.Tensor], path: Path
) -> None:
    if set(tensors) != set(parameters):
        odd = sorted(set(tensors) ^ set(parameters))
        raise RunMismatch(f"{path} holds other weights than the model trains, e.g. {odd[0]}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            assert tensor.dtype == parameters[name].dtype, f"{name}: {tensor.dtype}"
            parameters[name].copy_(tensor)


def optimizer_tensors(
    parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """The optimizer's state as named tensors: "<state>/<parameter name>"."""
    tensors = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}/{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return tensors


def load_optimizer(
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, torch.Tensor],
    path: Path,
) -> None:
    """Put `optimizer_tensors` back.

    Raises:
        RunMismatch: a parameter has no state in it.
    """
    names = {id(p): name for name, p in parameters.items()}
    state: dict[int, dict[str, torch.Tensor]] = {}
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    for index, parameter in enumerate(ordered):
        name = names[id(parameter)]
        suffix = f"/{name}"
        state[index] = {
            k.removesuffix(suffix): v for k, v in tensors.items() if k.partition("/")[2] == name
        }
        if not state[index]:
            raise RunMismatch(f"{path} has no optimizer state for {name}")
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
