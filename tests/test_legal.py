"""Which strategies are refused, why, and what the refusal says to do instead."""

import itertools

import pytest

from ditty.config import legal
from ditty.config.choices import Adapter, Optimizer, Precision, Quantization, Sharding
from ditty.config.legal import Strategy
from ditty.config.specfile import parse_spec
from ditty.errors import SpecError


def spec(processes=2, machines=1, model=None, **train):
    launch = {"num_processes": processes, "num_machines": machines}
    if machines > 1:
        launch |= {"machine_rank": 0, "main_host": "node0"}
    return parse_spec(
        {
            "name": "a",
            "data": {"source": "rows.jsonl"},
            "model": {"base_model": "some/model", **(model or {})},
            "train": train,
            "launch": launch,
        }
    )


@pytest.mark.parametrize(
    ("reason", "instead", "options"),
    [
        ("one process", "sharding: ddp", {"sharding": "none"}),
        ("cannot be cut", "nf4", {"sharding": "fsdp2", "model": {"quantization": "int8"}}),
        ("cannot be cut", "ddp", {"sharding": "zero3", "model": {"quantization": "int8"}}),
        (
            "freezes the base",
            "adapter: lora",
            {"model": {"adapter": "none", "quantization": "nf4"}},
        ),
        ("whole weight", "fsdp2", {"sharding": "zero3", "model": {"adapter": "dora"}}),
        (
            "nowhere whole",
            "ddp",
            {"sharding": "fsdp2", "model": {"adapter": "dora", "quantization": "nf4"}},
        ),
        ("second loss scale", "bf16", {"sharding": "zero3", "precision": "fp16"}),
        ("whole matrices", "adamw", {"sharding": "fsdp2", "optimizer": "muon"}),
        (
            "whole matrices",
            "ddp",
            {"sharding": "hybrid", "shard_size": 1, "optimizer": "adafactor"},
        ),
        ("flat partitions", "fsdp2", {"sharding": "zero3", "optimizer": "lion"}),
        ("pages it from a GPU", "lion", {"sharding": "fsdp2", "cpu_offload": True,
                                         "optimizer": "paged_lion"}),
        ("sharded weights", "fsdp2", {"cpu_offload": True}),
        ("one GPU", "nf4", {"cpu_offload": True, "model": {"quantization": "int8"},
                            "activation_checkpointing": "all"}),
        ("larger multiple", "fsdp2", {"sharding": "hybrid"}),
        ("is for hybrid", "sharding: hybrid", {"sharding": "fsdp2", "shard_size": 2}),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_reason_and_way_out(reason, instead, options):
    with pytest.raises(SpecError) as caught:
        spec(**options)
    assert reason in str(caught.value) and instead in str(caught.value)


def test_int8_offload_needs_recomputation():
    with pytest.raises(SpecError, match="activation_checkpointing: all"):
        spec(1, model={"quantization": "int8"}, cpu_offload=True)


def test_auto_is_one_process_or_replicas_and_hybrid_cuts_within_a_machine():
    assert spec(1).sharding is Sharding.NONE and spec(2).sharding is Sharding.DDP
    assert Strategy.of(spec(4, 3, sharding="hybrid")).shard_size == 4
    assert spec(3, 3).global_batch_size == 9 * 8


def test_every_way_out_of_the_matrix_is_a_member_of_it():
    """Of all 2-process strategies some work and some do not; those that do say what they are."""
    axes = (Sharding, Adapter, Quantization, Precision, Optimizer)
    legal_ones, refused = [], []
    for sharding, adapter, quantization, precision, optimizer in itertools.product(*axes):
        if sharding is Sharding.AUTO:
            continue
        shard_size = 1 if sharding is Sharding.HYBRID else None
        values = (sharding, adapter, quantization, precision, optimizer)
        strategy = Strategy(*values, False, False, None, 2, shard_size)
        problems = list(legal.problems(strategy))
        (refused if problems else legal_ones).append(strategy)
        assert all("; use " in p or "; remove" in p or "; set " in p for p in problems), problems
    assert legal_ones and refused
    for strategy in legal_ones:
        text = strategy.describe()
        assert strategy.precision in text and "2 processes" in text
