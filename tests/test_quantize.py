"""Quantization against transformers' own: the same bits, in less memory, loaded without work."""

import hashlib
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from ditty.config.choices import Quantization
from ditty.errors import ModelError, StoreError
from ditty.models import shards
from ditty.pretrained.tensorfiles import Header
from ditty.quantization import formats
from ditty.quantization.quantize import quantize
from ditty.quantization.quantplan import _describe, skeleton

from .tiny import VOCABULARY, make_model_folder, tiny_config

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "max_position_embeddings": 128}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama_tied": tiny_config(),
    "llama_untied": tiny_config(tie_word_embeddings=False, attention_bias=True),
    "gpt_neox": GPTNeoXConfig(**SMALL, **HEADS, intermediate_size=128, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SMALL, **HEADS, intermediate_size=128, num_key_value_heads=2),
    "gemma": GemmaConfig(
        **SMALL, **HEADS, intermediate_size=128, num_key_value_heads=2, head_dim=16
    ),
    "mistral": MistralConfig(
        **SMALL, **HEADS, intermediate_size=128, num_key_value_heads=2, sliding_window=8
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **SMALL,
        **HEADS,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    ),
    "mixtral": MixtralConfig(
        **SMALL, **HEADS, intermediate_size=128, num_key_value_heads=2, num_local_experts=4
    ),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_positions=128, n_embd=64, n_layer=2, n_head=4),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make_model_folder(root / name, config) for name, config in CONFIGS.items()}


def theirs(
    source: Path, dtype: torch.dtype, to: Quantization = Quantization.NF4
) -> PreTrainedModel:
    """What transformers makes of the model when it quantizes it by itself."""
    if to is Quantization.INT8:
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    # On the CPU, as we do: a GPU rounds the statistics of double quantization differently.
    return AutoModelForCausalLM.from_pretrained(
        source, quantization_config=settings, dtype=dtype, device_map={"": "cpu"}
    )


def quantized(
    source: Path,
    out: Path,
    dtype: str = "float32",
    to: Quantization = Quantization.NF4,
    **options: Any,
) -> dict[str, Any]:
    out.mkdir()
    return quantize(source, out, to, dtype, **options)


def differences(one: PreTrainedModel, other: PreTrainedModel) -> list[str]:
    """Names of what is not the same to the bit: weights, scales, nested scales, code books."""
    a, b = one.state_dict(), other.state_dict()
    assert any(name.endswith(("weight.nested_absmax", ".SCB")) for name in a)

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    def same(x: torch.Tensor, y: torch.Tensor) -> bool:
        return x.dtype == y.dtype and x.shape == y.shape and torch.equal(bits(x), bits(y))

    return sorted({*a} ^ {*b} | {name for name in {*a} & {*b} if not same(a[name], b[name])})


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def rewrite(folder: Path, target: Path, change: Any) -> Path:
    """A copy of a model whose tensors went through `change` (in place)."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_same_bits_and_logits_as_transformers(
    name: str, dtype: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    facts = quantized(sources[name], tmp_path / "out", dtype)
    reference = theirs(sources[name], getattr(torch, dtype))
    ours, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert ours.dtype == getattr(torch, dtype)
    assert differences(reference, ours) == []
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(reference(ids).logits, ours(ids).logits)
    packed = [p for p in reference.parameters() if p.dtype == torch.uint8]
    assert facts["quantized_weights"] == 2 * sum(p.numel() for p in packed)
    assert facts["dtype"] == dtype
    assert facts["ignored"] == []


def test_tied_embeddings_stay_tied_and_unquantized(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    quantized(sources["llama_tied"], tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.float32


def test_names_of_an_older_layout_are_understood(sources: dict[str, Path], tmp_path: Path) -> None:
    # What makes the GPT-NeoX case above worth something: its head has another name on disk.
    assert "embed_out.weight" in load_file(sources["gpt_neox"] / "model.safetensors")
    assert "lm_head.weight" in theirs(sources["gpt_neox"], torch.float32).state_dict()
    quantized(sources["gpt_neox"], tmp_path / "out")
    assert "embed_out.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_names_without_the_models_prefix(sources: dict[str, Path], tmp_path: Path) -> None:
    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.removeprefix("model.")] = tensors.pop(key)

    source = rewrite(sources["llama_tied"], tmp_path / "base", strip)
    quantized(source, tmp_path / "out")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert differences(theirs(source, torch.float32), ours) == []


def test_head_stored_twice(sources: dict[str, Path], tmp_path: Path) -> None:
    def tie(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    source = rewrite(sources["llama_tied"], tmp_path / "both", tie)
    quantized(source, tmp_path / "out")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert differences(theirs(source, torch.float32), ours) == []


def test_weights_that_a_model_keeps_in_fp32(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {"post_attention_layernorm", "k_proj"}
    monkeypatch.setattr(LlamaPreTrainedModel, "_keep_in_fp32_modules_strict", kept)
    quantized(sources["llama_untied"], tmp_path / "out", "bfloat16")
    reference = theirs(sources["llama_untied"], torch.bfloat16)
    layer = reference.model.layers[0]
    assert layer.post_attention_layernorm.weight.dtype == torch.float32
    assert layer.self_attn.k_proj.weight.quant_state.dtype == torch.float32
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert differences(reference, ours) == []


def test_shards(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 30_000
    monkeypatch.setattr(shards, "SHARD_BYTES", limit)
    facts = quantized(sources["llama_untied"], tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert facts["shards"] == len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert facts["bytes"] == sum(file.stat().st_size for file in files)
    for file in files:
        names = {n.partition(".weight")[0] for n in load_file(file)}
        assert len(names) == 1 or file.stat().st_size < limit + 8000  # the header is not counted
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {file.name for file in files}
    reference = theirs(sources["llama_untied"], torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert differences(reference, ours) == []


def test_sharded_source(tmp_path: Path, sources: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(sources["qwen3"])
    shutil.copytree(sources["qwen3"], tmp_path / "split")
    (tmp_path / "split" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "split", max_shard_size="50KB")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 2
    quantized(tmp_path / "split", tmp_path / "out")
    quantized(sources["qwen3"], tmp_path / "whole")
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert differences(one, other) == []


def test_same_bytes_each_time_whatever_the_threads(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 60_000)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            quantized(sources["llama_untied"], tmp_path / str(threads))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


@pytest.mark.parametrize("shape", [(2048, 2112), (2049, 2051)])
def test_large_tensor_in_chunks_equals_one_call(shape: tuple[int, int]) -> None:
    # Large enough for several chunks, for a mean that depends on threads, and with an odd end.
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert weight.numel() > formats.CHUNK
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        packed, state = bnb.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        torch.set_num_threads(2)
        parts = formats.nf4(weight)
    finally:
        torch.set_num_threads(before)
    expected = {f"weight.{key}": part for key, part in state.as_dict(packed=True).items()}
    expected["weight"] = packed
    assert parts.keys() == expected.keys()
    for key, part in parts.items():
        assert torch.equal(part, expected[key]), key


def test_mean_of_scales_does_not_depend_on_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [torch.rand(100_000, generator=generator) for _ in range(20)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = [draw.mean() for draw in draws]
        torch.set_num_threads(2)
        assert any(draw.mean() != mean for draw, mean in zip(draws, expected, strict=True))
        assert [formats._mean_in_one_thread(draw) for draw in draws] == expected
    finally:
        torch.set_num_threads(before)


def test_loading_quantizes_nothing(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized(sources["llama_tied"], tmp_path / "out")

    calls = []
    real = bnb.quantize_4bit
    monkeypatch.setattr(bnb, "quantize_4bit", lambda *a, **k: calls.append(1) or real(*a, **k))
    theirs(sources["llama_tied"], torch.float32)
    assert len(calls) == 2 * 7  # the counter works: two blocks of seven layers
    calls.clear()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").is_loaded_in_4bit
    assert calls == []


def test_folder_is_complete(sources: dict[str, Path], tmp_path: Path) -> None:
    quantized(sources["llama_tied"], tmp_path / "out")
    before = AutoTokenizer.from_pretrained(sources["llama_tied"])
    after = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "Hello"}]
    assert after.apply_chat_template(messages) == before.apply_chat_template(messages)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2


def test_progress_counts_the_sources_bytes(sources: dict[str, Path], tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    quantized(sources["llama_tied"], tmp_path / "out", progress=lambda *call: calls.append(call))
    tensors = load_file(sources["llama_tied"] / "model.safetensors")
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert {name for _, _, name in calls} == {*tensors}
    assert {of for _, of, _ in calls} == {total}
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
    assert calls[-1][0] == total


def test_unexpected_tensors_are_left_out_and_named(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    source = rewrite(sources["llama_tied"], tmp_path / "old", add)
    facts = quantized(source, tmp_path / "out")
    assert facts["ignored"] == ["model.layers.0.self_attn.rotary_emb.inv_freq"]


def test_incomplete_checkpoint(sources: dict[str, Path], tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    source = rewrite(sources["llama_tied"], tmp_path / "half", lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=f"no tensor for {name}"):
        quantized(source, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_weights_of_another_config(sources: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(sources["llama_tied"], tmp_path / "wrong")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    with pytest.raises(ModelError, match=r"\[64, 128\].*\[64, 256\]"):
        quantized(source, tmp_path / "out")


@pytest.mark.parametrize("to", [Quantization.NF4, Quantization.INT8])
def test_stacks_of_experts_stay_as_they_are(
    to: Quantization, sources: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    facts = quantized(sources["qwen3_moe"], tmp_path / "out", "bfloat16", to)
    reference = theirs(sources["qwen3_moe"], torch.bfloat16, to)
    experts = {n: p for n, p in reference.named_parameters() if ".experts." in n}
    assert len(experts) == 2 * 2 and {p.dtype for p in experts.values()} == {torch.bfloat16}
    assert facts["expert_weights"] == sum(p.numel() for p in experts.values())
    said = f"{facts['expert_weights']:,}"
    assert f"{said} weights are in such stacks; as with transformers they are not" in caplog.text
    assert (
        f"stacks, as transformers leaves them: {said}" in (tmp_path / "out/README.md").read_text()
    )


def test_float8_has_no_layout_for_stacks(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"experts in one tensor.* nf4 or int8, which leave them"):
        quantized(sources["qwen3_moe"], tmp_path / "out", to=Quantization.FP8)


def test_an_expert_is_missing(sources: dict[str, Path], tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    source = rewrite(sources["qwen3_moe"], tmp_path / "half", lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=r"layers.1.mlp.experts.gate_up_proj .* is incomplete"):
        quantized(source, tmp_path / "out")


def test_experts_that_are_stacked_on_disk(sources: dict[str, Path], tmp_path: Path) -> None:
    def stack(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            experts = f"model.layers.{layer}.mlp.experts"
            parts = {
                part: torch.stack([tensors.pop(f"{experts}.{i}.{part}.weight") for i in range(4)])
                for part in ("gate_proj", "up_proj", "down_proj")
            }
            tensors[f"{experts}.gate_up_proj"] = torch.cat(
                [parts["gate_proj"], parts["up_proj"]], 1
            )
            tensors[f"{experts}.down_proj"] = parts["down_proj"]

    source = rewrite(sources["qwen3_moe"], tmp_path / "stacked", stack)
    quantized(source, tmp_path / "out")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert differences(theirs(sources["qwen3_moe"], torch.float32), ours) == []


def test_quantized_already(sources: dict[str, Path], tmp_path: Path) -> None:
    quantized(sources["llama_tied"], tmp_path / "once")
    with pytest.raises(ModelError, match="quantized already.*bitsandbytes"):
        quantized(tmp_path / "once", tmp_path / "twice")


def test_unknown_dtype(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'float64', expected float32, bfloat16, float16"):
        quantized(sources["llama_tied"], tmp_path / "out", "float64")


def test_weight_under_a_name_of_another_kind(sources: dict[str, Path], tmp_path: Path) -> None:
    # Its scales would lie beside a name that transformers does not look them up by.
    model = skeleton(
        sources["llama_tied"], formats._nf4_settings(torch.float32), torch.float32, False
    )
    header = Header(Path("a.safetensors"), "up.kernel", [128, 64], 128 * 64 * 4, "F32")
    target = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ModelError, match="up.kernel in a.safetensors is the weight model.layers.0"):
        _describe(model, header, target, torch.float32, formats._nf4_size)


def test_full_disk_is_found_before_anything_is_written(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    with pytest.raises(StoreError, match="GB free.*needs"):
        quantized(sources["llama_tied"], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("damage", [lambda data: b"\xff" * 100, lambda data: data[:-1]])
def test_damaged_source(damage: Any, sources: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(sources["llama_tied"], tmp_path / "damaged")
    weights = source / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(ModelError, match=r"model.safetensors is damaged .*\d+ bytes"):
        quantized(source, tmp_path / "out")
