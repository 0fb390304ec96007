"""What `from_pretrained` would do with a checkpoint if it were to quantize it, tensor by tensor.

transformers decides: which layers bitsandbytes replaces, what the checkpoint's names mean, which
weights stay in fp32. Its own functions are asked, on a model without weights; no list of names is
kept here. They are not its public interface: tests compare the outcome with from_pretrained.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ditty.errors import ModelError
from ditty.models.weights import CheckpointNames, check_complete, kept_in_fp32
from ditty.pretrained.tensorfiles import Header, headers
from ditty.store.readahead import Span

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils.quantization_config import QuantizationConfigMixin

Size = Callable[[int, int], int]  # bytes of a quantized layer on disk, by its `out` and `in`


@dataclass(frozen=True)
class Tensor:
    """A tensor of the checkpoint and what becomes of it.

    Attributes:
        file: the safetensors file that holds it.
        name: its name there, which it keeps.
        target: the model's name for it.
        count: its weights.
        dtype: what it is cast to, before anything else.
        quantized: or else a plain copy.
        transposed: of a layer of GPT-2's kind, which holds [in, out]; quantized, [out, in].
        source: where its bytes lie.
        result_bytes: size on disk, exact or slightly too large.
    """

    file: Path
    name: str
    target: str
    count: int
    dtype: torch.dtype
    quantized: bool
    transposed: bool
    source: Span
    result_bytes: int


def skeleton(
    source: Path,
    settings: "QuantizationConfigMixin",
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> "PreTrainedModel":
    """The model without weights, its layers replaced as in from_pretrained.

    Raises:
        ModelError: transformers cannot build it, or it has nothing that could be quantized.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    from ditty.models.skeleton import build_empty

    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    model = build_empty(
        source, dtype, lambda config: quantizer, trust_remote_code=trust_remote_code
    )
    if not any(is_quantized(model, name) for name, _ in model.named_parameters()):
        raise ModelError(
            f"the model in {source} has no linear layer that could be quantized: use "
            "model.quantization: none"
        )
    return model


def is_quantized(model: "PreTrainedModel", name: str) -> bool:
    """Whether the parameter `name` of a `skeleton` is quantized."""
    return bool(_quantizer(model).param_needs_quantization(model, name))


def _quantizer(model: "PreTrainedModel") -> Any:
    return model.hf_quantizer


def stacks(model: "PreTrainedModel") -> dict[str, torch.Size]:
    """The experts that the model holds stacked in one parameter each, by name.

    No linear layer is made of them, so that they are not quantized. A parameter of three
    dimensions outside a convolution is such a stack.
    """
    convolutions = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return {
        name: parameter.shape
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 3
        and not isinstance(model.get_submodule(name.rpartition(".")[0]), convolutions)
    }


def plan(
    model: "PreTrainedModel", source: Path, dtype: torch.dtype, size: Size
) -> tuple[list[Tensor], list[str]]:
    """Every tensor to be written, ordered by file and name, and the names that are not loaded.

    Raises:
        ModelError: checkpoint and config do not fit each other, or transformers computes what is
            to be quantized from several tensors.
    """
    rename = _renaming(model)
    cast = _casting(model, dtype)
    known = model.state_dict()
    tensors: list[Tensor] = []
    whole: dict[str, Tensor] = {}  # those that are a weight as they stand, by its name
    counts: dict[str, int] = defaultdict(int)  # of those that transformers makes weights of
    ignored: list[str] = []
    for header in headers(source):
        target, made = rename(header.name)
        if target not in known:
            ignored.append(header.name)
            continue
        tensors.append(_describe(model, header, target, cast(target), size))
        if made:
            counts[target] += tensors[-1].count
            continue
        if target in whole:
            raise ModelError(
                f"{source}: {whole[target].name} and {header.name} are the same weight, {target}"
            )
        whole[target] = tensors[-1]
        _check_shape(header, list(known[target].shape), transposed=tensors[-1].transposed)
    for target, count in counts.items():
        _check_count(target, count, known[target].numel(), source)
    check_complete(model, {*whole, *counts}, source)
    return tensors, ignored


def _check_shape(header: Header, shape: list[int], *, transposed: bool) -> None:
    expected = shape[::-1] if transposed else shape
    if header.shape != expected:
        raise ModelError(
            f"{header.name} in {header.file} has shape {header.shape}, config.json makes it "
            f"{expected}: weights and config are of different models"
        )


def _check_count(target: str, count: int, expected: int, source: Path) -> None:
    """Raise unless what transformers makes `target` of is all there: a stack of experts."""
    if count != expected:
        raise ModelError(
            f"the tensors that {target} is made of have {count:,} weights in {source}, config.json "
            f"makes it {expected:,}: the checkpoint is incomplete, or the config of another model"
        )


def _describe(
    model: "PreTrainedModel", header: Header, target: str, dtype: torch.dtype, size: Size
) -> Tensor:
    from transformers.pytorch_utils import Conv1D

    count = math.prod(header.shape)
    quantized = is_quantized(model, target)
    owner: Any = model.get_submodule(target.rpartition(".")[0])
    if quantized and not header.name.endswith("weight"):
        raise ModelError(
            f"{header.name} in {header.file} is the weight {target} under another name, beside "
            "which its scales would not be found. Use model.quantization: none"
        )
    return Tensor(
        file=header.file,
        name=header.name,
        target=target,
        count=count,
        dtype=dtype,
        quantized=quantized,
        transposed=quantized and issubclass(getattr(owner, "source_cls", torch.nn.Linear), Conv1D),
        source=header.span,
        result_bytes=(
            size(owner.out_features, owner.in_features) if quantized else count * dtype.itemsize
        ),
    )


def _renaming(model: "PreTrainedModel") -> Callable[[str], tuple[str, bool]]:
    """From a checkpoint's name of a tensor to (the model's, whether it is only a part of that)."""
    names = CheckpointNames(model)

    def rename(name: str) -> tuple[str, bool]:
        found, pattern = names.target(name)
        if pattern is not None and found in names.known and is_quantized(model, found):
            raise ModelError(
                f"the checkpoint's tensor {name} is not {found} itself: transformers computes one "
                "from the other, which is not done here. Use model.quantization: none"
            )
        return found, pattern is not None

    return rename


def _casting(model: "PreTrainedModel", dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """What from_pretrained casts a parameter to: `dtype`, but for those a model keeps in fp32."""
    kept = kept_in_fp32(model, dtype)
    known = model.state_dict()

    def cast(name: str) -> torch.dtype:
        return kept(name) or (dtype if is_quantized(model, name) else known[name].dtype)

    return cast
