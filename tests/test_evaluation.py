"""Held-out evaluation, samples, early stopping and the best weights, under every sharding.

The oracles: DDP and one process for numbers, transformers' own `generate` for samples, a shorter
training for the best weights, and a rule written out here for the step at which to stop.
"""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import ditty.trainer
from ditty.errors import ArtifactDamaged, RunError, RunMismatch, SpecError
from ditty.evaluate import HeldOut
from ditty.load import load_module
from ditty.rundir import RunDir
from ditty.spec import ModelSpec, TrainSpec
from ditty.specfile import parse_spec
from ditty.trainer import Place, Trainer
from ditty.world import single
from tests import scenarios
from tests.tables_for_tests import write_rows
from tests.test_trainer import feed_of
from tests.tiny import VOCABULARY, make_model_folder, random_rows

TRAIN = {
    "max_steps": 6,
    "precision": "fp32",
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-2,
    "schedule": "constant",
    "save_steps": 100,
}
LOUD = {"eval_steps": 2, "num_samples": 2, "sample_steps": 3, "sample_max_tokens": 5}
STOPS = {
    "max_steps": 14,
    "learning_rate": 2e-2,
    "save_steps": 1,
    "keep_checkpoints": 2,
    "eval_steps": 2,
    "early_stopping_patience": 3,
    "final_weights": "best",
}
FULL = {"adapter": "none"}
LORA = {"adapter": "lora", "lora_r": 4, "lora_dropout": 0.2}
SHARDED = ("fsdp2", "zero3")
ALL = ("ddp", *SHARDED)


def word_tokenizer():
    """One word for each token: what is decoded shows every token that was generated."""
    words = {f"t{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t2", pad_token="t2")


def of_few_words(rows, first=3, words=20):
    """The rows with tokens of a small vocabulary, which is learned first and then overfitted."""
    for row in rows:
        row["input_ids"] = [first + i % words for i in row["input_ids"]]
        row["labels"] = [-100 if i == -100 else first + i % words for i in row["labels"]]
    return rows


HELD_OUT = random_rows(5, seed=1)  # with two processes one has no row left at the end


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluation")
    make_model_folder(root / "model", tokenizer=word_tokenizer())
    write_rows(root / "data" / "train.arrow", random_rows(30))
    write_rows(root / "data" / "eval.arrow", HELD_OUT)
    write_rows(root / "few" / "train.arrow", of_few_words(random_rows(2)))
    write_rows(root / "few" / "eval.arrow", of_few_words(random_rows(5, seed=1)))
    return root


@pytest.fixture(scope="module")
def results(root):
    return scenarios.launch(root / "job", [*_loud_and_quiet(root), *_stopping(root)])


def scenario(root, name, sharding, model, *, data="data", **options):
    """Two processes with a row each, or one with both."""
    processes = 1 if sharding == "none" else 2
    train = {**TRAIN, "sharding": sharding, **options.pop("train", {})}
    train["gradient_accumulation_steps"] *= 2 // processes
    options = {"evaluate": True, "processes": processes, **options}
    return scenarios.job(root, name, model, train, data_dir=str(root / data), **options)


def _loud_and_quiet(root):
    for sharding in ("none", *ALL):
        yield scenario(root, f"full-{sharding}", sharding, FULL, train=LOUD)
    for sharding in ALL:
        yield scenario(root, f"loud-{sharding}", sharding, LORA, train=LOUD)
        yield scenario(root, f"quiet-{sharding}", sharding, LORA, evaluate=False)


def _stopping(root):
    options = {"data": "few", "train": STOPS}
    for sharding in ALL:
        yield scenario(root, f"stops-{sharding}", sharding, FULL, **options)
    endless = {**STOPS, "final_weights": "last", "early_stopping_patience": None}
    yield scenario(root, "endless", "ddp", FULL, data="few", train=endless)
    short = {**endless, "max_steps": 4, "eval_steps": None}
    yield scenario(root, "short", "ddp", FULL, data="few", train=short, evaluate=False)
    for sharding in SHARDED:
        home = f"resumed-{sharding}"
        yield scenario(root, f"{home}-a", sharding, FULL, home=home, stop_before=7, **options)
        yield scenario(root, f"{home}-b", sharding, FULL, home=home, kill_before=9, **options)
        yield scenario(root, home, sharding, FULL, home=home, **options)


def same_weights(root, a, b):
    first, second = (load_file(root / f"{name}.safetensors") for name in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def floats(values):
    return [float.fromhex(value) for value in values]


def test_held_out_loss_has_the_same_bits_under_every_sharding(results):
    one = results["full-none"]
    assert one["eval_steps"] == [0, 2, 4, 6] and len(set(one["eval"])) == 4
    for sharding in ALL:
        assert results[f"full-{sharding}"]["eval"] == one["eval"], sharding
        assert results[f"full-{sharding}"]["eval_steps"] == one["eval_steps"], sharding


@pytest.mark.parametrize("sharding", ALL)
def test_evaluation_and_samples_leave_training_as_it_is(root, results, sharding):
    loud, quiet = results[f"loud-{sharding}"], results[f"quiet-{sharding}"]
    assert len(loud["eval"]) == 4 and quiet["eval"] == [] and len(loud["losses"]) == 6
    assert loud["losses"] == quiet["losses"] and loud["norms"] == quiet["norms"]
    assert same_weights(root, f"loud-{sharding}", f"quiet-{sharding}")
    assert loud["losses"] == results["loud-ddp"]["losses"]


def test_samples_are_the_same_under_every_sharding_and_written_once(root, results):
    reference = results["full-none"]["samples"]
    assert [(s["step"], s["index"]) for s in reference] == [
        (step, index) for step in (0, 3, 6) for index in (0, 1)
    ]
    assert reference[0]["completion"] != reference[4]["completion"], "training changed nothing"
    for name in ("full-none", *(f"full-{sharding}" for sharding in ALL)):
        assert results[name]["samples"] == reference, name
        lines = (root / "homes" / name / "samples.jsonl").read_text().splitlines()
        assert len(lines) == len(reference), name


def test_samples_are_what_transformers_generates(root, results):
    samples = {(s["step"], s["index"]): s for s in results["full-none"]["samples"]}
    for step in (0, 6):
        model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32).eval()
        if step:
            model.load_state_dict(load_file(root / "full-none.safetensors"), strict=False)
        for index in (0, 1):
            row, sample = HELD_OUT[index], samples[step, index]
            n = row["lengths"][0]
            start = next(i for i in range(n) if row["labels"][i] != -100)
            ids = torch.tensor([row["input_ids"][:start]])
            ends = [2, row["input_ids"][n - 1]]  # the tokenizer's, and the document's own
            with torch.no_grad():
                out = model.generate(
                    ids, do_sample=False, max_new_tokens=5, eos_token_id=ends, pad_token_id=2
                )
            assert words(out[0, start:]) == sample["completion"]
            assert words(ids[0]) == sample["prompt"]
            assert words(row["input_ids"][start:n]) == sample["reference"]


def words(ids):
    return " ".join(f"t{int(i)}" for i in ids if int(i) != 2)


def expected_stop(losses, every, patience):
    """(the step at which to stop, the best one) by the losses at steps 0, every, 2 x every ..."""
    best = 0
    for index, loss in enumerate(losses):
        if loss < losses[best]:
            best = index
        if index - best == patience:
            return index * every, best * every
    raise AssertionError(f"these losses never get worse: {losses}")


def test_it_stops_when_the_held_out_loss_gets_worse(results):
    endless = floats(results["endless"]["eval"])
    stop, best = expected_stop(endless, 2, 3)
    assert (stop, best) == (10, 4) and results["endless"]["step"] == 14
    for sharding in ALL:
        found = results[f"stops-{sharding}"]
        assert (found["step"], found["best_step"], found["finished"]) == (stop, best, True)
        assert floats(found["eval"]) == endless[:6], sharding
        assert found["losses"] == results["endless"]["losses"][:10], sharding


@pytest.mark.parametrize("sharding", ALL)
def test_the_result_is_the_best_step_which_is_never_removed(root, results, sharding):
    """`short` is a training of its own, of as many steps as the best one."""
    assert same_weights(root, f"stops-{sharding}", "short")
    assert not same_weights(root, "short", "endless")
    assert results[f"stops-{sharding}"]["checkpoints"] == [4, 9, 10]


@pytest.mark.parametrize("sharding", SHARDED)
def test_stopped_and_killed_it_ends_at_the_same_step_with_the_same_weights(root, results, sharding):
    """A stop after step 7 and a kill after step 9, both between evaluations without a better."""
    resumed, whole = results[f"resumed-{sharding}"], results[f"stops-{sharding}"]
    assert results[f"resumed-{sharding}-a"]["step"] == 7
    for key in ("step", "best_step", "losses", "eval", "eval_steps", "checkpoints"):
        assert resumed[key] == whole[key], key
    assert same_weights(root, f"resumed-{sharding}", "short")


# One process, in this one; the held-out losses of most are made up.
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
            self.monkeypatch.setattr(ditty.trainer, "held_out_loss", lambda *_: (loss, 1))
            return EVALUATE(trainer, step)

        self.monkeypatch.setattr(ditty.trainer.Trainer, "evaluate", evaluate)

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
