"""NF4 quantization of a checkpoint that need not fit in memory: one tensor at a time.

The result is what `from_pretrained(source, quantization_config=...)` followed by `save_pretrained`
would write, bit for bit, at a fraction of the memory: one tensor, and one output shard. transformers
itself decides which layers are quantized, which names a checkpoint may use and which weights stay in
fp32; here is only the loop around it. See `_nf4` for the one place where threads would matter.

Loading it: on CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights in place in an eval-mode
forward, which breaks later gradients; `ditty.model.keep_4bit_weights` turns that off. Quantizing is
not affected.

Source: arXiv:2305.14314 (NF4, double quantization).
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ditty.errors import ModelError, StoreError
from ditty.files import write_json
from ditty.modelfolder import INDEX, WEIGHTS, check_folder, tokenizer_files, weight_files

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

BLOCK = 64  # weights that share a scale
NESTED_BLOCK = 256  # scales that share a scale
CHUNK = 1 << 22  # weights quantized in one call; bitsandbytes needs about 24 bytes for each
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SPARE = 64 << 20  # bytes of disk beyond the estimate

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Tensor:
    """A tensor of the source and what becomes of it.

    Attributes:
        file: the safetensors file that holds it.
        name: its name there, which it keeps.
        target: the model's name for it.
        dtype: what it is cast to, before anything else.
        quantized: NF4, or a plain copy.
        transposed: of a Conv1D (GPT-2), which holds its weight as [in, out].
        source_bytes, result_bytes: sizes, the latter exact to a few hundred bytes.
    """

    file: Path
    name: str
    target: str
    dtype: torch.dtype
    quantized: bool
    transposed: bool
    source_bytes: int
    result_bytes: int


def quantize_nf4(
    source: Path,
    out: Path,
    dtype: str,
    *,
    max_shard_bytes: int = 512 << 20,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Quantize the model in `source` into the existing folder `out`, with double quantization.

    Args:
        source: config.json, safetensors, tokenizer.
        out: gets config.json with a quantization_config, shards and index, and copies of the
            tokenizer and generation files; `from_pretrained(out)` loads it.
        dtype: "float32" or "bfloat16": what weights are cast to first, what the weights that are
            not quantized are kept in, and what the layers compute in.
        max_shard_bytes: of one output file; a larger tensor gets a file of its own.
        progress: called after each tensor with (source bytes done, of how many, name).
        trust_remote_code: build the model from the folder's own code.
    Returns:
        facts: quantized_weights, other_weights (counts), bytes, shards, dtype, ignored (names in
            the checkpoint that transformers does not load).
    Raises:
        ModelError: a checkpoint that does not fit its config, is quantized already, or keeps
            weights where bitsandbytes does not quantize them (fused experts).
        StoreError: the disk has no room for the result.
    """
    if dtype not in DTYPES:
        raise ModelError(f"cannot quantize from dtype {dtype!r}, expected {' or '.join(DTYPES)}")
    check_folder(source, quantize=True)
    settings = _settings(DTYPES[dtype])
    model = _skeleton(source, settings, DTYPES[dtype], trust_remote_code)
    tensors, ignored = _plan(model, source, DTYPES[dtype])
    _check_disk(out, sum(t.result_bytes for t in tensors))
    shards = _write_shards(tensors, out, max_shard_bytes, progress)
    _write_config(model, settings, source, out)
    quantized = [p for n, p in model.named_parameters() if _is_quantized(model, n)]
    total = sum(p.numel() for p in model.parameters())
    return {
        "quantized_weights": sum(p.numel() for p in quantized),
        "other_weights": total - sum(p.numel() for p in quantized),
        "bytes": sum(path.stat().st_size for path in out.glob("*.safetensors")),
        "shards": shards,
        "dtype": dtype,
        "ignored": ignored,
    }


# --- what transformers would do -------------------------------------------------------------------


def _settings(dtype: torch.dtype) -> "BitsAndBytesConfig":
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=torch.uint8,
    )


def _skeleton(
    source: Path, settings: "BitsAndBytesConfig", dtype: torch.dtype, trust_remote_code: bool
) -> "PreTrainedModel":
    """The model without weights, its layers replaced as in from_pretrained.

    The steps are those of `PreTrainedModel.from_pretrained`, up to where it reads weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise ModelError(f"transformers cannot build the model of {source}: {error}") from error
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # of the biases of replaced layers
    try:
        quantizer.preprocess_model(model=model, dtype=dtype, device_map={"": "cpu"})
    finally:
        torch.set_default_dtype(before)
    model.hf_quantizer = quantizer
    _refuse_fused(model, source)
    return model


def _refuse_fused(model: "PreTrainedModel", source: Path) -> None:
    """Raise where large weights would stay as they are without a word: experts fused in one tensor.

    bitsandbytes replaces linear layers; a parameter of three dimensions outside a convolution is
    a stack of matrices that it does not see.
    """
    convolutions = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if parameter.ndim >= 3 and not isinstance(owner, convolutions):
            raise ModelError(
                f"{name} of {source} has shape {list(parameter.shape)}: experts fused in one "
                "tensor, which bitsandbytes cannot quantize and would leave in full size. "
                "Use model.quantization: none, or a dense model"
            )
    if not any(_is_quantized(model, name) for name, _ in model.named_parameters()):
        raise ModelError(f"the model in {source} has no linear layer that could be quantized")


def _is_quantized(model: "PreTrainedModel", name: str) -> bool:
    return model.hf_quantizer.param_needs_quantization(model, name)


class _Names:
    """From a checkpoint's names to the model's, by transformers' own rules for this model."""

    def __init__(self, model: "PreTrainedModel"):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules = get_model_conversion_mapping(model, None, model.hf_quantizer)
        self.renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self.converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self.prefix = model.base_model_prefix
        self.known = model.state_dict()

    def target(self, name: str) -> str | None:
        """The model's name, or None where from_pretrained would not load the tensor.

        Raises:
            ModelError: several tensors would be put together, or one taken apart.
        """
        from transformers.core_model_loading import rename_source_key

        found, pattern = rename_source_key(
            name, self.renamings, self.converters, self.prefix, self.known
        )
        if found not in self.known and name in self.known:
            found, pattern = name, None
        if pattern is not None:
            raise ModelError(
                f"the checkpoint's tensor {name} is converted by transformers when it is loaded "
                f"({pattern}), which streaming does not do: use model.quantization: none"
            )
        return found if found in self.known else None


def _dtype_of(model: "PreTrainedModel", dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """What from_pretrained casts a parameter to: `dtype`, but for those a model keeps in fp32."""
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)
    known = model.state_dict()
    if not plan:
        return lambda name: dtype if _is_quantized(model, name) else known[name].dtype
    pattern, group_names, _ = build_glob_alternation(list(plan))

    def cast(name: str) -> torch.dtype:
        match = pattern.search(name)
        if match is not None and match.lastgroup is not None:
            return plan[group_names[match.lastgroup]]
        return dtype if _is_quantized(model, name) else known[name].dtype

    return cast


# --- what the checkpoint holds --------------------------------------------------------------------


def _plan(
    model: "PreTrainedModel", source: Path, dtype: torch.dtype
) -> tuple[list[Tensor], list[str]]:
    """Every tensor to be written, in the order of the files, and the names that are not loaded."""
    names = _Names(model)
    cast = _dtype_of(model, dtype)
    tensors: list[Tensor] = []
    ignored: list[str] = []
    seen: dict[str, str] = {}
    for file, name, shape, source_bytes in _headers(source):
        target = names.target(name)
        if target is None:
            ignored.append(name)
            continue
        if target in seen:
            raise ModelError(f"{source}: both {seen[target]} and {name} are {target} of the model")
        seen[target] = name
        tensors.append(_describe(model, file, name, target, cast(target)))
        expected = list(names.known[target].shape)
        expected = expected[::-1] if tensors[-1].transposed else expected
        if shape != expected:
            raise ModelError(
                f"{name} in {file} has shape {shape}, its config.json makes it {expected}: "
                "weights and config are of different models"
            )
    _check_complete(model, set(seen), source)
    return tensors, ignored
