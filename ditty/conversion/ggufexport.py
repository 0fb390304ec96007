"""A model's folder as one .gguf file, which llama.cpp and all that is built upon it reads.

One tensor at a time: in memory is the largest of them, and once more of it while it is changed
(140 MB for 890 MB of bf16 with an embedding of 66 MB).
Names of tensors and keys are llama.cpp's own, from its package gguf.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    quants,
)
from gguf.tensor_mapping import TensorNameMap, get_tensor_name_map

from ditty.config.choices import ExportDtype
from ditty.conversion.ggufarch import Architecture, architecture_of, rope_factors, write_shape
from ditty.conversion.ggufvocab import write_vocabulary
from ditty.errors import ModelError
from ditty.models.shards import Progress, check_disk, tensor_of
from ditty.pretrained.tensorfiles import Header, headers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FILE = "model.gguf"
ROPE_FACTORS = "rope_freqs.weight"
TYPES = {
    "F32": GGMLQuantizationType.F32,
    "F16": GGMLQuantizationType.F16,
    "BF16": GGMLQuantizationType.BF16,
}
HALVES = {TYPES["F16"], TYPES["BF16"]}
QUANTIZED = {
    ExportDtype.Q8_0: GGMLQuantizationType.Q8_0,
    ExportDtype.Q4_0: GGMLQuantizationType.Q4_0,
}
FILE_TYPES = {
    GGMLQuantizationType.F32: LlamaFileType.ALL_F32,
    GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
    GGMLQuantizationType.BF16: LlamaFileType.MOSTLY_BF16,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    GGMLQuantizationType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
}
# Whose rows say most about the quality of what is written: 8 bits where the others have 4.
ENDS = ("token_embd.weight", "output.weight")


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file.

    Attributes:
        name: llama.cpp's.
        source: the tensor of the folder that it comes from.
        type: what it is in the file.
        heads: of query or key, where the rows of each head are put in another order; else None.
        offset: what is added to each number.
    """

    name: str
    source: Header
    type: GGMLQuantizationType
    heads: int | None
    offset: int

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        block, size = GGML_QUANT_SIZES[self.type]
        return prod(self.source.shape) // block * size

    def make(self) -> np.ndarray:
        """Its values; bf16, which numpy has not, as 16-bit integers, quantized ones as bytes."""
        with tensor_of(self.source.file, self.source.name) as value:
            if self.type not in HALVES:
                value = value.to(torch.float32) + self.offset
            if self.heads is not None:
                value = interleave(value, self.heads)
            value = value.clone(memory_format=torch.contiguous_format)
        if value.dtype == torch.bfloat16:
            value = value.view(torch.int16)
        if self.type in QUANTIZED.values():
            return quants.quantize(value.numpy(), self.type)
        return value.numpy()


def interleave(value: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (i, i + half) of each head become neighbours.

    transformers' rotary embedding turns these pairs, llama.cpp's turns neighbours.
    """
    halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return halves.transpose(1, 2).reshape(value.shape)


def write_gguf(
    folder: Path,
    out: Path,
    name: str,
    ends: Sequence[int] = (),
    *,
    quantized: ExportDtype | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the unquantized model in `folder` as `FILE` into the existing folder `out`.

    Args:
        folder: config.json, safetensors, tokenizer; perhaps generation_config.json.
        name: of the model, for people.
        ends: ids at which generation ends, besides those that the folder names.
        quantized: a key of QUANTIZED, what the matrices become; None: they stay what they are.
        progress: called after each tensor with source bytes done, source bytes in all, and name.
    Returns:
        facts: architecture, weights (a count), bytes, and those of `write_vocabulary`.
    Raises:
        ModelError: llama.cpp's name of the architecture, of a tensor or of the tokenizer is not
            known here, or the model does something that a .gguf file cannot say.
        StoreError: the disk has no room for the result.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    architecture = architecture_of(config, folder)
    to = QUANTIZED[quantized] if quantized else None
    tensors = list(_tensors(folder, config, architecture, to))
    factors = rope_factors(config)
    check_disk(out, sum(tensor.bytes for tensor in tensors))
    writer = GGUFWriter(out / FILE, architecture.name)
    try:
        writer.add_name(name)
        write_shape(writer, architecture, config)
        matrices = [t.source for t in tensors if len(t.source.shape) > 1]
        writer.add_file_type(FILE_TYPES[to or TYPES[max(matrix.dtype for matrix in matrices)]])
        if to is not None:
            writer.add_quantization_version(GGML_QUANT_VERSION)
        facts = write_vocabulary(writer, folder, config.vocab_size, ends)
        _write_tensors(writer, tensors, factors, progress)
    finally:
        writer.close()
    weights = sum(prod(tensor.source.shape) for tensor in tensors)
    size = (out / FILE).stat().st_size
    return {"architecture": architecture.name, "weights": weights, "bytes": size, **facts}


def _tensors(
    folder: Path,
    config: "PretrainedConfig",
    architecture: Architecture,
    to: GGMLQuantizationType | None,
) -> Iterator[Tensor]:
    names = _names(architecture.name, config.num_hidden_layers)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for header in headers(folder):
        if header.name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embedding where there is no head
        if header.name.endswith("rotary_emb.inv_freq"):
            continue  # a buffer that earlier versions of transformers saved
        name = names.get_name(header.name, try_suffixes=(".weight", ".bias"))
        if name is None or header.dtype not in TYPES:
            raise ModelError(
                f"{header.name} ({header.dtype}) in {header.file} has no name in llama.cpp's "
                f"{architecture.name}: use `--to merged`"
            )
        yield Tensor(
            name,
            header,
            _type(name, header, to),
            heads.get(name.split(".")[-2]) if architecture.interleaved else None,
            architecture.norm_offset if name.endswith("norm.weight") else 0,
        )


def _type(name: str, header: Header, to: GGMLQuantizationType | None) -> GGMLQuantizationType:
    """Vectors are fp32 in llama.cpp, matrices what they are in the folder, or quantized.

    Rows that are no whole number of blocks stay what they are.
    """
    if len(header.shape) == 1:
        return TYPES["F32"]
    if to is None or header.shape[-1] % GGML_QUANT_SIZES[to][0]:
        return TYPES[header.dtype]
    return QUANTIZED[ExportDtype.Q8_0] if name in ENDS else to


def _names(architecture: str, layers: int) -> TensorNameMap:
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    return get_tensor_name_map(arch, layers)


def _write_tensors(
    writer: GGUFWriter,
    tensors: list[Tensor],
    factors: np.ndarray | None,
    progress: Progress | None,
) -> None:
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    for tensor in tensors:
        stored = np.dtype(np.int16)  # only its not being uint8 counts: the type is given
        shape = tensor.source.shape
        writer.add_tensor_info(tensor.name, shape, stored, tensor.bytes, raw_dtype=tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    done, total = 0, sum(tensor.source.span.size for tensor in tensors)
    for tensor in tensors:
        writer.write_tensor_data(tensor.make())
        done += tensor.source.span.size
        if progress is not None:
            progress(done, total, tensor.source.name)
