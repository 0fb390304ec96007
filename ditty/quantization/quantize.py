"""Quantization of a checkpoint that need not fit in memory: one tensor at a time.

The result is what transformers' own quantization gives, bit for bit, in the memory of one tensor
and two output shards; `from_pretrained` loads it and quantizes nothing.

On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights in place in an eval-mode forward, which
spoils later gradients. That concerns who loads the result (ditty.models.model.keep_4bit_weights
turns it off), not the quantization, which runs no layer.

Source: arXiv:2208.07339 (LLM.int8), arXiv:2305.14314 (NF4 and double quantization).
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ditty.config.choices import Quantization
from ditty.errors import ModelError
from ditty.models.shards import (
    DTYPES,
    Parts,
    Piece,
    Progress,
    copy_beside,
    tensor_of,
    weight_bytes,
    write_shards,
)
from ditty.pretrained.modelfolder import check_folder
from ditty.quantization.formats import FORMATS, Pack, model_card
from ditty.quantization.quantplan import Tensor, plan, skeleton, stacks

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils.quantization_config import QuantizationConfigMixin

log = logging.getLogger(__name__)


def quantize(
    source: Path,
    out: Path,
    to: Quantization,
    dtype: str,
    *,
    progress: Progress | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Quantize the model in `source` into the existing folder `out`.

    The same source gives the same bytes, whatever the device and the number of threads. What an
    earlier call that was killed has written into `out` is kept.

    Args:
        source: config.json, safetensors, tokenizer.
        out: gets config.json, shards, their index, a model card, and copies of tokenizer and
            generation files.
        to: INT8 (LLM.int8, one scale a row), NF4 (with double quantization) or FP8 (e4m3, one
            scale a row).
        dtype: "float32", "bfloat16" or "float16": what weights are cast to first, what those that
            are not quantized are kept in, and what NF4 layers compute in.
        progress: called after each tensor with source bytes done, source bytes in all, and name.
        device: "cpu" or "cuda": where the arithmetic is done.
        trust_remote_code: build the model from the folder's own code.
    Returns:
        facts: quantized_weights and other_weights (counts), bytes, shards, dtype, ignored (names
        in the checkpoint that transformers does not load either), and of a mixture of experts
        expert_weights (a count): those among the others that are stacked.
    Raises:
        ModelError: the checkpoint does not fit its config, is quantized already, or has stacks of
            experts that the format does not leave as they are.
        StoreError: the disk has no room for the result.
    """
    if dtype not in DTYPES:
        raise ModelError(f"cannot quantize from dtype {dtype!r}, expected {', '.join(DTYPES)}")
    check_folder(source, quantize=True)
    settings = FORMATS[to].settings(DTYPES[dtype])
    model = skeleton(source, settings, DTYPES[dtype], trust_remote_code)
    kept = _stacked_weights(model, source, to, dtype)
    tensors, ignored = plan(model, source, DTYPES[dtype], FORMATS[to].size)
    convert = partial(_convert, pack=FORMATS[to].pack, device=torch.device(device))
    shards = write_shards([_piece(tensor, convert) for tensor in tensors], out, progress)
    _write_config(model, settings, source, out)
    facts = _facts(tensors, out) | {"shards": shards, "dtype": dtype, "ignored": ignored}
    facts |= {"expert_weights": kept} if kept else {}
    (out / "README.md").write_text(model_card(type(model).__name__, to, facts))
    return facts


def _stacked_weights(model: "PreTrainedModel", source: Path, to: Quantization, dtype: str) -> int:
    """How many weights of `model` are experts in stacks, which stay as they are; said in the log.

    Raises:
        ModelError: the format does not leave them so.
    """
    found = stacks(model)
    if not found:
        return 0
    count = sum(shape.numel() for shape in found.values())
    name, shape = next(iter(found.items()))
    said = (
        f"{name} of {source} has shape {list(shape)}: experts in one tensor. {count:,} weights are "
        "in such stacks"
    )
    if not FORMATS[to].leaves_stacks:
        raise ModelError(
            f"{said}, and {to} has no layout for them. Use model.quantization: nf4 or int8, which "
            "leave them as they are, or none"
        )
    log.warning("%s; as with transformers they are not quantized, and stay in %s", said, dtype)
    return count


def _facts(tensors: list[Tensor], out: Path) -> dict[str, Any]:
    return {
        "quantized_weights": sum(tensor.count for tensor in tensors if tensor.quantized),
        "other_weights": sum(tensor.count for tensor in tensors if not tensor.quantized),
        "bytes": weight_bytes(out),
    }


def _piece(tensor: Tensor, convert: Callable[[Tensor], Parts]) -> Piece:
    make = partial(convert, tensor)
    size = tensor.source.size
    return Piece(tensor.name, size, tensor.result_bytes, make, tensor.source)


def _convert(tensor: Tensor, pack: Pack, device: torch.device) -> Parts:
    """What the output holds in place of one tensor of the source, by name."""
    with tensor_of(tensor.file, tensor.name) as value:
        if not tensor.quantized:
            return {tensor.name: value.to(tensor.dtype, copy=True)}
        value = value.to(device).to(tensor.dtype)
        if tensor.transposed:
            value = value.T
        layer = tensor.name.removesuffix("weight")
        return {f"{layer}{entry}": part for entry, part in pack(value.contiguous()).items()}


def _write_config(
    model: "PreTrainedModel", settings: "QuantizationConfigMixin", source: Path, out: Path
) -> None:
    """Everything beside the weights, so that `from_pretrained(out)` needs nothing else."""
    model.config.quantization_config = settings.to_dict()
    model.config.save_pretrained(out)
    copy_beside(source, out)
