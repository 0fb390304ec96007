"""Held-out evaluation, samples, early stopping and the best weights, under every sharding.

The oracles: DDP and one process for numbers, transformers' own `generate` for samples, a shorter
training for the best weights, and a rule written out here for the step at which to stop.
"""

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests import scenarios
from tests.tables_for_tests import write_rows
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
