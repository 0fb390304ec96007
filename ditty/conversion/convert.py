"""From a .gguf file to a folder that `from_pretrained` reads: bf16 safetensors and tokenizer.

transformers reads the file and dequantizes it (it keeps GGUF packed by default, and a packed model
cannot be saved). The whole model is in memory meanwhile: about 2 bytes a weight, and once more for
the largest tensor. SmolLM2-135M from Q4_1: 36 s of CPU time, 1.0 GB, of which 0.5 GB are imports.
"""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ditty.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_SHARD = "4GB"
STOP_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")


def convert_gguf(gguf: Path, out: Path) -> dict[str, Any]:
    """Write the dequantized model of a .gguf file into the existing folder `out`.

    The same file gives the same bytes, wherever it and `out` are: transformers is shown the file
    alone, in a directory of its own, so that neither its name nor its neighbours (a config.json,
    an adapter) take part.

    Returns:
        facts: architecture, parameters (tied ones once), dtype, eos_token_ids, chat_template.
    Raises:
        ModelError: not a GGUF file, an architecture that transformers cannot read, missing
            tensors, or no `gguf` package.
    """
    with tempfile.TemporaryDirectory(prefix="ditty-gguf-") as alone:
        link = Path(alone) / "model.gguf"
        link.symlink_to(gguf.absolute())
        stops = _stop_ids(link, gguf)
        try:
            model, tokenizer = _read(link)
        except MemoryError:
            raise
        except Exception as error:  # a foreign file: tokenizers raises plain Exception
            raise ModelError(
                f"transformers cannot read {gguf}: {error}. Give the model as a folder with "
                "safetensors instead, or a .gguf file of an architecture that transformers lists"
            ) from error
    if tokenizer.eos_token_id is not None:
        stops.add(tokenizer.eos_token_id)
    _set_stops(model, sorted(stops))
    model.save_pretrained(out, max_shard_size=MAX_SHARD)
    tokenizer.save_pretrained(out)
    return {
        "architecture": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": "bfloat16",
        "eos_token_ids": sorted(stops),
        "chat_template": tokenizer.chat_template is not None,
    }


def _read(link: Path) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The dequantized model, complete, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, name = str(link.parent), link.name
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        quantization_config=GgufConfig(gguf_file=name, dequantize=True),
        dtype=torch.bfloat16,
        output_loading_info=True,
    )
    model, info = loaded
    wrong = {
        kind: sorted(map(str, info[kind]))
        for kind in ("missing_keys", "mismatched_keys")
        if info[kind]
    }
    if wrong:
        raise ValueError(f"its tensors do not make up the model: {json.dumps(wrong)[:500]}")
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=name)


def _stop_ids(link: Path, gguf: Path) -> set[int]:
    """Ids of the tokens at which the file's author lets generation stop."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError(
            f"{gguf} cannot be read without the package gguf: pip install gguf"
        ) from error
    try:
        fields = GGUFReader(link).fields
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise ModelError(f"{gguf} is no complete GGUF file: {error}") from error
    return {int(fields[key].contents()) for key in STOP_KEYS if key in fields}


def _set_stops(model: "PreTrainedModel", stops: list[int]) -> None:
    """Let `generate` end at any of the ids: transformers takes only one of them from the file."""
    if stops and model.generation_config is not None:
        model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
