"""Which files make a model, and which models are turned away before anything runs."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ditty.errors import ModelError, SpecError
from ditty.pretrained.modelfolder import (
    check_folder,
    folder_digest,
    pickled_files,
    tokenizer_digest,
    weight_files,
)
from ditty.store import files

CONFIG = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 512}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "model.safetensors").write_bytes(b"weights")
    (path / "tokenizer.json").write_text("{}")
    (path / "tokenizer_config.json").write_text("{}")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


def configure(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))


def shard(folder: Path, *names: str) -> None:
    (folder / "model.safetensors").unlink()
    weight_map = {f"tensor{i}": name for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


# --- identity -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"],
)
def test_digest_follows_content(folder: Path, name: str) -> None:
    before = folder_digest(folder)
    assert folder_digest(folder) == before
    (folder / name).write_text("changed")
    assert folder_digest(folder) != before


@pytest.mark.parametrize("name", ["modeling_own.py", "generation_config.json", "merges.txt"])
def test_digest_follows_new_files_that_are_loaded(folder: Path, name: str) -> None:
    before = folder_digest(folder)
    (folder / name).write_text("new")
    assert folder_digest(folder) != before


def test_digest_ignores_what_is_not_loaded(folder: Path) -> None:
    before = folder_digest(folder)
    for name in ("README.md", "manifest.json", "pytorch_model.bin", "other.safetensors"):
        (folder / name).write_text("noise")
    (folder / "logs").mkdir()
    assert folder_digest(folder) == before


def test_digest_does_not_depend_on_the_place(folder: Path) -> None:
    before = folder_digest(folder)
    assert folder_digest(folder.rename(folder.with_name("elsewhere"))) == before


def test_names_belong_to_the_digest(folder: Path) -> None:
    before = tokenizer_digest(folder)
    (folder / "chat_template.jinja").rename(folder / "chat_template.json")
    assert tokenizer_digest(folder) != before


def test_tokenizer_digest_is_of_the_tokenizer_alone(folder: Path) -> None:
    before = tokenizer_digest(folder)
    (folder / "model.safetensors").write_bytes(b"other weights")
    configure(folder, hidden_size=1)
    assert tokenizer_digest(folder) == before
    (folder / "chat_template.jinja").write_text("other")
    assert tokenizer_digest(folder) != before


def test_a_file_is_hashed_once_a_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = files.sha256_file
    monkeypatch.setattr(files, "sha256_file", lambda p: hashed.append(p.name) or real(p))
    folder_digest(folder)
    folder_digest(folder)
    assert hashed.count("model.safetensors") == 1
    os.utime(folder / "model.safetensors", ns=(0, 0))  # may have changed: size alone is no proof
    folder_digest(folder)
    assert hashed.count("model.safetensors") == 2


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer: expected one of tokenizer.json, vocab"):
        tokenizer_digest(folder)


def test_no_config(folder: Path) -> None:
    (folder / "config.json").rename(folder / "configs.json")
    with pytest.raises(ModelError, match=r"no config.json, but configs.json"):
        folder_digest(folder)


# --- weights --------------------------------------------------------------------------------------


def test_shards_in_order(folder: Path) -> None:
    shard(folder, "b.safetensors", "a.safetensors", "b.safetensors")
    for name in ("a", "b", "unrelated"):
        (folder / f"{name}.safetensors").write_bytes(name.encode())
    assert [path.name for path in weight_files(folder)] == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize("name", ["gone.safetensors", "../model/tokenizer.json"])
def test_missing_shard(folder: Path, name: str) -> None:
    shard(folder, name)
    with pytest.raises(ModelError, match=f"{name} is named in .* not there"):
        weight_files(folder)


def test_pickled_weights(folder: Path) -> None:
    assert pickled_files(folder) == []
    (folder / "pytorch_model.bin").write_bytes(b"in the way")
    assert pickled_files(folder) == []  # safetensors count
    with_both = folder_digest(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert pickled_files(folder) == [folder / "pytorch_model.bin"]
    assert folder_digest(folder) != with_both
    with pytest.raises(ModelError, match=r"has neither model.safetensors nor"):
        check_folder(folder)
    (folder / "pytorch_model.bin").rename(folder / "one.bin")
    index = {"weight_map": {"a": "one.bin", "b": "two.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="two.bin is named in .* not there"):
        pickled_files(folder)


# --- check_folder ---------------------------------------------------------------------------------


def test_good_folder(folder: Path) -> None:
    check_folder(folder)
    check_folder(folder, 512, quantize=True)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_position_embeddings": None, "n_positions": 512},
        {"max_position_embeddings": None, "n_ctx": 512},
        {"max_position_embeddings": None, "text_config": {"max_position_embeddings": 512}},
    ],
)
def test_seq_len_beyond_the_model(folder: Path, changes: dict[str, Any]) -> None:
    configure(folder, **changes)
    check_folder(folder, 512)
    with pytest.raises(SpecError, match=r"data.seq_len: got 513, .* at most 512"):
        check_folder(folder, 513)


def test_no_limit_known(folder: Path) -> None:
    configure(folder, max_position_embeddings=None)
    check_folder(folder, 10**6)


@pytest.mark.parametrize("architectures", [[], None, ["BertForMaskedLM"], ["LlamaModel"]])
def test_not_a_causal_model(folder: Path, architectures: Any) -> None:
    configure(folder, architectures=architectures)
    with pytest.raises(ModelError, match="expected one that ends in ForCausalLM"):
        check_folder(folder)


def test_gpt2_is_a_causal_model(folder: Path) -> None:
    configure(folder, architectures=["GPT2LMHeadModel"])
    check_folder(folder)


def test_quantized_already(folder: Path) -> None:
    configure(folder, quantization_config={"quant_method": "gptq"})
    check_folder(folder)
    with pytest.raises(ModelError, match="quant_method gptq.*quantization: none"):
        check_folder(folder, quantize=True)


def test_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter"):
        check_folder(folder)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_config_that_is_none(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config.json is"):
        check_folder(folder)
