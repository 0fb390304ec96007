"""A .gguf file gives back the model it was written of; the oracle is transformers, which reads it.

What transformers does not read (llama.cpp's factors of the rotary embedding, types of tokens) is
read with llama.cpp's own package.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from ditty.conversion.ggufexport import FILE, interleave, write_gguf
from ditty.errors import ModelError
from tests.architectures import GROUPED, TIED, UNTIED
from tests.tiny import make_tokenizer, tiny_config
from tests.tokenizers_for_tests import CHATML, train_tokenizer

TOKENS = 318  # of the tokenizer that is trained here
SIZE = {"vocab_size": 336}  # 18 more rows than tokens, as padded embeddings have
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": tiny_config(**SIZE),
    "llama_untied": tiny_config(**SIZE, **UNTIED),
    "mistral": MistralConfig(**(GROUPED | SIZE), sliding_window=None),
    "qwen2": Qwen2Config(**(GROUPED | SIZE), **UNTIED),
    # transformers takes 128 for granted where a .gguf file says it otherwise.
    "qwen3": Qwen3Config(**(GROUPED | SIZE), head_dim=128, **TIED),
}


def folder_of(path: Path, config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> Path:
    """A random model, none of whose weights is like another, with a tokenizer that has merges."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(path)
    return train_tokenizer(path)


def read_back(folder: Path, dtype: torch.dtype) -> Any:
    """The .gguf file alone, as anyone loads it."""
    unpacked = GgufConfig(gguf_file=FILE, dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=FILE, quantization_config=unpacked, dtype=dtype
    ).eval()


def greedy(model: Any, tokenizer: Any, text: str) -> str:
    ids = tokenizer(text, return_tensors="pt")
    unused = list(range(TOKENS, SIZE["vocab_size"]))  # a random model says them, a trained one not
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 2}
    out = model.generate(**ids, **options, suppress_tokens=unused)
    return tokenizer.decode(out[0])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_reads_the_model_back(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    base, out = folder_of(tmp_path / "base", CONFIGS[name], dtype), tmp_path / "out"
    out.mkdir()
    seen: list[tuple[int, int]] = []
    facts = write_gguf(
        base, out, "Tiny", progress=lambda done, total, _: seen.append((done, total))
    )
    assert [path.name for path in out.iterdir()] == [FILE]
    assert seen[-1][0] == seen[-1][1] and facts["tokens"] == TOKENS
    ours, before = read_back(out, dtype), AutoModelForCausalLM.from_pretrained(base).eval()
    after, expected = ours.state_dict(), before.state_dict()
    assert after.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(after[key], value), key  # not a bit is lost
    assert facts["weights"] == sum(parameter.numel() for parameter in before.parameters())
    text = "Hello there, how are you?\n\ndef add(a, b):"
    theirs = AutoTokenizer.from_pretrained(out, gguf_file=FILE)
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert theirs(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert greedy(ours, theirs, text) == greedy(before, tokenizer, text)
    assert theirs.chat_template == CHATML and theirs.eos_token == "<|im_end|>"


def fields(folder: Path) -> dict[str, Any]:
    reader = gguf.GGUFReader(folder / FILE)
    return {name: field.contents() for name, field in reader.fields.items()}


def test_what_only_llama_cpp_reads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Frequencies of Llama 3's rotary embedding, types of tokens, tokens that end a generation."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 64}
    config = tiny_config(**SIZE, rope_parameters=rope)
    base = folder_of(tmp_path / "base", config)
    GenerationConfig(eos_token_id=[2, 0, 1, 0]).save_pretrained(base)
    (tmp_path / "out").mkdir()
    with caplog.at_level("WARNING", "ditty.conversion.ggufvocab"):
        write_gguf(base, tmp_path / "out", "Tiny")
    ends = AutoTokenizer.from_pretrained(base).convert_ids_to_tokens([2, 0, 1])
    assert "{} and {}; the model also ends at {}, and".format(*ends) in caplog.text
    reader = gguf.GGUFReader(tmp_path / "out" / FILE)
    (factors,) = [t.data for t in reader.tensors if t.name == "rope_freqs.weight"]
    scaled = AutoModelForCausalLM.from_pretrained(base).model.rotary_emb.inv_freq.numpy()
    plain = 500000.0 ** -(np.arange(8) / 8)
    np.testing.assert_allclose(plain / factors, scaled, rtol=1e-6)
    assert factors.min() == pytest.approx(1) and factors.max() == pytest.approx(8)
    found = fields(tmp_path / "out")
    kinds = found["tokenizer.ggml.token_type"]
    assert kinds[:5] == [gguf.TokenType.CONTROL] * 5 and kinds[-1] == gguf.TokenType.UNUSED
    assert kinds[5] == gguf.TokenType.NORMAL
    assert found["tokenizer.ggml.eos_token_id"] == 2 and found["tokenizer.ggml.eot_token_id"] == 0
    assert found["tokenizer.ggml.pre"] == "gpt-2" and not found["tokenizer.ggml.add_bos_token"]
    assert found["general.file_type"] == gguf.LlamaFileType.ALL_F32


def test_the_order_of_rows_is_that_of_the_rotary_embedding() -> None:
    """A head of four: transformers turns (0, 2) and (1, 3), llama.cpp (0, 1) and (2, 3)."""
    rows = interleave(torch.arange(8.0)[:, None], 2)
    assert rows[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(
    ("split", "name"),
    [
        ([("Digits", {"individual_digits": True})], "smollm"),
        ([("Split", r"\p{N}{1,3}")], "llama-bpe"),
        ([("Split", r"\p{N}")], "qwen2"),
        ([("Split", r"\p{N}{1,2}")], None),
        ([("Digits", {"individual_digits": False})], None),
        ([("Digits", {"individual_digits": True, "use_regex": False})], None),
    ],
)
def test_llama_cpps_name_of_how_a_text_is_split(tmp_path: Path, split: Any, name: Any) -> None:
    base = folder_of(tmp_path / "base", CONFIGS["llama"])
    file = base / "tokenizer.json"
    value = json.loads(file.read_text())
    ((kind, how),) = split
    if kind == "Split":
        words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + how
        words += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        how = {"pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}
    splits = kind != "Split" and how.pop("use_regex", True)
    last = value["pre_tokenizer"] | {"use_regex": splits}
    value["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": kind, **how}, last],
    }
    file.write_text(json.dumps(value))
    (tmp_path / "out").mkdir()
    if name is None:
        with pytest.raises(ModelError, match="does not know llama.cpp's name of how the tokenizer"):
            write_gguf(base, tmp_path / "out", "Tiny")
        return
    assert write_gguf(base, tmp_path / "out", "Tiny")["tokenizer"] == name


def refused(base: Path, out: Path, message: str, **changes: Any) -> None:
    config = json.loads((base / "config.json").read_text())
    shutil.copytree(base, out)
    (out / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError, match=message):
        write_gguf(out, out, "Tiny")


def test_what_a_file_cannot_say_is_refused(tmp_path: Path) -> None:
    base = folder_of(tmp_path / "base", CONFIGS["llama"])
    gemma = {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"}
    refused(
        base, tmp_path / "1", "does not write GemmaForCausalLM as .gguf, expected Llama", **gemma
    )
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    refused(base, tmp_path / "2", "cannot say that rope_type is yarn", rope_parameters=yarn)
    refused(base, tmp_path / "3", "cannot say that hidden_act is gelu", hidden_act="gelu")
    mistral = folder_of(tmp_path / "mistral", MistralConfig(**(GROUPED | SIZE), sliding_window=8))
    refused(mistral, tmp_path / "4", "attention slides over 8 tokens")
    make_tokenizer().save_pretrained(base)  # it has no merges
    refused(base, tmp_path / "5", "byte-level BPE with merges")
    short = folder_of(tmp_path / "short", tiny_config(vocab_size=300))
    refused(short, tmp_path / "6", "has 318 tokens and the model.s embedding 300 rows")
