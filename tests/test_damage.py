"""Damage to each file of a checkpoint in turn: found, set aside, and the one before it used."""

import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch

from ditty.distributed.parallel import whole_weights
from ditty.distributed.world import single
from ditty.runs.rundir import RunDir
from ditty.store.artifacts import MANIFEST
from ditty.training.checkpoint import Checkpointer
from tests.faultproxy import flipped
from tests.test_trainer import run_trainer, settings
from tests.tiny import make_model_folder

DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "flipped": flipped,
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "removed": lambda data: None,
}


@pytest.mark.fault("damaged checkpoint")
def test_damage_to_any_file_of_a_checkpoint_is_found(tmp_path: Path, figure) -> None:
    folder = make_model_folder(tmp_path / "model")
    # Up to step 4 the schedule only warms up: it is the same for a training of 4 steps.
    four = run_trainer(folder, tmp_path, settings(max_steps=4), name="four")[0]
    expected = {n: p.clone() for n, p in whole_weights(four.parallel, single()).items()}
    trainer, _, _ = run_trainer(folder, tmp_path, settings(max_steps=5, save_steps=4), name="whole")
    whole = RunDir(tmp_path / "whole")
    files = sorted(path.name for path in whole.checkpoint(5).iterdir())
    assert len(files) == 4 and whole.committed_steps() == [4, 5]
    found = 0
    for number, (name, damage) in enumerate(product(files, DAMAGES)):
        run = RunDir(tmp_path / f"copy-{number}")
        shutil.copytree(whole.root, run.root)
        path = run.checkpoint(5) / name
        data = DAMAGES[damage](path.read_bytes())
        path.unlink() if data is None else path.write_bytes(data)
        saver = Checkpointer(run, single(), trainer.checkpointer.identity, keep=2)
        step, _ = saver.restore(trainer.parallel)
        assert step == 4, f"{name} {damage}: taken for whole"
        aside = list(run.checkpoints.glob(".bad-step_000000005-*"))
        assert len(aside) == ((name, damage) != (MANIFEST, "removed")), "that one was no checkpoint"
        found += 1
        got = whole_weights(trainer.parallel, single())
        assert all(torch.equal(got[n], expected[n]) for n in expected)
    figure(f"{found} of {len(files) * len(DAMAGES)} detected ({len(files)} files)")
