"""The training loop against a plain PyTorch loop, and against itself when split and resumed."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, get_scheduler

from ditty.config.choices import Precision
from ditty.config.spec import ModelSpec, TrainSpec
from ditty.distributed.parallel import whole_weights
from ditty.distributed.world import single
from ditty.errors import ArtifactDamaged, RunError, RunMismatch
from ditty.models.batches import collate
from ditty.models.model import add_adapter, base_model, load_base, prepare_model, trainable
from ditty.runs.rundir import RunDir
from ditty.training.evaluate import held_out_loss
from ditty.training.feed import LoaderFeed, PackedFeed
from ditty.training.loss import token_loss_sum
from ditty.training.recompute import recompute_blocks
from ditty.training.sampler import BatchSplit, SampleOrder
from ditty.training.trainer import Place, Trainer
from tests.tiny import make_model_folder, random_rows, tiny_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("model"))


def build(folder: Path, *, adapter: str = "none", attention_kind: str = "packed", **model):
    spec = ModelSpec(base_model=str(folder), adapter=adapter, attention=attention_kind, **model)
    base = load_base(folder, spec, Precision.FP32, CPU)
    return prepare_model(base, spec, seed=0)


def settings(**changes) -> TrainSpec:
    values = {
        "max_steps": 10, "micro_batch_size": 2, "gradient_accumulation_steps": 4,
        "precision": "fp32",
        "learning_rate": 1e-3, "warmup_steps": 3, "weight_decay": 0.1, "max_grad_norm": 0.5,
    }  # fmt: skip
    return TrainSpec(**(values | changes))


def feed_of(rows, train: TrainSpec) -> PackedFeed:
    split = BatchSplit(train.micro_batch_size, train.gradient_accumulation_steps, 0, 1)
    order = SampleOrder(len(rows), split.global_batch_size, train.sampling, train.seed)
    return PackedFeed(rows, order, split)


def run_trainer(
    folder,
    tmp_path,
    train=None,
    *,
    rows=None,
    name="run",
    module=None,
    ahead=False,
    **build_options,
):
    """`ahead`: read each step's numbers after the next one is launched, as on a GPU."""
    train = train or settings()
    module = module or build(folder, **build_options)
    run = RunDir(tmp_path / name)
    run.root.mkdir(parents=True, exist_ok=True)
    place = Place(
        run, single(), {"train": train.model_dump(mode="json", include={"learning_rate"})}
    )
    trainer = Trainer(module, feed_of(rows or random_rows(30), train), train, place)
    trainer.waits = trainer.waits and not ahead
    outcome = trainer.fit()
    return trainer, outcome, [r for r in run.metrics() if r["kind"] == "train"]


def plain_loop(folder, rows, train: TrainSpec, adapter: str, takes=lambda losses, norms: True):
    """The reference: what a careful person would write without ditty, one document at a time.

    `takes`: whether a step is taken, by all losses and norms up to its own.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter == "lora":
        model = add_adapter(model, ModelSpec(base_model=""), train.seed)
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=train.learning_rate)
    schedule = get_scheduler(train.schedule.value, optimizer, train.warmup_steps, train.max_steps)
    size = train.micro_batch_size * train.gradient_accumulation_steps
    order = SampleOrder(len(rows), size, train.sampling, train.seed).samples(0)
    losses, norms, rates = [], [], []
    for _ in range(train.max_steps):
        documents = []
        for row in (rows[next(order)] for _ in range(size)):
            start = 0
            for n in row["lengths"]:
                pair = row["input_ids"][start : start + n], row["labels"][start : start + n]
                documents.append(tuple(torch.tensor(x) for x in pair))
                start += n
        total = sum(int((labels[1:] != -100).sum()) for _, labels in documents)
        loss = torch.zeros(())
        for ids, labels in documents:
            logits = model(input_ids=ids[None]).logits[0]
            loss = loss + F.cross_entropy(logits[:-1], labels[1:], reduction="sum") / total
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(params, train.max_grad_norm)))
        rates.append(optimizer.param_groups[0]["lr"])
        losses.append(loss.item())
        if takes(losses, norms):
            optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses, norms, rates


@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_first_ten_steps_equal_a_plain_loop(folder, tmp_path, adapter, schedule):
    rows, train = random_rows(30), settings(schedule=schedule)
    losses, norms, rates = plain_loop(folder, rows, train, adapter)
    _, outcome, metrics = run_trainer(folder, tmp_path, train, rows=rows, adapter=adapter)
    assert outcome.finished and [m["step"] for m in metrics] == list(range(1, 11))
    assert [m["loss"] for m in metrics] == pytest.approx(losses, rel=1e-5)
    assert [m["grad_norm"] for m in metrics] == pytest.approx(norms, rel=1e-4)
    assert [m["learning_rate"] for m in metrics] == pytest.approx(rates, rel=1e-12)
    assert losses[0] != losses[-1] and min(norms) > 0


@pytest.mark.parametrize("kind", ["packed", "sdpa", "eager"])
@pytest.mark.parametrize("window", [None, 7])
def test_packed_loss_equals_unpacked(tmp_path, kind, window):
    from transformers import MistralConfig

    config = tiny_config()
    if window:
        config = MistralConfig(
            **{**config.to_dict(), "model_type": "mistral", "sliding_window": window}
        )
    model = build(make_model_folder(tmp_path / "m", config), attention_kind=kind).eval()
    rows = random_rows(6)
    packed = float(token_loss_sum(model, model, collate(rows)).detach())
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", attn_implementation="eager"
    ).eval()
    unpacked = 0.0
    for row in rows:
        start = 0
        for n in row["lengths"]:
            ids, labels = (torch.tensor(row[k][start : start + n]) for k in ("input_ids", "labels"))
            with torch.no_grad():
                logits = reference(input_ids=ids[None], use_cache=False).logits[0]
            unpacked += float(F.cross_entropy(logits[:-1], labels[1:], reduction="sum"))
            start += n
    assert packed == pytest.approx(unpacked, rel=1e-5)
    assert sum(len(r["lengths"]) for r in rows) > len(rows), "no row is packed"


def test_documents_do_not_see_each_other(folder):
    model = build(folder).eval()
    row = {"input_ids": [5, 6, 7, 8, 9, 10], "labels": [-100] * 3 + [8, 9, 10], "lengths": [3, 3]}
    other = {**row, "input_ids": [99, 98, 97, 8, 9, 10]}
    losses = [float(token_loss_sum(model, model, collate([r])).detach()) for r in (row, other)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("micro, accumulation", [(2, 4), (8, 1)])
def test_accumulation_changes_nothing(folder, tmp_path, micro, accumulation):
    _, _, one = run_trainer(
        folder, tmp_path, settings(micro_batch_size=1, gradient_accumulation_steps=8), name="a"
    )
    train = settings(micro_batch_size=micro, gradient_accumulation_steps=accumulation)
    _, _, other = run_trainer(folder, tmp_path, train, name="b")
    assert [m["loss"] for m in other] == pytest.approx([m["loss"] for m in one], rel=1e-6)
    assert [m["supervised_tokens"] for m in other] == [m["supervised_tokens"] for m in one]
    assert len({m["supervised_tokens"] for m in one}) > 1, "all batches weigh the same"


def weights(trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.parallel.parameters.items()}


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_resume_is_bitwise_twice_and_across_an_epoch(folder, tmp_path, adapter):
    """10 + 7 + 3 steps of 8 over 30 rows, dropout on, cross two epoch boundaries."""
    options = {"adapter": adapter, "lora_dropout": 0.3 if adapter == "lora" else 0.0}
    whole, _, metrics = run_trainer(
        folder, tmp_path, settings(max_steps=20), name="whole", **options
    )
    stopper = StopAt(10)
    for stop in (10, 17, None):
        train = settings(max_steps=20, save_steps=5)
        module = build(folder, **options)
        if stop:
            stopper = StopAt(stop)
            stopper.attach(module, RunDir(tmp_path / "parts"), train)
        part, outcome, parts = run_trainer(folder, tmp_path, train, name="parts", module=module)
        assert outcome.step == (stop or 20) and outcome.finished is (stop is None)
        RunDir(tmp_path / "parts").stop_file.unlink(missing_ok=True)
    assert [m["loss"] for m in parts] == [m["loss"] for m in metrics]
    expected, got = weights(whole), weights(part)
    assert all(torch.equal(expected[n], got[n]) for n in expected)


def test_a_shuffling_loader_resumes_bitwise_with_dropout_on(folder, tmp_path):
    """torch's own DataLoader draws from the global generator, at each pass and in its sampler."""
    import random

    def noisy(rows):
        random.random()
        np.random.rand()
        torch.rand(3)
        return collate(rows)

    def train_for(name, stop=None):
        loader = DataLoader(random_rows(12), batch_size=2, shuffle=True, collate_fn=noisy)
        run = RunDir(tmp_path / name)
        run.root.mkdir(exist_ok=True)
        run.stop_file.unlink(missing_ok=True)
        train = settings(gradient_accumulation_steps=2)
        module = build(folder, adapter="lora", lora_dropout=0.3)
        if stop:
            StopAt(stop).attach(module, run, train)
        trainer = Trainer(module, LoaderFeed(loader, 2, single()), train, Place(run))
        return trainer, trainer.fit()

    whole, _ = train_for("whole")
    assert train_for("parts", stop=4)[1].step == 4
    part, outcome = train_for("parts")
    assert outcome.finished
    expected, got = weights(whole), weights(part)
    assert all(torch.equal(expected[n], got[n]) for n in expected)


class StopAt:
    """Asks the run to stop during the forward passes of a step, as the flow would."""

    def __init__(self, step: int):
        self.step, self.calls = step, 0

    def attach(self, module, run: RunDir, train: TrainSpec) -> None:
        first = run.newest_step()
        calls = (self.step - first) * train.gradient_accumulation_steps

        def count(model, *_):
            self.calls += model.training
            if self.calls == calls:
                run.stop_file.touch()

        base_model(module).register_forward_pre_hook(count)


def test_damaged_checkpoint_is_set_aside_and_the_one_before_used(folder, tmp_path):
    whole, _, _ = run_trainer(folder, tmp_path, settings(save_steps=4), name="whole")
    trainer, _, _ = run_trainer(folder, tmp_path, settings(save_steps=4), name="run")
    run = RunDir(tmp_path / "run")
    assert run.committed_steps() == [8, 10]
    victim = run.checkpoint(10) / "shard_00000.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    again, _, _ = run_trainer(folder, tmp_path, settings(save_steps=4), name="run")
    assert list(run.checkpoints.glob(".bad-step_000000010-*"))
    expected, got = weights(whole), weights(again)
    assert all(torch.equal(expected[n], got[n]) for n in expected)


def test_no_checkpoint_verifies_is_an_error_and_no_fresh_start(folder, tmp_path):
    run_trainer(folder, tmp_path, settings(max_steps=4, save_steps=2))
    run = RunDir(tmp_path / "run")
    for step in run.committed_steps():
        (run.checkpoint(step) / "state.json").unlink()
    with pytest.raises(ArtifactDamaged, match="none of the checkpoints"):
        run_trainer(folder, tmp_path, settings(max_steps=4, save_steps=2))


@pytest.mark.fault("changed spec")
def test_changed_spec_is_refused_and_named(folder, tmp_path, figure):
    run_trainer(folder, tmp_path, settings(max_steps=2))
    with pytest.raises(RunMismatch, match=r"learning_rate was 0\.001, now 0\.5"):
        run_trainer(folder, tmp_path, settings(max_steps=2, learning_rate=0.5))
    figure("refused by the checkpoint, and the key is named")


@pytest.mark.fault("not finite")
def test_non_finite_loss_is_never_committed(folder, tmp_path, figure):
    module = build(folder)
    train = settings(
        max_steps=6, save_steps=1, learning_rate=1e30, max_grad_norm=1e30, warmup_steps=0
    )
    with pytest.raises(RunError, match="step 2: loss"):
        run_trainer(folder, tmp_path, train, module=module)
    assert RunDir(tmp_path / "run").committed_steps() == [1]
    figure("NaN commits 0 (non-finite loss)")


@pytest.mark.parametrize("save_steps", [1, 100])
def test_what_is_not_finite_is_never_committed_where_it_is_read_a_step_later(
    folder, tmp_path, save_steps
):
    train = settings(max_steps=6, save_steps=save_steps, learning_rate=1e30, max_grad_norm=1e30)
    train = train.model_copy(update={"warmup_steps": 0})
    with pytest.raises(RunError, match="step 2: loss"):
        run_trainer(folder, tmp_path, train, ahead=True)
    assert RunDir(tmp_path / "run").committed_steps() == [1][: save_steps == 1]


def test_numbers_read_a_step_later_are_the_same(folder, tmp_path):
    train = settings(max_steps=7, save_steps=3, eval_steps=None)
    waited, _, expected = run_trainer(folder, tmp_path, train, name="waited")
    ahead, _, found = run_trainer(folder, tmp_path, train, name="ahead", ahead=True)
    assert waited.waits and not ahead.waits
    assert ahead.unread is None
    for ours, theirs in zip(found, expected, strict=True):
        for key in ("step", "loss", "grad_norm", "learning_rate", "supervised_tokens", "tokens"):
            assert ours[key] == theirs[key], key
    mine, other = (whole_weights(t.parallel, single()) for t in (ahead, waited))
    assert all(torch.equal(mine[name], other[name]) for name in other)


def test_held_out_loss_and_recomputed_blocks(folder):
    rows = random_rows(5, seed=9)
    model = build(folder)
    loss, tokens = held_out_loss(model, model, rows, Precision.FP32, single())
    batch = collate(rows)
    assert tokens == int((batch["labels"] != -100).sum())
    assert loss == pytest.approx(
        float(token_loss_sum(model, model, batch).detach()) / tokens, rel=1e-5
    )
    spec = ModelSpec(base_model=str(folder))
    gradients = []
    for count in (0, 1, 2):
        base = load_base(folder, spec, Precision.FP32, CPU)
        module = prepare_model(base, spec, seed=0)
        recompute_blocks(base, count)
        calls = _count_mlp_calls(base)
        token_loss_sum(module, base, batch).backward()
        assert calls == [1 + (i < count) for i in range(2)]
        gradients.append([p.grad for p in trainable(module).values()])
    kept = gradients[0]
    for recomputed in gradients[1:]:
        assert all(
            g is not None and torch.equal(g, h) for g, h in zip(kept, recomputed, strict=True)
        )


def _count_mlp_calls(model) -> list[int]:
    """How often each block's MLP is called, from now on."""
    calls = [0] * len(model.model.layers)
    for index, layer in enumerate(model.model.layers):

        def count(*_, index=index):
            calls[index] += 1

        layer.mlp.register_forward_pre_hook(count)
    return calls


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_bf16_follows_fp32_and_keeps_fp32_weights(folder, tmp_path, adapter):
    runs = {}
    for precision in ("fp32", "bf16"):
        train = settings(precision=precision)
        spec = ModelSpec(base_model=str(folder), adapter=adapter)
        base = load_base(folder, spec, train.precision, CPU)
        module = prepare_model(base, spec, seed=0)
        trainer, _, metrics = run_trainer(folder, tmp_path, train, name=precision, module=module)
        assert {p.dtype for p in trainer.parallel.parameters.values()} == {torch.float32}
        runs[precision] = [m["loss"] for m in metrics]
    assert runs["bf16"] == pytest.approx(runs["fp32"], rel=0.02)
    assert runs["bf16"] != runs["fp32"], "nothing was computed in bf16"


def test_an_operation_without_a_deterministic_kernel_ends_the_run(folder, tmp_path):
    def scattering(*_args):
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))

    module = build(folder)
    base_model(module).register_forward_hook(scattering)
    with pytest.raises(RunError, match="put_ has no kernel .* Set train.deterministic: false"):
        run_trainer(folder, tmp_path, module=module)
    train = settings(deterministic=False, max_steps=1)
    assert run_trainer(folder, tmp_path, train, name="any", module=module)[1].finished
