"""The one way from a folder of weights to the module that a training trains."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from ditty.config.choices import Adapter, Quantization, Sharding
from ditty.config.spec import ModelSpec, TrainSpec
from ditty.distributed.world import World
from ditty.errors import ModelError
from ditty.models import fp8
from ditty.models.model import load_base, prepare_model, reason


def load_module(folder: Path, spec: ModelSpec, train: TrainSpec, world: World) -> torch.nn.Module:
    """Load the model in `folder` as `train.sharding` says, with its adapter, in train mode.

    Args:
        folder: config.json and safetensors; quantized (ditty.quantization) where `spec` says so.
    Raises:
        ModelError: the folder does not fit the spec, or the GPU does not.
    """
    if spec.quantization is Quantization.FP8:
        fp8.check_device(world.device)
    if train.sharding in (Sharding.FSDP2, Sharding.HYBRID):
        from ditty.distributed.sharded import load_sharded

        return load_sharded(folder, spec, train, world)
    if train.sharding is Sharding.ZERO3:
        from ditty.distributed.zero import load_zero3

        return load_zero3(folder, spec, train, world)
    base = _base(folder, spec, train, world.device)
    if world.device.type == "cuda":
        fp8.keep_transposed(base)
    return prepare_model(base, spec, seed=train.seed)


def _base(folder: Path, spec: ModelSpec, train: TrainSpec, device: torch.device) -> PreTrainedModel:
    """The whole model of a folder; blocks on the host where int8 with offload asks for it."""
    places = None
    if spec.quantization is Quantization.INT8 and train.cpu_offload:
        from ditty.models.offload import offload_options

        places = offload_options(folder, spec, train, device)
    return load_base(folder, spec, train.precision, device, places=places)


def load_trained(
    folder: Path,
    trained: Path | None,
    spec: ModelSpec,
    train: TrainSpec,
    device: torch.device,
) -> torch.nn.Module:
    """What a training has made, ready to be evaluated, whole on one device.

    Args:
        folder: the base model, as `load_module` takes it.
        trained: the training's artifact; None: the base model alone.
    Raises:
        ModelError: a folder does not fit the spec.
    """
    if spec.quantization is Quantization.FP8:
        fp8.check_device(device)
    if trained is not None and spec.adapter is Adapter.NONE:
        return _base(trained, spec, train, device).eval()
    base = _base(folder, spec, train, device)
    if trained is None:
        return base.eval()
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(base, trained, local_files_only=True).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"the adapter in {trained} does not fit the model in {folder}: {reason(error)}"
        ) from error
