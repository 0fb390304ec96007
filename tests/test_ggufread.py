"""A .gguf file tensor by tensor: the weights and config that transformers makes of it at once.

The files hold random numbers under the names that llama.cpp has for each architecture.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GgufConfig,
    GPT2Config,
    Lfm2Config,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from ditty.conversion import ggufread
from ditty.conversion.convert import convert_gguf
from ditty.errors import ModelError
from ditty.models import shards
from tests.architectures import HEADS, OLDER
from tests.test_quantize import digests
from tests.test_shards import stamps
from tests.tiny import make_tokenizer, tiny_config

LAYERS, WIDTH, FEED, COUNT = 2, 64, 128, 4  # of heads, and of experts
# What transformers calls it -> (llama.cpp's name, config, keys of the file beside the usual ones)
KINDS: dict[str, tuple[str, PretrainedConfig, dict[str, Any]]] = {
    "llama": ("llama", tiny_config(tie_word_embeddings=False), {}),
    "gpt2": (
        "gpt2",
        GPT2Config(**(OLDER | {"n_positions": 1024})),
        {"attention.layer_norm_epsilon": 1e-5},
    ),
    "gemma2": ("gemma2", Gemma2Config(**HEADS), {"attention.key_length": 16}),
    "qwen3_moe": (
        "qwen3moe",
        Qwen3MoeConfig(**HEADS, num_experts=COUNT, num_experts_per_tok=2),
        {"attention.key_length": 16, "expert_count": COUNT, "expert_used_count": 2},
    ),
    "lfm2": (
        "lfm2",
        Lfm2Config(
            **HEADS,
            layer_types=["conv", "full_attention"],
            conv_L_cache=3,
            block_auto_adjust_ff_dim=False,
        ),
        {"attention.head_count_kv": [0, 2], "shortconv.l_cache": 3},
    ),
}


def stored(
    name: str, architecture: str, layers: int, tensor: torch.Tensor
) -> list[tuple[str, np.ndarray]]:
    """(llama.cpp's name, values as it holds them) of what one weight is made of."""
    (arch,) = (key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, layers)
    value = tensor.numpy()
    if name.endswith("experts.gate_up_proj"):
        layer = name.split(".")[2]
        halves = zip(("gate", "up"), np.split(value, 2, axis=1), strict=True)
        return [(f"blk.{layer}.ffn_{part}_exps.weight", half) for part, half in halves]
    if name.endswith("experts.down_proj"):
        return [(f"{names.get_name(name)}.weight", value)]
    stem, _, suffix = name.rpartition(".")
    if ".conv.conv." in name:
        value = value[:, 0]
    if architecture == "gpt2" and value.ndim == 2 and "wte" not in name and "wpe" not in name:
        value = value.T
    found = names.get_name(stem)
    assert found is not None, name
    return [(f"{found}.{suffix}", np.ascontiguousarray(value))]


def write(
    path: Path, kind: str, matrices: Type = Type.Q8_0, change: tuple[str, Any] = ("", None)
) -> Path:
    """A .gguf file of random weights: vectors and the narrow in fp32, matrices as asked for.

    `change`: a tensor that is left out, or has another shape.
    """
    architecture, config, more = KINDS[kind]
    writer = gguf.GGUFWriter(path, architecture)
    keys = {
        "block_count": LAYERS, "context_length": 128, "embedding_length": WIDTH,
        "feed_forward_length": FEED, "attention.head_count": COUNT,
        "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 10000.0,
    } | more  # fmt: skip
    for key, value in keys.items():
        add = {int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
        add[type(value)](f"{architecture}.{key}", value)
    tokens = make_tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    words = sorted(tokens, key=tokens.__getitem__)
    words += ["zq", *(f"<unused{i}>" for i in range(len(words) + 1, config.vocab_size))]
    writer.add_token_list(words)
    writer.add_token_merges(["z q"])
    writer.add_eos_token_id(2)
    torch.manual_seed(0)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    layers = keys["block_count"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        for target, value in stored(name, architecture, layers, torch.randn(tensor.shape)):
            if target == change[0]:
                if change[1] is None:
                    continue
                value = np.zeros(change[1], np.float32)
            packed = value.ndim > 1 and value.shape[-1] % 32 == 0
            to = matrices if packed else Type.F32
            writer.add_tensor(target, gguf.quants.quantize(value, to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def theirs(file: Path) -> Any:
    """The model as transformers reads the file, all at once."""
    unpacked = GgufConfig(gguf_file=file.name, dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=unpacked, dtype=torch.bfloat16
    )


def converted(file: Path, out: Path) -> Path:
    out.mkdir()
    convert_gguf(file, out)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_that_transformers_reads(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ggufread, "CHUNK", 1000)  # several calls a matrix
    # Blocks of newer architectures are unpacked in bf16 there, and rounded once here.
    file = write(tmp_path / "model.gguf", kind, Type.BF16 if kind == "lfm2" else Type.Q8_0)
    reference = theirs(file)
    ours, info = AutoModelForCausalLM.from_pretrained(
        converted(file, tmp_path / "out"), output_loading_info=True
    )
    assert not any(info.values()), info
    assert ours.dtype == torch.bfloat16 and type(ours) is type(reference)
    a, b = reference.state_dict(), ours.state_dict()
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert all(value.unique().numel() > 1 for value in a.values())
    reference.save_pretrained(tmp_path / "theirs")
    one, other = ((tmp_path / f / "config.json").read_text() for f in ("out", "theirs"))
    assert one == other


def test_killed_it_goes_on_at_the_shard_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "model.gguf", "llama")
    monkeypatch.setattr(shards, "SHARD_BYTES", 40_000)
    whole, part = converted(file, tmp_path / "whole"), tmp_path / "part"
    part.mkdir()
    seen: list[tuple[int, int, str]] = []

    def dies(done: int, total: int, name: str) -> None:
        seen.append((done, total, name))
        if len(seen) == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_gguf(file, part, dies)
    before = stamps(part)
    assert before and len(before) < len(stamps(whole))
    convert_gguf(file, part, lambda *call: seen.append(call))
    assert stamps(part).items() >= before.items()
    assert digests(part) == digests(whole)
    tensors = GGUFReader(file).tensors
    assert {total for _, total, _ in seen} == {seen[-1][0]} == {sum(t.n_bytes for t in tensors)}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (("blk.1.ffn_up.weight", None), "no tensor for model.layers.1.mlp.up_proj.weight"),
        (("output_norm.weight", (32,)), r"model.norm.weight .* \[32\], .* make it \[64\]"),
    ],
)
def test_a_file_that_does_not_fit_its_own_settings(
    change: tuple[str, Any], match: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "model.gguf", "llama", change=change)
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=match):
        convert_gguf(file, tmp_path / "out")
    assert not [*(tmp_path / "out").glob("*.safetensors")]
