"""From a folder of weights to a model ready to train: frozen base, adapter, attention."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ditty import attention
from ditty.errors import ModelError
from ditty.spec import Adapter, Attention, ModelSpec, Precision

DTYPES = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16}


def load_base(
    folder: Path, spec: ModelSpec, precision: Precision, device: torch.device
) -> PreTrainedModel:
    """Load the base model; a pre-quantized folder is loaded as it is, nothing quantized again.

    A frozen base is held in `precision`; a base that is trained (adapter none) in fp32, its
    arithmetic under autocast.
    """
    attention.register()
    implementation = attention.NAME if spec.attention is Attention.PACKED else spec.attention.value
    dtype = torch.float32 if spec.adapter is Adapter.NONE else DTYPES[precision]
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=implementation,
            device_map={"": device},
            trust_remote_code=spec.trust_remote_code,
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load the model in {folder}: {error}") from error
    model.config.use_cache = False
    keep_4bit_weights(model)
    return model


def keep_4bit_weights(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in place on CPUs with AVX512-BF16.

    An eval-mode forward there changes the layout, and later gradients are wrong.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def add_adapter(model: PreTrainedModel, spec: ModelSpec, seed: int) -> torch.nn.Module:
    """Freeze the base and put fp32 LoRA matrices beside its layers; the same for the same seed.

    Raises:
        ModelError: `target_modules` names no layer of this model.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=spec.lora_r,
        lora_alpha=spec.lora_alpha,
        lora_dropout=spec.lora_dropout,
        target_modules=spec.target_modules,
    )
    torch.manual_seed(seed)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"model.target_modules {spec.target_modules!r}: {error}") from error


def prepare_model(
    model: PreTrainedModel, spec: ModelSpec, *, seed: int, gradient_checkpointing: bool
) -> torch.nn.Module:
    """The module to train: with its adapter, or itself; in train mode."""
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = add_adapter(model, spec, seed) if spec.adapter is Adapter.LORA else model
    trained.train()
    return trained


def trainable(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name; tied ones once."""
    found = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert found, "nothing to train"
    return found


def save_trained(module: torch.nn.Module, base_name: str, out: Path) -> None:
    """Write what was trained, in the layout of peft (adapter) or transformers (full model).

    Args:
        base_name: what the adapter's config names as its base.
    """
    from peft import PeftModel

    if isinstance(module, PeftModel):
        for config in module.peft_config.values():
            config.base_model_name_or_path = base_name
        module.save_pretrained(out, save_embedding_layers=False)
        (out / "README.md").unlink(missing_ok=True)  # peft's empty model card
    else:
        assert isinstance(module, PreTrainedModel)
        module.save_pretrained(out)
