"""The folder of a model: which files count, what they hash to, and whether it fits the spec.

Reads JSON and hashes files; imports neither torch nor transformers.
"""

import difflib
from pathlib import Path
from typing import Any

from ditty.errors import ModelError, SpecError
from ditty.store.files import canonical_json, read_json, sha256_bytes, sha256_once

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
VOCABULARY = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken")
TOKENIZER = (
    *VOCABULARY,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template*",
)
LENGTH_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
CAUSAL = ("ForCausalLM", "LMHeadModel")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that from_pretrained would read, in a fixed order.

    Raises:
        ModelError: there are none, or a shard is missing.
    """
    if (folder / WEIGHTS).is_file():  # first, as transformers does
        return [folder / WEIGHTS]
    index = _read_config(folder / INDEX) if (folder / INDEX).is_file() else None
    if index is None:
        raise ModelError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}; "
            "a folder of a base model holds config.json, safetensors and a tokenizer"
        )
    return _indexed(folder, INDEX, index)


def pickled_files(folder: Path) -> list[Path]:
    """The .bin files of a folder that has no safetensors, in a fixed order; else none.

    Raises:
        ModelError: a shard is missing.
    """
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        return []
    if (folder / PICKLED).is_file():
        return [folder / PICKLED]
    if not (folder / PICKLED_INDEX).is_file():
        return []
    return _indexed(folder, PICKLED_INDEX, _read_config(folder / PICKLED_INDEX))


def _indexed(folder: Path, index_name: str, index: dict[str, Any]) -> list[Path]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{folder / index_name} has no weight_map")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ModelError(
                f"{folder / name} is named in {index_name} and is not there: "
                "the download or copy is incomplete, repeat it"
            )
    return [folder / name for name in names]


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that define the tokenizer and the chat template, sorted by name.

    Raises:
        ModelError: none of them holds a vocabulary.
    """
    found = _matching(folder, TOKENIZER)
    if not any(path.match(pattern) for path in found for pattern in VOCABULARY):
        raise ModelError(
            f"{folder} has no tokenizer: expected one of {', '.join(VOCABULARY)}. "
            "Save the tokenizer beside the model with save_pretrained"
        )
    return found


def tokenizer_digest(folder: Path) -> str:
    """Hex digest of the tokenizer and the chat template, over names and bytes.

    Raises:
        ModelError: the folder has no tokenizer.
    """
    return _digest_of(tokenizer_files(folder))


def folder_digest(folder: Path) -> str:
    """Hex digest of all files of a folder that change what is loaded from it.

    Those are the weights and their index, configuration, tokenizer and code; not README, logs or
    weights in other formats, unless there are only those.

    Raises:
        ModelError: no config.json, weights or tokenizer.
    """
    if not (folder / "config.json").is_file():
        near = difflib.get_close_matches("config.json", [p.name for p in folder.iterdir()], n=1)
        hint = f", but {near[0]}" if near else ""
        raise ModelError(
            f"{folder} has no config.json{hint}: "
            "expected a folder written by save_pretrained, or a snapshot of a hub model"
        )
    pickled = pickled_files(folder)
    index = PICKLED_INDEX if pickled else INDEX
    others = _matching(folder, ("config.json", "generation_config.json", "*.py", index))
    return _digest_of([*(pickled or weight_files(folder)), *tokenizer_files(folder), *others])


def check_folder(folder: Path, seq_len: int | None = None, *, quantize: bool = False) -> None:
    """Whether the model in `folder` can be trained as asked; reads JSON only.

    Args:
        seq_len: data.seq_len, in tokens.
        quantize: the weights are to be quantized here.
    Raises:
        ModelError: not a causal language model, an adapter, no safetensors, or quantized already.
        SpecError: `seq_len` is beyond the model's maximum.
    """
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds an adapter (adapter_config.json), expected a whole model: "
            "merge the adapter into its base (`ditty export`, or peft's merge_and_unload) first"
        )
    config = _read_config(folder / "config.json")
    architectures = config.get("architectures") or []
    if not any(str(name).endswith(CAUSAL) for name in architectures):
        raise ModelError(
            f"{folder / 'config.json'} has architectures {architectures}, expected one that ends "
            f"in {' or '.join(CAUSAL)}: ditty trains causal language models"
        )
    weight_files(folder)
    method = (config.get("quantization_config") or {}).get("quant_method", "unknown")
    if quantize and config.get("quantization_config"):
        raise ModelError(
            f"{folder} is quantized already (quant_method {method}), and quantizing it again "
            "would add up both errors: use the unquantized model, or model.quantization: none"
        )
    maximum = max_seq_len(config)
    if seq_len is not None and maximum is not None and seq_len > maximum:
        raise SpecError(
            f"data.seq_len: got {seq_len}, but {folder} was made for at most {maximum} tokens "
            f"(its config.json): lower data.seq_len to {maximum}"
        )


def max_seq_len(config: dict[str, Any]) -> int | None:
    """The longest row, in tokens, that a config.json allows; None where it sets no limit."""
    for section in (config, config.get("text_config") or {}):
        for name in LENGTH_KEYS:
            if isinstance(section.get(name), int) and section[name] > 0:
                return section[name]
    return None


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is missing or not a JSON object")
    return value


def _digest_of(files: list[Path]) -> str:
    return sha256_bytes(canonical_json([[path.name, sha256_once(path)] for path in sorted(files)]))
