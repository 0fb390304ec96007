"""From a .gguf file to a folder that `from_pretrained` reads: bf16 safetensors and tokenizer.

Tensor by tensor, see ditty.conversion.ggufread. Config and tokenizer are what transformers makes of
the file. SmolLM2-135M from Q4_1: 24 s of CPU time, 0.8 GB, of which 0.4 GB are imports.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ditty.conversion.ggufread import DTYPE, gguf_pieces
from ditty.errors import DittyError, ModelError
from ditty.models.shards import Piece, Progress, write_shards
from ditty.models.weights import check_complete

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STOP_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")


def convert_gguf(gguf: Path, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Write the dequantized model of a .gguf file into the existing folder `out`.

    The same file gives the same bytes, wherever it and `out` are: transformers is shown the file
    alone, in a directory of its own, so that neither its name nor its neighbours (a config.json,
    an adapter) take part. What an earlier call that was killed has written is kept.

    Args:
        progress: called after each weight with source bytes done, source bytes in all, and name.
    Returns:
        facts: architecture, parameters (tied ones once), dtype, eos_token_ids, chat_template,
        shards.
    Raises:
        ModelError: not a GGUF file, an architecture that transformers cannot read, or missing
            tensors.
        StoreError: the disk has no room for the result.
    """
    with tempfile.TemporaryDirectory(prefix="ditty-gguf-") as alone:
        link = Path(alone) / "model.gguf"
        link.symlink_to(gguf.absolute())
        stops = _stop_ids(link, gguf)
        try:
            model, tokenizer, pieces = _read(link)
        except (MemoryError, DittyError):
            raise
        except Exception as error:  # a foreign file: tokenizers raises plain Exception
            raise ModelError(
                f"transformers cannot read {gguf}: {error}. Give the model as a folder with "
                "safetensors instead, or a .gguf file of an architecture that transformers lists"
            ) from error
        check_complete(model, {piece.name for piece in pieces}, gguf)
        shards = write_shards(pieces, out, progress)
    if tokenizer.eos_token_id is not None:
        stops.add(tokenizer.eos_token_id)
    _save_settings(model, sorted(stops), out)
    tokenizer.save_pretrained(out)
    return {
        "architecture": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(DTYPE).removeprefix("torch."),
        "eos_token_ids": sorted(stops),
        "chat_template": tokenizer.chat_template is not None,
        "shards": shards,
    }


def _read(link: Path) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase", list[Piece]]:
    """The model without weights, its tokenizer, and what its weights are made of."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder, name = str(link.parent), link.name
    config = AutoConfig.from_pretrained(folder, gguf_file=name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    return model, tokenizer, gguf_pieces(link, model)


def _stop_ids(link: Path, gguf: Path) -> set[int]:
    """Ids of the tokens at which the file's author lets generation stop."""
    from gguf import GGUFReader

    try:
        fields = GGUFReader(link).fields
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise ModelError(f"{gguf} is no complete GGUF file: {error}") from error
    return {int(fields[key].contents()) for key in STOP_KEYS if key in fields}


def _save_settings(model: "PreTrainedModel", stops: list[int], out: Path) -> None:
    """config.json, and a generation config that ends at any of `stops`.

    transformers takes only one of them from the file.
    """
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(out)
    if model.generation_config is not None:
        if stops:
            model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
        model.generation_config.save_pretrained(out)
