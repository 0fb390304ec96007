"""Quantization of a checkpoint that need not fit in memory: one tensor at a time.

The result is what transformers' own quantization gives, bit for bit, in the memory of one tensor
and one output shard; `from_pretrained` loads it and quantizes nothing.

On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights in place in an eval-mode forward, which
spoils later gradients. That concerns who loads the result (ditty.model.keep_4bit_weights turns it
off), not the quantization, which runs no layer.

Source: arXiv:2208.07339 (LLM.int8), arXiv:2305.14314 (NF4 and double quantization).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from ditty.choices import Quantization
from ditty.errors import ModelError
from ditty.modelfolder import check_folder
from ditty.quantplan import Size, Tensor, plan, skeleton
from ditty.shards import DTYPES, Parts, Piece, Progress, copy_beside, weight_bytes, write_shards

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

CHUNK = 1 << 22  # weights quantized in one call: bitsandbytes needs about 24 bytes for each
BLOCK = 64  # NF4: weights that share a scale
NESTED_BLOCK = 256  # NF4: scales that share a scale
EXTRA_BYTES = 2048  # NF4, of a tensor at most: two code books and its shape and dtype

Pack = Callable[[torch.Tensor], Parts]


@dataclass(frozen=True)
class Format:
    """How bitsandbytes stores a quantized layer.

    Attributes:
        settings: what asks transformers for it, by the dtype to compute in.
        pack: from a weight [out, in] to the layer's entries in a checkpoint, without its name.
        size: their bytes, exact or slightly too large, by `out` and `in`.
    """

    settings: Callable[[torch.dtype], "BitsAndBytesConfig"]
    pack: Pack
    size: Size


def quantize(
    source: Path,
    out: Path,
    to: Quantization,
    dtype: str,
    *,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Quantize the model in `source` into the existing folder `out`.

    The same source gives the same bytes, whatever the number of threads.

    Args:
        source: config.json, safetensors, tokenizer.
        out: gets config.json, shards, their index, and copies of tokenizer and generation files.
        to: INT8 (LLM.int8, one scale a row) or NF4 (with double quantization).
        dtype: "float32", "bfloat16" or "float16": what weights are cast to first, what those that
            are not quantized are kept in, and what NF4 layers compute in.
        progress: called after each tensor with source bytes done, source bytes in all, and name.
        trust_remote_code: build the model from the folder's own code.
    Returns:
        facts: quantized_weights and other_weights (counts), bytes, shards, dtype, ignored (names
        in the checkpoint that transformers does not load either).
    Raises:
        ModelError: the checkpoint does not fit its config, is quantized already, or fuses experts.
        StoreError: the disk has no room for the result.
    """
    if dtype not in DTYPES:
        raise ModelError(f"cannot quantize from dtype {dtype!r}, expected {', '.join(DTYPES)}")
    check_folder(source, quantize=True)
    settings = FORMATS[to].settings(DTYPES[dtype])
    model = skeleton(source, settings, DTYPES[dtype], trust_remote_code)
    tensors, ignored = plan(model, source, DTYPES[dtype], FORMATS[to].size)
    shards = write_shards(_pieces(tensors, FORMATS[to].pack), out, progress)
    _write_config(model, settings, source, out)
    return _facts(tensors, out) | {"shards": shards, "dtype": dtype, "ignored": ignored}


def _facts(tensors: list[Tensor], out: Path) -> dict[str, Any]:
    return {
        "quantized_weights": sum(tensor.count for tensor in tensors if tensor.quantized),
        "other_weights": sum(tensor.count for tensor in tensors if not tensor.quantized),
        "bytes": weight_bytes(out),
    }


def _pieces(tensors: list[Tensor], pack: Pack) -> list[Piece]:
    return [
        Piece(t.name, t.source_bytes, t.result_bytes, partial(_convert, t, pack)) for t in tensors
    ]


def _convert(tensor: Tensor, pack: Pack) -> Parts:
    """What the output holds in place of one tensor of the source, by name."""
    # Opened for each tensor: the pages of a mapping count as ours for as long as it is open.
    with safe_open(tensor.file, framework="pt") as file:
        value = file.get_tensor(tensor.name).to(tensor.dtype)
        if not tensor.quantized:
            return {tensor.name: value.clone()}
        if tensor.transposed:
            value = value.T
        layer = tensor.name.removesuffix("weight")
        return {f"{layer}{entry}": part for entry, part in pack(value.contiguous()).items()}


def _write_config(
    model: "PreTrainedModel", settings: "BitsAndBytesConfig", source: Path, out: Path
) -> None:
    """Everything beside the weights, so that `from_pretrained(out)` needs nothing else."""
    model.config.quantization_config = settings.to_dict()
    model.config.save_pretrained(out)
    copy_beside(source, out)


def _int8_settings(dtype: torch.dtype) -> "BitsAndBytesConfig":
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)  # layers compute in the dtype of their input


def _int8_size(rows: int, columns: int) -> int:
    return rows * columns + 4 * rows + 1


def _int8(weight: torch.Tensor) -> Parts:
    """What `bitsandbytes.nn.Int8Params` makes of a weight, in less memory.

    In chunks of whole rows, which do not depend on each other. Rounded to fp16 first, from any
    dtype, as bitsandbytes does.
    """
    import bitsandbytes.functional as bnb

    rows = max(1, CHUNK // weight.shape[1])
    parts = [bnb.int8_vectorwise_quant(chunk.to(torch.float16)) for chunk in weight.split(rows)]
    return {
        "weight": torch.cat([part for part, _, _ in parts]),
        "SCB": torch.cat([scales for _, scales, _ in parts]),  # fp32 [out], a row's maximum
        "weight_format": torch.tensor(0, dtype=torch.uint8),  # row by row, the only one there is
    }


def _nf4_settings(dtype: torch.dtype) -> "BitsAndBytesConfig":
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=torch.uint8,
    )


def _nf4_size(rows: int, columns: int) -> int:
    blocks = math.ceil(rows * columns / BLOCK)
    nested = 4 * math.ceil(blocks / NESTED_BLOCK)
    return math.ceil(rows * columns / 2) + blocks + nested + EXTRA_BYTES


def _nf4(weight: torch.Tensor) -> Parts:
    """`bitsandbytes.functional.quantize_4bit(weight, compress_statistics=True)` in less memory.

    In chunks of whole blocks, which do not depend on each other. The mean of the scales does, on
    the number of threads that add them up (measured: the last bit, from 2.1 million weights on),
    so that one thread does it: then it equals transformers' result in a process of one thread.
    """
    import bitsandbytes.functional as bnb

    parts = [
        bnb.quantize_4bit(chunk, blocksize=BLOCK, quant_type="nf4")
        for chunk in weight.reshape(-1).split(CHUNK)
    ]
    packed = torch.cat([part for part, _ in parts])
    scales = torch.cat([state.absmax for _, state in parts])
    mean = _mean_in_one_thread(scales)
    nested_scales, nested = bnb.quantize_blockwise(scales - mean, blocksize=NESTED_BLOCK)
    state = bnb.QuantState(
        absmax=nested_scales,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=BLOCK,
        code=parts[0][1].code,
        quant_type="nf4",
        offset=mean,
        state2=nested,
    )
    beside = {f"weight.{key}": part.clone() for key, part in state.as_dict(packed=True).items()}
    return {"weight": packed, **beside}


def _mean_in_one_thread(values: torch.Tensor) -> torch.Tensor:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return values.mean()
    finally:
        torch.set_num_threads(threads)


FORMATS = {
    Quantization.INT8: Format(_int8_settings, _int8, _int8_size),
    Quantization.NF4: Format(_nf4_settings, _nf4, _nf4_size),
}
