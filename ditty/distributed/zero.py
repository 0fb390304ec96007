"""DeepSpeed ZeRO stage 3: loading a model in parts, and its side of a training step.

DeepSpeed cuts each flattened parameter into equal ranges, one a process. Its own loading makes
every process read everything and rank 0 send it again; here each process reads its range. Its own
checkpoints know one number of processes; ours know ranges (ditty.training.checkpoint).
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ditty.config.choices import ActivationCheckpointing, Adapter, Precision
from ditty.config.spec import ModelSpec, TrainSpec
from ditty.distributed.parallel import Part
from ditty.distributed.sharded import ReadPart, empty_module
from ditty.distributed.world import World
from ditty.errors import RunError
from ditty.models import skeleton
from ditty.models.model import DTYPES, base_model, trainable

log = logging.getLogger(__name__)

# Smaller parameters stay whole in each process between uses; DeepSpeed's default, and less for
# models so small that this would be all of them.
PERSISTENT_ELEMENTS = 100_000
PERSISTENT_SHARE = 1 / 200


def is_zero(module: torch.nn.Module) -> bool:
    """Whether DeepSpeed has cut the parameters of `module`."""
    return any(hasattr(p, "ds_id") for p in module.parameters())


def load_zero3(folder: Path, spec: ModelSpec, train: TrainSpec, world: World) -> torch.nn.Module:
    """The module to train, of which this process holds 1/N of each weight, in train mode.

    Raises:
        ModelError: see WeightFiles and skeleton.
    """

    def prepare(model: PreTrainedModel) -> None:
        if train.activation_checkpointing is ActivationCheckpointing.ALL:
            # DeepSpeed frees a block's weights between forward and backward, which the other kind
            # of checkpointing takes for a change of what is computed.
            model.gradient_checkpointing_enable({"use_reentrant": True})
        if spec.adapter is not Adapter.NONE:
            # DeepSpeed learns that a block's backward is done from the gradient of its input;
            # without one it takes the first block for done before it has begun, and frees its
            # weights.
            model.enable_input_require_grads()

    module, files, read = empty_module(folder, spec, train, world, prepare)
    _cut(module, read, train, world)
    log.info("rank %d read %.1f MB of the weights", world.rank, files.bytes_read / 1e6)
    return module


def _cut(module: torch.nn.Module, read: ReadPart, train: TrainSpec, world: World) -> None:
    """Replace each empty parameter by DeepSpeed's, filled with this process's range."""
    deepspeed = _deepspeed(world)
    config = ds_config(module, train, world)
    # Block by block, as FSDP2 does. DeepSpeed's hooks on every layer would make autograd add the
    # gradients within a block up in another order, and so round them otherwise.
    kinds = {type(block) for block in skeleton.blocks(base_model(module))}
    deepspeed.utils.set_z3_leaf_modules(base_model(module), sorted(kinds, key=str))
    cutter = deepspeed.zero.Init(config_dict_or_path=config, dtype=torch.float32)
    # DeepSpeed cuts a whole tensor; all take turns in one whose rest is never touched.
    largest = max(p.numel() for p in module.parameters())
    spaces: dict[torch.dtype, torch.Tensor] = {}
    done: dict[int, torch.nn.Parameter] = {}
    names = {id(p): n for n, p in module.named_parameters()}
    for owner in module.modules():
        for key, empty in list(owner.named_parameters(recurse=False)):
            if id(empty) not in done:
                dtype = _kept_dtype(empty, train)
                if dtype not in spaces:
                    spaces[dtype] = torch.empty(largest, dtype=dtype, device=world.device)
                whole = spaces[dtype][: empty.numel()].view(empty.shape)
                made = torch.nn.Parameter(whole, requires_grad=empty.requires_grad)
                cutter._convert_to_deepspeed_param(made)
                size = cutter._aligned_size(made) // world.world_size
                start = min(size * world.rank, empty.numel())
                stop = min(start + size, empty.numel())
                if stop > start:
                    value = read(names[id(empty)], empty.shape, start, stop)
                    if made.requires_grad and made.dtype != torch.float32:
                        made.exact_start = value  # until DeepSpeed's fp32 copy is there
                    made.data.view(-1)[start:stop] = value.to(made.device, made.dtype)
                made.partition()
                done[id(empty)] = made
            owner._parameters[key] = done[id(empty)]


def _kept_dtype(parameter: torch.nn.Parameter, train: TrainSpec) -> torch.dtype:
    """DeepSpeed keeps its own fp32 copy of what is trained, and gathers in the arithmetic's."""
    return DTYPES[train.precision] if parameter.requires_grad else parameter.dtype


def _deepspeed(world: World) -> Any:
    """DeepSpeed over the process group that is there."""
    if world.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    if world.device.type == "cpu":
        # Sums through shared memory: a compiler and a minute at first use, for nothing here.
        from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder

        deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    backend = "gloo" if world.device.type == "cpu" else "nccl"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    if deepspeed.comm.get_world_size() != world.world_size:
        raise RunError(
            f"DeepSpeed sees {deepspeed.comm.get_world_size()} processes, expected "
            f"{world.world_size}: the data would not be shared out. Look at launch.json"
        )
    return deepspeed


def ds_config(module: torch.nn.Module, train: TrainSpec, world: World) -> dict[str, Any]:
    """DeepSpeed's configuration of this training."""
    elements = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())
    zero: dict[str, Any] = {
        "stage": 3,
        "overlap_comm": world.device.type == "cuda",
        "contiguous_gradients": True,
        "memory_efficient_linear": False,  # another rounding than torch's own linear layer
        "stage3_param_persistence_threshold": int(
            min(PERSISTENT_ELEMENTS, elements * PERSISTENT_SHARE)
        ),
    }
    if train.cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "zero_optimization": zero,
        "bf16": {"enabled": train.precision is Precision.BF16},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": 0.0,  # the trainer clips
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def _adamw(
    parameters: dict[str, torch.nn.Parameter], train: TrainSpec, world: World
) -> torch.optim.AdamW:
    """As optim.make_optimizer; but a parameter that DeepSpeed has cut shows neither its size nor
    its dimensions."""
    shapes = {name: p.ds_shape for name, p in parameters.items()}
    matrices = [p for name, p in parameters.items() if len(shapes[name]) >= 2]
    vectors = [p for name, p in parameters.items() if len(shapes[name]) < 2]
    groups = [
        {"params": matrices, "weight_decay": train.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        fused=_fused(train, world),
    )


def _fused(train: TrainSpec, world: World) -> bool:
    return world.device.type == "cuda" and not train.cpu_offload


class Zero3:
    """A range of each flattened weight in each process; see parallel.Parallel."""

    def __init__(self, module: torch.nn.Module, train: TrainSpec, world: World):
        self.module, self.model, self.world = module, base_model(module), world
        self.accumulation = train.gradient_accumulation_steps
        self.fused = _fused(train, world)
        self.parameters = trainable(module)
        self.engine, *_ = _deepspeed(world).initialize(
            model=self.model,
            optimizer=_adamw(self.parameters, train, world),
            config=ds_config(module, train, world),
            dist_init_required=False,
        )
        self.forward = self.engine
        self.zero = self.engine.optimizer
        self.parts = [self._part(name, p) for name, p in self.parameters.items()]
        self._check_cut()
        for part, parameter in zip(self.parts, self.parameters.values(), strict=True):
            if hasattr(parameter, "exact_start"):
                part.value.copy_(parameter.exact_start)
                del parameter.exact_start

    def _flat(self, parameter: torch.nn.Parameter) -> tuple[torch.Tensor, int, int]:
        """(DeepSpeed's fp32 copy of a group of ranges, where this one starts in it, its size)"""
        group, offset, size = self.zero.grad_position[self.zero.get_param_id(parameter)]
        return self.zero.fp32_partitioned_groups_flat[group], int(offset), int(size)

    def _part(self, name: str, parameter: Any) -> Part:
        flat, offset, padded = self._flat(parameter)
        start = min(padded * self.world.rank, parameter.ds_numel)
        size = min(padded, parameter.ds_numel - start)
        value = flat.detach().narrow(0, offset, size)
        return Part(name, tuple(parameter.ds_shape), start, value, True)

    def _check_cut(self) -> None:
        whole = sum(p.ds_numel for p in self.parameters.values())
        (held,) = self.world.sum([float(sum(part.value.numel() for part in self.parts))])
        if held != whole:
            raise RunError(f"the processes hold {held:.0f} trained weights, expected {whole}")

    def backward(self, loss: torch.Tensor, index: int) -> None:
        self.engine.set_gradient_accumulation_boundary(index == self.accumulation - 1)
        self.engine.backward(loss, scale_wrt_gas=False)
        if index < self.accumulation - 1:
            self.engine.step()  # counts the micro batch, updates nothing

    def gradients(self) -> list[torch.Tensor]:
        found = []
        for part, parameter in zip(self.parts, self.parameters.values(), strict=True):
            gradient, _ = self.zero._get_fp32_grad_state_partition(parameter, False)
            found.append(gradient[: part.value.numel()])
        return found

    def step(self, rate: float) -> None:
        for group in self.zero.param_groups:
            group["lr"] = rate
        self.engine.step()

    def skip(self) -> None:
        # What DeepSpeed does after an overflow, without counting one; and the micro batch is over.
        self.zero._partition_all_parameters()
        self.zero._overflow_clean_up(prev_scale=1.0)
        self.engine.set_gradient_accumulation_boundary(False)
        self.engine.step()

    def rest(self) -> None:
        return

    def optimizer_state(self, part: Part) -> dict[str, Any]:
        flat, offset, _ = self._flat(self.parameters[part.name])
        state = self.zero.optimizer.state.get(flat, {})
        size = part.value.numel()
        return {k: v.narrow(0, offset, size) if v.ndim else v for k, v in state.items()}

    def load_optimizer_state(self, states: list[dict[str, Any]]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            flat, offset, _ = self._flat(self.parameters[part.name])
            held = self.zero.optimizer.state[flat]
            for key, value in state.items():
                if value.ndim == 0:  # fused AdamW counts its steps on the GPU
                    held[key] = value.to(flat.device if self.fused else "cpu", copy=True)
                    continue
                if key not in held:
                    held[key] = torch.zeros_like(flat, requires_grad=False)
                held[key].narrow(0, offset, part.value.numel()).copy_(value)

    def weights_changed(self) -> None:
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        kept = self.zero.persistent_parameters
        if kept:
            kept[0].partition(kept)
            kept[0].all_gather(kept)

    def whole(self) -> Iterator[tuple[str, torch.Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self.parameters.items():
            yield name, safe_get_full_fp32_param(parameter).detach().cpu().contiguous()
