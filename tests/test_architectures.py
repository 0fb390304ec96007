"""Any causal language model of transformers: its own blocks are cut, in its own layout on disk.

The oracle is DDP, which loads with from_pretrained and cuts nothing: same losses and same weights,
to the bit. See scenarios.py for how the trainings run, and test_weights.py for more architectures.
"""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ditty.config.choices import Quantization
from ditty.quantization.quantize import quantize
from ditty.store.files import read_json
from tests import scenarios
from tests.architectures import TRAINED, make
from tests.tables_for_tests import write_rows
from tests.tiny import random_rows

STEPS = 3
TRAIN = {
    "max_steps": STEPS,
    "precision": "fp32",
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "save_steps": 100,
}
MODELS = {
    "full": {"adapter": "none"},
    "lora": {"adapter": "lora", "lora_r": 4},
    "qlora": {"adapter": "lora", "lora_r": 4, "quantization": "nf4"},
    "dora": {"adapter": "dora", "lora_r": 4},
}
# Of what is trained: whether the head is tied makes no difference to an adapter. GPT-2 is here for
# its transposed layers, whose rows (DoRA) are columns on disk; for MoE's experts, peft's adapter
# wraps a parameter, not a layer.
TRAININGS = {
    "full": list(TRAINED),
    "lora": ["gpt_neox", "gemma", "mixtral"],
    "qlora": ["gpt_neox", "mixtral"],
    "dora": ["gpt2"],
}
ZERO3 = ("llama_untied", "gpt2", "mixtral")


def shardings(name, kind):
    """ZeRO-3 cuts flat ranges, whatever the architecture: a few of them will do."""
    return ("fsdp2", "zero3") if kind == "full" and name in ZERO3 else ("fsdp2",)


SAVED = ("llama", "llama_untied", "gpt_neox", "mixtral")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("architectures")
    for name in TRAINED:
        make(root, name)
    for name in TRAININGS["qlora"]:
        (root / f"{name}-nf4").mkdir()
        quantize(root / name, root / f"{name}-nf4", Quantization.NF4, "float32")
    write_rows(root / "data" / "train.arrow", random_rows(2 * STEPS))
    write_rows(root / "data" / "eval.arrow", random_rows(1, seed=1))
    return root


@pytest.fixture(scope="module")
def results(root):
    jobs = [
        scenario(root, name, kind, sharding)
        for kind, names in TRAININGS.items()
        for name in names
        for sharding in ("ddp", *shardings(name, kind))
    ]
    return scenarios.launch(root / "job", jobs)


def scenario(root, name, kind, sharding):
    title = f"{name}-{kind}-{sharding}"
    folder = root / (f"{name}-nf4" if kind == "qlora" else name)
    train = {**TRAIN, "sharding": sharding}
    job = scenarios.job(root, title, MODELS[kind], train, model_dir=str(folder))
    if name in SAVED and (kind, sharding) == ("full", "fsdp2"):
        job["save"] = str(root / f"{name}-saved")
    if title == "mixtral-lora-fsdp2":
        job["save"] = str(root / "mixtral-lora-saved")
    return job


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for kind, names in TRAININGS.items() for name in names]
)
def test_cut_or_whole_gives_the_same_bits(root, results, name, kind):
    reference = results[f"{name}-{kind}-ddp"]
    expected = load_file(root / f"{name}-{kind}-ddp.safetensors")
    assert len(set(reference["losses"])) == STEPS
    for sharding in shardings(name, kind):
        found = results[f"{name}-{kind}-{sharding}"]
        assert found["losses"] == reference["losses"], sharding
        trained = load_file(root / f"{name}-{kind}-{sharding}.safetensors")
        assert trained.keys() == expected.keys()
        different = [key for key in expected if not torch.equal(trained[key], expected[key])]
        assert different == [], sharding
        # Really cut: each process trains and keeps about half.
        assert max(found["parts"]) < 0.6 * reference["parts"][0]
        assert max(found["kept"]) < 0.6 * reference["kept"][0]


def test_a_saved_adapter_of_experts_is_what_was_trained(root, results):
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(root / "mixtral")
    loaded = PeftModel.from_pretrained(base, root / "mixtral-lora-saved")
    trained = load_file(root / "mixtral-lora-fsdp2.safetensors")
    found = {n: p for n, p in loaded.named_parameters() if ".lora_" in n}
    assert found.keys() == trained.keys()
    assert [key for key in trained if not torch.equal(found[key], trained[key])] == []


@pytest.mark.parametrize("name", SAVED)
def test_what_is_saved_loads_and_is_what_was_trained(root, results, name):
    """In the layout of the base: tied heads once, experts one by one, GPT-NeoX's older names."""
    base, saved = (load_file(root / n / "model.safetensors") for n in (name, f"{name}-saved"))
    assert saved.keys() == base.keys()
    config, its_config = (read_json(root / n / "config.json") for n in (name, f"{name}-saved"))
    assert its_config["architectures"] == config["architectures"]
    model, info = AutoModelForCausalLM.from_pretrained(
        root / f"{name}-saved", output_loading_info=True
    )
    assert not any(info.values()), info
    trained = load_file(root / f"{name}-full-fsdp2.safetensors")
    loaded = dict(model.named_parameters())
    assert loaded.keys() == trained.keys()
    assert [key for key in trained if not torch.equal(loaded[key], trained[key])] == []
    assert not any(torch.equal(saved[key], base[key]) for key in base if "norm" not in key)


def test_the_experts_on_disk_are_not_those_in_memory(root):
    """What makes the MoE above worth something: transformers computes its weights from others."""
    stored = load_file(root / "mixtral" / "model.safetensors")
    assert "model.layers.1.block_sparse_moe.experts.3.w1.weight" in stored
    model = AutoModelForCausalLM.from_pretrained(root / "mixtral")
    assert model.get_parameter("model.layers.1.mlp.experts.gate_up_proj").shape == (4, 256, 64)
