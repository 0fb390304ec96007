"""A model without weights: every parameter on the meta device, every layer in its place."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ditty.config.choices import Quantization
from ditty.config.spec import ModelSpec
from ditty.errors import ModelError
from ditty.models import fp8
from ditty.models.model import attention_name, keep_4bit_weights, reason
from ditty.models.weights import WeightFiles, kept_in_fp32


def build_empty(
    folder: Path,
    dtype: torch.dtype,
    quantizer: Callable[[Any], Any],
    *,
    trust_remote_code: bool,
    **options: Any,
) -> PreTrainedModel:
    """The model of `folder` on the meta device, its layers replaced as in from_pretrained.

    Args:
        quantizer: from the folder's config to transformers' quantizer, or None.
        options: of AutoModelForCausalLM.from_config.
    Raises:
        ModelError: transformers cannot build it.
    """
    with ExitStack() as stack:
        for context in PreTrainedModel.get_init_context(dtype, False, False, None):
            stack.enter_context(context)
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code, **options
            )
        except (ValueError, KeyError, OSError, ImportError) as error:
            raise ModelError(
                f"transformers cannot build the model of {folder}: {reason(error)}"
            ) from error
        if (replaces := quantizer(config)) is not None:
            replaces.preprocess_model(model=model, dtype=dtype, device_map={"": "cpu"})
            model.hf_quantizer = replaces
    return model


def empty_model(folder: Path, spec: ModelSpec, dtype: torch.dtype) -> PreTrainedModel:
    """The model of `folder` on the meta device, its layers quantized where the folder says so.

    Raises:
        ModelError: transformers cannot build it.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    def quantizer(config: Any) -> Any:
        if spec.quantization is Quantization.NONE:
            return None
        if spec.quantization is Quantization.FP8:
            return fp8.Fp8Quantizer(fp8.Fp8Config(), pre_quantized=True)
        return AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)

    model = build_empty(
        folder,
        dtype,
        quantizer,
        trust_remote_code=spec.trust_remote_code,
        attn_implementation=attention_name(spec),
    )
    _keep_in_fp32(model, dtype)
    model.tie_weights()
    model.config.use_cache = False
    keep_4bit_weights(model)
    return model


def _keep_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """As from_pretrained, and not from_config: what a model wants in fp32 whatever `dtype`."""
    kept = kept_in_fp32(model, dtype)
    for name, value in model.state_dict(keep_vars=True).items():
        if value.is_floating_point() and (exception := kept(name)) is not None:
            value.data = value.data.to(exception)


def pack_quantized(model: PreTrainedModel, files: WeightFiles, device: torch.device) -> set[str]:
    """Give each 4-bit layer a packed meta weight of one column, and its scales on `device`.

    The bytes are viewed as the layer's compute dtype, since FSDP2 and ZeRO-3 cut floating-point
    tensors; scales are whole in each process (a 30th of the weights).

    Returns:
        names of the packed weights.
    """
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit

    from ditty.models.packed import PackedLinear4bit

    packed = set()
    for name, layer in model.named_modules():
        weight = f"{name}.weight"
        if not isinstance(layer, Linear4bit) or weight not in files.statistics:
            continue
        state = QuantState.from_dict(files.read_statistics(weight), device=device)
        storage = layer.compute_dtype
        size, odd = divmod(state.shape.numel() // 2, storage.itemsize)
        assert not odd, f"{weight}: {state.shape} does not fill whole {storage} numbers"
        empty = torch.empty(size, 1, dtype=storage, device="meta")
        layer.weight = torch.nn.Parameter(empty, requires_grad=False)
        layer.quant_state = state
        layer.quant_storage = storage
        layer.__class__ = PackedLinear4bit
        packed.add(weight)
    return packed


def fill_buffers(model: PreTrainedModel, files: WeightFiles, device: torch.device) -> None:
    """Put every buffer on `device`: stored ones read, the others (rotary tables) computed again.

    Raises:
        ModelError: transformers leaves one without a value.
    """
    stored = set(model.state_dict())
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # so that _init_weights leaves it alone
    for prefix, module in model.named_modules():
        computed = []
        for key, buffer in list(module.named_buffers(recurse=False)):
            if not buffer.is_meta:
                module._buffers[key] = buffer.to(device)
                continue
            name = f"{prefix}.{key}".removeprefix(".")
            value = torch.full_like(buffer, -1, device=device)
            if name in stored and name in files.sources:
                value = files.read(name, 0, buffer.numel(), buffer.shape).to(device, buffer.dtype)
                value = value.view(buffer.shape)
                value._is_hf_initialized = True
            else:
                computed.append(key)
            module._buffers[key] = value
        if computed:
            _compute_buffers(model, module, prefix, computed)


def _compute_buffers(
    model: PreTrainedModel, module: torch.nn.Module, prefix: str, names: list[str]
) -> None:
    before = {name: module.get_buffer(name).clone() for name in names}
    model._init_weights(module)
    for name in names:
        if torch.equal(before[name], module.get_buffer(name)):
            raise ModelError(
                f"{f'{prefix}.{name}'.removeprefix('.')} is in no file, and transformers does not "
                "compute it again: this model cannot be loaded in parts. Use train.sharding: ddp"
            )


def blocks(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The model's own blocks (`_no_split_modules`), in order, none inside another.

    Raises:
        ModelError: the model names none.
    """
    names: Any = set(model._no_split_modules or ())
    found: dict[str, torch.nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        # Its class, or the one that FSDP2 has made a subclass of.
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if kinds & names and not inside:
            found[name] = module
    if not found:
        raise ModelError(
            f"{type(model).__name__} names no blocks that could be sharded one by one "
            f"(_no_split_modules: {sorted(names)}). Use train.sharding: ddp"
        )
    return list(found.values())
