"""Callbacks, and a loss, an optimizer and a collator of one's own: ditty.training.hooks."""

import inspect
import textwrap

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.trainer_pt_utils import LabelSmoother

from ditty import Data, Hooks, Pipeline
from ditty.distributed.parallel import make_parallel
from ditty.distributed.world import single
from ditty.errors import DataError, RunError, RunMismatch, SpecError
from ditty.models.attention import forward_kwargs
from ditty.runs.rundir import RunDir
from ditty.training import hooks
from ditty.training.evaluate import HeldOut
from ditty.training.trainer import Place, Trainer
from tests.test_trainer import build, feed_of, settings
from tests.tiny import make_model_folder, make_tokenizer, random_rows


def smoothed(forward, model, batch):
    logits = forward(**forward_kwargs(model, batch)).logits[0, batch["predicts"]]
    targets = batch["targets"]
    return F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=0.1)


def momentum(parameters, train):
    return torch.optim.SGD(parameters.values(), lr=train.learning_rate, momentum=0.9)


def last_words(rows):
    batch = make_tokenizer().pad(rows, return_tensors="pt")
    places = torch.arange(batch["input_ids"].shape[1])
    ends = batch["attention_mask"].sum(1)[:, None]
    learned = (places >= ends - 3) & (places < ends)
    return {**batch, "labels": batch["input_ids"].where(learned, -100)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("model"))


def trainer_of(folder, root, train, hooks, **options):
    run = RunDir(root)
    run.root.mkdir(parents=True, exist_ok=True)
    module = build(folder, adapter="lora", lora_dropout=0.1)
    rows = random_rows(30)
    held_out = HeldOut(random_rows(3, seed=1))
    return Trainer(module, feed_of(rows, train), train, Place(run, single()), held_out, hooks)


def weights(trainer):
    return {part.name: part.value.detach().clone() for part in trainer.parallel.parts}


def test_callbacks_are_told_everything_once_and_change_nothing(folder, tmp_path):
    train = settings(max_steps=9, save_steps=2, eval_steps=4)
    plain = trainer_of(folder, tmp_path / "plain", train, Hooks())
    plain.fit()
    told = []

    def noisy(kind):
        def callback(*arguments):
            torch.rand(7)
            told.append((kind, *arguments))

        return callback

    def stopping(record):
        noisy("step")(record)
        if record["step"] == 5 and not trainer.run.stop_file.exists():
            trainer.run.stop_file.touch()

    run = RunDir(tmp_path / "told")
    for _ in range(2):
        callbacks = Hooks(stopping, noisy("evaluate"), noisy("save"))
        trainer = trainer_of(folder, run.root, train, callbacks)
        outcome = trainer.fit()
        run.stop_file.unlink(missing_ok=True)
    assert outcome.finished
    one, two = weights(plain), weights(trainer)
    assert all(torch.equal(one[name], two[name]) for name in one), "with dropout, and a resume"
    records = list(run.metrics())
    for kind, name in (("step", "train"), ("evaluate", "eval")):
        assert [r for k, r, *_ in told if k == kind] == [r for r in records if r["kind"] == name]
    saved = [step for kind, step, *_ in told if kind == "save"]
    assert saved == [2, 4, 5, 6, 8, 9]
    assert {path for kind, *_, path in told if kind == "save"} == {run.checkpoint(s) for s in saved}


@pytest.mark.parametrize("name", ["on_step", "on_save", "on_evaluate"])
def test_what_a_callback_raises_ends_the_run_with_its_name(folder, tmp_path, name):
    def of_the_user(*_):
        raise KeyError("nothing there")

    train = settings(max_steps=3, save_steps=1)
    trainer = trainer_of(folder, tmp_path, train, Hooks(**{name: of_the_user}))
    with pytest.raises(
        RunError, match=rf"{name} \(.*of_the_user\) raised KeyError: 'nothing there'"
    ):
        trainer.fit()


def test_a_loss_of_ones_own_equals_transformers_label_smoother(folder, tmp_path):
    """One row at a time, as transformers' Trainer would compute it."""
    train = settings(max_steps=1)
    trainer = trainer_of(folder, tmp_path, train, Hooks(loss=smoothed))
    batches = next(trainer.feed.steps(0))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = count = 0.0
    for batch in batches:
        for start, end in zip(batch["cu_seqlens"], batch["cu_seqlens"][1:], strict=False):
            ids, labels = (batch[key][:, start:end] for key in ("input_ids", "labels"))
            n = int((labels[:, 1:] != -100).sum())
            output = {"logits": model(ids).logits}
            total += LabelSmoother(0.1)(output, labels, shift_labels=True).item() * n
            count += n
    trainer.fit()
    (record,) = [r for r in trainer.run.metrics() if r["kind"] == "train"]
    assert record["loss"] == pytest.approx(total / count, rel=1e-5)
    assert record["supervised_tokens"] == count


def test_an_optimizer_of_ones_own_equals_a_plain_loop(folder, tmp_path):
    train = settings(max_steps=4, schedule="constant", warmup_steps=0, max_grad_norm=1e9)
    trainer = trainer_of(folder, tmp_path, train, Hooks(optimizer=momentum))
    reference = build(folder, adapter="lora", lora_dropout=0.1).eval()
    trainer.parallel.model.eval()
    parameters = {n: p for n, p in reference.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=train.learning_rate, momentum=0.9)
    steps = trainer.feed.steps(0)
    for _ in range(4):
        batches = next(steps)
        terms = sum(len(batch["targets"]) for batch in batches)
        for batch in batches:
            (
                hooks.token_loss_sum(reference.get_base_model(), reference.get_base_model(), batch)
                / terms
            ).backward()
        optimizer.step()
        optimizer.zero_grad()
    trainer.held_out = None
    trainer.fit()
    for name, value in weights(trainer).items():
        torch.testing.assert_close(value, parameters[name].detach(), rtol=1e-4, atol=1e-7)
    assert any(value.abs().sum() for name, value in weights(trainer).items() if "lora_B" in name)


class Mine(Pipeline):
    """All three, as in the documentation."""

    def dataset(self):
        rows = [{"text": f"{'word ' * (i % 5)}number {i}"} for i in range(20)]
        data = Data(
            dataset=Dataset.from_list(rows),
            tokenizer=self.tokenizer,
            batch_size=2,
            collator=last_words,
            cache=False,
        )
        encode = [("map", lambda row: dict(self.tokenizer(row["text"])), {})]
        return data.prepare(encode)

    def hooks(self):
        return Hooks(loss=smoothed, optimizer=momentum, on_step=self.told.append)


def mine(folder, root, kind=Mine, **options):
    chosen = {
        "batch_size": 2,
        "grad_accum": 2,
        "precision": "fp32",
        "max_steps": 6,
        "save_steps": 2,
    }
    pipeline = kind(str(folder), output_dir=str(root), lora_dropout=0.1, **(chosen | options))
    pipeline.told = []
    return pipeline


def test_a_resume_with_all_of_them_is_bitwise_and_another_loss_is_refused(folder, tmp_path):
    whole = mine(folder, tmp_path / "whole")
    assert whole.run().finished
    assert [r["step"] for r in whole.told] == list(range(1, 7))
    tokens = {r["supervised_tokens"] for r in whole.told}
    assert tokens == {4 * 3}, "four rows, three tokens each, are supervised: the collator says so"

    class Stops(Mine):
        def hooks(self):
            def stop(record):
                if record["step"] == 3:
                    RunDir(self.output_dir).stop_file.touch()

            return Hooks(loss=smoothed, optimizer=momentum, on_step=stop)

    assert mine(folder, tmp_path / "part", Stops).run().step == 3
    RunDir(tmp_path / "part").stop_file.unlink()

    class Other(Mine):
        def hooks(self):
            return Hooks(optimizer=momentum)

    with pytest.raises(RunMismatch, match=r"hooks\.loss was '\w{64}', now None"):
        mine(folder, tmp_path / "part", Other).run()
    assert mine(folder, tmp_path / "part").run().finished
    name = "final/adapter_model.safetensors"
    one, two = (load_file(tmp_path / p / name) for p in ("whole", "part"))
    assert one and all(torch.equal(one[k], two[k]) for k in one)


def test_mistakes_in_hooks(folder, tmp_path):
    def closes_over(forward, model, batch):
        return tmp_path

    with pytest.raises(DataError, match="tmp_path"):
        Hooks(loss=closes_over).identity()
    with pytest.raises(SpecError, match=r"closes_over returned PosixPath, expected a scalar"):
        trainer_of(folder, tmp_path / "a", settings(), Hooks(loss=closes_over)).fit()

    class Hidden(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            self.param_groups[0]["count"] = self.param_groups[0].get("count", 0) + 1

    def hidden(parameters, train):
        return Hidden(parameters.values(), lr=1.0)

    def choosy(parameters, train):
        return torch.optim.SGD([*parameters.values()][1:], lr=1.0)

    with pytest.raises(
        SpecError, match=r"SGD has \d+ parameters, and \d+ are trained \(left out: "
    ):
        trainer_of(folder, tmp_path / "c", settings(), Hooks(optimizer=choosy))
    trainer = trainer_of(folder, tmp_path / "b", settings(), Hooks(optimizer=hidden))
    with pytest.raises(RunError, match=r"Hidden keeps param_groups\[0\]\['count'\]"):
        trainer.fit()
    zero = build(folder)
    next(zero.parameters()).ds_id = 0
    with pytest.raises(SpecError, match="zero3 takes no optimizer of yours"):
        make_parallel(zero, settings(), single(), momentum)


@pytest.mark.parametrize("function", [smoothed, momentum, last_words], ids=lambda f: f.__name__)
def test_the_documentation_shows_these_and_they_are_short(function):
    source = inspect.getsource(function)
    assert textwrap.indent(source, "    ") in hooks.__doc__
    assert source.count("\n") < 10
