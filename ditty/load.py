"""The one way from a folder of weights to the module that a training trains."""

from pathlib import Path

import torch

from ditty.choices import Quantization, Sharding
from ditty.model import load_base, prepare_model
from ditty.spec import ModelSpec, TrainSpec
from ditty.world import World


def load_module(folder: Path, spec: ModelSpec, train: TrainSpec, world: World) -> torch.nn.Module:
    """Load the model in `folder` as `train.sharding` says, with its adapter, in train mode.

    Args:
        folder: config.json and safetensors; quantized by ditty.quantize where `spec` says so.
    Raises:
        ModelError: the folder does not fit the spec.
    """
    if train.sharding in (Sharding.FSDP2, Sharding.HYBRID):
        from ditty.sharded import load_sharded

        return load_sharded(folder, spec, train, world)
    if train.sharding is Sharding.ZERO3:
        from ditty.zero import load_zero3

        return load_zero3(folder, spec, train, world)
    places = None
    if spec.quantization is Quantization.INT8 and train.cpu_offload:
        from ditty.offload import offload_options

        places = offload_options(folder, spec, train, world.device)
    base = load_base(folder, spec, train.precision, world.device, places=places)
    return prepare_model(
        base, spec, seed=train.seed, gradient_checkpointing=train.gradient_checkpointing
    )
