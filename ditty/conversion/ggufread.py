"""Which tensors of a .gguf file make up which weight of a model, and their values, one at a time.

transformers decides, by two sets of rules: converters for the architectures that its newer reader
knows, processors of numpy arrays for all others. Neither is its public interface, and its loader
of the latter holds the whole model: tests compare the outcome with from_pretrained.
Blocks are unpacked by llama.cpp's own package, in fp32, some rows at a time, and rounded once.
"""

from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize

from ditty.errors import ModelError
from ditty.models.shards import Parts, Piece
from ditty.store.readahead import Span

if TYPE_CHECKING:
    from gguf.gguf_reader import ReaderTensor
    from transformers import PreTrainedModel

DTYPE = torch.bfloat16  # of what is written
CHUNK = 1 << 22  # weights unpacked in one call, which needs about 12 bytes for each
NUMBERS = {GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16}

Process = Callable[["ReaderTensor", np.ndarray, dict[str, Any]], Any]


@dataclass(frozen=True)
class Source:
    """What a weight is made of.

    Attributes:
        tensors: of the file.
        make: the weight's values; little more than they is in memory.
    """

    tensors: list["ReaderTensor"]
    make: Callable[[], torch.Tensor]


def gguf_pieces(file: Path, model: "PreTrainedModel") -> list[Piece]:
    """Every weight of `model` that the file holds, in the model's order and by its names.

    Args:
        model: of the file's config, on the meta device.
    """
    from transformers.integrations.gguf.utils import is_gguf_arch_supported

    reader = GGUFReader(file)
    architecture = str(reader.fields["general.architecture"].contents())
    rules = _by_converters if is_gguf_arch_supported(architecture) else _by_processors
    found = rules(file, reader, architecture, model)
    return [
        _piece(file, name, empty.shape, found[name])
        for name, empty in model.state_dict().items()
        if name in found
    ]


def _unpacked(file: Path, name: str, source: Source) -> torch.Tensor:
    try:
        return source.make()
    except (NotImplementedError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"{name} in {file} cannot be unpacked: {error}. Give the model as a folder with "
            "safetensors"
        ) from error


def _piece(file: Path, name: str, shape: torch.Size, source: Source) -> Piece:
    def make() -> Parts:
        made = _unpacked(file, name, source).to(DTYPE).contiguous()
        if made.shape != shape:
            raise ModelError(
                f"{name} in {file} has shape {list(made.shape)}, the file's own settings make it "
                f"{list(shape)}: it is damaged, or of a kind that transformers does not know"
            )
        return {name: made}

    size = sum(tensor.n_bytes for tensor in source.tensors)
    start = min(tensor.data_offset for tensor in source.tensors)
    return Piece(name, size, shape.numel() * DTYPE.itemsize, make, Span(file, start, size))


def _by_processors(
    file: Path, reader: GGUFReader, architecture: str, model: "PreTrainedModel"
) -> dict[str, Source]:
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        load_gguf_checkpoint,
    )

    config = load_gguf_checkpoint(str(file), return_tensors=False)["config"]
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
    names = get_gguf_hf_weights_map(model, processor)
    groups: dict[str, list[ReaderTensor]] = defaultdict(list)
    for tensor in reader.tensors:
        # Stacked experts are "x.weight" in the file, and "x" in the map.
        name = names.get(tensor.name) or names.get(tensor.name.removesuffix(".weight"))
        if name is not None:
            groups[name].append(tensor)

    def process(tensor: "ReaderTensor", values: np.ndarray, made: dict[str, Any]) -> Any:
        options = {"tensor_key_mapping": names, "parsed_parameters": {"tensors": made}}
        return processor.process(weights=values, name=tensor.name, **options).weights

    return {
        name: Source(tensors, partial(_processed, file, name, tensors, process))
        for name, tensors in groups.items()
    }


def _processed(
    file: Path, name: str, tensors: list["ReaderTensor"], process: Process
) -> torch.Tensor:
    def part(start: int, stop: int) -> torch.Tensor:
        made: dict[str, Any] = {}  # where a processor puts what it makes of several tensors
        for tensor in tensors:
            values = process(tensor, _values(file, tensor, start, stop), made)
        return torch.as_tensor(made.get(name, values))

    shape = _shape(tensors[0])
    if len(shape) == 3:  # experts, which do not depend on each other
        experts = part(0, 1)
        out = torch.empty((shape[0], *experts.shape[1:]), dtype=DTYPE)
        for i in range(shape[0]):
            out[i] = part(i, i + 1)[0]
        return out
    empty = np.broadcast_to(np.float32(0), shape)
    if process(tensors[0], empty, {}) is empty:  # as most are: nothing is to be done
        return _dense(file, tensors[0], DTYPE)
    return part(0, shape[0])


def _by_converters(
    file: Path, reader: GGUFReader, architecture: str, model: "PreTrainedModel"
) -> dict[str, Source]:
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )
    from transformers.integrations.gguf.utils import get_gguf_conversion_mapping

    rules = get_gguf_conversion_mapping(architecture, model.config)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    groups: dict[str, list[tuple[ReaderTensor, str]]] = defaultdict(list)
    for tensor in sorted(reader.tensors, key=lambda tensor: dot_natural_key(tensor.name)):
        name, pattern = rename_source_key(tensor.name, renamings, converters, prefix, known)
        if name in known:
            groups[name].append((tensor, pattern or ""))

    def source(name: str, group: list[tuple["ReaderTensor", str]]) -> Source:
        rule = by_pattern.get(group[0][1])
        return Source([t for t, _ in group], partial(_converted, file, name, group, rule, model))

    return {name: source(name, group) for name, group in groups.items()}


def _converted(
    file: Path,
    name: str,
    group: list[tuple["ReaderTensor", str]],
    rule: Any,
    model: "PreTrainedModel",
) -> torch.Tensor:
    if rule is None:
        return _dense(file, group[0][0], DTYPE)
    rule = deepcopy(rule)
    for tensor, pattern in group:
        # Numbers stay fp32 until all is done: some are stored off by one.
        dtype = torch.float32 if tensor.tensor_type in NUMBERS else DTYPE
        rule.add_tensor(name, tensor.name, pattern, _dense(file, tensor, dtype))
    made = rule.convert(name, model=model, config=model.config)[name]
    return made[0] if isinstance(made, list) else made


def _shape(tensor: "ReaderTensor") -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(tensor.shape))


def _dense(file: Path, tensor: "ReaderTensor", dtype: torch.dtype) -> torch.Tensor:
    """A tensor's values, unpacked some rows at a time."""
    shape = _shape(tensor)
    if len(shape) == 1:
        return torch.from_numpy(_values(file, tensor, 0, shape[0])).to(dtype)
    out = torch.empty(shape, dtype=dtype)
    step = max(1, CHUNK // prod(shape[1:]))
    for start in range(0, shape[0], step):
        stop = min(shape[0], start + step)
        out[start:stop] = torch.from_numpy(_values(file, tensor, start, stop))
    return out


def _values(file: Path, tensor: "ReaderTensor", start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) in fp32.

    They are read, not looked at in the reader's mapping, whose pages would all count as ours.
    """
    rows, *others = tensor.data.shape  # of bytes, where the tensor is packed in blocks
    if len(_shape(tensor)) == 1:
        start, stop = 0, rows
    offset = tensor.data_offset + start * tensor.data.nbytes // rows
    count = (stop - start) * prod(others)
    stored = np.fromfile(file, tensor.data.dtype, count, offset=offset)
    return dequantize(stored.reshape(stop - start, *others), tensor.tensor_type)
