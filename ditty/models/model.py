"""From a folder of weights to a model ready to train: frozen base, adapter, attention."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ditty.config.choices import Adapter, Attention, Precision, Quantization
from ditty.config.spec import ModelSpec
from ditty.errors import ModelError
from ditty.models import attention, fp8
from ditty.pretrained.layernames import check_layers
from ditty.store.files import read_json, sha256_bytes, write_json

DTYPES = {
    Precision.FP32: torch.float32,
    Precision.BF16: torch.bfloat16,
    Precision.FP16: torch.float16,
}


def base_dtype(spec: ModelSpec, precision: Precision) -> torch.dtype:
    """A frozen base is held in `precision`, a base that is trained in fp32."""
    return torch.float32 if spec.adapter is Adapter.NONE else DTYPES[precision]


def attention_name(spec: ModelSpec) -> str:
    """What transformers calls the attention of `spec`, which it knows from now on."""
    attention.register()
    return attention.NAME if spec.attention is Attention.PACKED else spec.attention.value


def load_base(
    folder: Path,
    spec: ModelSpec,
    precision: Precision,
    device: torch.device,
    *,
    places: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Load the whole base model; a pre-quantized folder as it is, nothing quantized again.

    Args:
        places: arguments of from_pretrained that put it elsewhere than on `device`
            (offload.offload_options).
    """
    options = dict(places or {"device_map": {"": device}})
    if spec.quantization is Quantization.FP8:
        options["config"] = fp8.loading_config(folder, spec.trust_remote_code)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=base_dtype(spec, precision),
            attn_implementation=attention_name(spec),
            trust_remote_code=spec.trust_remote_code,
            local_files_only=True,
            **options,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load the model in {folder}: {reason(error)}") from error
    model.config.use_cache = False
    keep_4bit_weights(model)
    return model


def reason(error: BaseException) -> str:
    """The message of an exception that may be a wrapper with none of its own."""
    if isinstance(error, KeyError) and error.args == (attention.NAME,):
        return "its architecture takes no attention but its own. Set model.attention: eager"
    return str(error) or str(error.__cause__ or type(error).__name__)


def keep_4bit_weights(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in place on CPUs with AVX512-BF16.

    An eval-mode forward there changes the layout, and later gradients are wrong.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def add_adapter(
    model: PreTrainedModel, spec: ModelSpec, seed: int, *, empty: bool = False
) -> torch.nn.Module:
    """Freeze the base and put fp32 LoRA or DoRA matrices beside its layers.

    Their start is a function of the seed and each matrix's name (`initial_adapter`), so that it is
    the same however the model is cut.

    Args:
        empty: the adapter is left on the meta device, for a model that is there.
    Raises:
        SpecError: `target_modules` or `modules_to_save` names no layer of this model.
        ModelError: peft cannot put an adapter beside one that they name.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=spec.lora_r,
        lora_alpha=spec.lora_alpha,
        lora_dropout=spec.lora_dropout,
        target_modules=spec.target_modules,
        use_rslora=spec.rank_stabilized,
        use_dora=spec.adapter is Adapter.DORA,
        modules_to_save=spec.modules_to_save or None,
    )
    layers = [name for name, _ in model.named_modules()]
    check_layers(layers, spec.target_modules, spec.modules_to_save)
    try:
        adapted = get_peft_model(model, config, low_cpu_mem_usage=empty)
    except ValueError as error:
        raise ModelError(f"model.target_modules {spec.target_modules!r}: {error}") from error
    if not empty:
        _start_adapter(adapted, seed)
    return adapted


def _start_adapter(adapted: torch.nn.Module, seed: int) -> None:
    names = {id(p): name for name, p in trainable(adapted).items()}
    device = next(p.device for p in adapted.parameters() if not p.is_meta)
    for owner in adapted.modules():
        for key, parameter in list(owner.named_parameters(recurse=False)):
            if id(parameter) not in names:
                continue
            name = names[id(parameter)]
            if parameter.is_meta:  # beside a layer that waits on the host
                made = torch.empty(parameter.shape, dtype=torch.float32, device=device)
                parameter = owner._parameters[key] = torch.nn.Parameter(made)
            start = initial_adapter(name, parameter.shape, seed)
            if start is not None:
                with torch.no_grad():
                    parameter.copy_(start)


def initial_adapter(name: str, shape: torch.Size, seed: int) -> torch.Tensor | None:
    """The start of an adapter's matrix, fp32 on the CPU, or None for what starts as the base is.

    LoRA's A: Kaiming uniform, B: zeros, as in arXiv:2106.09685 and peft; for embeddings the
    reverse, normal and zeros.
    """
    generator = torch.Generator()
    generator.manual_seed(int(sha256_bytes(f"ditty adapter {seed} {name}".encode())[:15], 16))
    if ".lora_A." in name:
        value = torch.empty(shape)
        return torch.nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
    if ".lora_embedding_B." in name:
        return torch.randn(shape, generator=generator)
    if ".lora_B." in name or ".lora_embedding_A." in name:
        return torch.zeros(shape)
    return None


def prepare_model(model: PreTrainedModel, spec: ModelSpec, *, seed: int) -> torch.nn.Module:
    """The module to train: with its adapter, or itself; in train mode."""
    trained = model if spec.adapter is Adapter.NONE else add_adapter(model, spec, seed)
    trained.train()
    return trained


def base_model(module: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside peft's wrapper, or the module itself."""
    inner = module.get_base_model() if hasattr(module, "get_base_model") else module
    assert isinstance(inner, PreTrainedModel), f"{type(inner)} is no transformers model"
    return inner


def trainable(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name; tied ones once."""
    found = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert found, "nothing to train"
    return found


def save_trained(
    module: torch.nn.Module, weights: Mapping[str, torch.Tensor], base_name: str, out: Path
) -> None:
    """Write what was trained, in the layout of peft (adapter) or transformers (full model).

    Args:
        module: what was trained; its own weights may be parts, or stale.
        weights: the whole trained weights by parameter name, on the CPU.
        base_name: what the adapter's config names as its base.
    Raises:
        ModelError: a weight is empty or not finite: it would be saved without a word.
    """
    from peft import PeftModel

    for name, value in weights.items():
        if not value.numel() or not bool(torch.isfinite(value).all()):
            raise ModelError(f"{name} is {'not finite' if value.numel() else 'empty'}: not saved")
    if isinstance(module, PeftModel):
        for config in module.peft_config.values():
            config.base_model_name_or_path = base_name
        module.save_pretrained(out, state_dict=dict(weights), save_embedding_layers=False)
        (out / "README.md").unlink(missing_ok=True)  # peft's empty model card
        _sort_sets(out / "adapter_config.json")
    else:
        model = base_model(module)
        state = dict(weights)
        for tied, root in model.all_tied_weights_keys.items():
            if root in state:
                state[tied] = state[root]
        model.save_pretrained(out, state_dict=state)


def _sort_sets(config: Path) -> None:
    """peft holds sets of names, and writes them in another order in each process.

    An order that means something (`layers_to_transform` of numbers) is not touched.
    """
    values = read_json(config)
    assert values is not None, f"peft has written {config}"

    def is_names(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(name, str) for name in value)

    write_json(config, {k: sorted(v) if is_names(v) else v for k, v in values.items()})
