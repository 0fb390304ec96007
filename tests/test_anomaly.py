"""Steps out of the ordinary, by a batch that really is: told, skipped or stopped, never kept.

The oracle is a plain loop that decides by numpy's median. Several processes: test_strategies.py.
"""

import json
import math

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForCausalLM

from ditty.config.choices import OnAnomaly
from ditty.config.specfile import parse_spec
from ditty.errors import RunError, RunMismatch, StoreError
from ditty.runs.anomaly import LEAST_SIGMA, MOST_SKIPPED, StepGuard, robust_z
from ditty.runs.identity import check_identity
from ditty.runs.rundir import RunDir
from ditty.stages.stageline import training_identity
from ditty.training.readout import waits_for_numbers
from tests.test_specs import MINIMAL
from tests.test_trainer import StopAt, build, plain_loop, run_trainer, settings, weights
from tests.tiny import VOCABULARY, make_model_folder, random_rows, tiny_config

BAD_STEP = 9  # takes rows 16 and 17
POISON = VOCABULARY - 1  # a token whose embedding is infinite
WINDOW = {"spike_window": 8, "spike_threshold": 3.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with one poisoned token, whose embedding is not trained by an adapter."""
    folder = tmp_path_factory.mktemp("model")
    make_model_folder(folder, tiny_config(tie_word_embeddings=False))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = math.inf
    model.save_pretrained(folder)
    return folder


def easy_rows(bad: str) -> list[dict]:
    """Rows of one short pattern, soon learned; those of BAD_STEP are noise, or poisoned."""
    ids = [5, 6, 7, 8, 9, 10, 11, 12]
    rows = [{"input_ids": ids, "labels": ids, "lengths": [len(ids)]} for _ in range(40)]
    noise = random_rows(2, seed=3)
    for row in noise:
        row["input_ids"] = [POISON if bad == "non-finite" else i for i in row["input_ids"]]
        row["input_ids"] = [i if bad == "non-finite" else i % POISON for i in row["input_ids"]]
    rows[2 * (BAD_STEP - 1) : 2 * BAD_STEP] = noise
    return rows


def easy(**changes):
    values = {
        "max_steps": 14, "micro_batch_size": 1, "gradient_accumulation_steps": 2,
        "sampling": "sequential", "learning_rate": 1e-2, "warmup_steps": 0, **WINDOW,
    }  # fmt: skip
    return settings(**(values | changes))


def takes_by_numpy(losses: list[float], norms: list[float]) -> bool:
    """Iglewicz and Hoaglin's rule on the last 8 of each, by numpy."""
    for values in (losses, norms):
        if not np.isfinite([losses[-1], norms[-1]]).all():
            return False
        window = np.array([v for v in values[:-1] if np.isfinite(v)][-8:])
        if len(window) < 4:
            continue
        median = np.median(window)
        sigma = max(1.4826 * np.median(np.abs(window - median)), LEAST_SIGMA * median)
        if (values[-1] - median) / sigma >= 3.0:
            return False
    return True


def anomalies(tmp_path, name="run") -> list[dict]:
    records = list(RunDir(tmp_path / name).metrics())
    return [r for r in records if r["kind"] == "anomaly"]


@pytest.mark.parametrize("reason", ["spike", "non-finite"])
def test_a_bad_batch_is_skipped_as_a_plain_loop_skips_it(folder, tmp_path, caplog, reason):
    rows, train = easy_rows(reason), easy(on_spike="skip", on_non_finite="skip")
    skipped = []

    def takes(losses, norms):
        taken = takes_by_numpy(losses, norms)
        skipped.extend([] if taken else [len(losses)])
        return taken

    losses, norms, _ = plain_loop(folder, rows, train, "lora", takes)
    _, outcome, metrics = run_trainer(folder, tmp_path, train, rows=rows, adapter="lora")
    assert outcome.finished and skipped == [BAD_STEP]
    assert [m["loss"] for m in metrics] == pytest.approx(losses, rel=1e-5, nan_ok=True)
    assert [m["grad_norm"] for m in metrics] == pytest.approx(norms, rel=1e-4, nan_ok=True)
    (found,) = anomalies(tmp_path)
    assert (found["step"], found["reason"], found["action"]) == (BAD_STEP, reason, "skip")
    assert found["packed_rows"] == [16, 17]
    assert f"step {BAD_STEP}: loss" in caplog.text and "on packed rows 16, 17" in caplog.text


@pytest.mark.parametrize(("reason", "ahead"), [("spike", True), ("non-finite", False)])
def test_a_stop_keeps_nothing_and_a_skip_goes_on_from_there(folder, tmp_path, reason, ahead):
    """As a user does it: the run ends, they look at the rows, and tell it to skip them."""
    rows, options = easy_rows(reason), {"adapter": "lora", "lora_dropout": 0.2}
    stop, skip = easy(on_spike="stop", save_steps=1), easy(on_spike="skip", on_non_finite="skip")
    with pytest.raises(RunError, match=rf"step {BAD_STEP}: .* on packed rows 16, 17\. Nothing"):
        run_trainer(folder, tmp_path, stop, rows=rows, ahead=ahead, **options)
    assert RunDir(tmp_path / "run").committed_steps() == [BAD_STEP - 2, BAD_STEP - 1]
    assert [a["action"] for a in anomalies(tmp_path)] == ["stop"]
    resumed, outcome, _ = run_trainer(folder, tmp_path, skip, rows=rows, **options)
    whole, _, _ = run_trainer(folder, tmp_path, skip, rows=rows, name="whole", **options)
    assert outcome.finished and [a["action"] for a in anomalies(tmp_path, "whole")] == ["skip"]
    expected, got = weights(whole), weights(resumed)
    assert all(torch.equal(expected[n], got[n]) for n in expected)


def test_a_spike_is_told_and_taken_unless_the_spec_says_otherwise(folder, tmp_path, caplog):
    rows = easy_rows("spike")
    run_trainer(folder, tmp_path, easy(), rows=rows, adapter="lora", name="told")
    told = RunDir(tmp_path / "told")
    blind = easy(spike_threshold=1e9)
    run_trainer(folder, tmp_path, blind, rows=rows, adapter="lora", name="blind")
    losses = [
        [r["loss"] for r in run.metrics() if r["kind"] == "train"]
        for run in (told, RunDir(tmp_path / "blind"))
    ]
    assert losses[0] == losses[1] and anomalies(tmp_path, "blind") == []
    assert anomalies(tmp_path, "told")[0]["packed_rows"] == [16, 17]
    assert "on_spike: warn" in caplog.text


def test_a_resume_judges_by_the_steps_before_it(folder, tmp_path):
    """One step before the bad one: without what came before, nothing would be a spike."""
    rows, train = easy_rows("spike"), easy(on_spike="skip")
    whole, _, _ = run_trainer(folder, tmp_path, train, rows=rows, name="whole", adapter="lora")
    module, run = build(folder, adapter="lora"), RunDir(tmp_path / "run")
    StopAt(BAD_STEP - 1).attach(module, run, train)
    _, outcome, _ = run_trainer(folder, tmp_path, train, rows=rows, module=module)
    assert outcome.step == BAD_STEP - 1
    run.stop_file.unlink()
    part, outcome, _ = run_trainer(folder, tmp_path, train, rows=rows, adapter="lora")
    assert outcome.finished and [a["step"] for a in anomalies(tmp_path)] == [BAD_STEP]
    expected, got = weights(whole), weights(part)
    assert all(torch.equal(expected[n], got[n]) for n in expected)


def test_what_a_finite_step_made_infinite_is_not_committed(folder, tmp_path):
    """Loss and gradients are finite, and the optimizer's state is not: the next save refuses it."""
    calls = []

    def poison(optimizer, *_):
        calls.append(1)
        if len(calls) == 3:
            next(iter(optimizer.state.values()))["exp_avg"].flatten()[0] = math.inf

    hook = register_optimizer_step_post_hook(poison)
    try:
        with pytest.raises((StoreError, RunError), match="exp_avg/.* is not finite"):
            train = easy(max_steps=4, save_steps=1)
            run_trainer(folder, tmp_path, train, rows=easy_rows("spike"), adapter="lora")
    finally:
        hook.remove()
    assert len(calls) >= 3 and RunDir(tmp_path / "run").committed_steps() == [1, 2]


@pytest.mark.parametrize(
    ("changes", "waits"),
    [({}, False), ({"on_spike": "stop"}, False), ({"on_spike": "skip"}, True)]
    + [({"on_non_finite": "skip"}, True), ({"precision": "fp16"}, True)],
)
def test_on_a_gpu_only_a_skip_waits_for_the_numbers_of_its_step(changes, waits):
    assert waits_for_numbers(easy(**changes), torch.device("cuda")) is waits
    assert waits_for_numbers(easy(**changes), torch.device("cpu"))


def test_the_measure_is_numpys():
    generator = np.random.default_rng(0)
    for size in (4, 5, 128):
        window = generator.standard_t(2, size) * 0.3 + 2.0
        value = float(generator.normal(3.0, 2.0))
        median = np.median(window)
        mad = np.median(np.abs(window - median))
        assert robust_z(value, window.tolist()) == pytest.approx((value - median) / (1.4826 * mad))
    assert robust_z(2.01, [2.0] * 9) == pytest.approx(0.5), "equal values: 1% of them is a sigma"
    assert robust_z(1.0, [0.0] * 9) > 1e300


def guard(**changes) -> StepGuard:
    return StepGuard(easy(**changes))


def test_a_level_that_rose_for_good_is_the_usual_one_soon():
    watched = guard(on_spike="skip")
    assert all(watched.judge(1.0, 1.0) is None for _ in range(8))
    actions = [getattr(watched.judge(3.0, 1.0), "action", None) for _ in range(10)]
    assert actions == [OnAnomaly.SKIP] * 4 + [None] * 6


def test_skipping_on_and_on_ends_the_run():
    watched = guard(on_non_finite="skip")
    found = [watched.judge(math.nan, 1.0) for _ in range(MOST_SKIPPED + 1)]
    assert [f.action for f in found[:-1]] == [OnAnomaly.SKIP] * MOST_SKIPPED
    assert found[-1].action is OnAnomaly.STOP
    assert "it is not the batch" in found[-1].told(1, {"packed_rows": [1]})
    assert json.dumps(found[-1].record(), allow_nan=False)


WARN, SKIP, STOP = ({"on_spike": a} for a in ("warn", "skip", "stop"))
LOWER = {"spike_threshold": 2.0}


@pytest.mark.parametrize(
    ("before", "numbers", "now", "fits"),
    [
        (STOP, [1.0], SKIP, True),
        (SKIP, [1.0], WARN, True),
        (WARN, [1.0], SKIP, True),
        (WARN, [9.0], STOP, True),
        (WARN, [9.0], SKIP, False),
        (SKIP, [9.0], WARN, False),
        (SKIP, [9.0], SKIP, True),
        (WARN, [1.0], SKIP | LOWER, False),
        (SKIP, [1.0], SKIP | LOWER, False),
        ({}, [1.0], {"on_non_finite": "skip"}, True),
        ({}, [9.0], {"on_non_finite": "skip"}, True),
        ({"on_non_finite": "skip"}, [math.nan], {}, False),
    ],
)
def test_the_rule_may_change_where_no_step_would_have_been_another(before, numbers, now, fits):
    first, second = guard(**before), guard(**now)
    for number in [1.0] * 8 + numbers:
        first.judge(number, 1.0)
    state = json.loads(json.dumps(first.state()))
    if fits:
        second.resume(state, 9)
        assert second.state() == state | {"rule": second.state()["rule"]}
    else:
        with pytest.raises(RunMismatch, match=r"train\.\w+ was .*, now .* up to 9"):
            second.resume(state, 9)


def test_a_rule_that_changed_twice_is_not_forgotten():
    first, second, third = guard(**WARN), guard(**WARN, **LOWER), guard(**SKIP, **LOWER)
    first.judge(1.0, 1.0)
    second.resume(first.state(), 1)
    with pytest.raises(RunMismatch, match="on_spike"):
        third.resume(second.state(), 1)


def test_a_checkpoint_of_before_there_were_guards_resumes_but_for_a_skip():
    guard().resume(None, 4)
    guard(on_non_finite="skip").resume(None, 4)
    with pytest.raises(RunMismatch, match="on_spike was 'warn', now 'skip'"):
        guard(on_spike="skip").resume(None, 4)


def test_only_a_skip_is_part_of_the_training_identity():
    def identity(**train):
        return training_identity(parse_spec({**MINIMAL, "train": train}), "m", "p")

    plain = identity()
    assert not {"on_spike", "on_non_finite", *WINDOW} & plain["train"].keys()
    assert identity(on_spike="stop", spike_threshold=2) == plain
    skipping = [identity(on_spike="skip"), identity(on_spike="skip", spike_window=64)]
    skipping.append(identity(on_non_finite="skip"))
    assert all(a != b for a in skipping for b in (plain, *skipping) if a is not b)
    check_identity(skipping[0], plain, "a checkpoint")  # whether it fits: StepGuard.resume
    with pytest.raises(RunMismatch, match="learning_rate"):
        check_identity(skipping[0], identity(learning_rate=1), "a checkpoint")
