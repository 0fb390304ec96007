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
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.tensor_mapping import TensorNameMap, get_tensor_name_map
from safetensors import safe_open

from ditty.conversion.ggufvocab import write_vocabulary
from ditty.errors import ModelError
from ditty.pretrained.tensorfiles import Header, headers
from ditty.quantization.shards import Progress, check_disk

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FILE = "model.gguf"
ROPE_FACTORS = "rope_freqs.weight"
# transformers' class -> (llama.cpp's name, whether it has rows of query and key in another order)
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", True),
    "MistralForCausalLM": ("llama", True),
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen3ForCausalLM": ("qwen3", False),
}
TYPES = {
    "F32": GGMLQuantizationType.F32,
    "F16": GGMLQuantizationType.F16,
    "BF16": GGMLQuantizationType.BF16,
}
FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
}


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file.

    Attributes:
        name: llama.cpp's.
        source: the tensor of the folder that it comes from.
        heads: of query or key, where the rows of each head are put in another order; else None.
    """

    name: str
    source: Header
    heads: int | None

    @property
    def type(self) -> GGMLQuantizationType:
        """Vectors are fp32 in llama.cpp, matrices what they are in the folder."""
        return TYPES["F32" if len(self.source.shape) == 1 else self.source.dtype]

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return prod(self.source.shape) * (4 if self.type is GGMLQuantizationType.F32 else 2)

    def make(self) -> np.ndarray:
        """Its values; bf16, which numpy has not, as 16-bit integers."""
        # Opened for each tensor: the pages of a mapping count as ours for as long as it is open.
        with safe_open(self.source.file, framework="pt") as file:
            value = file.get_tensor(self.source.name)
            if self.type is GGMLQuantizationType.F32:
                value = value.to(torch.float32)
            if self.heads is not None:
                value = interleave(value, self.heads)
            value = value.clone(memory_format=torch.contiguous_format)
        if value.dtype == torch.bfloat16:
            value = value.view(torch.int16)
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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the unquantized model in `folder` as `FILE` into the existing folder `out`.

    Args:
        folder: config.json, safetensors, tokenizer; perhaps generation_config.json.
        name: of the model, for people.
        ends: ids at which generation ends, besides those that the folder names.
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
    architecture, ordered = _architecture(config, folder)
    tensors = list(_tensors(folder, config, architecture, ordered=ordered))
    factors = _rope_factors(config)
    check_disk(out, sum(tensor.bytes for tensor in tensors))
    writer = GGUFWriter(out / FILE, architecture)
    try:
        writer.add_name(name)
        _write_shape(writer, config)
        matrices = [t.source for t in tensors if len(t.source.shape) > 1]
        writer.add_file_type(FILE_TYPES[max(matrix.dtype for matrix in matrices)])
        facts = write_vocabulary(writer, folder, config.vocab_size, ends)
        _write_tensors(writer, tensors, factors, progress)
    finally:
        writer.close()
    weights = sum(prod(tensor.source.shape) for tensor in tensors)
    size = (out / FILE).stat().st_size
    return {"architecture": architecture, "weights": weights, "bytes": size, **facts}


def _architecture(config: "PretrainedConfig", folder: Path) -> tuple[str, bool]:
    name = (config.architectures or [type(config).__name__])[0]
    if name not in ARCHITECTURES:
        raise ModelError(
            f"ditty does not write {name} as .gguf, expected {', '.join(ARCHITECTURES)}. Use "
            f"`--to merged`, and llama.cpp's own convert_hf_to_gguf.py on it ({folder})"
        )
    problem = next(_unsaid(config), None)
    if problem:
        raise ModelError(
            f"a .gguf file of architecture {ARCHITECTURES[name][0]} cannot say that {problem} "
            f"({folder / 'config.json'}): llama.cpp would compute something else. Use `--to merged`"
        )
    return ARCHITECTURES[name]


def _unsaid(config: "PretrainedConfig") -> Iterator[str]:
    """What the model does otherwise than llama.cpp would."""
    if getattr(config, "quantization_config", None):
        yield "its weights are quantized"
    if config.hidden_act not in ("silu", "swish"):
        yield f"hidden_act is {config.hidden_act}"
    slides = getattr(config, "use_sliding_window", True)
    if slides and getattr(config, "sliding_window", None):
        yield f"attention slides over {config.sliding_window} tokens (sliding_window)"
    if config.rope_parameters["rope_type"] not in ("default", "llama3"):
        yield f"rope_type is {config.rope_parameters['rope_type']}"


def _tensors(
    folder: Path, config: "PretrainedConfig", architecture: str, *, ordered: bool
) -> Iterator[Tensor]:
    names = _names(architecture, config.num_hidden_layers)
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
                f"{architecture}: use `--to merged`"
            )
        part = name.split(".")[-2]
        yield Tensor(name, header, heads.get(part) if ordered else None)


def _names(architecture: str, layers: int) -> TensorNameMap:
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    return get_tensor_name_map(arch, layers)


def _write_shape(writer: GGUFWriter, config: "PretrainedConfig") -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _rope_factors(config: "PretrainedConfig") -> np.ndarray | None:
    """By what each frequency of the rotary embedding is divided, fp32; None: by nothing."""
    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    plain = rope["rope_theta"] ** -(torch.arange(len(scaled)) / len(scaled))
    return (plain / scaled).to(torch.float32).numpy()


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
