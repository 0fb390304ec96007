"""Predicted GPU memory, against what was measured, and what `auto` makes of it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ditty.config.choices import ActivationCheckpointing, Sharding
from ditty.config.launchspec import LaunchSpec
from ditty.config.spec import RunSpec, TrainSpec
from ditty.distributed.parallel import make_parallel
from ditty.distributed.world import single
from ditty.errors import LESS_MEMORY, SpecError
from ditty.models.model import add_adapter
from ditty.planning.fit import expected_memory, fitted
from ditty.planning.memory import Sizes, budget_of, expect_held, plan_memory
from ditty.planning.shapes import SHAPES
from ditty.training.recompute import held_by
from ditty.worker import explain
from tests.architectures import TRAINED

CARD = 80e9


def spec_of(model: dict | None = None, **train) -> RunSpec:
    return RunSpec.model_validate(
        {
            "name": "x",
            "data": {"source": "x.jsonl"},
            "model": {"base_model": "m", **(model or {})},
            "train": {"gradient_accumulation_steps": 1, **train},
        }
    )


def memory_of(shape: str, rows: int, spec: RunSpec, budget: float | None = None):
    sizes = Sizes.of(SHAPES[shape].config())
    assert sizes is not None
    return plan_memory(spec.train, sizes, expect_held(spec, sizes), rows * 2048, budget)


@pytest.mark.parametrize(
    ("shape", "rows", "model", "measured_gb"),
    # Peaks that torch told on one H200 (torch 2.11), nothing recomputed, rows of 2,048 tokens.
    [
        ("1b", 8, {}, 27.2),
        ("1b", 8, {"adapter": "none"}, 43.3),
        ("1b", 8, {"quantization": "nf4"}, 24.7),
        ("8b", 4, {}, 60.5),
        ("8b", 4, {"quantization": "nf4"}, 48.0),
    ],
)
def test_peaks_are_those_that_were_measured(shape, rows, model, measured_gb):
    assert memory_of(shape, rows, spec_of(model)).peak / 1e9 == pytest.approx(measured_gb, rel=0.1)


def test_sizes_count_the_weights_that_transformers_makes():
    for name in ("1b", "8b"):
        config = LlamaConfig(**SHAPES[name].config())
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        sizes = Sizes.of(config.to_dict())
        assert sizes is not None
        total = sum(p.numel() for p in model.parameters() if p.ndim == 2)
        assert sizes.linear_weights + sizes.word_weights == total
        assert len(model.model.layers) == sizes.layers


def test_what_is_expected_is_what_is_held_once_it_is_loaded():
    """The plan's count of LoRA's weights, against peft's own on the same model."""
    spec = spec_of({"lora_r": 8, "lora_dropout": 0.1}, precision="fp32")
    config = LlamaConfig(**SHAPES["tiny"].config() | {"dtype": "float32"})
    model = AutoModelForCausalLM.from_config(config)
    module = add_adapter(model, spec.model, 0)
    held = held_by(make_parallel(module, spec.train, single()), spec.train, compiled=False)
    sizes = Sizes.of(config.to_dict())
    assert sizes is not None
    expected = expect_held(spec, sizes)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert expected.trained == trained
    assert (held.full, held.dropout, held.compiled) == (False, True, False)
    assert (expected.full, expected.dropout, expected.compiled) == (False, True, False)
    assert held.weights == 0  # on a GPU: this is a CPU


def test_auto_recomputes_no_more_than_it_must():
    spec = spec_of()
    kept = memory_of("8b", 4, spec)
    assert kept.recomputed == 0 and kept.budget is None
    every = memory_of("8b", 4, spec_of(activation_checkpointing="all"), CARD)
    assert every.recomputed == 32 and every.peak < 25e9 < kept.peak
    assert memory_of("8b", 4, spec, kept.peak).recomputed == 0
    counts = []
    for budget in (60e9, 50e9, 40e9, 30e9, 24e9):
        found = memory_of("8b", 4, spec, budget)
        assert found.peak <= budget
        counts.append(found.recomputed)
    assert counts == sorted(counts) and 0 < counts[0] < counts[-1] < 32
    # One block fewer would be too much.
    assert found.peak + (kept.peak - every.peak) / 32 > budget
    assert memory_of("8b", 4, spec, 10e9).recomputed == 32  # does not fit at all: and says so
    assert memory_of("8b", 4, spec_of(activation_checkpointing="none"), 10e9).recomputed == 0


@pytest.mark.parametrize("checkpointing", ["none", "all"])
def test_full_training_takes_at_least_weights_optimizer_and_gradients(checkpointing):
    """With few tokens the most is taken at the end of the backward pass."""
    spec = spec_of({"adapter": "none"}, activation_checkpointing=checkpointing)
    sizes = Sizes.of(SHAPES["8b"].config())
    assert sizes is not None
    found = plan_memory(spec.train, sizes, expect_held(spec, sizes), 256, None)
    weights = sizes.linear_weights + sizes.word_weights
    assert 16 * weights <= found.peak < 16.5 * weights
    assert found.gradients == 4 * weights


def test_deepspeed_recomputes_all_blocks_or_none():
    assert memory_of("8b", 4, spec_of(sharding="zero3"), 20e9).recomputed == 0
    spec = spec_of(sharding="zero3", activation_checkpointing="all")
    assert memory_of("8b", 4, spec, 20e9).recomputed == 32


def test_the_switch_of_earlier_specs_is_read():
    old = TrainSpec.model_validate({"gradient_checkpointing": True})
    assert old.activation_checkpointing is ActivationCheckpointing.ALL
    assert TrainSpec.model_validate({"gradient_checkpointing": False}) == TrainSpec()


def test_the_budget_is_the_cards_or_the_specs():
    assert budget_of(TrainSpec(), CARD) == pytest.approx(0.92 * CARD)
    assert budget_of(TrainSpec(max_memory_gb=20), CARD) == 20e9
    assert budget_of(TrainSpec(max_memory_gb=500), CARD) == pytest.approx(0.92 * CARD)


def test_two_processes_hold_half_each_and_what_they_gather():
    alone = memory_of("8b", 4, spec_of({"quantization": "nf4"}))
    both = spec_of({"quantization": "nf4"}, sharding="fsdp2")
    both = both.model_copy(update={"launch": both.launch.model_copy(update={"num_processes": 2})})
    cut = memory_of("8b", 4, both)
    words = 2 * 2 * 128256 * 4096
    assert alone.weights / 2 + words < cut.weights < alone.weights / 2 + words * 1.15
    assert cut.activations == alone.activations


@pytest.mark.parametrize("name", sorted(TRAINED))
def test_sizes_of_other_architectures_are_right_or_unknown(name):
    config = TRAINED[name]
    sizes = Sizes.of(config.to_dict())
    assert (sizes is None) == (name in ("gpt2", "mixtral"))
    if sizes is None:
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = sum(
        m.weight.numel()
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings()
    )
    assert sizes.linear_weights == linear


def test_describe_says_where_it_goes_and_what_is_recomputed():
    line = memory_of("8b", 4, spec_of(), 40e9).describe()
    assert "of 40.0 GB a process (weights 1" in line and "of 32 blocks recomputed" in line


def test_the_choice_is_no_part_of_the_training_identity():
    from ditty.stages.stageline import training_identity

    one, other = spec_of(), spec_of(activation_checkpointing="all", max_memory_gb=3)
    assert training_identity(one, "m", "p") == training_identity(other, "m", "p")
    assert ActivationCheckpointing("auto") is one.train.activation_checkpointing


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """A base model's folder of 8B's sizes, and a machine whose GPUs have so many GB."""
    LlamaConfig(**SHAPES["8b"].config()).save_pretrained(tmp_path)

    def give(gigabytes: float | None):
        monkeypatch.setattr("ditty.planning.fit.resolve_device", lambda _: "cuda")
        card = None if gigabytes is None else gigabytes * 1e9
        monkeypatch.setattr("ditty.planning.fit.gpu_bytes", lambda: card)
        return tmp_path

    return give


def pair_of(model: dict | None = None, **train) -> RunSpec:
    return spec_of(model, **train).model_copy(update={"launch": LaunchSpec(num_processes=2)})


def test_auto_makes_replicas_where_they_fit_and_cuts_where_they_do_not(gpus):
    spec = pair_of({"quantization": "nf4"})
    roomy, why = fitted(spec, gpus(80))
    assert roomy.sharding is Sharding.DDP and "a copy of everything fits" in why[0]
    tight, why = fitted(pair_of(), gpus(16))
    assert tight.sharding is Sharding.FSDP2 and "would not fit" in why[0] and "of 14.7 GB" in why[0]
    kept, why = fitted(pair_of(optimizer="muon"), gpus(16))
    assert (
        kept.sharding is Sharding.DDP
        and "may not fit" in why[0]
        and "muon looks at whole" in why[0]
    )


def test_auto_has_nothing_to_choose(gpus):
    for spec, cards in ((spec_of(), 1), (pair_of(sharding="fsdp2"), 80)):
        found, why = fitted(spec, gpus(cards))
        assert found.sharding is spec.sharding and not why
    for folder in (gpus(None), None):  # no nvidia-smi; a model that is not fetched yet
        found, why = fitted(pair_of(), folder)
        assert found.sharding is Sharding.DDP and "unknown" in why[0]


def test_auto_takes_as_many_rows_at_once_as_fit_and_the_step_stays(gpus):
    rows = {"micro_batch_size": "auto", "gradient_accumulation_steps": 24}
    spec = spec_of({"quantization": "nf4"}, **rows)
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"seq_len": 2048})})
    assert spec.global_batch_size == 24
    sizes = []
    for card in (12, 24, 40, 60, 200):
        found, why = fitted(spec, gpus(card))
        memory = expected_memory(found, gpus(card))
        assert found.global_batch_size == 24 and memory is not None
        if found.train.micro_batch > 1:
            assert memory.fits and memory.recomputed == 0
        assert f"train.micro_batch_size is {found.train.micro_batch_size}, " in why[0]
        sizes.append(found.train.micro_batch)
    assert sizes == sorted(sizes) and sizes[0] == 1 and sizes[-1] == 12  # 16 does not divide 24
    assert all(24 % size == 0 for size in sizes) and len(set(sizes)) > 3


def test_auto_rows_of_what_is_not_predicted_are_refused(gpus, tmp_path):
    spec = spec_of(micro_batch_size="auto", gradient_accumulation_steps=8)
    with pytest.raises(SpecError, match="micro_batch_size: auto needs a model whose memory"):
        fitted(spec, gpus(None))
    with pytest.raises(ValueError, match="micro_batch_size"):
        spec_of(micro_batch_size="all")


@pytest.mark.fault("out of memory")
def test_a_host_that_has_no_more_is_out_of_memory(figure):
    """By torch's own error: on a CPU it has no class for that."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    result = explain(caught.value)
    assert (result.kind, result.retryable) == ("OutOfMemory", False)
    assert LESS_MEMORY in result.message and str(1 << 60) in result.message
    figure("on a CPU: retries 0, the error has the bytes and what to lower")
