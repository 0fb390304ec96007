"""A model cut over processes by FSDP2: built empty, cut, then filled, each process with its part.

No process ever holds the whole model, and none sends another anything: each reads its own rows
from the files. Block by block PyTorch gathers the weights when they are needed.
"""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ditty.config.choices import Adapter, Precision, Sharding
from ditty.config.spec import ModelSpec, TrainSpec
from ditty.distributed.world import World
from ditty.models import skeleton
from ditty.models.model import DTYPES, add_adapter, base_dtype, base_model, initial_adapter
from ditty.models.weights import WeightFiles

log = logging.getLogger(__name__)

READERS = 4  # weights that are read at once
DORA_MAGNITUDE = ".lora_magnitude_vector"

# A part of a weight: (elements [start, stop) of the flattened whole) -> their values
ReadPart = Callable[[str, torch.Size, int, int], torch.Tensor]


def load_sharded(folder: Path, spec: ModelSpec, train: TrainSpec, world: World) -> torch.nn.Module:
    """The module to train, of which this process holds 1/N of each weight, in train mode.

    Args:
        train: `sharding` is `fsdp2` or `hybrid`.
    Raises:
        ModelError: see WeightFiles and skeleton.
    """
    module, files, read = empty_module(folder, spec, train, world)
    cut(base_model(module), spec, train, world)
    _to_empty(module, torch.device("cpu") if train.cpu_offload else world.device)
    with ThreadPoolExecutor(READERS, thread_name_prefix="ditty weights") as readers:
        parameters = list(module.named_parameters())
        for done in [readers.submit(_fill, name, p, read) for name, p in parameters]:
            done.result()
    log.info("rank %d read %.1f MB of the weights", world.rank, files.bytes_read / 1e6)
    return module


def empty_module(
    folder: Path,
    spec: ModelSpec,
    train: TrainSpec,
    world: World,
    prepare: Callable[[PreTrainedModel], None] | None = None,
) -> tuple[torch.nn.Module, WeightFiles, ReadPart]:
    """The module to train with its parameters on the meta device, and what reads parts of them.

    Buffers, and the scales of quantized layers, are whole and in place.

    Args:
        prepare: called with the model before it gets its adapter.
    Raises:
        ModelError: see WeightFiles and skeleton.
    """
    model = skeleton.empty_model(folder, spec, base_dtype(spec, train.precision))
    if prepare is not None:
        prepare(model)
    files = WeightFiles(folder, model)
    packed = skeleton.pack_quantized(model, files, world.device)
    module = model if spec.adapter is Adapter.NONE else add_adapter(model, spec, 0, empty=True)
    module.train()
    skeleton.fill_buffers(model, files, world.device)
    return module, files, part_reader(model, files, packed, train.seed)


def cut(model: PreTrainedModel, spec: ModelSpec, train: TrainSpec, world: World) -> None:
    """Cut the parameters of `model`, block by block, and the rest as one group."""
    policy = MixedPrecisionPolicy()
    if spec.adapter is Adapter.NONE and train.precision is not Precision.FP32:
        # What is gathered is what the arithmetic uses; what is kept and reduced stays fp32.
        policy = MixedPrecisionPolicy(DTYPES[train.precision], torch.float32)
    options = {"mesh": mesh(train, world), "mp_policy": policy}
    if train.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy()
    for block in skeleton.blocks(model):
        fully_shard(block, **options)
    fully_shard(model, **options)


def mesh(train: TrainSpec, world: World) -> DeviceMesh:
    """[N] processes, or for `hybrid` [copies, processes of a copy]."""
    size = train.shard_size or world.local_world_size
    kind = world.device.type
    if train.sharding is Sharding.HYBRID:
        names = ("copies", "shard")
        return init_device_mesh(kind, (world.world_size // size, size), mesh_dim_names=names)
    return init_device_mesh(kind, (world.world_size,))


def _to_empty(module: torch.nn.Module, device: torch.device) -> None:
    """Memory for the parameters alone: `Module.to_empty` would wipe the buffers."""
    buffers = [(m, k, b) for m in module.modules() for k, b in m.named_buffers(recurse=False)]
    module.to_empty(device=device)
    for owner, key, value in buffers:
        owner._buffers[key] = value


def part_reader(
    model: PreTrainedModel, files: WeightFiles, packed: set[str], seed: int
) -> ReadPart:
    """How to get any part of any parameter of a module made from `model`."""

    def read(name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
        started = initial_adapter(name, shape, seed)
        if started is not None:
            return started.reshape(-1)[start:stop]
        if DORA_MAGNITUDE in name:
            return _row_lengths(files, name, model, start, stop)
        key = checkpoint_name(name)
        if key in packed:
            storage = model.get_submodule(_layer_of(name, model)).quant_storage
            size = storage.itemsize
            whole = (shape.numel() * size, 1)
            return files.read(key, start * size, stop * size, whole).view(storage)
        return files.read(key, start, stop, shape)

    return read


def _row_lengths(
    files: WeightFiles, name: str, model: PreTrainedModel, start: int, stop: int
) -> torch.Tensor:
    """DoRA's start for rows [start, stop): the length of the base's rows, as peft computes it."""
    layer = model.get_submodule(checkpoint_name(name.partition(DORA_MAGNITUDE)[0]))
    weight = layer.base_layer.weight
    columns = weight.shape[1]
    key = f"{checkpoint_name(name.partition(DORA_MAGNITUDE)[0])}.weight"
    (magnitude,) = layer.lora_magnitude_vector.values()
    if magnitude.fan_in_fan_out:  # GPT-2's Conv1D, embeddings: the rows are columns in the file
        whole = files.read(key, 0, weight.numel(), weight.shape).view(weight.shape)
        return torch.linalg.norm(whole.to(weight.dtype).T, dim=1)[start:stop]
    rows = files.read(key, start * columns, stop * columns, weight.shape).view(-1, columns)
    rows = rows.to(weight.dtype)
    return torch.linalg.norm(rows, dim=1).to(weight.dtype)


def checkpoint_name(name: str) -> str:
    """The base model's name of a parameter that peft has wrapped.

    `base_model.model.x.base_layer.weight` and `base_model.model.x.modules_to_save.default.weight`
    are both `x.weight`.
    """
    name = name.removeprefix("base_model.model.")
    for inserted in (".base_layer", ".modules_to_save.default", ".original_module"):
        name = name.replace(inserted, "")
    return name


def _layer_of(name: str, model: PreTrainedModel) -> str:
    return name.removeprefix("base_model.model.").rpartition(".")[0]


def _fill(name: str, parameter: torch.nn.Parameter, read: ReadPart) -> None:
    assert isinstance(parameter, DTensor), f"{name} was not cut"
    local = parameter._local_tensor
    start = first_element(parameter)
    if local.numel():
        value = read(name, parameter.shape, start, start + local.numel())
        with torch.no_grad():
            local.copy_(value.view(local.shape))


def first_element(parameter: DTensor) -> int:
    """Where this process's rows start in the flattened parameter."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    assert not any(offset[1:]), "FSDP2 cuts rows"
    return offset[0] * parameter.shape[1:].numel() if offset else 0


def is_cut(module: torch.nn.Module) -> bool:
    """Whether FSDP2 has cut the parameters of `module`."""
    return any(isinstance(p, DTensor) for p in base_model(module).parameters())
