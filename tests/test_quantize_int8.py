"""LLM.int8 against transformers' own: the same bits, files and gradients, loaded without work."""

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from ditty.config.choices import Quantization
from ditty.models import shards
from ditty.pretrained.modelfolder import WEIGHTS
from ditty.quantization import formats

from .test_quantize import (
    CONFIGS,
    differences,
    digests,
    quantized,
    rewrite,
    sources,  # noqa: F401
    theirs,
)

INT8 = Quantization.INT8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_same_model_as_transformers(
    name: str,
    dtype: str,
    sources: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    facts = quantized(sources[name], tmp_path / "out", dtype, INT8)
    reference = theirs(sources[name], getattr(torch, dtype), INT8)
    ours, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert ours.is_loaded_in_8bit and ours.dtype == getattr(torch, dtype)
    assert differences(reference, ours) == []
    assert_same_files(reference, tmp_path / "out", tmp_path / "theirs")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(reference(ids).logits, ours(ids).logits)
    packed = [p for p in reference.parameters() if p.dtype == torch.int8]
    assert facts["quantized_weights"] == sum(p.numel() for p in packed) > 0


def assert_same_files(reference: PreTrainedModel, ours: Path, theirs: Path) -> None:
    """What save_pretrained writes of transformers' own int8 model: weights and config."""
    reference.save_pretrained(theirs)
    a, b = load_file(theirs / WEIGHTS), load_file(ours / WEIGHTS)
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value.dtype == b[key].dtype and torch.equal(value, b[key]), key
    configs = [json.loads((folder / "config.json").read_text()) for folder in (theirs, ours)]
    assert configs[0] == configs[1]


def test_a_checkpoint_is_cast_to_the_dtype_before_fp16(
    sources: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    # Why the dtype belongs to an int8 model's content key, though its layers are int8 each time.
    found = []
    for dtype in ("float32", "bfloat16"):
        quantized(sources["llama_tied"], tmp_path / dtype, dtype, INT8)
        found.append(load_file(tmp_path / dtype / WEIGHTS)["model.layers.0.mlp.up_proj.weight"])
    assert not torch.equal(*found)


def test_unusual_checkpoints(
    sources: dict[str, Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Names without a prefix, a row of zeros, values beyond fp16, a layer kept in fp32; shards."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][5] = 0
        tensors["model.layers.0.mlp.down_proj.weight"][7, 3] = 1e6
        for key in list(tensors):
            tensors[key.removeprefix("model.")] = tensors.pop(key)

    source = rewrite(sources["llama_untied"], tmp_path / "base", change)
    monkeypatch.setattr(LlamaPreTrainedModel, "_keep_in_fp32_modules_strict", {"k_proj"})
    monkeypatch.setattr(shards, "SHARD_BYTES", 30_000)
    monkeypatch.setattr(formats, "CHUNK", 1000)
    facts = quantized(source, tmp_path / "out", "bfloat16", INT8)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert differences(theirs(source, torch.bfloat16, INT8), ours) == []
    assert facts["shards"] == len(list((tmp_path / "out").glob("*.safetensors"))) > 2


@pytest.mark.parametrize("shape", [(2048, 2112), (2051, 2049), (1, formats.CHUNK + 1)])
def test_large_weight_in_chunks_equals_one_call(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert weight.numel() > formats.CHUNK
    packed, scales, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
    parts = formats.int8(weight)
    assert torch.equal(parts["weight"], packed)
    assert torch.equal(parts["SCB"], scales)
    written = sum(part.nbytes for part in parts.values())
    assert written == formats._int8_size(*shape)


def test_same_bytes_each_time_whatever_the_threads(
    sources: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            quantized(sources["llama_untied"], tmp_path / str(threads), to=INT8)
    finally:
        torch.set_num_threads(before)
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


def test_loading_quantizes_nothing(
    sources: dict[str, Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quantized(sources["llama_tied"], tmp_path / "out", to=INT8)
    calls = []
    real = bnb.int8_vectorwise_quant
    monkeypatch.setattr(bnb, "int8_vectorwise_quant", lambda *a: calls.append(1) or real(*a))
    theirs(sources["llama_tied"], torch.float32, INT8)
    assert len(calls) == 2 * 7  # the counter works: two blocks of seven layers
    calls.clear()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert calls == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_gradients_equal_those_on_transformers_own(
    dtype: str,
    sources: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    quantized(sources["llama_untied"], tmp_path / "out", dtype, INT8)
    reference = theirs(sources["llama_untied"], getattr(torch, dtype), INT8)
    loss, gradients = lora_step(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    expected_loss, expected = lora_step(reference)
    assert loss == expected_loss
    assert gradients.keys() == expected.keys() and len(gradients) == 2 * 2 * 7  # A, B, blocks
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, expected[name]), name


def lora_step(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one training step of LoRA on all linear layers."""
    torch.manual_seed(0)
    # B is zero otherwise, and so is the gradient of A.
    config = LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
    trained = get_peft_model(model, config).train()
    ids = torch.arange(3, 40)[None]
    loss = trained(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in trained.named_parameters() if p.grad is not None}
