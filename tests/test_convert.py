"""GGUF to safetensors: a file written here with llama.cpp's own package, from a model we know."""

import hashlib
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from ditty.conversion.convert import convert_gguf
from ditty.errors import ModelError
from ditty.pretrained.modelfolder import check_folder

from .tiny import CHATML, make_tokenizer, tiny_config

Q8 = gguf.GGMLQuantizationType.Q8_0
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of query and key: its rotary embedding pairs neighbours."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, -1)


def write_gguf(path: Path, model: LlamaForCausalLM, **changes: Any) -> Path:
    """The model as llama.cpp's converter writes it: norms in fp32, matrices in Q8_0."""
    config, tokenizer = model.config, make_tokenizer()
    writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_name("Tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    vocabulary += ["zq", *(f"<unused{i}>" for i in range(len(vocabulary) + 1, config.vocab_size))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    special = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    writer.add_token_merges(["z q"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(1)
    writer.add_chat_template(CHATML)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        add_tensor(writer, model, name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tensor(
    writer: gguf.GGUFWriter, model: LlamaForCausalLM, name: str, value: np.ndarray
) -> None:
    stem = name.removesuffix(".weight").removeprefix("model.")
    top = {"embed_tokens": "token_embd", "norm": "output_norm"}
    if stem in top:
        target = top[stem]
    else:
        _, number, part = stem.split(".", 2)
        target = f"blk.{number}.{LAYER[part]}"
        heads = {"attn_q": model.config.num_attention_heads}
        heads["attn_k"] = model.config.num_key_value_heads
        if LAYER[part] in heads:
            value = interleave(value, heads[LAYER[part]])
    if value.ndim == 2:
        writer.add_tensor(f"{target}.weight", gguf.quants.quantize(value, Q8), raw_dtype=Q8)
    else:
        writer.add_tensor(f"{target}.weight", value)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def converted(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gguf")
    (root / "out").mkdir()
    facts = convert_gguf(write_gguf(root / "tiny.gguf", model), root / "out")
    assert facts == {
        "architecture": "LlamaForCausalLM",
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": "bfloat16",
        "eos_token_ids": [1, 2],
        "chat_template": True,
        "shards": 1,
    }
    return root / "out"


def test_weights_are_the_dequantized_ones(model: LlamaForCausalLM, converted: Path) -> None:
    got = load_file(converted / "model.safetensors")
    assert {*got} == {*model.state_dict()} - {"lm_head.weight"}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        expected = tensor.numpy()
        if tensor.ndim == 2:
            # Rows are quantized one by one, so that llama.cpp's order of them does not matter.
            expected = gguf.quants.dequantize(gguf.quants.quantize(expected, Q8), Q8)
        assert torch.equal(got[name], torch.from_numpy(expected).to(torch.bfloat16)), name


def test_logits_are_near_the_original(model: LlamaForCausalLM, converted: Path) -> None:
    check_folder(converted, 512, quantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(converted)
    assert loaded.dtype == torch.bfloat16
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        expected, got = model(ids).logits, loaded.float()(ids).logits
    assert (expected - got).abs().max() < 0.02 * expected.abs().max()


def test_tokenizer_and_template(converted: Path) -> None:
    before, after = make_tokenizer(), AutoTokenizer.from_pretrained(converted)
    text = "Hello, wörld!\n"
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.eos_token == "<|im_end|>"
    messages = [{"role": "user", "content": "Hello"}]
    render = {"tokenize": False, "add_generation_prompt": True}
    expected = before.apply_chat_template(messages, **render)
    assert after.apply_chat_template(messages, **render) == expected
    assert after(expected)["input_ids"] == before(expected)["input_ids"]


def test_generation_ends_at_each_of_the_files_end_tokens(converted: Path) -> None:
    assert GenerationConfig.from_pretrained(converted).eos_token_id == [1, 2]
    loaded = AutoModelForCausalLM.from_pretrained(converted)
    ids = torch.arange(3, 20)[None]
    for stop in (1, 2):

        class Push(torch.nn.Module):
            def forward(self, hidden: torch.Tensor, stop: int = stop) -> torch.Tensor:
                logits = torch.zeros(*hidden.shape[:-1], 320)
                logits[..., stop] = 1.0
                return logits

        loaded.lm_head = Push()
        out = loaded.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert out[0].tolist() == [*ids[0].tolist(), stop]


def test_same_bytes_wherever_the_file_is(
    model: LlamaForCausalLM, converted: Path, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    file = write_gguf(tmp_path / "a" / "other name.gguf", model)
    # Neighbours that from_pretrained would look at.
    (tmp_path / "a" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    (tmp_path / "out").mkdir()
    convert_gguf(file, tmp_path / "out")

    def digests(folder: Path) -> dict[str, str]:
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}

    assert digests(tmp_path / "out") == digests(converted)


def test_not_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"x" * 100)
    with pytest.raises(ModelError, match="bad.gguf is no complete GGUF file"):
        convert_gguf(tmp_path / "bad.gguf", tmp_path)


def test_cut_short(model: LlamaForCausalLM, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "cut.gguf", model)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="cut.gguf is no complete GGUF file"):
        convert_gguf(file, tmp_path)


def test_unknown_architecture(model: LlamaForCausalLM, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "rwkv.gguf", model, architecture="rwkv6")
    with pytest.raises(ModelError, match="transformers cannot read .*rwkv6"):
        convert_gguf(file, tmp_path)
