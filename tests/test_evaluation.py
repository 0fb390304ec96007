"""Early stopping and the best weights, killed and resumed, in this process.

The held-out losses of most are made up; under every sharding: test_evaluation_shardings.py.
"""

# ruff: noqa: F811  (imported fixtures)
import shutil

import pytest
import torch
from safetensors.torch import load_file

import ditty.training.trainer
from ditty.config.spec import ModelSpec, TrainSpec
from ditty.config.specfile import parse_spec
from ditty.distributed.load import load_module
from ditty.distributed.world import single
from ditty.errors import ArtifactDamaged, RunError, RunMismatch, SpecError
from ditty.runs.rundir import RunDir
from ditty.training.evaluate import HeldOut
from ditty.training.trainer import Place, Trainer
from tests.test_evaluation_shardings import HELD_OUT, STOPS, TRAIN, root, word_tokenizer  # noqa: F401
from tests.test_trainer import feed_of
from tests.tiny import random_rows

EVALUATE = Trainer.evaluate


class Here:
    """Trainings in one process, by name, with held-out losses by step."""

    def __init__(self, root, tmp_path, monkeypatch):
        self.root, self.tmp_path, self.monkeypatch = root, tmp_path, monkeypatch
        self.identity = {"test": "same"}

    def losses(self, losses, every=1):
        """Let evaluations give these, at steps 0, every, 2 x every ..."""

        def evaluate(trainer, step):
            loss = losses[step // every]
            self.monkeypatch.setattr(ditty.training.trainer, "held_out_loss", lambda *_: (loss, 1))
            return EVALUATE(trainer, step)

        self.monkeypatch.setattr(ditty.training.trainer.Trainer, "evaluate", evaluate)

    def trainer(self, name="run", *, held_out=HELD_OUT, tokenizer=None, **train):
        settings = TrainSpec(**{**TRAIN, "eval_steps": 1, "save_steps": 1, **train})
        spec = ModelSpec(base_model="", adapter="none")
        module = load_module(self.root / "model", spec, settings, single())
        run = self.run(name)
        run.root.mkdir(exist_ok=True)
        rows = HeldOut(held_out, tokenizer, settings.num_samples, settings.sample_max_tokens)
        place = Place(run, single(), self.identity)
        return Trainer(module, feed_of(random_rows(4), settings), settings, place, rows)

    def fit(self, name="run", **train):
        trainer = self.trainer(name, **train)
        return trainer, trainer.fit()

    def run(self, name="run"):
        return RunDir(self.tmp_path / name)

    def weights_of(self, name, step):
        file = self.run(name).checkpoint(step) / "shard_00000.safetensors"
        return {
            key.removeprefix("weight/").removesuffix("@0"): value
            for key, value in load_file(file).items()
            if key.startswith("weight/")
        }


@pytest.fixture
def here(root, tmp_path, monkeypatch):
    return Here(root, tmp_path, monkeypatch)


def holds(trainer, weights):
    parts = {part.name: part.value.detach().reshape(-1) for part in trainer.parallel.parts}
    return parts.keys() == weights.keys() and all(torch.equal(parts[k], weights[k]) for k in parts)


BEST = {"final_weights": "best", "early_stopping_patience": 2}


def test_the_start_may_be_the_best(here):
    here.losses([1.0, 2.0, 3.0, 4.0])
    start = here.trainer("other", **BEST).parallel.parts
    trainer, outcome = here.fit(**BEST)
    assert (outcome.step, outcome.finished, trainer.progress.best_step) == (2, True, 0)
    assert holds(trainer, {p.name: p.value.detach().reshape(-1).clone() for p in start})
    assert holds(trainer, here.weights_of("run", 0))
    assert not holds(trainer, here.weights_of("run", 2))
    again, outcome = here.fit(**BEST)  # all is done: nothing is trained
    assert outcome.step == 2 and holds(again, here.weights_of("run", 0))


def test_the_last_step_may_be_the_best(here):
    here.losses([4.0, 3.0, 3.5, 3.0, 2.0])
    trainer, outcome = here.fit(max_steps=4, final_weights="best")
    assert outcome.step == trainer.progress.best_step == 4
    assert holds(trainer, here.weights_of("run", 4))


def test_a_kill_before_the_first_step_was_saved_starts_again(here):
    losses = [1.0, 2.0, 3.0, 4.0]
    here.losses(losses)
    trainer = here.trainer(**BEST, max_steps=3)
    here.monkeypatch.setattr(trainer, "_step", _killed)
    with pytest.raises(Killed):
        trainer.fit()
    assert here.run().committed_steps() == [0]
    here.identity = {"test": "other"}
    with pytest.raises(RunMismatch, match="belongs to another spec"):
        here.fit(**BEST, max_steps=3)
    here.identity = {"test": "same"}
    trainer, outcome = here.fit(**BEST, max_steps=3)
    assert outcome.step == 2 and holds(trainer, here.weights_of("run", 0))
    assert [r["loss"] for r in here.run().metrics() if r["kind"] == "eval"] == losses[:3]


class Killed(BaseException):
    """Nobody catches it, as nobody catches SIGKILL."""


def _killed(*_):
    raise Killed


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_kill_between_evaluation_and_save_changes_nothing(here, step):
    """At the best step (2), at one without a better, and at the one that stops early (4)."""
    losses = [4.0, 3.0, 2.0, 5.0, 6.0, 1.0]
    here.losses(losses)
    whole, _ = here.fit("whole", **BEST)
    trainer = here.trainer(**BEST)
    save = trainer.save
    here.monkeypatch.setattr(trainer, "save", lambda s: _killed() if s == step else save(s))
    with pytest.raises(Killed):
        trainer.fit()
    assert max(here.run().committed_steps()) == step - 1
    resumed, outcome = here.fit(**BEST)
    assert outcome.step == 4 and resumed.progress == whole.progress
    assert holds(resumed, here.weights_of("whole", 2))
    records = [r["loss"] for r in here.run().metrics() if r["kind"] == "eval"]
    assert records == losses[:5]


def test_it_resumes_where_it_stopped_early(here):
    """A kill after the last save, before the result was made: nothing is trained any more."""
    here.losses([1.0, 2.0, 3.0])
    for _ in range(2):
        trainer, outcome = here.fit(early_stopping_patience=2)
        assert (outcome.step, outcome.finished) == (2, True)
        assert holds(trainer, here.weights_of("run", 2))


@pytest.mark.parametrize(
    ("losses", "threshold", "stop", "best"),
    [
        ([5.0, 4.9, 4.8, 1.0], 0.5, 2, 2),  # lower, but not by enough
        ([5.0, 4.7, 4.4, 4.3, 4.2, 1.0], 0.5, 4, 4),  # two small gains make one that counts
        ([5.0, 4.9, 4.8, 4.7, 4.6, 4.5, 4.4], 0.0, 6, 6),
        ([5.0, 5.0, 5.0, 1.0], 0.0, 2, 0),
        ([float("nan"), 5.0, float("nan"), float("inf"), 1.0], 0.0, 3, 1),
    ],
)
def test_early_stopping_counts_gains_above_the_threshold(here, losses, threshold, stop, best):
    here.losses(losses)
    trainer, outcome = here.fit(**BEST, early_stopping_threshold=threshold)
    assert (outcome.step, trainer.progress.best_step) == (stop, best)
    assert holds(trainer, here.weights_of("run", best)), "the lowest loss is the best"


def test_without_early_stopping_evaluation_decides_nothing(here):
    here.losses([1.0, 2.0, 3.0, 4.0, 5.0])
    trainer, outcome = here.fit(max_steps=4)
    assert outcome.step == 4 and holds(trainer, here.weights_of("run", 4))
    assert here.run().committed_steps() == [3, 4]


def test_a_training_that_stops_early_ends_with_samples(here):
    here.losses([1.0, 2.0, 3.0])
    options = {"num_samples": 1, "sample_max_tokens": 2, "tokenizer": word_tokenizer()}
    here.fit(early_stopping_patience=2, **options)
    assert [s["step"] for s in here.run().samples()] == [0, 2]


def test_each_checkpoint_that_stays_keeps_its_best(here):
    """The newest may turn out to be damaged: then the one before it needs a best of its own."""
    here.losses([9.0, 5.0, 6.0, 7.0, 1.0])
    here.fit(max_steps=4, final_weights="best")
    run = here.run()
    assert run.committed_steps() == [1, 3, 4]
    (run.checkpoint(4) / "state.json").write_text("{}")
    here.losses([9.0, 5.0, 6.0, 7.0, 8.0])
    trainer, _ = here.fit(max_steps=4, final_weights="best")
    assert list(run.checkpoints.glob(".bad-step_000000004-*"))
    assert trainer.progress.best_step == 1 and holds(trainer, here.weights_of("run", 1))


def test_a_lost_best_checkpoint_is_said_at_once(here):
    here.losses([9.0, 5.0, 6.0, 7.0, 8.0])
    trainer = here.trainer(max_steps=4, final_weights="best")
    here.run().stop_file.touch()
    here.monkeypatch.setattr(trainer, "_agree", lambda *_: ((1, 1, 1), "stop" * (len(calls) > 2)))
    calls = []
    take = trainer._step
    here.monkeypatch.setattr(trainer, "_step", lambda *a: (calls.append(a), take(*a)))
    assert trainer.fit().step == 3
    here.run().stop_file.unlink()
    shutil.rmtree(here.run().checkpoint(1))
    resumed = here.trainer(max_steps=4, final_weights="best")
    here.monkeypatch.setattr(resumed, "_step", _killed)
    with pytest.raises(RunError, match=r"those of step 1, and .*step_000000001 is not there"):
        resumed.fit()


def test_a_damaged_best_checkpoint_is_no_result(here):
    here.losses([9.0, 5.0, 6.0, 7.0])
    here.fit(max_steps=3, final_weights="best")
    victim = here.run().checkpoint(1) / "shard_00000.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    with pytest.raises(ArtifactDamaged, match="step_000000001"):
        here.fit(max_steps=3, final_weights="best")


def test_no_finite_held_out_loss_is_no_result(here):
    here.losses([float("nan")] * 3)
    with pytest.raises(RunError, match="no step with a finite held-out loss"):
        here.fit(max_steps=2, final_weights="best")


@pytest.mark.parametrize("key", ["final_weights", "early_stopping_patience"])
def test_nothing_to_decide_by_is_refused(here, key):
    wanted = {key: BEST[key]}
    with pytest.raises(SpecError, match=r"there are none: raise data\.eval_fraction"):
        here.trainer(held_out=[], **wanted)
    values = {"name": "x", "data": {"source": "a.jsonl"}, "model": {"base_model": "m"}}
    with pytest.raises(SpecError, match=f"{key} needs evaluations: set eval_steps"):
        parse_spec({**values, "train": wanted}, where="here")
    values["train"] = {**wanted, "eval_steps": 5}
    assert parse_spec(values, where="here").train.evaluation_decides
    values["data"] = {"source": "a.jsonl", "eval_fraction": 0}
    with pytest.raises(SpecError, match=r"data\.eval_fraction is 0; raise it"):
        parse_spec(values, where="here")
