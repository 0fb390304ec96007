"""How one training step is done over several processes, and which part of the weights is here.

Each strategy gives the trainer the same few things: a forward pass, a backward pass that leaves
the gradients added up over processes, and `Part`s: the piece of each trained parameter that this
process holds and updates. Optimizer, gradient norm and checkpoints work on parts alone.

Every strategy adds gradients up in the same order (over processes first, then over the micro
batches of a step), so that in fp32 they give the same numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ditty.config.choices import Precision, Sharding
from ditty.config.spec import TrainSpec
from ditty.distributed.optim import MakeOptimizer, make_optimizer, refuse_hidden_state
from ditty.distributed.sharded import first_element, is_cut
from ditty.distributed.world import World
from ditty.errors import RunError, SpecError
from ditty.models.model import base_model, trainable

BUCKET_ELEMENTS = 16 << 20
LOSS_SCALE_START = 65536.0
LOSS_SCALE_GROWTH_STEPS = 2000


@dataclass(frozen=True)
class Part:
    """A piece of a trained parameter: a range of the flattened whole.

    Attributes:
        name: the parameter's.
        shape: the whole parameter's.
        start: the first element that is here.
        value: fp32, what the optimizer updates.
        owned: this process stands for the piece where several hold the same.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    value: torch.Tensor
    owned: bool


class Parallel(Protocol):
    """One process's side of a strategy."""

    module: torch.nn.Module
    model: PreTrainedModel
    forward: torch.nn.Module
    parts: list[Part]

    def backward(self, loss: torch.Tensor, index: int) -> None:
        """Add micro batch `index`'s gradients, the mean over processes, to those of the step."""
        ...

    def gradients(self) -> list[torch.Tensor]:
        """The step's gradients, in the order of `parts`; may be changed in place."""
        ...

    def step(self, rate: float) -> None:
        """Update the weights with the gradients, and drop those."""
        ...

    def skip(self) -> None:
        """Drop the gradients."""
        ...

    def rest(self) -> None:
        """Called after forward passes without a backward: give gathered weights back."""
        ...

    def optimizer_state(self, part: Part) -> dict[str, Any]:
        """The optimizer's values for a part; tensors of the part's size belong to its elements."""
        ...

    def load_optimizer_state(self, states: list[dict[str, Any]]) -> None:
        """Put `optimizer_state` back, one for each part."""
        ...

    def weights_changed(self) -> None:
        """Called after the parts' values were overwritten."""
        ...

    def whole(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each trained parameter whole, on the CPU; all processes take part."""
        ...


def make_parallel(
    module: torch.nn.Module,
    train: TrainSpec,
    world: World,
    optimizer: MakeOptimizer = make_optimizer,
) -> Parallel:
    """The strategy by which `module` was made.

    Args:
        optimizer: see ditty.training.hooks.
    Raises:
        RunError: it is not the one that `train.sharding` asks for.
        SpecError: it takes no optimizer but its own.
    """
    from ditty.distributed.zero import Zero3, is_zero

    found: Parallel
    made: tuple[Sharding, ...]
    if is_zero(module):
        if optimizer is not make_optimizer:
            raise SpecError(
                "train.sharding: zero3 takes no optimizer of yours: DeepSpeed keeps its state in "
                "flat partitions: use train.sharding: fsdp2"
            )
        found, made = Zero3(module, train, world), (Sharding.ZERO3,)
    elif is_cut(module):
        found, made = (
            FullySharded(module, train, world, optimizer),
            (Sharding.FSDP2, Sharding.HYBRID),
        )
    else:
        found, made = Replicated(module, train, world, optimizer), (Sharding.NONE, Sharding.DDP)
    if train.sharding not in (Sharding.AUTO, *made):
        raise RunError(
            f"train.sharding is {train.sharding}, and the model was loaded for "
            f"{' or '.join(made)}: load it with ditty.distributed.load.load_module"
        )
    return found


class _WithOptimizer:
    """What the strategies share whose parts a torch optimizer updates."""

    module: torch.nn.Module
    parts: list[Part]
    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer

    def _make_optimizer(self, make: MakeOptimizer, train: TrainSpec) -> torch.optim.Optimizer:
        made = make(self.parameters, train)
        if make is make_optimizer:
            return made
        taken = [id(p) for group in made.param_groups for p in group["params"]]
        if sorted(taken) != sorted(map(id, self.parameters.values())):
            left = [name for name, p in self.parameters.items() if id(p) not in taken]
            raise SpecError(
                f"the optimizer {type(made).__name__} has {len(taken)} parameters, and "
                f"{len(self.parameters)} are trained (left out: {', '.join(left[:3]) or 'none'}): "
                "it must get all that it is given and no others. What is not to be trained: set "
                "requires_grad to False before"
            )
        return refuse_hidden_state(made)

    def gradients(self) -> list[torch.Tensor]:
        for parameter in self.parameters.values():
            if parameter.grad is None:  # not used in this batch
                parameter.grad = torch.zeros_like(parameter)
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def step(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.skip()

    def skip(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def rest(self) -> None:
        return

    def weights_changed(self) -> None:
        return

    def optimizer_state(self, part: Part) -> dict[str, Any]:
        return dict(self.optimizer.state.get(self.parameters[part.name], {}))

    def load_optimizer_state(self, states: list[dict[str, Any]]) -> None:
        by_name = {part.name: state for part, state in zip(self.parts, states, strict=True)}
        names = {id(p): name for name, p in self.parameters.items()}
        ordered = [p for group in self.optimizer.param_groups for p in group["params"]]
        numbered = {i: by_name[names[id(p)]] for i, p in enumerate(ordered)}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": numbered, "param_groups": groups})


class Replicated(_WithOptimizer):
    """Everything in each process; gradients are averaged over them after each backward pass.

    Not by torch's DistributedDataParallel: with gradients of small fp32 matrices (LoRA) it gave
    other bits from one run to the next on GPUs (torch 2.11: in some runs the parameter whose
    gradient came last). Nor does it know of micro batches before: it would average those once more.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        train: TrainSpec,
        world: World,
        optimizer: MakeOptimizer = make_optimizer,
    ):
        self.module, self.model, self.world = module, base_model(module), world
        self.forward: torch.nn.Module = self.model
        self.before: list[torch.Tensor] = []  # gradients of earlier micro batches of the step
        # In fp32, which is for exact comparisons, one process adds as two do: (a + b) + (c + d).
        self.in_pairs = train.precision is Precision.FP32
        self.parameters = trainable(module)
        self.parts = [
            Part(name, tuple(p.shape), 0, p, world.main) for name, p in self.parameters.items()
        ]
        self.optimizer = self._make_optimizer(optimizer, train)
        # All ranks have read the same files: sending the weights would only cost time.
        sums = world.gather([float(p.detach().double().sum()) for p in self.parameters.values()])
        assert sums.count(sums[0]) == len(sums), "ranks start from different weights"

    def backward(self, loss: torch.Tensor, index: int) -> None:
        several = self.world.world_size > 1
        if index and (several or (self.in_pairs and index % 2 == 0)):
            self.before = self.gradients()
            self.skip()
        loss.backward()
        if several:
            average(super().gradients(), self.world)

    def gradients(self) -> list[torch.Tensor]:
        found = super().gradients()
        if self.before:
            torch._foreach_add_(found, self.before)
            self.before = []
        return found

    def whole(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.parameters.items():
            yield name, parameter.detach().cpu().contiguous()


class FullySharded(_WithOptimizer):
    """Rows of each weight in each process (FSDP2); see ditty.distributed.sharded."""

    def __init__(
        self,
        module: torch.nn.Module,
        train: TrainSpec,
        world: World,
        optimizer: MakeOptimizer = make_optimizer,
    ):
        self.module, self.model, self.world = module, base_model(module), world
        self.forward = self.model  # calls on peft's wrapper would pass FSDP2's hooks by
        self.cut = trainable(module)
        self.parameters, self.parts = {}, []
        self._check_cut()
        for name, parameter in self.cut.items():
            assert isinstance(parameter, DTensor)
            local = torch.nn.Parameter(parameter._local_tensor.detach())
            self.parameters[name] = local
            mesh = parameter.device_mesh
            first_copy = mesh.ndim == 1 or mesh.get_local_rank(0) == 0
            start = first_element(parameter) if local.numel() else 0
            self.parts.append(Part(name, tuple(parameter.shape), start, local, first_copy))
        self.optimizer = self._make_optimizer(optimizer, train)

    def _check_cut(self) -> None:
        held = sum(p._local_tensor.numel() for p in self.cut.values())
        whole = sum(p.numel() for p in self.cut.values())
        mesh = next(iter(self.cut.values())).device_mesh
        copies = 1 if mesh.ndim == 1 else mesh.size(0)
        total = self.world.sum([float(held)])[0]
        if total != float(whole * copies):
            raise RunError(
                f"the processes hold {total:.0f} trained weights, expected {whole} x {copies}: "
                "the model was not cut as train.sharding says"
            )

    def backward(self, loss: torch.Tensor, index: int) -> None:
        loss.backward()

    def gradients(self) -> list[torch.Tensor]:
        for name, parameter in self.cut.items():
            if parameter.grad is not None:
                self.parameters[name].grad = parameter.grad._local_tensor
                parameter.grad = None
        return super().gradients()

    def skip(self) -> None:
        for local in self.parameters.values():
            local.grad = None

    def rest(self) -> None:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def whole(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.cut.items():
            assert isinstance(parameter, DTensor)
            # NCCL gathers on the GPU, also what is kept on the host.
            here = DTensor.from_local(
                parameter._local_tensor.detach().to(self.world.device),
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
            yield name, here.full_tensor().cpu().contiguous()


def average(tensors: list[torch.Tensor], world: World) -> None:
    """Replace each tensor by its mean over all processes, in messages of some megabytes."""
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in [*tensors, None]:
        if tensor is not None:
            bucket.append(tensor)
            size += tensor.numel()
        if bucket and (tensor is None or size >= BUCKET_ELEMENTS):
            flat = torch.cat([t.reshape(-1) for t in bucket])
            dist.all_reduce(flat)
            flat /= world.world_size
            parts = flat.split([t.numel() for t in bucket])
            torch._foreach_copy_(bucket, [f.view_as(t) for f, t in zip(parts, bucket, strict=True)])
            bucket, size = [], 0


@dataclass
class LossScale:
    """fp16's loss scale: halved after a step whose gradients overflow, doubled after 2,000 good.

    Source: torch.amp.GradScaler, whose constants these are. In bf16 and fp32 it stays 1.
    """

    scale: float = 1.0
    good_steps: int = 0
    adapts: bool = False

    @classmethod
    def of(cls, precision: Precision) -> "LossScale":
        """The scale to start with."""
        fp16 = precision is Precision.FP16
        return cls(LOSS_SCALE_START if fp16 else 1.0, adapts=fp16)

    def update(self, overflowed: bool) -> None:
        """Learn from a step.

        Raises:
            RunError: gradients overflow even unscaled.
        """
        if not self.adapts:
            return
        if overflowed:
            if self.scale <= 1.0:
                raise RunError(
                    "gradients are not finite in fp16 even at loss scale 1: use train.precision: "
                    "bf16, or lower train.learning_rate"
                )
            self.scale, self.good_steps = self.scale / 2, 0
            return
        self.good_steps += 1
        if self.good_steps == LOSS_SCALE_GROWTH_STEPS:
            self.scale, self.good_steps = self.scale * 2, 0


def squared_norm(parallel: Parallel) -> torch.Tensor:
    """The squared L2 norm of the step's gradients, as far as they are this process's; fp64 scalar.

    In fp64, so that it does not depend on how the gradients are cut: the factor made of it, rounded
    to fp32, is the same for every strategy.
    """
    owned = [
        gradient
        for part, gradient in zip(parallel.parts, parallel.gradients(), strict=True)
        if part.owned and gradient.numel()
    ]
    if not owned:
        return torch.zeros((), dtype=torch.float64)
    norms = torch._foreach_norm(owned, 2, dtype=torch.float64)
    return torch.stack(norms).square().sum()


def scale_gradients(parallel: Parallel, factor: torch.Tensor) -> None:
    """Multiply the step's gradients by `factor`, an fp32 scalar."""
    found = [g for g in parallel.gradients() if g.numel()]
    if found:
        torch._foreach_mul_(found, factor.to(found[0].device))


def whole_weights(parallel: Parallel, world: World) -> dict[str, torch.Tensor]:
    """The trained weights by name on rank 0, empty elsewhere; all processes take part."""
    found = {}
    for name, value in parallel.whole():
        if world.main:
            found[name] = value
    return found
