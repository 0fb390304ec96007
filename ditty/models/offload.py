"""An int8 base larger than the GPU: some blocks on it in int8, the others streamed from the host.

bitsandbytes quantizes at load here: a folder quantized before cannot be split this way, since its
scales would be lost on the way to the host and back. Blocks on the host stay as they are.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ditty.config.choices import Quantization
from ditty.config.spec import ModelSpec, TrainSpec
from ditty.models import skeleton
from ditty.models.model import base_dtype

FREE_SHARE = 0.6  # of the free GPU memory, for weights; the rest is for activations and adapters


def offload_options(
    folder: Path, spec: ModelSpec, train: TrainSpec, device: torch.device
) -> dict[str, Any]:
    """What from_pretrained needs to load `folder` (not quantized) partly on the host."""
    from transformers import BitsAndBytesConfig

    plain = spec.model_copy(update={"quantization": Quantization.NONE})
    model = skeleton.empty_model(folder, plain, base_dtype(spec, train.precision))
    if train.offload_gpu_gb is not None:
        budget = train.offload_gpu_gb * 1e9
    else:
        budget = FREE_SHARE * torch.cuda.mem_get_info(device)[0]
    return {
        "device_map": device_map(model, device, budget),
        "quantization_config": BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True
        ),
    }


def device_map(
    model: PreTrainedModel, device: torch.device, budget: float
) -> dict[str, torch.device | str]:
    """Everything but the blocks on `device`, and of the blocks as many as fit `budget` bytes.

    Args:
        model: on the meta device.
    """
    blocks = {id(block) for block in skeleton.blocks(model)}
    places: dict[str, torch.device | str] = {}
    block_names = [name for name, m in model.named_modules() if id(m) in blocks]
    left = budget
    for name, module in model.named_modules():
        around = any(b.startswith(f"{name}.") for b in block_names) or not name
        inside = any(name.startswith(f"{p}.") for p in (*places, *block_names))
        if around or inside or id(module) in blocks:
            continue
        places[name] = device
        left -= sum(p.numel() * p.itemsize for p in module.parameters())
    for name in block_names:
        left -= sum(p.numel() for p in model.get_submodule(name).parameters())  # a byte each
        places[name] = device if left >= 0 else "cpu"
    return places
