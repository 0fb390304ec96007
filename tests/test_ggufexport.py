"""A .gguf file gives back the model it was written of; the oracle is transformers, which reads it.

What transformers does not read (llama.cpp's factors of the rotary embedding, types of tokens) is
read with llama.cpp's own package.
"""

import copy
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
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    GgufConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from ditty.config.choices import ExportDtype
from ditty.conversion.ggufexport import FILE, interleave, write_gguf
from ditty.errors import ModelError
from tests.architectures import GROUPED, TIED, UNTIED
from tests.tiny import make_tokenizer, tiny_config
from tests.tokenizers_for_tests import CHATML, train_pieces, train_tokenizer

TOKENS = 318  # of the tokenizer that is trained here
SIZE = {"vocab_size": 336}  # 18 more rows than tokens, as padded embeddings have
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": tiny_config(**SIZE),
    "llama_untied": tiny_config(**SIZE, **UNTIED),
    "mistral": MistralConfig(**(GROUPED | SIZE), sliding_window=None),
    "qwen2": Qwen2Config(**(GROUPED | SIZE), **UNTIED),
    # transformers takes 128 for granted where a .gguf file says it otherwise.
    "qwen3": Qwen3Config(**(GROUPED | SIZE), head_dim=128, **TIED),
    "phi3": Phi3Config(**(GROUPED | SIZE), **UNTIED, sliding_window=None, pad_token_id=2),
    # Heads of 256 and its root as their scale are taken for granted, by llama.cpp too.
    "gemma2": Gemma2Config(**(GROUPED | SIZE), head_dim=256, sliding_window=8),
    "gemma3": Gemma3TextConfig(**(GROUPED | SIZE), head_dim=256, sliding_window=8),
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
        if name.startswith("gemma") and key.endswith("norm.weight"):  # the file has 1 + value, fp32
            torch.testing.assert_close(after[key], value, rtol=0, atol=2**-23)
        else:
            assert torch.equal(after[key], value), key  # not a bit is lost
    assert facts["weights"] == sum(parameter.numel() for parameter in before.parameters())
    text = "Hello there, how are you?\n\ndef add(a, b):"
    theirs = AutoTokenizer.from_pretrained(out, gguf_file=FILE)
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert theirs(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert greedy(ours, theirs, text) == greedy(before, tokenizer, text)
    assert theirs.chat_template == CHATML and theirs.eos_token == "<|im_end|>"


@pytest.mark.parametrize("to", [ExportDtype.Q8_0, ExportDtype.Q4_0])
def test_quantized_weights_are_those_of_llama_cpps_own_quantizer(
    tmp_path: Path, to: ExportDtype
) -> None:
    """The embedding, which is the head too, has 8 bits; rows of 48 are no whole blocks of 32."""
    config = tiny_config(**SIZE, intermediate_size=48)
    base, out = folder_of(tmp_path / "base", config, torch.bfloat16), tmp_path / "out"
    out.mkdir()
    facts = write_gguf(base, out, "Tiny", quantized=to)
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    after, asked = read_back(out, torch.float32).state_dict(), gguf.GGMLQuantizationType[to.upper()]
    kinds = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(out / FILE).tensors}
    assert kinds["token_embd.weight"] == gguf.GGMLQuantizationType.Q8_0
    assert kinds["blk.0.ffn_up.weight"] == kinds["blk.1.attn_q.weight"] == asked
    assert kinds["blk.0.ffn_down.weight"] == gguf.GGMLQuantizationType.BF16
    for key, value in before.state_dict().items():
        found = gguf.GGMLQuantizationType.Q8_0 if "embed" in key or "lm_head" in key else asked
        expected = value.numpy()
        if value.dim() == 2 and value.shape[1] % 32 == 0:
            expected = gguf.dequantize(gguf.quantize(expected, found), found)
            assert 0 < np.abs(expected - value.numpy()).max() < 0.1, key
        assert np.array_equal(after[key].numpy(), expected), key
    assert fields(out)["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{to.upper()}"]
    assert facts["bytes"] < 0.8 * (base / "model.safetensors").stat().st_size


TEXTS = [
    "Hello there, how are you?\n\ndef add(a, b):",
    "a  b   c",
    "\u00e9\u6f22 is nowhere in the vocabulary",
]


def pieces_in(folder: Path, prefix: bool) -> Path:
    """A model whose tokenizer is tokenizer.model alone, or is Gemma's: no space before a text."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS["llama" if prefix else "gemma3"])
    config.vocab_size = 370
    AutoModelForCausalLM.from_config(config).save_pretrained(train_pieces(folder))
    if not prefix:
        file, tokenizer = folder / "tokenizer.json", AutoTokenizer.from_pretrained(folder)
        value = json.loads(tokenizer.backend_tokenizer.to_str())
        value["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
        value["pre_tokenizer"] = {"type": "Split", "pattern": {"String": " "}, "invert": False}
        value["pre_tokenizer"]["behavior"] = "MergedWithPrevious"
        tokenizer.save_pretrained(folder)
        file.write_text(json.dumps(value))
        (folder / "tokenizer_config.json").write_text(  # LlamaTokenizer has a normalizer of its own
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"})
        )
        (folder / "tokenizer.model").unlink()
    return folder


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepieces_tokenizer(
    tmp_path: Path, prefix: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The oracle is sentencepiece's own processor, and its model for pieces and scores."""
    import sentencepiece

    (tmp_path / "base").mkdir()
    (tmp_path / "out").mkdir()
    base = pieces_in(tmp_path / "base", prefix)
    model = train_pieces(tmp_path) / "tokenizer.model"
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model))
    facts = write_gguf(base, tmp_path / "out", "Tiny")
    found = fields(tmp_path / "out")
    n = theirs.get_piece_size()
    assert facts["tokens"] == n and found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.tokens"][:n] == [theirs.id_to_piece(i) for i in range(n)]
    types = found["tokenizer.ggml.token_type"]
    asked = (theirs.is_unknown, theirs.is_control, theirs.is_byte)
    kinds = (gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.BYTE)
    for i in range(n):
        expected = [kind for kind, ask in zip(kinds, asked, strict=True) if ask(i)]
        assert types[i] == (expected or [gguf.TokenType.NORMAL])[0], theirs.id_to_piece(i)
    scores = found["tokenizer.ggml.scores"]
    merged = [i for i in range(n) if len(theirs.id_to_piece(i)) > 1 and types[i] == 1]
    assert len(merged) > 30
    assert sorted(merged, key=lambda i: -scores[i]) == sorted(
        merged, key=lambda i: -theirs.get_score(i)
    )
    assert found["tokenizer.ggml.add_space_prefix"] is prefix
    read = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=FILE)
    for text in TEXTS:
        ids = AutoTokenizer.from_pretrained(base)(text)["input_ids"]
        assert read(text)["input_ids"] == ids
        if prefix:
            assert theirs.encode(text) == ids
    assert ("only before the first text" in caplog.text) is prefix


def test_pieces_that_llama_cpp_would_merge_otherwise_are_refused(tmp_path: Path) -> None:
    base = pieces_in(tmp_path, False)
    file = base / "tokenizer.json"
    whole = json.loads(file.read_text())

    def message(**model: Any) -> str:
        file.write_text(json.dumps(whole | {"model": whole["model"] | model}))
        with pytest.raises(ModelError) as error:
            write_gguf(base, base, "Tiny")
        return str(error.value)

    merges = whole["model"]["merges"]
    assert " make a piece and are not merged" in message(merges=merges[:5] + merges[6:])
    pair = next(i for i in range(len(merges)) if "".join(merges[i]) == "".join(merges[i + 1]))
    apart = [*merges[: pair + 1], *merges[pair + 2 :], merges[pair + 1]]
    assert "are not one after the other" in message(merges=apart)
    assert "BPE without byte fallback" in message(byte_fallback=False)
    whole["normalizer"] = {"type": "NFC"}
    assert "another normalizer" in message()


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
    gemma = folder_of(tmp_path / "gemma", Gemma2Config(**(GROUPED | SIZE), head_dim=128))
    refused(gemma, tmp_path / "7", "query_pre_attn_scalar is 256, not 128")
    alike = ["full_attention"] * 2
    whole = folder_of(tmp_path / "whole", CONFIGS["gemma3"])
    refused(whole, tmp_path / "8", "layer_types are .'full_attention', 'full", layer_types=alike)
    refused(whole, tmp_path / "9", "the logits are capped", final_logit_softcapping=30.0)
    make_tokenizer().save_pretrained(base)  # it has no merges
    refused(base, tmp_path / "5", "byte-level BPE with merges")
    short = folder_of(tmp_path / "short", tiny_config(vocab_size=300))
    refused(short, tmp_path / "6", "has 318 tokens and the model.s embedding 300 rows")
